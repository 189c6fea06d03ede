package blackbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// device is one of `belay instance describe -o json`.
type device struct {
	Plugin, ID, Kind, Health, Reason string
	Ready                            bool
	Shares                           int
	UsedBy                           []struct{ Task, Container string }
}

func (d device) users() (tasks []string) {
	for _, u := range d.UsedBy {
		tasks = append(tasks, u.Task)
	}
	return tasks
}

// twins is a site with a device plugin that has two devices, "a" and "b".
type twins struct {
	*site
	devices string // directory of the plugin's
	nodes   map[string]uint32
}

// miscNodes are two device numbers that open without doing anything and that
// no container may open unless it is given them.
func miscNodes(t *testing.T) map[string]uint32 {
	nodes := map[string]uint32{}
	for _, minor := range []uint32{237 /* loop-control */, 229 /* fuse */, 235 /* autofs */, 196 /* vfio */, 183 /* hwrng */} {
		path := filepath.Join(t.TempDir(), "node")
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(10, minor))); err != nil {
			t.Skipf("device nodes cannot be made here: %v", err)
		}
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		f.Close()
		nodes[string(rune('a'+len(nodes)))] = minor
		if len(nodes) == 2 {
			return nodes
		}
	}
	t.Skip("this kernel has no two harmless devices to give away")
	return nil
}

func newTwins(t *testing.T, runtime string) *twins { return newTwinsBy(t, runtime, false) }

// newTwinsBy gives the devices by a CDI specification, or as nodes.
func newTwinsBy(t *testing.T, runtime string, cdi bool) *twins {
	t.Helper()
	w := &twins{devices: tempDir(t)}
	if runtime != "process" {
		w.nodes = miscNodes(t)
	}
	for _, id := range []string{"a", "b"} {
		w.plug(t, id, "")
		if w.nodes == nil {
			continue
		}
		if err := unix.Mknod(filepath.Join(w.devices, id+".node"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, w.nodes[id]))); err != nil {
			t.Fatal(err)
		}
	}
	plugins := tempDir(t)
	if err := os.Chmod(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "build", "-o", filepath.Join(plugins, "twin"), "./testdata/twin").CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, out)
	}
	real, err := filepath.Abs(bin(t).Path("belay-plugins"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, filepath.Join(plugins, runtime)); err != nil {
		t.Fatal(err)
	}
	s := &site{Control: newControl(t), runtime: runtime, dir: tempDir(t)}
	w.site = s
	s.cli = s.Control.CLI()
	s.agent = newDevice(t, s.cli, s.dir, func(a *rig.Agent) {
		a.Config = filepath.Join(s.dir, "agent.toml")
		s.prepare(t, a)
		text, _ := os.ReadFile(a.Config)
		if cdi { // the runtime's table is the last
			text = append(text, fmt.Sprintf("cdi_spec_dirs = [%q]\n", w.devices)...)
		}
		text = append(text, fmt.Sprintf("[plugins.twin]\ndir = %q\nnodes = %t\ncdi = %t\n", w.devices, w.nodes != nil, cdi)...)
		if err := os.WriteFile(a.Config, text, 0o600); err != nil {
			t.Fatal(err)
		}
		a.PluginDir = plugins
	})
	ids, err := s.cli.Connected(deadline(t, patience), cluster, 1, runtime, "twin")
	if err != nil {
		t.Fatal(err)
	}
	s.instance = ids[0]
	t.Cleanup(func() { s.sweep(t) })
	w.sees(t, "both devices to be ready", func(ds map[string]device) bool { return len(ds) == 2 && ds["a"].Ready && ds["b"].Ready })
	return w
}

// plug makes a device be there, ready unless there is a reason not to be.
func (w *twins) plug(t *testing.T, id, reason string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.devices, id+".device"), []byte(reason), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (w *twins) unplug(t *testing.T, id string) {
	t.Helper()
	if err := os.Remove(filepath.Join(w.devices, id+".device")); err != nil {
		t.Fatal(err)
	}
}

// sees waits until the instance's devices are as they should be.
func (w *twins) sees(t *testing.T, what string, ok func(map[string]device) bool) map[string]device {
	t.Helper()
	by := map[string]device{}
	if err := rig.Until(deadline(t, patience), nil, what, func() error {
		var i struct{ Devices []device }
		if err := w.cli.JSON(deadline(t, patience), &i, "instance", "describe", w.instance); err != nil {
			return err
		}
		clear(by)
		for _, d := range i.Devices {
			by[d.ID] = d
		}
		if !ok(by) {
			return fmt.Errorf("devices are %+v", i.Devices)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return by
}

// wanting is a container that asks for a device, says which one it got, opens
// it where there are nodes, tries the other, and runs until it is stopped.
func (w *twins) wanting(name, where string) container {
	out := filepath.Join(w.dir, name)
	script := fmt.Sprintf("echo got $TWIN >> %s; ", out)
	if w.nodes != nil {
		script += fmt.Sprintf(`: <> /dev/twin-$TWIN && echo opens >> %[1]s
ls /dev | grep twin- | sed 's/^/sees /' >> %[1]s
`, out)
		for id, minor := range w.nodes {
			script += fmt.Sprintf(`if [ $TWIN != %[2]s ]; then mknod /other c 10 %[3]d && if (: < /other) 2>/dev/null; then echo opens the other >> %[1]s; else echo kept from the other >> %[1]s; fi; fi
`, out, id, minor)
		}
	}
	script += fmt.Sprintf("echo ready >> %s; trap 'exit 0' TERM; while :; do sleep 0.1; done", out)
	return container{"name": "c", "script": script, "stopTimeout": 2,
		"belay": map[string]any{"devices": []any{map[string]any{"kind": "twin", "where": where}}}}
}

// got waits until a wanting container has said what it got and saw.
func (w *twins) got(t *testing.T, name string) string {
	t.Helper()
	var text string
	if err := rig.Until(deadline(t, patience), nil, name+" to say what it got", func() error {
		b, err := os.ReadFile(filepath.Join(w.dir, name))
		if text = string(b); err != nil || !strings.HasSuffix(text, "ready\n") {
			return fmt.Errorf("it says %q, %v", text, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	id := strings.TrimPrefix(strings.SplitN(text, "\n", 2)[0], "got ")
	want := "got " + id + "\nready\n"
	if w.nodes != nil {
		want = "got " + id + "\nopens\nsees twin-" + id + "\nkept from the other\nready\n"
	}
	if text != want {
		t.Errorf("%s says %q, want %q", name, text, want)
	}
	return id
}

// Two containers run on a device each, the third is told why it does not, and
// whatever is killed, everyone keeps what it has until it is gone for good.
func TestDevices(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		w := newTwins(t, runtime)
		first := w.run(t, "first", w.wanting("first", ""))
		one := w.got(t, "first")
		second := w.run(t, "second", w.wanting("second", ""))
		two := w.got(t, "second")
		if one == two || !slices.Contains([]string{"a", "b"}, one) {
			t.Fatalf("the first got %q, the second %q", one, two)
		}
		third := w.document(t, "third", w.wanting("third", ""))
		refused := func(why string) {
			t.Helper()
			// Not at once: a device that is still on its way back is the reason first.
			if err := rig.Until(deadline(t, patience), nil, "the third to be refused", func() error {
				id, err := w.cli.RunTask(deadline(t, patience), cluster, third)
				if err == nil {
					t.Fatalf("the third was placed: %s", id)
				}
				if !strings.Contains(err.Error(), why) {
					return fmt.Errorf("the third: %w; want %q", err, why)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		}
		refused("2 of 2 in use")
		holds := func(ds map[string]device) bool {
			return slices.Equal(ds[one].users(), []string{first.ID}) && slices.Equal(ds[two].users(), []string{second.ID})
		}
		w.sees(t, "the users of the devices", holds)

		for name, kill := range victims {
			if err := rig.Until(deadline(t, patience), nil, "the plugins to run", func() error {
				if pids := pluginPIDs(w.agent); len(pids) < 2 {
					return fmt.Errorf("the agent has the processes %v", pids)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			kill(t, w.site)(t)
			for _, before := range []rig.Task{first, second} {
				after := w.await(t, before.ID, "the task to be RUNNING after killing "+name, patience, func(now rig.Task) bool {
					ids, err := w.cli.Connected(deadline(t, patience), cluster, 1, runtime, "twin")
					return err == nil && len(ids) == 1 && running(now)
				})
				if a, b := after.Container("c"), before.Container("c"); a.PID != b.PID || a.Attempt != 1 || !alive(a.PID) {
					t.Errorf("after killing %s: pid %d attempt %d, before pid %d", name, a.PID, a.Attempt, b.PID)
				}
			}
			w.sees(t, "the same users of ready devices after killing "+name, func(ds map[string]device) bool {
				return holds(ds) && ds["a"].Ready && ds["b"].Ready
			})
			refused("2 of 2 in use")
		}

		// Unplugged in use: it goes on, and that is seen.
		w.unplug(t, two)
		ds := w.sees(t, "the unplugged device", func(ds map[string]device) bool { return !ds[two].Ready })
		if !holds(ds) || !strings.Contains(ds[two].Reason, "no longer in the device's inventory") {
			t.Errorf("devices %+v", ds)
		}
		if now, err := w.cli.Describe(deadline(t, patience), second.ID); err != nil || !running(now) || !alive(now.Container("c").PID) {
			t.Errorf("its user: %+v, %v", now, err)
		}
		refused("1 of 1 in use")
		w.plug(t, two, "its driver is not bound")
		w.sees(t, "a device that is not ready", func(ds map[string]device) bool { return ds[two].Reason == "its driver is not bound" })
		refused("its driver is not bound")
		w.plug(t, two, "")
		w.sees(t, "the device back", func(ds map[string]device) bool { return ds[two].Ready })

		if _, err := w.cli.Run(deadline(t, patience), "task", "stop", first.ID); err != nil {
			t.Fatal(err)
		}
		w.await(t, first.ID, "the first to stop", patience, stopped)
		w.run(t, "third", w.wanting("third", ""))
		if id := w.got(t, "third"); id != one {
			t.Errorf("the third got %q, the first had %q", id, one)
		}
	})
}

// What a device plugin names by CDI, the runtime finds in a specification.
func TestDevicesByCDI(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		if runtime == "process" {
			t.Skip("its programs see all of the machine's devices")
		}
		if !atLength() {
			t.Skip("its parts are tested beside each runtime: run make test-docker for the whole")
		}
		w := newTwinsBy(t, runtime, true)
		spec := `{"cdiVersion":"0.6.0","kind":"example.com/twin","devices":[`
		for _, id := range []string{"a", "b"} {
			spec += fmt.Sprintf(`{"name":%[1]q,"containerEdits":{"deviceNodes":[{"path":"/dev/twin-%[1]s","hostPath":"%[2]s/%[1]s.node","permissions":"rw"}]}},`, id, w.devices)
		}
		// It comes late: the start is tried until it is there.
		id, err := w.cli.RunTask(deadline(t, patience), cluster, w.document(t, "named", w.wanting("named", "attribute:name == b")))
		if err != nil {
			t.Fatal(err)
		}
		w.await(t, id, "the task to say what is missing", patience, func(now rig.Task) bool {
			return !stopped(now) && strings.Contains(now.Note, "example.com/twin=b") && strings.Contains(now.Note, w.devices)
		})
		if err := os.WriteFile(filepath.Join(w.devices, "twin.json"), []byte(strings.TrimSuffix(spec, ",")+"]}"), 0o600); err != nil {
			t.Fatal(err)
		}
		w.await(t, id, "the task to run", patience, running)
		if got := w.got(t, "named"); got != "b" {
			t.Errorf("it got %q", got)
		}
	})
}

// A device that goes away between placement and start is waited for, with the
// reason told.
func TestDevicesAreWaitedFor(t *testing.T) {
	w := newTwins(t, "process")
	// A task of the same definition is placed while the agent is away, and its
	// device is gone when the agent is back.
	w.agent.Kill()
	w.unplug(t, "a")
	id, err := w.cli.RunTask(deadline(t, patience), cluster, w.document(t, "late", w.wanting("late", "attribute:name == a")), "--instance", w.instance)
	if err != nil {
		t.Skipf("the control plane noticed at once that the agent is gone: %v", err)
	}
	if err := w.agent.Restart(); err != nil {
		t.Fatal(err)
	}
	w.await(t, id, "the task to say what it waits for", patience, func(now rig.Task) bool {
		return now.LastStatus == "PENDING" && strings.Contains(now.Note, "waiting for devices")
	})
	w.plug(t, "a", "")
	w.await(t, id, "the task to run", patience, running)
	if got := w.got(t, "late"); got != "a" {
		t.Errorf("it got %q", got)
	}
}
