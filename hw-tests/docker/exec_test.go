package docker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// TestExecWhileTheDaemonHangs: a command whose end is not known because the
// daemon does not answer did not take too long. A health check must not fail
// for that. It is killed when the daemon is back.
func TestExecWhileTheDaemonHangs(t *testing.T) {
	w := newWorld(t, "")
	dir := t.TempDir()
	q := w.request(sdk.TaskSpec{}, images.Shell, "/bin/sh", "-c", "echo > /test/up; exec sleep 600")
	q.Spec.Mounts = []sdk.Mount{{Type: "bind", Source: dir, Target: "/test"}}
	q.Spec.Init = true // reaps: what is dead must not be counted
	if _, err := w.rt.Start(w.ctx(), q); err != nil {
		t.Fatal(err)
	}
	signal := func(s syscall.Signal) {
		t.Helper()
		if err := w.d.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { signal(syscall.SIGCONT) })
	exec := func(command string) error {
		_, err := w.rt.Exec(w.ctx(), sdk.ExecRequest{Attempt: q.Attempt, Command: []string{"/bin/sh", "-c", command}, Timeout: time.Second})
		return err
	}
	there := func(file string) {
		t.Helper()
		if err := rig.Until(w.ctx(), nil, file+" to be there", func() error {
			_, err := os.Stat(filepath.Join(dir, file))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	there("up") // and with it all the processes that it is to have
	before, err := w.rt.Stats(w.ctx(), q.Attempt)
	if err != nil {
		t.Fatal(err)
	}
	gone := func() error {
		s, err := w.rt.Stats(w.ctx(), q.Attempt)
		if err == nil && s.Pids != before.Pids {
			err = fmt.Errorf("%d processes, %d before", s.Pids, before.Pids)
		}
		return err
	}
	if err := exec("sleep 600; true"); !errors.Is(err, sdk.Deadline) {
		t.Errorf("a command that takes too long: %v", err)
	}
	if err := rig.Until(w.ctx(), nil, "it to be gone with what it started", gone); err != nil {
		t.Fatal(err)
	}

	signal(syscall.SIGSTOP)
	begun := time.Now()
	if err := exec("true"); !errors.Is(err, sdk.Unavailable) {
		t.Errorf("asked for while it hangs: %v", err)
	}
	if took := time.Since(begun); took > 6*time.Second {
		t.Errorf("that took %s: the agent has given up by then", took)
	}
	signal(syscall.SIGCONT)

	ended := make(chan error, 1)
	go func() { ended <- exec("echo > /test/began; sleep 600; true") }()
	there("began")
	signal(syscall.SIGSTOP)
	if err := <-ended; !errors.Is(err, sdk.Unavailable) {
		t.Errorf("it hangs while the command runs: %v", err)
	}
	signal(syscall.SIGCONT)
	if err := rig.Until(w.ctx(), nil, "the command to be killed", gone); err != nil {
		t.Error(err)
	}
	if err := exec("true"); err != nil {
		t.Errorf("after all that: %v", err)
	}
}
