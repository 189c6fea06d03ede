// Package blackbox drives the built binaries the way an operator would: real
// control plane, real agent, real containerd and registry, the CLI's JSON.
package blackbox

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

var binFlag = flag.String("bin", os.Getenv("BELAY_BIN"), "directory with the built binaries; empty: run make build")

var binaries = sync.OnceValues(func() (rig.Binaries, error) {
	if *binFlag != "" {
		return rig.Binaries(*binFlag), nil
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	if out, err := exec.Command("make", "-C", root, "build").CombinedOutput(); err != nil {
		return "", fmt.Errorf("make build: %w\n%s", err, out)
	}
	return rig.Binaries(filepath.Join(root, "bin")), nil
})

// site is a control plane with one enrolled, running device.
type site struct {
	*rig.Control
	cli      *rig.CLI
	agent    *rig.Agent
	instance string
	runtime  string
	dir      string
	// namespace is the site's own in the shared containerd.
	namespace string
}

// images says that containers of this site come from images.
func (s *site) images() bool { return s.runtime != "process" }

const cluster = "shop"

// patience is how long anything that should happen may take on a busy machine.
const patience = 60 * time.Second

func deadline(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func bin(t testing.TB) rig.Binaries {
	t.Helper()
	b, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// tempDir is like t.TempDir but short: unix socket paths end at 107 bytes.
func tempDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "belay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kept for a look: %s", dir)
			return
		}
		os.RemoveAll(dir)
	})
	return dir
}

// newControl starts a control plane that ends with the test.
func newControl(t testing.TB, extra ...string) *rig.Control {
	t.Helper()
	c, err := rig.StartControl(deadline(t, patience), bin(t), tempDir(t), extra...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-c.Done():
		default:
			if _, err := c.Stop(15 * time.Second); err != nil {
				t.Error(err)
			}
		}
		if t.Failed() {
			t.Logf("control plane's last words:\n%s", c.Tail(6000))
		}
	})
	return c
}

// newSite starts a control plane and one device whose plugins are up.
func newSite(t testing.TB, runtime string) *site {
	t.Helper()
	return newSiteOf(t, runtime, func(s *site, a *rig.Agent) { s.prepare(t, a) })
}

// prepare points an agent at what the machine shares.
func (s *site) prepare(t testing.TB, a *rig.Agent) {
	t.Helper()
	switch s.runtime {
	case "containerd":
		s.namespace = host(t).prepare(t, a, s.dir)
	case "docker":
		dockerConfig(t, a, s.dir, host(t).dockerd(t).Address)
	}
}

// newSiteOf is newSite with an agent that set has prepared.
func newSiteOf(t testing.TB, runtime string, set func(*site, *rig.Agent)) *site {
	t.Helper()
	s := &site{Control: newControl(t), runtime: runtime, dir: tempDir(t)}
	s.cli = s.Control.CLI()
	s.agent = newDevice(t, s.cli, s.dir, func(a *rig.Agent) { set(s, a) })
	ids, err := s.cli.Connected(deadline(t, patience), cluster, 1, runtime)
	if err != nil {
		t.Fatal(err)
	}
	s.instance = ids[0]
	t.Cleanup(func() { s.sweep(t) })
	return s
}

// newDevice enrols a device and runs its agent until the test ends.
func newDevice(t testing.TB, cli *rig.CLI, dir string, set func(*rig.Agent)) *rig.Agent {
	t.Helper()
	return newDeviceOf(t, bin(t), cli, dir, set)
}

func newDeviceOf(t testing.TB, binaries rig.Binaries, cli *rig.CLI, dir string, set func(*rig.Agent)) *rig.Agent {
	t.Helper()
	ctx := deadline(t, patience)
	code, err := cli.Activate(ctx, cluster, 1)
	if err != nil {
		t.Fatal(err)
	}
	a, err := rig.Enroll(ctx, binaries, dir, code)
	if err != nil {
		t.Fatal(err)
	}
	set(a)
	if err := a.Restart(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-a.Done():
		default:
			if _, err := a.Stop(20 * time.Second); err != nil {
				t.Error(err)
			}
		}
		if t.Failed() {
			t.Logf("agent's last words:\n%s", a.Tail(8000))
		}
	})
	return a
}

// sweep stops what the test left running, so that nothing outlives it.
func (s *site) sweep(t testing.TB) {
	ctx := deadline(t, patience)
	var l struct{ Tasks []rig.Task }
	select {
	case <-s.Control.Done():
		return
	case <-s.agent.Done():
		return
	default:
	}
	if err := s.cli.JSON(ctx, &l, "task", "list", "--cluster", cluster); err != nil {
		t.Errorf("list what is left: %v", err)
		return
	}
	for _, task := range l.Tasks {
		if _, err := s.cli.Run(ctx, "task", "stop", task.ID); err != nil {
			t.Errorf("stop what is left: %v", err)
		}
	}
	for _, task := range l.Tasks {
		if _, err := s.cli.Await(ctx, task.ID, "the end of what was left", patience, stopped); err != nil {
			t.Error(err)
		}
	}
}

func running(t rig.Task) bool { return t.LastStatus == "RUNNING" }
func stopped(t rig.Task) bool { return t.LastStatus == "STOPPED" }

// container is one container definition of a test's task definition.
type container map[string]any

// document builds a task definition for the site's runtime. Each container
// runs its "script" with /bin/sh and sees the test's directory at its own path.
func (s *site) document(t testing.TB, family string, containers ...container) string {
	t.Helper()
	doc := map[string]any{"family": family}
	var defs []container
	for _, c := range containers {
		d := container{}
		for k, v := range c {
			d[k] = v
		}
		if script, ok := d["script"]; ok {
			delete(d, "script")
			d["command"] = []any{"/bin/sh", "-c", script}
		}
		if s.images() {
			if d["image"] == nil {
				d["image"] = host(t).image("shell")
			}
			d["mountPoints"] = []any{map[string]any{"sourceVolume": "test", "containerPath": s.dir}}
			if d["memory"] == nil {
				d["memory"] = 64
			}
		}
		defs = append(defs, d)
	}
	doc["containerDefinitions"] = defs
	if s.images() {
		doc["volumes"] = []any{map[string]any{"name": "test", "host": map[string]any{"sourcePath": s.dir}}}
	}
	if s.runtime != "containerd" {
		doc["belay"] = map[string]any{"runtime": s.runtime}
	}
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// run runs one task and waits until it is RUNNING.
func (s *site) run(t testing.TB, family string, containers ...container) rig.Task {
	t.Helper()
	ctx := deadline(t, patience)
	id, err := s.cli.RunTask(ctx, cluster, s.document(t, family, containers...))
	if err != nil {
		t.Fatal(err)
	}
	task, err := s.cli.Await(ctx, id, "the task to run", patience, running)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func (s *site) await(t testing.TB, id, what string, within time.Duration, ok func(rig.Task) bool) rig.Task {
	t.Helper()
	task, err := s.cli.Await(context.Background(), id, what, within, ok)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// eachRuntime runs a test on every runtime this user can use here.
func eachRuntime(t *testing.T, f func(t *testing.T, runtime string)) {
	for _, r := range []string{"process", "containerd", "docker"} {
		t.Run(r, func(t *testing.T) {
			if r != "process" && os.Getuid() != 0 {
				t.Skipf("%s needs root: run as root to test it", r)
			}
			if r == "docker" && os.Getenv("BELAY_TEST_DOCKER") == "" {
				t.Skip("takes minutes more: run make test-docker")
			}
			f(t, r)
		})
	}
}
