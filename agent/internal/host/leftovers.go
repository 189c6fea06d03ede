package host

import (
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

// sweep kills what a detector that has ended left in its group, be it in a
// session of its own; the process spare, if any, is the next. A runtime's
// processes outlive it in sessions of their own, and may be what keeps a
// container: those are spared, here and by package sdk/host, which has killed
// what was left in the plugin's session.
func (p *plugin) sweep(spare int) {
	if p.group == nil {
		return
	}
	kinds := p.status().Kinds
	if len(kinds) == 0 {
		kinds, _ = p.recall(p.files.sum)
	}
	if len(kinds) > 0 && !slices.ContainsFunc(kinds, func(k sdk.Kind) bool { return k != sdk.KindDevice }) {
		p.group.kill(spare)
	}
}

// kill ends everything in the group but one process.
func (g *group) kill(spare int) {
	for range 50 { // what is being forked is found the next time
		left := slices.DeleteFunc(g.processes(), func(pid int) bool { return pid == spare })
		if len(left) == 0 {
			return
		}
		if at := g.any(); spare != 0 || !at.v2 || at.write("cgroup.kill", "1") != nil { // since Linux 5.14
			for _, pid := range left {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// any is one of the group's directories: the same processes are in all.
func (g *group) any() controller {
	if g.units != nil {
		return g.slice
	}
	for _, c := range g.limited() {
		if c.at.dir != "" {
			return *c.at
		}
	}
	return controller{}
}

// processes lists what is in the group and in those below it.
func (g *group) processes() (pids []int) {
	at := g.any()
	if at.dir == "" {
		return nil
	}
	_ = filepath.WalkDir(at.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		b, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for word := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// outlive lists the files by which a process leaves the group for the agent's
// own.
func (g *group) outlive() []string {
	mine, err := groupsOf(os.Getpid())
	if err != nil {
		return nil
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var files []string
	for _, m := range cgroupMounts(string(mounts)) {
		path, in := "", false
		for _, c := range m.controllers {
			if path, in = mine[c]; in {
				break
			}
		}
		// systemd keeps a process in the same group of every hierarchy.
		ours := g.units != nil || slices.ContainsFunc(g.limited(), func(c namedController) bool {
			return c.at.dir != "" && strings.HasPrefix(c.at.dir, m.mount+"/")
		})
		if !in || !ours {
			continue
		}
		rel, below := strings.CutPrefix(path, strings.TrimSuffix(m.root, "/"))
		file := filepath.Join(m.mount, rel, "cgroup.procs")
		if _, err := os.Stat(file); err != nil || !below {
			file = filepath.Join(m.mount, "cgroup.procs")
		}
		files = append(files, file)
	}
	return files
}

// cgroupMount is one mounted hierarchy.
type cgroupMount struct {
	root, mount string
	controllers []string // as /proc/PID/cgroup names them: "" is version 2
}

func cgroupMounts(mountinfo string) (found []cgroupMount) {
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 3 {
			continue
		}
		m := cgroupMount{root: f[3], mount: unescapeMount(f[4])}
		switch g[0] {
		case "cgroup2":
			m.controllers = []string{""}
		case "cgroup":
			m.controllers = strings.Split(g[2], ",")
		default:
			continue
		}
		// The first one counts: others are the same, seen from elsewhere.
		if !slices.ContainsFunc(found, func(o cgroupMount) bool { return slices.Equal(o.controllers, m.controllers) }) {
			found = append(found, m)
		}
	}
	return found
}

func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(s)
}

// lacksOf says what this device cannot give to any plugin of these kinds.
func lacksOf(kinds []sdk.Kind) (lacks []string) {
	if why := noPidfd(unix.PidfdOpen); why != "" {
		lacks = append(lacks, why)
	}
	if slices.Contains(kinds, sdk.KindRuntime) {
		mine, err := os.Readlink("/proc/self/ns/mnt")
		first, err1 := os.Readlink("/proc/1/ns/mnt")
		if err == nil && err1 == nil && mine != first {
			lacks = append(lacks, "the host's mounts: the agent is in a mount namespace of its own, so mounts that the plugin makes, of container networks for instance, "+
				"stay invisible to the host; drop Protect..., Private... and the like from the agent's unit")
		}
	}
	return lacks
}

// noPidfd says why a plugin's process can only be told by its number.
func noPidfd(open func(pid, flags int) (int, error)) string {
	fd, err := open(os.Getpid(), 0)
	if err == nil {
		_ = unix.Close(fd)
		return ""
	}
	return "process handles (pidfd, Linux 5.3): " + err.Error() + " on " + kernel() + ": a signal for the plugin could reach another process that has got its number"
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return goruntime.GOOS
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

// cut bounds what is told of a plugin.
func cut(s string) string {
	if len(s) <= sdk.MaxReason {
		return s
	}
	return strings.ToValidUTF8(s[:sdk.MaxReason], "") + "..."
}
