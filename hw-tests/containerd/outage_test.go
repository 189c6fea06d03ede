package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// TestContainerdOutage kills a containerd of its own under a running plugin.
func TestContainerdOutage(t *testing.T) {
	daemons(t)
	ctd, err := rig.StartContainerd(t.Context(), filepath.Join(t.TempDir(), "c"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after the world's own
		if err := ctd.Close(); err != nil {
			t.Error(err)
		}
	})
	w := newWorld(t)
	w.ctd, w.json = ctd, strings.ReplaceAll(w.json, w.ctd.Address, ctd.Address)
	w.restart()

	stay, leave := w.attempt(sdk.TaskSpec{}), w.attempt(sdk.TaskSpec{})
	q := w.request(stay, sdk.NetworkNone, images.Workload, "tick", "50ms")
	running := w.start(q)
	w.start(w.request(leave, sdk.NetworkNone, images.Workload, "exit", "9", "2s"))
	broken := make(chan error, 1)
	go func() { broken <- w.rt.Events(w.ctx(), func(sdk.Attempt) {}) }()

	// A containerd that hangs says nothing of a health check's container.
	if err := ctd.Hang(); err != nil {
		t.Fatal(err)
	}
	_, err = w.rt.Exec(w.ctx(), sdk.ExecRequest{Attempt: stay, Command: []string{"/workload", "info"}, Timeout: time.Second})
	if !errors.Is(err, sdk.Unavailable) || !strings.Contains(err.Error(), "does not answer in time") {
		t.Errorf("Exec while containerd hangs: %v; want unavailable", err)
	}

	ctd.Kill()
	for name, call := range map[string]func(context.Context) error{
		"Info": func(ctx context.Context) error { _, err := w.rt.Info(ctx); return err },
		"List": func(ctx context.Context) error { _, err := w.rt.List(ctx); return err },
		"Pull": func(ctx context.Context) error {
			_, err := w.rt.Pull(ctx, sdk.PullRequest{Image: w.reg.Address + "/workload:1"}, noProgress)
			return err
		},
		"Start": func(ctx context.Context) error { _, err := w.rt.Start(ctx, q); return err },
		"Stop":  func(ctx context.Context) error { _, err := w.rt.Stop(ctx, stay, time.Second); return err },
		"Exec": func(ctx context.Context) error {
			_, err := w.rt.Exec(ctx, sdk.ExecRequest{Attempt: stay, Command: []string{"/workload", "info"}})
			return err
		},
	} {
		begun := time.Now()
		err := call(w.ctx())
		if !errors.Is(err, sdk.Unavailable) || !strings.Contains(err.Error(), ctd.Address) {
			t.Errorf("%s without containerd: %v; want unavailable, naming the socket", name, err)
		}
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("%s answered only after %s", name, took)
		}
	}
	if err := <-broken; !errors.Is(err, sdk.Unavailable) {
		t.Errorf("Events ended with %v, want unavailable", err)
	}
	before := len(read(t, q.Stdout))
	w.eventually("the container keeps writing", func() bool { return len(read(t, q.Stdout)) > before })
	w.eventually("the other container exits", func() bool { return syscall.Kill(running.PID, 0) == nil && !alive(leave) })

	if err := ctd.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.eventually("the same plugin works again", func() bool { _, err := w.rt.List(w.ctx()); return err == nil })
	if c, ok := w.find(stay); !ok || c.State != sdk.StateRunning || c.PID != running.PID {
		t.Errorf("after the outage the container is %+v, want pid %d", c, running.PID)
	}
	if c := w.exit(leave); forgetsExits(t) {
		// At least it does not make one up.
		if c.ExitCode != nil || !strings.Contains(c.Reason, "while containerd was down") {
			t.Errorf("exit of a container that this containerd has forgotten: %+v", c)
		}
	} else {
		wantExit(t, c, 9)
	}
}

// forgetsExits tells whether containerd, from 1.7 on, drops containers that it
// finds exited when it starts, with their exit codes.
func forgetsExits(t *testing.T) bool {
	out, err := exec.Command("containerd", "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", out)
	f := strings.Fields(string(out)) // containerd PACKAGE VERSION REVISION
	return len(f) < 3 || !strings.HasPrefix(strings.TrimPrefix(f[2], "v"), "1.6.")
}

// alive looks for the workload's process by its cgroup, as containerd cannot
// be asked.
func alive(a sdk.Attempt) bool {
	for _, pattern := range []string{"/sys/fs/cgroup/pids/belay/", "/sys/fs/cgroup/belay/"} {
		found, _ := filepath.Glob(pattern + a.Task + "/*/cgroup.procs")
		for _, f := range found {
			if readIfThere(f) != "" {
				return true
			}
		}
	}
	return false
}

// TestTwoAgents: neither sees or ends what the other runs.
func TestTwoAgents(t *testing.T) {
	one, two := newWorld(t), newWorld(t)
	a := one.attempt(sdk.TaskSpec{})
	q := one.request(a, sdk.NetworkNone, images.Workload, "sleep")
	one.start(q)
	inv, err := two.rt.List(two.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if len(inv.Containers) != 0 || len(inv.Tasks) != 0 {
		t.Errorf("the other agent lists %+v", inv)
	}
	_, err = two.rt.Stop(two.ctx(), a, 0)
	wantError(t, err, sdk.Conflict, "another agent")
	wantError(t, two.rt.Remove(two.ctx(), a), sdk.Conflict, "another agent")
	if c, ok := one.find(a); !ok || c.State != sdk.StateRunning {
		t.Errorf("it is %+v", c)
	}
}

// TestShimKilled: an exit nobody can know is reported as such, once.
func TestShimKilled(t *testing.T) {
	w := newWorld(t)
	a := w.attempt(sdk.TaskSpec{})
	q := w.request(a, sdk.NetworkNone, images.Workload, "sleep")
	c := w.start(q)
	shim := parentOf(t, c.PID)
	if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	end := w.exit(a)
	t.Logf("%+v", end)
	if end.ExitCode != nil && *end.ExitCode != 137 {
		t.Errorf("exit code %d", *end.ExitCode)
	}
	if end.ExitCode == nil && end.Reason == "" {
		t.Error("no exit code and no reason")
	}
	again := w.start(q)
	if again.State != sdk.StateExited {
		t.Errorf("a second Start made %+v", again)
	}
}

// TestForgottenBundle: containerd can forget an abandoned start whose bundle it
// has not removed, with its shim or without, and then refuses the name until it
// is restarted.
func TestForgottenBundle(t *testing.T) {
	for _, shim := range []bool{false, true} {
		t.Run(fmt.Sprintf("shim=%t", shim), func(t *testing.T) {
			w := newWorld(t)
			before := leftovers(t, w)
			a := w.attempt(sdk.TaskSpec{})
			id := a.Task + "-" + a.Container + "-1"
			bundle, work := filepath.Join(bundles(w.ctd, "state"), id), filepath.Join(bundles(w.ctd, "root"), id)
			precious := t.TempDir()
			if err := os.WriteFile(filepath.Join(precious, "file"), []byte("kept"), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{bundle, work, filepath.Join(bundle, "rootfs")} {
				if err := os.MkdirAll(dir, 0o711); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Symlink(work, filepath.Join(bundle, "work")); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(bundle, "rootfs", "proc"), 0o755); err != nil { // runc, without the mount
				t.Fatal(err)
			}
			if err := syscall.Mount(precious, filepath.Join(bundle, "rootfs"), "", syscall.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = syscall.Unmount(filepath.Join(bundle, "rootfs"), syscall.MNT_DETACH) })
			if shim {
				// What is told from a shim is its command line and where it runs.
				p := exec.Command("sh", "-c", "while :; do sleep 1; done", "-namespace", "belay", "-id", id, "-address", w.ctd.Address)
				p.Dir = bundle
				if err := p.Start(); err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() { ended <- p.Wait() }()
				t.Cleanup(func() {
					_ = p.Process.Kill()
					<-ended
				})
			}
			if c := w.start(w.request(a, sdk.NetworkNone, images.Workload, "sleep")); c.State != sdk.StateRunning {
				t.Errorf("it is %+v", c)
			}
			if b, err := os.ReadFile(filepath.Join(precious, "file")); err != nil || string(b) != "kept" {
				t.Errorf("what was mounted in the bundle was emptied: %q, %v", b, err)
			}
			w.clear()
			if d := cmp.Diff(before, leftovers(t, w)); d != "" {
				t.Errorf("left behind (-before +after):\n%s", d)
			}
		})
	}
}

// TestExecTimeoutLeavesNothing: no FIFO, mount or record outlives a command
// that was killed.
func TestExecTimeoutLeavesNothing(t *testing.T) {
	w := newWorld(t)
	before := leftovers(t, w)
	a := w.attempt(sdk.TaskSpec{})
	w.start(w.request(a, sdk.NetworkNone, images.Shell, "/bin/sleep", "1000"))
	_, err := w.rt.Exec(w.ctx(), sdk.ExecRequest{Attempt: a, Command: []string{"/bin/sh", "-c", "sleep 500 & sleep 500"}, Timeout: 500 * time.Millisecond})
	wantError(t, err, sdk.Deadline, "500ms")
	st, err := w.rt.Stats(w.ctx(), a)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d processes are left", st.Pids)
	w.clear()
	for _, l := range leftovers(t, w) {
		if !slices.Contains(before, l) {
			t.Errorf("left behind: %s", l)
		}
	}
}
