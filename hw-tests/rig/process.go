package rig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Process is a program the rig started, its output going to a log file.
type Process struct {
	Name string
	Log  string // path of what it printed
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// start runs a program in a process group of its own, which does not end with
// the caller's terminal. Its output is appended to dir/name.log.
func start(dir, name string, env []string, path string, args ...string) (*Process, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &Process{Name: name, Log: log.Name(), done: make(chan struct{})}
	p.cmd = exec.Command(path, args...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed once the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal to the process alone.
func (p *Process) Signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// Kill ends the process with SIGKILL and waits until it is gone.
func (p *Process) Kill() {
	_ = p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop sends SIGTERM, waits up to grace, then kills. It returns the exit code.
func (p *Process) Stop(grace time.Duration) (int, error) {
	_ = p.Signal(syscall.SIGTERM) // one that has ended is stopped already
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), nil
	case <-time.After(grace):
		p.Kill()
		return -1, fmt.Errorf("%s did not stop within %s of SIGTERM; its log is %s", p.Name, grace, p.Log)
	}
}

// Tail returns the last bytes of what the process printed.
func (p *Process) Tail(n int64) string {
	f, err := os.Open(p.Log)
	if err != nil {
		return ""
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil && size > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	} else {
		_, _ = f.Seek(0, io.SeekStart)
	}
	b, _ := io.ReadAll(f)
	return string(b)
}

// Until calls ok every 10 ms until it returns nil, the context ends, or the
// process (which may be nil) dies; the error tells the last thing ok said.
func Until(ctx context.Context, p *Process, what string, ok func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var died <-chan struct{}
	if p != nil {
		died = p.done
	}
	var last error
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // what the deadline itself breaks tells nothing
		}
		select {
		case <-tick.C:
		case <-died:
			return fmt.Errorf("%s ended while waiting for %s: %v\n%s", p.Name, what, errors.Join(p.err, last), p.Tail(4096))
		case <-ctx.Done():
			tail := ""
			if p != nil {
				tail = "\n" + p.Tail(4096)
			}
			return fmt.Errorf("waiting for %s: %w; last: %w%s", what, context.Cause(ctx), last, tail)
		}
	}
}

// FreePort finds a loopback port that nobody has on TCP or UDP. It is below
// those that the kernel gives to whoever asks for any (32768 on, unless
// configured): a daemon that is restarted finds it free still.
func FreePort() (int, error) {
	var last error
	for range 50 {
		port := 10000 + rand.IntN(22000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			last = err
			continue
		}
		u, err := net.ListenPacket("udp", fmt.Sprintf("127.0.0.1:%d", port))
		l.Close()
		if err == nil {
			u.Close()
			return port, nil
		}
		last = err
	}
	return 0, errors.Join(errors.New("no port was free on both TCP and UDP"), last)
}
