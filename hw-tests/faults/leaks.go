package faults

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// leaks waits until the device holds nothing that belongs to none of the given
// tasks: containers, snapshots, mounts, network namespaces, links, addresses,
// firewall rules, cgroups, processes, files of the agent's.
func (s *site) leaks(mine []*subject) error {
	return until(bound, "the device to hold nothing that belongs to nobody", func() error {
		var found []string
		of := func(text string) bool {
			return slices.ContainsFunc(mine, func(sub *subject) bool { return strings.Contains(text, sub.id) })
		}
		note := func(what string, lines []string) {
			for _, l := range lines {
				if l = strings.TrimSpace(l); l != "" && !of(l) {
					found = append(found, what+": "+l)
				}
			}
		}
		containers, err1 := s.ctr("containers", "ls", "-q")
		tasks, err2 := s.ctr("tasks", "ls", "-q")
		snapshots, err3 := s.ctr("snapshots", "ls")
		if err := errors.Join(err1, err2, err3); err != nil {
			return err
		}
		note("container", containers)
		note("containerd's task", tasks)
		// What an interrupted pull had begun to unpack is kept by containerd's
		// lease for a day.
		note("snapshot", slices.DeleteFunc(snapshots, func(l string) bool {
			return !strings.Contains(l, "Active") && !strings.Contains(l, "View") || strings.HasPrefix(l, "extract-")
		}))
		mounts, err := s.device.mounts()
		if err != nil {
			return err
		}
		note("mount", slices.DeleteFunc(mounts, func(at string) bool { return s.device.atBoot[at] }))
		netns, _ := filepath.Glob(s.device.root("/run/belay/plugins/containerd/netns/*"))
		note("network namespace", netns)
		note("address", addresses(s.device.root("/run/belay-cni")))
		rules, err := s.device.inside("iptables-save", "-t", "nat").Output()
		if err != nil {
			return fmt.Errorf("iptables-save: %w", err)
		}
		for line := range strings.Lines(string(rules)) {
			if strings.Contains(line, "CNI-DN-") || strings.Contains(line, "CNI-SN-") {
				note("firewall rule", []string{line})
			}
		}
		groups, err := s.groups()
		if err != nil {
			return err
		}
		note("cgroup", groups)
		note("process", s.processes())
		saved, _ := filepath.Glob(filepath.Join(s.state(), "tasks", "*"))
		note("state", saved)
		outputs, _ := filepath.Glob(filepath.Join(s.state(), "outputs", "*"))
		note("output", outputs)
		volumes, _ := filepath.Glob(filepath.Join(s.state(), "volumes", "*"))
		note("volume", volumes)
		prepared, _ := filepath.Glob(filepath.Join(s.state(), "plugins", "*", "tasks", "*"))
		note("plugin's state", prepared)
		if veths, want := s.veths(), s.bridged(mine); len(veths) > want {
			found = append(found, fmt.Sprintf("%d links to containers, of which there are %d:\n    %s", len(veths), want,
				strings.Join(append(veths, s.netHolders()...), "\n    ")))
		}
		if len(found) > 0 {
			return errors.New("left behind:\n  " + strings.Join(found, "\n  "))
		}
		return nil
	})
}

// addresses are what CNI's host-local has given to whom.
func addresses(dir string) (found []string) {
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return nil
		}
		if _, err := netip.ParseAddr(e.Name()); err == nil {
			owner, _ := os.ReadFile(path)
			found = append(found, e.Name()+" of "+strings.Join(strings.Fields(string(owner)), " "))
		}
		return nil
	})
	return found
}

// groups are the cgroups of tasks: those whose path names one.
func (s *site) groups() (found []string, err error) {
	mounts, err := controllers()
	if err != nil {
		return nil, err
	}
	for mount := range mounts {
		for _, dir := range subdirectories(filepath.Join(mount, s.device.group)) {
			if taskOf(dir) != "" {
				found = append(found, dir)
			}
		}
	}
	return found, nil
}

// taskOf finds a task id in a path.
func taskOf(path string) string {
	for _, part := range strings.FieldsFunc(path, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef", r) }) {
		if len(part) == 32 {
			return part
		}
	}
	return ""
}

// processes are those on the device that are there for a container, and those
// that nobody knows.
func (s *site) processes() (found []string) {
	deviceNS, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", s.device.pid.Load()))
	if err != nil {
		return nil
	}
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		dir := filepath.Dir(e)
		ns, err := os.Readlink(filepath.Join(dir, "ns/pid"))
		if err != nil || filepath.Base(dir) == strconv.FormatInt(s.device.pid.Load(), 10) {
			continue
		}
		b, _ := os.ReadFile(e)
		line := strings.Join(strings.Split(strings.TrimRight(string(b), "\x00"), "\x00"), " ")
		switch {
		case line == "":
		case ns != deviceNS && strings.Contains(line, mainMark):
			environ, _ := os.ReadFile(filepath.Join(dir, "environ"))
			found = append(found, taskOf(string(environ))+" "+line[:min(len(line), 60)])
		case ns != deviceNS:
		case strings.Contains(line, "containerd-shim"), strings.Contains(line, "belay-supervise"):
			environ, _ := os.ReadFile(filepath.Join(dir, "environ"))
			found = append(found, filepath.Base(dir)+" "+line+" "+taskOf(string(environ)))
		}
	}
	return found
}

// veths are the links of the device's bridge.
func (s *site) veths() (links []string) {
	out, err := s.device.inside("ip", "-o", "link", "show", "type", "veth").Output()
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(out)) {
		links = append(links, strings.TrimSpace(line))
	}
	return links
}

// netHolders are the processes that are in another network namespace than the
// device's: for a person to find who keeps one.
func (s *site) netHolders() (found []string) {
	own, _ := os.Readlink(s.device.netns())
	harness, _ := os.Readlink("/proc/self/ns/net")
	entries, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, e := range entries {
		ns, err := os.Readlink(e)
		if err != nil || ns == own || ns == harness {
			continue
		}
		dir := filepath.Dir(filepath.Dir(e))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		environ, _ := os.ReadFile(filepath.Join(dir, "environ"))
		text := strings.ReplaceAll(string(line), "\x00", " ")
		found = append(found, fmt.Sprintf("%s in %s: task %s: %s", filepath.Base(dir), ns, taskOf(string(environ)), text[:min(len(text), 40)]))
	}
	return found
}

func (s *site) bridged(mine []*subject) (n int) {
	for _, sub := range mine {
		if sub.runtime() == "containerd" {
			n++
		}
	}
	return n
}

// counts are the file descriptors of a process by what they are, and its
// threads.
type counts map[string]int

func countsOf(pid int) counts {
	c := counts{}
	dir := fmt.Sprintf("/proc/%d", pid)
	fds, _ := filepath.Glob(filepath.Join(dir, "fd", "*"))
	for _, f := range fds {
		to, err := os.Readlink(f)
		if err != nil {
			continue
		}
		sort, _, special := strings.Cut(to, ":")
		if !special {
			sort = "file"
		}
		c[sort]++
	}
	tasks, _ := os.ReadDir(filepath.Join(dir, "task"))
	c["thread"] = len(tasks)
	return c
}

// grown says what a process has much more of than at the beginning. Threads are
// as many as ever blocked at the same time, so they may be more.
func grown(name string, before, after counts) (found []string) {
	for what, n := range after {
		most := before[what] + 3
		if what == "thread" {
			most = before[what] + 12
		}
		if n > most {
			found = append(found, fmt.Sprintf("%s has %d of %s, and had %d", name, n, what, before[what]))
		}
	}
	return found
}

// measure counts what the processes of Belay have open.
func (s *site) measure() (map[string]counts, error) {
	all := map[string]counts{"control": countsOf(s.control.PID())}
	agent, err := s.pid("agent")
	if err != nil {
		return nil, err
	}
	all["agent"] = countsOf(agent)
	for _, p := range []string{"containerd", "process"} {
		pid, err := s.plugin(p)
		if err != nil {
			return nil, err
		}
		all["plugin "+p] = countsOf(pid)
	}
	return all, nil
}

// goroutines makes a process of Go tell of its goroutines, which ends it, and
// counts them by where they were made.
func goroutines(log string, from int64, end func() error) (map[string]int, error) {
	if err := end(); err != nil {
		return nil, err
	}
	var text string
	if err := until(10*time.Second, "the goroutines to be told", func() error {
		b, err := os.ReadFile(log)
		if err != nil {
			return err
		}
		text = string(b[min(from, int64(len(b))):])
		if !strings.Contains(text, "SIGQUIT") {
			return errors.New("nothing of SIGQUIT in " + log)
		}
		return nil
	}); err != nil {
		return nil, err
	}
	made := map[string]int{}
	for g := range strings.SplitSeq(text, "\n\ngoroutine ") {
		by := "main"
		if _, after, ok := strings.Cut(g, "\ncreated by "); ok {
			by, _, _ = strings.Cut(after, "\n")
			by, _, _ = strings.Cut(by, " in goroutine")
		}
		made[by]++
	}
	return made, nil
}

// moreGoroutines says of which there are many more than at the beginning.
func moreGoroutines(name string, before, after map[string]int) (found []string) {
	for by, n := range after {
		if n > before[by]+3 {
			found = append(found, fmt.Sprintf("%s has %d goroutines made by %s, and had %d", name, n, by, before[by]))
		}
	}
	slices.Sort(found)
	return found
}
