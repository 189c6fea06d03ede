// Package rig starts the real daemons that tests and the demo need, each
// private to one directory and to loopback: a containerd of its own and an OCI
// registry. It knows nothing of package testing, so programs can use it too.
package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Missing says which programs a daemon needs and this machine lacks.
type Missing struct {
	Programs []string
}

func (m *Missing) Error() string {
	return fmt.Sprintf("not installed: %s (as root, run packaging/dev/setup.sh)", strings.Join(m.Programs, ", "))
}

// lookUp returns a *Missing naming those programs that are not in PATH.
func lookUp(programs ...string) error {
	var missing []string
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	if missing != nil {
		return &Missing{Programs: missing}
	}
	return nil
}

// daemon is a child process whose output goes to a file.
type daemon struct {
	cmd    *exec.Cmd
	log    string // path
	exited chan struct{}
	err    error // valid once exited is closed

	stopOnce sync.Once
}

// launch starts a program in a process group of its own, so that Ctrl-C in a
// terminal leaves its end to Close. Its output is appended to log.
func launch(log, name string, args ...string) (*daemon, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	d := &daemon{cmd: cmd, log: log, exited: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		d.err = cmd.Wait()
		close(d.exited)
	}()
	return d, nil
}

// stop ends the daemon with SIGTERM, and with SIGKILL after grace.
func (d *daemon) stop(grace time.Duration) {
	d.stopOnce.Do(func() {
		_ = d.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.exited:
			return
		case <-time.After(grace):
		}
		_ = d.cmd.Process.Kill()
		<-d.exited
	})
}

// kill ends the daemon at once, as a crash would.
func (d *daemon) kill() {
	_ = d.cmd.Process.Kill()
	<-d.exited
}

// until polls ready every few milliseconds until it returns nil.
func (d *daemon) until(ctx context.Context, ready func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-d.exited:
			return fmt.Errorf("%s exited: %v\n%s", filepath.Base(d.cmd.Path), d.err, tail(d.log))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w (last: %v)\n%s", filepath.Base(d.cmd.Path), ctx.Err(), err, tail(d.log))
		case <-tick.C:
		}
	}
}

// tail returns the end of a log file for an error message.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	const most = 2000
	if len(b) > most {
		b = b[len(b)-most:]
	}
	return string(bytes.TrimSpace(b))
}

var errNotYet = errors.New("not yet")
