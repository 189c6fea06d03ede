package host

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// hog takes memory until it is killed.
func hog() {
	var all [][]byte
	for {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
		time.Sleep(time.Duration(len(all)/1024) * time.Millisecond)
	}
}

func flood() {
	line := []byte(strings.Repeat("x", 200) + "\n")
	for {
		_, _ = os.Stderr.Write(line)
	}
}

// garbage shakes hands and then talks rubbish.
func garbage() {
	path := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), fmt.Sprint("host.", os.Getpid()))
	l, err := net.Listen("unix", path)
	if err != nil {
		os.Exit(9)
	}
	fmt.Printf("1|2|unix|%s|grpc|\n", path)
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(9)
		}
		go func() {
			for {
				if _, err := c.Write(bytes.Repeat([]byte("rubbish "), 512)); err != nil {
					return
				}
			}
		}()
	}
}

func TestMemoryBlowUpIsKilledAndNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups take root")
	}
	f := newFixture(t, quick, nil, "hog", "devhog", "good", "dev")
	f.Host.config.LimitGroup = fmt.Sprint("belay-test-", os.Getpid())
	if g := openGroup(f.Host.config.LimitGroup, "probe"); g.memory.dir == "" && g.units == nil {
		t.Skipf("no memory controller: %s", g.lacks)
	} else {
		defer func() {
			if g.units != nil {
				return
			}
			g.remove()
			if _, err := os.Stat(filepath.Dir(g.memory.dir)); !os.IsNotExist(err) {
				t.Errorf("groups are left behind: %v", err)
			}
		}()
	}
	limit := uint64(48 << 20)
	for _, n := range []string{"hog", "devhog"} {
		f.settings.set(n, Settings{MemoryMax: &limit}, nil)
	}
	stop := f.start(t)
	if s := f.wait(t, "good", is(Ready)); strings.Contains(strings.Join(s.Missing, ";"), "does not apply") {
		stop()
		t.Skipf("no limits here: %q", s.Missing)
	}
	for _, n := range []string{"hog", "devhog"} {
		s := f.wait(t, n, func(s Status) bool { return strings.Contains(s.Error, "killed: out of memory (limit 48 MiB)") })
		if s.MemoryMax != limit || s.CPUMax != 100 {
			t.Errorf("%s: %+v", n, s)
		}
		f.wait(t, n, func(s Status) bool { return s.Restarts > 0 })
	}
	for n, want := range map[string]uint64{"good": runtimeMemory, "dev": deviceMemory} {
		// The limit of its kind follows once the plugin has told its kind.
		s := f.wait(t, n, func(s Status) bool { return s.State == Ready && s.MemoryMax == want && s.Missing == nil })
		if s.Restarts != 0 || s.Memory == 0 {
			t.Errorf("%s: %+v", n, s)
		}
	}
	stop()
}

// counted counts lines of the log.
type counted struct {
	mu             sync.Mutex
	lines, longest int
}

func (c *counted) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines++
	c.longest = max(c.longest, len(b))
	return len(b), nil
}

func TestFloodOnStderr(t *testing.T) {
	for _, name := range []string{"floods", "devfloods"} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, Timing{Ping: 100 * time.Millisecond}, nil, name, "good")
			log := &counted{}
			f.Host.log = slog.New(slog.NewTextHandler(io.Writer(log), nil))
			f.start(t)
			first := f.wait(t, name, is(Ready))
			<-time.After(1500 * time.Millisecond)
			if s := f.wait(t, name, is(Ready)); s.PID != first.PID {
				t.Errorf("it was relaunched: %+v", s)
			}
			if s := f.wait(t, "good", is(Ready)); s.Restarts != 0 {
				t.Errorf("the other plugin was disturbed: %+v", s)
			}
			log.mu.Lock()
			defer log.mu.Unlock()
			if log.lines < 500 || log.lines > 1500 {
				t.Errorf("%d lines in the log", log.lines)
			}
		})
	}
}

func TestGarbageOnTheSocket(t *testing.T) {
	f := newFixture(t, quick, nil, "garbage", "good")
	f.start(t)
	s := f.wait(t, "garbage", is(Quarantined))
	if !strings.Contains(s.Error, "not the plugin protocol") {
		t.Errorf("error is %s", s.Error)
	}
	if s := f.wait(t, "good", is(Ready)); s.Restarts != 0 {
		t.Errorf("the other plugin was disturbed: %+v", s)
	}
}

// Whatever happens to a plugin of either kind, it comes back by itself and the
// others notice nothing.
func TestEitherKindRecovers(t *testing.T) {
	timing := quick
	timing.Ping, timing.PingAnswer, timing.Close = 50*time.Millisecond, slow(time.Second), 100*time.Millisecond
	timing.Crashes = 100
	f := newFixture(t, timing, nil, "good", "dev", "good-bystander", "dev-bystander", "slow-bystander")
	f.Host.config.Stage = []string{"/proc/self/exe", "plugin-stage"}
	f.start(t)
	bystanders := map[string]int{}
	for _, n := range []string{"good-bystander", "dev-bystander", "slow-bystander"} {
		bystanders[n] = f.wait(t, n, is(Ready)).PID
	}
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGSEGV} {
		for _, n := range []string{"good", "dev"} {
			before := f.wait(t, n, is(Ready))
			if err := syscall.Kill(before.PID, sig); err != nil {
				t.Fatal(err)
			}
			after := f.wait(t, n, func(s Status) bool { return s.State == Ready && s.PID != before.PID })
			if after.Restarts != before.Restarts+1 {
				t.Errorf("%s after %s: %d restarts, before %d", n, sig, after.Restarts, before.Restarts)
			}
		}
		f.inventory(t, "dev", ready)
	}
	for n, pid := range bystanders {
		if s := f.wait(t, n, is(Ready)); s.PID != pid {
			t.Errorf("%s was relaunched: %+v", n, s)
		}
	}
}

// Out of quarantine a plugin comes by itself.
func TestQuarantineEndsByItself(t *testing.T) {
	f := newFixture(t, Timing{MinBackoff: time.Millisecond, Quarantine: 100 * time.Millisecond}, nil, "heals", "good")
	f.start(t)
	s := f.wait(t, "heals", func(s Status) bool { return s.State == Quarantined && s.Restarts > 7 })
	if !strings.Contains(s.Error, "exit status 6") {
		t.Errorf("it is %+v", s)
	}
	if err := os.WriteFile(filepath.Join(f.state, "heals", "well"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s = f.wait(t, "heals", func(s Status) bool { return s.State == Ready && s.Error == "" })
	if !strings.Contains(s.LastDown, "exit status 6") {
		t.Errorf("it does not say why it was down: %+v", s)
	}
	if g := f.wait(t, "good", is(Ready)); g.Restarts != 0 {
		t.Errorf("the other plugin was disturbed: %+v", g)
	}
}
