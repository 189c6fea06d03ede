package clock

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
)

// container is one container definition of a test's task definition.
type container map[string]any

// forever is a script that ends only when it is told to.
const forever = "trap 'exit 0' TERM; while :; do sleep 0.5; done"

// site is a control plane and what its operator uses.
type site struct {
	bin     rig.Binaries
	dir     string
	plugins string
	control *rig.Control
	cli     *rig.CLI
	devices []*device
}

// device is a real agent with the process runtime.
type device struct {
	*rig.Agent
	name     string
	instance string
}

func newSite(t *testing.T, bin rig.Binaries) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "belay") // short: unix socket paths end at 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{bin: bin, dir: dir, plugins: filepath.Join(dir, "plugins")}
	for link, to := range map[string]string{
		"belay-plugins": "belay-plugins", "belay-supervise": "belay-supervise",
		"plugins/process": "belay-plugins", "containing/process": "belay-plugins", "containing/containerd": "belay-plugins",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, link)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(bin.Path(to), filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if s.control, err = rig.StartControl(deadline(t, patience()), bin, filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ended(t, s.control.Process) })
	s.cli = s.control.CLI()
	return s
}

// ended stops a process, and says its last words when the test failed.
func ended(t *testing.T, p *rig.Process) {
	select {
	case <-p.Done():
	default:
		if _, err := p.Stop(patience()); err != nil {
			t.Error(err)
		}
	}
	if t.Failed() {
		t.Logf("last words of %s:\n%s", p.Name, p.Tail(6000))
	}
}

// enrol enrols a device.
func (s *site) enrol(t *testing.T, name string, extra ...string) *device {
	t.Helper()
	ctx := deadline(t, patience())
	code, err := s.cli.Activate(ctx, cluster, 1)
	if err != nil {
		t.Fatal(err)
	}
	d := s.with(t, name, code, extra...)
	s.devices = append(s.devices, d)
	return d
}

func (s *site) with(t *testing.T, name, code string, extra ...string) *device {
	t.Helper()
	a, err := rig.Enroll(deadline(t, patience()), s.bin, filepath.Join(s.dir, name), code, extra...)
	if err != nil {
		t.Fatal(err)
	}
	a.PluginDir, a.Extra = s.plugins, extra
	return &device{Agent: a, name: name}
}

// contain gives a device a containerd of its own, and returns the address of a
// registry with a shell for it.
func (s *site) contain(t *testing.T, d *device) string {
	t.Helper()
	ctx := deadline(t, 2*patience())
	c, err := rig.StartContainerd(ctx, filepath.Join(s.dir, "ctd"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	registry, err := rig.StartRegistry(ctx, filepath.Join(s.dir, "registry"), rig.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = registry.Close() })
	if _, err := images.Push(ctx, images.Target{Registry: registry.Address, PlainHTTP: true}, images.Options{}, images.Shell); err != nil {
		t.Fatal(err)
	}
	d.PluginDir, d.ContainerdAddress = filepath.Join(s.dir, "containing"), c.Address
	return registry.Address
}

// start runs a device until the test ends.
func (d *device) start(t *testing.T) {
	t.Helper()
	if err := d.Restart(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ended(t, d.Process) })
}

// ask asks the running agent.
func (d *device) ask(t *testing.T, args ...string) []byte {
	t.Helper()
	args = append(args, "--run-dir", d.RunDir, "-o", "json")
	out, err := exec.CommandContext(deadline(t, patience()), d.Bin.Path("belay-agent"), args...).Output()
	if err != nil {
		t.Fatalf("belay-agent %v: %v", args, err)
	}
	return out
}

// status is what an agent says of its session.
type status struct {
	Instance string
	Link     struct {
		Connected bool
		Transport string
		Since     time.Time
	}
	Problems []string
}

func (d *device) status(t *testing.T) (s status) {
	t.Helper()
	out := d.ask(t, "status")
	sane(t, d.name+"'s status", out)
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return s
}

// task is a task as the device itself shows it.
func (d *device) task(t *testing.T, id string) (task rig.Task) {
	t.Helper()
	out := d.ask(t, "tasks")
	sane(t, d.name+"'s tasks", out)
	var l struct{ Tasks []rig.Task }
	if err := json.Unmarshal(out, &l); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, task = range l.Tasks {
		if task.ID == id {
			return task
		}
	}
	t.Fatalf("%s does not show task %s: %s", d.name, id, out)
	return task
}

// connected waits until the devices are, and their runtimes are ready.
func (s *site) connected(t *testing.T, devices ...*device) {
	t.Helper()
	began := time.Now()
	if _, err := s.cli.Connected(deadline(t, patience()), cluster, len(devices), "process"); err != nil {
		for _, d := range devices {
			t.Logf("%s: %+v", d.name, d.status(t))
		}
		t.Fatal(err)
	}
	for _, d := range devices {
		now := d.status(t)
		d.instance = now.Instance
		t.Logf("%s is connected over %s, seen after %s", d.name, now.Link.Transport, time.Since(began).Round(100*time.Millisecond))
	}
}

// run runs a task on a device and waits until it is RUNNING.
func (s *site) run(t *testing.T, on *device, family string, belay map[string]any, containers ...container) rig.Task {
	t.Helper()
	var defs []container
	for i, c := range containers {
		d := container{"name": "c"}
		for k, v := range c {
			d[k] = v
		}
		if i > 0 && d["name"] == "c" {
			t.Fatal("two containers of one name")
		}
		d["command"] = []any{"/bin/sh", "-c", d["script"]}
		delete(d, "script")
		defs = append(defs, d)
	}
	if belay == nil {
		belay = map[string]any{}
	}
	if belay["runtime"] == nil {
		belay["runtime"] = "process"
	}
	doc, err := json.Marshal(map[string]any{"family": family, "belay": belay, "networkMode": "host", "containerDefinitions": defs})
	if err != nil {
		t.Fatal(err)
	}
	id, err := s.cli.RunTask(deadline(t, patience()), cluster, string(doc), "--instance", on.instance)
	if err != nil {
		t.Fatal(err)
	}
	return s.await(t, id, "task "+family+" to run", func(now rig.Task) bool {
		return now.LastStatus == "RUNNING" && now.Container("c").PID != 0
	})
}

func (s *site) await(t *testing.T, id, what string, ok func(rig.Task) bool) rig.Task {
	t.Helper()
	task, err := s.cli.Await(deadline(t, 2*patience()), id, what, 2*patience(), ok)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func (s *site) describe(t *testing.T, id string) rig.Task {
	t.Helper()
	task, err := s.cli.Describe(deadline(t, patience()), id)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// raw is what a command prints; in it nothing is negative.
func (s *site) raw(t *testing.T, args ...string) []byte {
	t.Helper()
	out, err := s.cli.Run(deadline(t, patience()), args...)
	if err != nil {
		t.Fatal(err)
	}
	sane(t, "belay "+strings.Join(args, " "), out)
	return out
}

// span is the time since boot before and after something.
type span struct{ from, to time.Duration }

func (s *site) stop(t *testing.T, id string) span {
	t.Helper()
	from := uptime()
	if _, err := s.cli.Run(deadline(t, patience()), "task", "stop", id); err != nil {
		t.Fatal(err)
	}
	return span{from, uptime()}
}

func stopped(t rig.Task) bool { return t.LastStatus == "STOPPED" }

// watch looks at everything for a while: sessions last, what runs runs on.
func (s *site) watch(t *testing.T, stage string, constant []rig.Task) {
	t.Helper()
	lost, looks := map[string]time.Time{}, 0
	for began := time.Now(); time.Since(began) < watched; looks++ {
		for _, d := range s.devices {
			switch now := d.status(t); {
			case now.Link.Connected:
				delete(lost, d.name)
			case lost[d.name].IsZero():
				t.Logf("%s: %s has no session: %+v", stage, d.name, now)
				lost[d.name] = time.Now()
			case time.Since(lost[d.name]) > slow(outage):
				t.Errorf("%s: %s has had no session for %s: %+v", stage, d.name, time.Since(lost[d.name]), now)
			}
			sane(t, d.name+"'s tasks", d.ask(t, "tasks"))
		}
		for _, was := range constant {
			var now rig.Task
			out := s.raw(t, "task", "describe", was.ID, "-o", "json")
			if err := json.Unmarshal(out, &now); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			a, b := was.Container("c"), now.Container("c")
			if now.LastStatus != "RUNNING" || a.PID != b.PID || a.Attempt != b.Attempt || syscall.Kill(a.PID, 0) != nil {
				t.Errorf("%s: %+v, it was %+v", stage, now, was)
			}
			if was.HealthStatus == "HEALTHY" && now.HealthStatus != "HEALTHY" {
				t.Errorf("%s: it was healthy, it is %+v", stage, now)
			}
			inOrder(t, stage, out)
		}
		s.raw(t, "task", "describe", constant[0].ID)
		s.raw(t, "task", "list", "--cluster", cluster, "-o", "json")
		s.raw(t, "task", "list", "--cluster", cluster)
		s.raw(t, "instance", "list", "--cluster", cluster, "-o", "json")
		if t.Failed() {
			break
		}
	}
	var since []string
	for _, d := range s.devices {
		now := d.status(t)
		since = append(since, fmt.Sprintf("%s over %s since %s", d.name, now.Link.Transport, now.Link.Since.Format(time.DateTime)))
		if len(now.Problems) > 0 {
			t.Logf("%s: %s has problems: %q", stage, d.name, now.Problems)
		}
	}
	t.Logf("%s: looked %d times, connected: %s", stage, looks, strings.Join(since, ", "))
}

// ends waits for the end of a task that ignores its SIGTERM.
func (s *site) ends(t *testing.T, task rig.Task, what string, asked span) {
	t.Helper()
	pid := task.Container("c").PID
	if err := rig.Until(deadline(t, stopGrace+slack()), nil, "the process to end that was "+what, func() error {
		if err := syscall.Kill(pid, 0); err != nil {
			return nil
		}
		return fmt.Errorf("%d lives", pid)
	}); err != nil {
		t.Error(err)
	}
	least, most := uptime()-asked.to, uptime()-asked.from
	t.Logf("%s with stopTimeout %s: it ended after %s to %s", what, stopGrace, least.Round(100*time.Millisecond), most.Round(100*time.Millisecond))
	end := s.await(t, task.ID, "the task to end that was "+what, stopped)
	if c := end.Container("c"); most < stopGrace || c.ExitCode == nil || *c.ExitCode != 137 || end.StopCode != "UserInitiated" {
		t.Errorf("%s: it ended after at most %s of %s, as %+v", what, most, stopGrace, end)
	}
	if least > stopGrace+slow(outage) {
		t.Errorf("%s: it ended after at least %s, its stopTimeout is %s", what, least, stopGrace)
	}
	inOrder(t, what, s.raw(t, "task", "describe", task.ID, "-o", "json"))
}

// inOrder checks the times that the control plane tells of a task.
func inOrder(t *testing.T, what string, out []byte) {
	t.Helper()
	var task map[string]any
	if err := json.Unmarshal(out, &task); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var times []string
	var at []time.Time
	for _, name := range []string{"createdAt", "startedAt", "stoppingAt", "stoppedAt"} {
		text, _ := task[name].(string)
		if text == "" {
			continue
		}
		moment, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			t.Errorf("%s: %s: %v", what, name, err)
		}
		times, at = append(times, name+" "+text), append(at, moment)
	}
	if len(at) == 0 || !slices.IsSortedFunc(at, time.Time.Compare) {
		t.Errorf("%s: the times of a task are %q", what, times)
	}
}

// negative is a duration below zero in the middle of a text.
var negative = regexp.MustCompile(`(^|[\s"(:,=])-\d+(\.\d+)?(ns|us|µs|ms|s|m|h|d)?\b`)

// sane looks for numbers and durations below zero.
func sane(t *testing.T, what string, out []byte) {
	t.Helper()
	if m := negative.FindAll(out, -1); m != nil {
		t.Errorf("%s has %q:\n%s", what, m, out)
	}
}
