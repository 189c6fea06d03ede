package host_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
)

// leave starts a program in this session and one in a session of its own.
func leave(c sdk.Config) error {
	for name, own := range map[string]bool{"helper": false, "keeper": true} {
		cmd := exec.Command("/bin/sh", "-c", "sleep 983 & echo $$ $!; wait")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: own}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		line := make([]byte, 100)
		n, err := out.Read(line)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(c.RunDir, name), line[:n], 0o600); err != nil {
			return err
		}
	}
	return nil
}

func pids(t *testing.T, file string) (all []int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(w)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, pid)
	}
	if len(all) != 2 {
		t.Fatalf("%s says %q", file, b)
	}
	return all
}

// lives is false for a process that is only not reaped yet.
func lives(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.HasPrefix(string(b[bytes.LastIndexByte(b, ')')+1:]), " Z")
}

// What a plugin leaves in its session goes with it, however it ends; what it
// put into a session of its own stays.
func TestLeftoversEndWithThePlugin(t *testing.T) {
	for name, end := range map[string]func(*host.Plugin){
		"killed by somebody": func(p *host.Plugin) { _ = syscall.Kill(p.PID(), syscall.SIGKILL) },
		"killed":             func(p *host.Plugin) { p.Kill() },
		"asked to end":       func(p *host.Plugin) { p.Close(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			o := options(t, "leaves")
			p, err := host.Launch(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			helper, keeper := pids(t, filepath.Join(o.SocketDir, "helper")), pids(t, filepath.Join(o.SocketDir, "keeper"))
			defer func() {
				for _, pid := range keeper {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}()
			end(p)
			p.Close(t.Context())
			for _, pid := range helper {
				if lives(pid) {
					t.Errorf("its helper %d lives", pid)
				}
			}
			for _, pid := range keeper {
				if !lives(pid) {
					t.Errorf("%d, in a session of its own, was killed", pid)
				}
			}
		})
	}
}

// safe is a buffer that several goroutines may use.
type safe struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safe) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *safe) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// Somebody else who connects to a plugin's socket is not served, which the
// plugin's log tells, and the host is as before.
func TestForeignConnectionIsRefused(t *testing.T) {
	if os.Getenv("TEST_CONNECT") != "" {
		t.Skip("this is the foreigner")
	}
	o := options(t, "good")
	log := &safe{}
	o.Logger = slog.New(slog.NewTextHandler(log, nil))
	p, err := host.Launch(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	socket := filepath.Join(o.SocketDir, fmt.Sprint("host.", p.PID()))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	foreigner := exec.Command(self)
	foreigner.Env = append(os.Environ(), "TEST_PLUGIN=connects", "TEST_SOCKET="+socket)
	out, err := foreigner.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "refused" {
		t.Errorf("a foreigner is told %q, %v", out, err)
	}
	deadline := time.After(10 * time.Second)
	for want := fmt.Sprint("it is process ", foreigner.Process.Pid, "'s"); !strings.Contains(log.String(), want); {
		select {
		case <-deadline:
			t.Fatalf("the log does not tell %q:\n%s", want, log)
		case <-time.After(5 * time.Millisecond):
		}
	}
	if err := p.Ping(t.Context()); err != nil {
		t.Error(err)
	}
}

// connect says how a connection to a plugin ends.
func connect() {
	c, err := net.Dial("unix", os.Getenv("TEST_SOCKET"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	if n, err := c.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		fmt.Println("served", n, err)
		return
	}
	fmt.Println("refused")
}

// A socket that somebody else serves is not talked to.
func TestSocketOfSomebodyElseIsRefused(t *testing.T) {
	o := options(t, "impostor")
	path := filepath.Join(o.SocketDir, "theirs")
	l, err := net.Listen("unix", path) // by this process, which is no plugin
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o.Env = append(o.Env, "TEST_SOCKET="+path)
	_, err = host.Launch(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint("served by process ", os.Getpid())) {
		t.Errorf("launch: %v", err)
	}
}

// Last words are in the reason of an end, however soon it is asked for.
func TestLastWordsAreHeard(t *testing.T) {
	for range 20 {
		p := launch(t, "gasps")
		r := runtime(t, p)
		_, _ = r.List(t.Context())
		<-p.Exited()
		if why := p.ExitReason(); !strings.Contains(why, "exit status 7") || !strings.Contains(why, "aaargh") {
			t.Fatalf("it ended: %s", why)
		}
	}
}
