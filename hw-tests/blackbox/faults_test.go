package blackbox

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// plugged is a plugin in `belay-agent plugins -o json`.
type plugged struct {
	Name, Version, State, Checksum, LastError, LastDown string
	Kinds                                               []string
	PID, Restarts                                       int
	MemoryBytes, MemoryMaxBytes                         uint64
	ProtectionsMissing                                  []string
}

// faultySite is a device with healthy plugins and those of the faults, which
// are links to one program that misbehaves as it is called.
func faultySite(t *testing.T, faults ...string) *site {
	t.Helper()
	plugins := tempDir(t)
	if err := os.Chmod(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(tempDir(t), "faulty")
	if out, err := exec.Command("go", "build", "-o", program, "./testdata/faulty").CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, out)
	}
	links := map[string]string{"process": bin(t).Path("belay-plugins"), "rt-good": program, "dev-good": program}
	for _, f := range faults {
		links[f] = program
	}
	for name, to := range links {
		to, err := filepath.Abs(to)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(plugins, name)); err != nil {
			t.Fatal(err)
		}
	}
	s := &site{Control: newControl(t), runtime: "process", dir: tempDir(t)}
	s.cli = s.Control.CLI()
	s.agent = newDevice(t, s.cli, s.dir, func(a *rig.Agent) {
		a.PluginDir = plugins
		a.Extra = []string{"--transport", "tcp"} // its bytes can be counted
	})
	ids, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process", "rt-good", "dev-good")
	if err != nil {
		t.Fatal(err)
	}
	s.instance = ids[0]
	t.Cleanup(func() { s.sweep(t) })
	return s
}

// plugins asks the agent.
func (s *site) plugins(t testing.TB) (map[string]plugged, error) {
	t.Helper()
	out, err := exec.CommandContext(deadline(t, patience), s.agent.Bin.Path("belay-agent"), "plugins", "--run-dir", s.agent.RunDir, "-o", "json").Output()
	if err != nil {
		return nil, fmt.Errorf("belay-agent plugins: %w", err)
	}
	var l struct{ Plugins []plugged }
	if err := json.Unmarshal(out, &l); err != nil {
		return nil, fmt.Errorf("belay-agent plugins: %w\n%s", err, out)
	}
	by := map[string]plugged{}
	for _, p := range l.Plugins {
		by[p.Name] = p
	}
	return by, nil
}

// plugin waits until the agent says of a plugin what it should.
func (s *site) plugin(t testing.TB, name, what string, within time.Duration, ok func(plugged) bool) plugged {
	t.Helper()
	var p plugged
	if err := rig.Until(deadline(t, within), s.agent.Process, name+" to be "+what, func() error {
		all, err := s.plugins(t)
		if err != nil {
			return err
		}
		if p = all[name]; !ok(p) {
			return fmt.Errorf("it is %+v", p)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	return p
}

func ready(p plugged) bool { return p.State == "ready" && p.PID > 0 }

// heal ends a fault that goes on until then.
func (s *site) heal(t testing.TB, plugin string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.agent.RunDir, "plugins", plugin, "healed"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// hangNoticed is two pings of 10 s without an answer, sent 10 s apart, and a
// machine that is busy.
const hangNoticed = 90 * time.Second

// Whatever plugins of either kind do, all at the same time: the agent, the
// other plugins and the tasks go on, one can see what happened, and all comes
// back by itself.
func TestFaultyPlugins(t *testing.T) {
	kinds := []string{"rt", "dev"}
	var faults []string
	for _, f := range []string{"kill", "stop", "hog", "stderr", "stdout", "socket", "line", "endless", "nonsense", "slow", "loop", "leaves"} {
		for _, k := range kinds {
			faults = append(faults, k+"-"+f)
		}
	}
	s := faultySite(t, faults...)
	task := s.run(t, "bystander", container{"name": "c", "script": waitScript(s.dir, "bystander"),
		"belay": map[string]any{"devices": []any{map[string]any{"kind": "faulty", "where": "attribute:vendor == acme"}}}})
	innocent := map[string]plugged{}
	for _, name := range []string{"process", "rt-good", "dev-good"} {
		innocent[name] = s.plugin(t, name, "ready", patience, ready)
	}
	agent := s.agent.PID()
	t.Logf("the agent has %d KiB", rss(t, agent))

	var later []func() // what takes its time
	for _, k := range kinds {
		// These wait for their signal.
		killed := s.plugin(t, k+"-kill", "ready", patience, ready)
		hung := s.plugin(t, k+"-stop", "ready", patience, ready)
		left := s.plugin(t, k+"-leaves", "ready", patience, ready)
		children := leftBehind(t, s, k+"-leaves")
		for pid, sig := range map[int]syscall.Signal{killed.PID: syscall.SIGKILL, hung.PID: syscall.SIGSTOP, left.PID: syscall.SIGKILL} {
			if err := syscall.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
		}
		t.Run(k+"-kill", func(t *testing.T) {
			p := s.plugin(t, k+"-kill", "up again", patience, func(p plugged) bool { return ready(p) && p.PID != killed.PID })
			if p.Restarts != 1 || !strings.Contains(p.LastDown, "killed by signal 9") {
				t.Errorf("it is %+v", p)
			}
		})
		t.Run(k+"-leaves", func(t *testing.T) {
			p := s.plugin(t, k+"-leaves", "up again", patience, func(p plugged) bool { return ready(p) && p.PID != left.PID })
			if p.Restarts != 1 {
				t.Errorf("it is %+v", p)
			}
			// What a runtime puts into a session of its own may be a container's.
			for which, pids := range children {
				spared := which == "true" && k == "rt"
				for _, pid := range pids {
					if spared {
						t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
					}
					if lives := alive(pid) && !zombie(pid); lives != spared && (os.Geteuid() == 0 || which == "false") {
						t.Errorf("child %d (session of its own: %s) lives: %t, want %t", pid, which, lives, spared)
					}
				}
			}
		})
		later = append(later, func() {
			t.Run(k+"-stop", func(t *testing.T) {
				p := s.plugin(t, k+"-stop", "killed and up again", hangNoticed, func(p plugged) bool { return ready(p) && p.PID != hung.PID })
				if p.Restarts != 1 || !strings.Contains(p.LastDown, "it hangs") {
					t.Errorf("it is %+v", p)
				}
			})
		})
	}
	talks := map[string]plugged{}
	for _, k := range kinds {
		name := k + "-nonsense"
		p := s.plugin(t, name, "reported", patience, func(p plugged) bool { return ready(p) && strings.Contains(p.LastError, "defect of the plugin") })
		if len(p.LastError) > 8<<10 {
			t.Errorf("an error of %d bytes", len(p.LastError))
		}
		talks[name] = p
		s.heal(t, name)
	}
	for _, k := range kinds {
		t.Run(k+"-hog", func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("limits take root")
			}
			p := s.plugin(t, k+"-hog", "killed and up again", patience, func(p plugged) bool { return ready(p) && p.Restarts > 0 })
			if len(p.ProtectionsMissing) > 0 && p.MemoryMaxBytes == 0 {
				t.Skipf("no limits here: %s", p.ProtectionsMissing)
			}
			if want := map[string]uint64{"rt": 256 << 20, "dev": 64 << 20}[k]; p.MemoryMaxBytes != want || !strings.Contains(p.LastDown, "out of memory") {
				t.Errorf("it is %+v, want a limit of %d", p, want)
			}
		})
		for _, f := range []string{"stderr", "stdout", "slow"} {
			t.Run(k+"-"+f, func(t *testing.T) {
				if p := s.plugin(t, k+"-"+f, "ready", patience, ready); p.Restarts != 0 {
					t.Errorf("it was relaunched: %+v", p)
				}
			})
		}
		t.Run(k+"-socket", func(t *testing.T) {
			if p := s.plugin(t, k+"-socket", "up again", patience, func(p plugged) bool { return ready(p) && p.Restarts > 0 }); !strings.Contains(p.LastDown, "not the plugin protocol") {
				t.Errorf("it is %+v", p)
			}
		})
		for _, f := range []string{"line", "endless"} {
			t.Run(k+"-"+f, func(t *testing.T) {
				// A program that is no plugin is tried again when its file
				// changes, and seldom otherwise.
				name := k + "-" + f
				p := s.plugin(t, name, "refused", patience, func(p plugged) bool { return p.State == "failed" })
				if !strings.Contains(p.LastError, "is not a plugin's") || len(p.LastError) > 1024 {
					t.Errorf("it is %+v", p)
				}
				touch(t, filepath.Join(s.agent.PluginDir, name))
				s.plugin(t, name, "up", patience, ready)
			})
		}
		t.Run(k+"-loop", func(t *testing.T) {
			p := s.plugin(t, k+"-loop", "quarantined", patience, func(p plugged) bool { return p.State == "quarantined" })
			if p.Restarts < 4 || !strings.Contains(p.LastError, "exit status 5") || !strings.Contains(p.LastError, "again and again") {
				t.Errorf("it is %+v", p)
			}
		})
	}
	for name, was := range talks {
		t.Run(name, func(t *testing.T) {
			if now := s.plugin(t, name, "healed", patience, func(p plugged) bool { return ready(p) && p.LastError == "" }); now.Restarts != 0 || now.PID != was.PID {
				t.Errorf("it was relaunched: %+v", now)
			}
		})
	}
	for _, f := range later {
		f()
	}
	// What the agent says now, the control plane says too.
	t.Run("seen from the control plane", func(t *testing.T) {
		if err := rig.Until(deadline(t, patience), nil, "the control plane to know", func() error {
			here, err := s.plugins(t)
			if err != nil {
				return err
			}
			var there []struct {
				Name, State, Checksum, LastError string
				Restarts                         int
			}
			if err := s.cli.JSON(deadline(t, patience), &struct{ Plugins any }{&there}, "plugin", "list", "--instance", s.instance); err != nil {
				return err
			}
			for _, p := range there {
				h := here[p.Name]
				if p.State != h.State || p.Restarts != h.Restarts || p.Checksum != h.Checksum || !strings.Contains(p.LastError, h.LastError) ||
					h.LastError == "" && !strings.Contains(p.LastError, h.LastDown) {
					return fmt.Errorf("here %+v, there %+v", h, p)
				}
			}
			if len(there) != len(here) {
				return fmt.Errorf("here %d, there %d", len(here), len(there))
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	t.Run("the others", func(t *testing.T) {
		if s.agent.PID() != agent || !alive(agent) {
			t.Errorf("the agent was %d and is %d", agent, s.agent.PID())
		}
		for name, was := range innocent {
			if now := s.plugin(t, name, "ready", patience, ready); now.PID != was.PID || now.Restarts != 0 {
				t.Errorf("%s was disturbed: %+v, was %+v", name, now, was)
			}
		}
		was := task.Container("c")
		now := s.await(t, task.ID, "the task to run", patience, running).Container("c")
		if now.PID != was.PID || now.Attempt != 1 || !alive(now.PID) || starts(t, s.dir, "bystander") != 1 {
			t.Errorf("the task is %+v, was %+v", now, was)
		}
		kib := rss(t, agent)
		t.Logf("the agent has %d KiB", kib)
		if kib > 128<<10 {
			t.Errorf("the agent has grown to %d KiB", kib)
		}
	})
}

// touch makes a plugin's file another one: a link made anew.
func touch(t *testing.T, path string) {
	t.Helper()
	to, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	// A copy: the same content in another file.
	b, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+"~", b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+"~", path); err != nil {
		t.Fatal(err)
	}
}

// leftBehind are the children a plugin has started, by whether they are in a
// session of their own.
func leftBehind(t *testing.T, s *site, plugin string) map[string][]int {
	t.Helper()
	children := map[string][]int{}
	for _, own := range []string{"true", "false"} {
		if err := rig.Until(deadline(t, patience), nil, "the children of "+plugin, func() error {
			b, err := os.ReadFile(filepath.Join(s.agent.RunDir, "plugins", plugin, "left-"+own))
			if err != nil {
				return err
			}
			children[own] = nil
			for _, word := range strings.Fields(string(b)) {
				pid, err := strconv.Atoi(word)
				if err != nil {
					return err
				}
				children[own] = append(children[own], pid)
			}
			if len(children[own]) != 2 || slices.ContainsFunc(children[own], func(pid int) bool { return !alive(pid) }) {
				return fmt.Errorf("they are %q", b)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return children
}

// rss is what a process has in memory, in KiB.
func rss(t testing.TB, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			n, _ := strconv.Atoi(f[1])
			return n
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// What tasks take is theirs: it neither counts against their plugin's limit
// nor ends with the plugin, and what keeps them is not in the plugin's group.
func TestTasksDoNotCountAsTheirPlugin(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("limits take root")
	}
	s := &site{Control: newControl(t), runtime: "process", dir: tempDir(t)}
	s.cli = s.Control.CLI()
	s.agent = newDevice(t, s.cli, s.dir, func(a *rig.Agent) {
		a.Config = filepath.Join(s.dir, "agent.toml")
		if err := os.WriteFile(a.Config, []byte("[plugins.process.belay]\nmemory_max = \"40MiB\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	ids, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process")
	if err != nil {
		t.Fatal(err)
	}
	s.instance = ids[0]
	t.Cleanup(func() { s.sweep(t) })
	p := s.plugin(t, "process", "ready", patience, func(p plugged) bool { return ready(p) && p.MemoryMaxBytes > 0 })
	if len(p.ProtectionsMissing) > 0 {
		t.Skipf("no limits here: %q", p.ProtectionsMissing)
	}
	held := filepath.Join(s.dir, "held")
	task := s.run(t, "large", container{"name": "c", "script": `awk 'BEGIN{s="0123456789abcdef"; while(length(s)<6e7) s=s s; system("touch ` + held + `; exec sleep 1000"); print length(s)}'`})
	if err := rig.Until(deadline(t, patience), nil, "the task to hold memory", func() error { _, err := os.Stat(held); return err }); err != nil {
		t.Fatal(err)
	}
	pid := task.Container("c").PID
	if kib := rss(t, pid) + childrenRSS(t, pid); kib < 50<<10 {
		t.Errorf("the task holds %d KiB, too little to show anything", kib)
	}
	theirs, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	groups := map[string]bool{}
	for line := range strings.Lines(string(theirs)) {
		if strings.Contains(line, "/plugins") || strings.Contains(line, ".scope") {
			groups[line] = true
		}
	}
	if len(groups) == 0 {
		t.Fatalf("the plugin is in no group of its own:\n%s", theirs)
	}
	for what, pid := range map[string]int{"the program": pid, "what keeps it": parentOf(t, pid)} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if groups[line] {
				t.Errorf("%s is in the plugin's group %s", what, line)
			}
		}
	}
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again := s.plugin(t, "process", "up again", patience, func(now plugged) bool { return ready(now) && now.PID != p.PID })
	if again.Restarts != 1 || strings.Contains(again.LastDown, "out of memory") {
		t.Errorf("it is %+v", again)
	}
	if now := s.await(t, task.ID, "the task to run", patience, running).Container("c"); now.PID != pid || now.Attempt != 1 || !alive(pid) {
		t.Errorf("the task is %+v, was %d", now, pid)
	}
}

func parentOf(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	parent, _ := strconv.Atoi(strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[1])
	return parent
}

// childrenRSS is what a process's children have in memory, in KiB.
func childrenRSS(t *testing.T, pid int) (sum int) {
	t.Helper()
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	for _, word := range strings.Fields(string(b)) {
		if child, err := strconv.Atoi(word); err == nil {
			sum += rss(t, child) + childrenRSS(t, child)
		}
	}
	return sum
}
