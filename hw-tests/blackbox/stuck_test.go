package blackbox

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// bugged is a directory with an agent in which bugs can be planted, see
// hw-tests/faults. Only agent/internal/watchdog is quicker for those here.
var bugged = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "belay-bug")
	if err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-tags=grpcnotrace,belay_bug", "-o", dir+"/", "./agent/cmd/belay-agent")
	build.Dir = "../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("build an agent with bugs: %w\n%s", err, out), os.RemoveAll(dir))
	}
	return dir, nil
})

// bugFile is where such an agent reads which bug it has. It is mounted over for
// each agent; this one, of everyone's, stays empty.
const bugFile = "/run/belay-bug"

// supervisor listens where an agent notifies systemd, and writes down when it
// was told what.
type supervisor struct {
	conn *net.UnixConn
	mu   sync.Mutex
	told map[string][]time.Time
}

func newSupervisor(t *testing.T, path string) *supervisor {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	v := &supervisor{conn: conn, told: map[string][]time.Time{}}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for b := make([]byte, 4096); ; {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			v.mu.Lock()
			for _, line := range strings.Fields(string(b[:n])) {
				v.told[line] = append(v.told[line], time.Now())
			}
			v.mu.Unlock()
		}
	}()
	t.Cleanup(func() { conn.Close(); <-ended })
	return v
}

// heard is how often it was told something since then, and when last.
func (v *supervisor) heard(what string, since time.Time) (n int, last time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, at := range v.told[what] {
		if at.After(since) {
			n, last = n+1, at
		}
	}
	return n, last
}

// TestStuckAgentIsRestarted: an agent that hangs, or that no longer gets
// through to a control plane which answers, ends by itself and says what was
// wrong; started again it finds its task as it was.
func TestStuckAgentIsRestarted(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("an agent with bugs is built for it:", err)
	}
	program, err := bugged()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(program) })
	if f, err := os.OpenFile(bugFile, os.O_CREATE|os.O_EXCL, 0o644); err == nil {
		f.Close()
		t.Cleanup(func() { os.Remove(bugFile) })
	}
	for _, c := range []struct {
		bug  string
		says []string // in its log, one after the other
		fed  bool     // to the end: the loops turn
	}{
		{"stuck-loop", []string{"a loop is slow to turn", "stuck; where every goroutine is follows", "watchdog: stuck: task loop has not turned for"}, false},
		{"stuck-reports", []string{"a loop is slow to turn", "stuck; where every goroutine is follows", "watchdog: stuck: session reports has not turned for"}, false},
		{"deaf-transport", []string{"no session for long: the tunnel is built anew", "the transport is built anew", "although the control plane's port answers: ending"}, true},
	} {
		t.Run(c.bug, func(t *testing.T) {
			t.Parallel() // it mostly waits
			var v *supervisor
			bug := ""
			s := newSiteOf(t, "process", func(s *site, a *rig.Agent) {
				// As systemd starts it, and with a file of its own to say which bug it has.
				socket := filepath.Join(s.dir, "notify")
				v = newSupervisor(t, socket)
				bug = filepath.Join(s.dir, "bug")
				plant(t, bug, "")
				a.Bin = rig.Binaries(program)
				a.Within = []string{"env", "NOTIFY_SOCKET=" + socket, "WATCHDOG_USEC=3000000",
					"unshare", "--mount", "/bin/sh", "-ec", `mount --bind "$0" ` + bugFile + `; exec "$@"`, bug}
			})
			before := s.run(t, "keep", container{"name": "c", "script": waitScript(s.dir, "keep"),
				"healthCheck": map[string]any{"command": []any{"CMD", "/bin/true"}, "interval": 5}})
			// Whatever fails from here on, nothing goes on running.
			t.Cleanup(func() { _ = os.WriteFile(filepath.Join(s.dir, "keep.go"), nil, 0o644) })
			v.until(t, s, "a healthy agent to feed systemd's watchdog", "WATCHDOG=1", time.Now(), 3)
			l := s.says(t, "the agent to be connected", func(l local) bool { return l.Link.Connected })
			t.Logf("watched: %q", l.Watched)
			for _, name := range []string{"task loop", "tunnel", "clock", "memory", "network changes", "events of process",
				"session reader", "session reports", "session assignments", "session requests", "session end"} {
				if !slices.Contains(l.Watched, name) {
					t.Errorf("not watched: %s", name)
				}
			}
			halt(t, s.agent)

			plant(t, bug, c.bug)
			started := time.Now()
			if err := s.agent.Restart(); err != nil {
				t.Fatal(err)
			}
			v.until(t, s, "the agent to be ready", "READY=1", started, 1)
			if !c.fed {
				s.says(t, "the agent to be connected", func(l local) bool { return l.Link.Connected })
				// Something to do, and to report.
				if _, err := s.cli.RunTask(deadline(t, patience), cluster, s.document(t, "other", container{"name": "c", "script": "exit 0"})); err != nil {
					t.Fatal(err)
				}
			}
			select {
			case <-s.agent.Done():
			case <-time.After(2 * patience):
				t.Fatal("the agent did not end")
			}
			ended := time.Now()
			if code, err := s.agent.Stop(time.Second); err != nil || code != 1 {
				t.Errorf("exit code %d, %v", code, err)
			}
			n, last := v.heard("WATCHDOG=1", started)
			t.Logf("ended %s after its start; %d times fed, last %s before its end", ended.Sub(started).Round(time.Millisecond), n, ended.Sub(last).Round(time.Millisecond))
			switch silent := ended.Sub(last); {
			case n == 0:
				t.Error("it never fed systemd's watchdog")
			case !c.fed && silent < time.Second:
				t.Errorf("fed to within %s of its end", silent)
			case c.fed && silent > 20*time.Second:
				t.Errorf("not fed for %s though its loops turned", silent)
			}
			log, err := os.ReadFile(s.agent.Log)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range c.says {
				i := bytes.Index(log, []byte(line))
				if i < 0 {
					t.Fatalf("its log does not say %q, or not in that place", line)
				}
				log = log[i+len(line):]
			}
			s.same(t, "ended", before)

			plant(t, bug, "")
			if err := s.agent.Restart(); err != nil { // as systemd does
				t.Fatal(err)
			}
			s.says(t, "the agent to be connected again", func(l local) bool { return l.Link.Connected && l.Tasks["RUNNING"] == 1 })
			now := s.await(t, before.ID, "the task to be known as it is", patience, running)
			if c, was := now.Container("c"), before.Container("c"); c.PID != was.PID || c.Attempt != was.Attempt || c.RuntimeID != was.RuntimeID {
				t.Errorf("pid %d attempt %d, before: pid %d attempt %d", c.PID, c.Attempt, was.PID, was.Attempt)
			}
			s.same(t, "in the end", before)
			release(t, s.dir, "keep")
			exits(t, s, before.ID, 7)
		})
	}
}

func plant(t *testing.T, file, bug string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(bug), 0o644); err != nil {
		t.Fatal(err)
	}
}

func halt(t *testing.T, a *rig.Agent) {
	t.Helper()
	if code, err := a.Stop(20 * time.Second); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v", code, err)
	}
}

// until waits until it was told something so many times.
func (v *supervisor) until(t *testing.T, s *site, what, line string, since time.Time, times int) {
	t.Helper()
	if err := rig.Until(deadline(t, patience), s.agent.Process, what, func() error {
		if n, _ := v.heard(line, since); n < times {
			return fmt.Errorf("told %s %d times", line, n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
