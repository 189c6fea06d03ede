package host

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

var quick = Timing{Scan: 20 * time.Millisecond, Quarantine: time.Hour, MinBackoff: time.Millisecond}

func config(text string) Settings {
	return Settings{Source: "/etc/p.toml", JSON: json.RawMessage(text)}
}

// replace puts a copy of this binary, told apart by its last byte, where a
// plugin's executable is.
func (f fixture) replace(t *testing.T, name string, tail byte) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	f.install(t, name, append(b, tail))
}

// install does what installers do: a new file, renamed over the old.
func (f fixture) install(t *testing.T, name string, content []byte) {
	t.Helper()
	path := filepath.Join(f.dir, name)
	if err := errors.Join(os.WriteFile(path+"~", content, 0o755), os.Chmod(path+"~", 0o755), os.Rename(path+"~", path)); err != nil {
		t.Fatal(err)
	}
}

func TestNewConfigurationIsTakenOver(t *testing.T) {
	f := newFixture(t, quick, map[string]json.RawMessage{"good": json.RawMessage(`{"x":1}`)}, "good")
	f.start(t)
	first := f.wait(t, "good", is(Ready))
	f.settings.set("good", config(`{"x":2}`), nil)
	s := f.wait(t, "good", func(s Status) bool { return s.State == Ready && s.PID != first.PID })
	if b, _ := os.ReadFile(filepath.Join(f.state, "good", "config")); string(b) != `{"x":2}` || s.Restarts != 0 || s.Error != "" {
		t.Errorf("it has configuration %s, status %+v", b, s)
	}
}

func TestBadConfigurationDoesNotTakeAPluginDown(t *testing.T) {
	f := newFixture(t, quick, map[string]json.RawMessage{"picky": json.RawMessage(`{"color":"red"}`), "dev": json.RawMessage(`{"mood":"good"}`)}, "picky", "dev")
	f.start(t)
	picky, dev := f.wait(t, "picky", is(Ready)), f.wait(t, "dev", is(Ready))
	says := func(words ...string) func(Status) bool {
		return func(s Status) bool {
			for _, w := range words {
				if !strings.Contains(s.Error, w) {
					return false
				}
			}
			return s.State == Ready
		}
	}
	works := func() {
		t.Helper()
		r, err := f.Runtime("picky")
		if err == nil {
			_, err = r.List(t.Context())
		}
		if err != nil {
			t.Errorf("the plugin does not serve: %v", err)
		}
	}
	// What the file says cannot be read.
	f.settings.set("picky", Settings{}, errors.New("picky.toml:3: unknown key"))
	if s := f.wait(t, "picky", says("not taken", "goes on with the one before", "picky.toml:3")); s.PID != picky.PID {
		t.Error("it was relaunched for a file that cannot be read")
	}
	// What the plugin's options forbid.
	f.settings.set("dev", config(`{"moood":1,"flood":"x"}`), nil)
	if s := f.wait(t, "dev", says("/etc/p.toml", "not taken", "moood is not known", "flood")); s.PID != dev.PID {
		t.Error("it was relaunched with what its options forbid")
	}
	// What only Configure finds wrong.
	f.settings.set("picky", config(`{"color":"bad"}`), nil)
	refused := f.wait(t, "picky", says("/etc/p.toml", "color: bad is no color", "goes on with the one before"))
	works()
	// It crashes: the configuration on disk is still bad.
	if err := syscall.Kill(refused.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.wait(t, "picky", func(s Status) bool { return s.PID != refused.PID && says("color: bad is no color")(s) })
	works()
	// Corrected, as it was before and otherwise.
	f.settings.set("picky", config(`{"color":"green"}`), nil)
	f.wait(t, "picky", func(s Status) bool { return s.State == Ready && s.Error == "" })
	f.settings.set("dev", Settings{Source: "dev.toml", JSON: json.RawMessage(`{"mood":"good"}`)}, nil)
	if s := f.wait(t, "dev", func(s Status) bool { return s.State == Ready && s.Error == "" }); s.PID != dev.PID {
		t.Error("it was relaunched for the configuration it has")
	}
}

func TestNewExecutableIsTakenOver(t *testing.T) {
	f := newFixture(t, quick, nil, "slow", "good")
	f.start(t)
	first := f.wait(t, "slow", is(Ready))
	r, err := f.Runtime("slow")
	if err != nil {
		t.Fatal(err)
	}
	// Calls all the time: none of them may notice.
	stop, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(failed)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := r.List(t.Context()); err != nil {
				failed <- err
				return
			}
		}
	}()
	f.replace(t, "slow", 1)
	second := f.wait(t, "slow", func(s Status) bool { return s.State == Ready && s.SHA256 != first.SHA256 })
	if second.PID == first.PID || second.Restarts != 0 {
		t.Errorf("after the upgrade %+v, before %+v", second, first)
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Errorf("a call failed during the upgrade: %v", err)
	}
	// Something that is no plugin: the process goes on, and it says so.
	f.install(t, "slow", []byte("just words\n"))
	bad := f.wait(t, "slow", func(s Status) bool { return strings.Contains(s.Error, "new executable is not taken") })
	if !strings.Contains(bad.Error, "text file") || bad.PID != second.PID || bad.State != Ready {
		t.Errorf("with a text file as new executable: %+v", bad)
	}
	if _, err := r.List(t.Context()); err != nil {
		t.Error(err)
	}
	// The same content again is no upgrade.
	f.replace(t, "slow", 1)
	if s := f.wait(t, "slow", func(s Status) bool { return s.Error == "" }); s.PID != second.PID {
		t.Errorf("relaunched for the same content: %+v", s)
	}
	if s := f.wait(t, "good", is(Ready)); s.Restarts != 0 {
		t.Errorf("the other plugin was disturbed: %+v", s)
	}
}

func TestASlowCallDoesNotHoldUpAnUpgradeForEver(t *testing.T) {
	timing := quick
	timing.Drain = 100 * time.Millisecond
	f := newFixture(t, timing, nil, "slow")
	f.start(t)
	first := f.wait(t, "slow", is(Ready))
	r, err := f.Runtime("slow")
	if err != nil {
		t.Fatal(err)
	}
	busy := make(chan struct{})
	go func() {
		defer close(busy)
		for range 10 {
			go r.List(t.Context())
			select {
			case <-time.After(50 * time.Millisecond):
			case <-t.Context().Done():
			}
		}
	}()
	f.settings.set("slow", config(`{"x":2}`), nil)
	f.wait(t, "slow", func(s Status) bool { return s.State == Ready && s.PID != first.PID })
	<-busy
}

func TestDisabledAndPinned(t *testing.T) {
	f := newFixture(t, quick, nil, "good", "dev")
	f.settings.set("good", Settings{Source: "good.toml", SHA256: strings.Repeat("0", 64)}, nil)
	f.start(t)
	s := f.wait(t, "good", func(s Status) bool { return s.State == Failed && s.Error != "" })
	for _, w := range []string{"SHA-256 is " + s.SHA256, strings.Repeat("0", 64), "good.toml"} {
		if !strings.Contains(s.Error, w) {
			t.Errorf("error lacks %q: %s", w, s.Error)
		}
	}
	dev := f.wait(t, "dev", is(Ready))
	f.settings.set("good", Settings{Source: "good.toml", SHA256: dev.SHA256}, nil)
	pid := f.wait(t, "good", is(Ready)).PID
	f.settings.set("good", Settings{Source: "good.toml", Disabled: true}, nil)
	f.wait(t, "good", is(Disabled))
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process of a disabled plugin lives: %v", err)
	}
	if _, err := f.Runtime("good"); !errors.Is(err, sdk.Unavailable) || !strings.Contains(err.Error(), "disabled") {
		t.Errorf("a disabled plugin's runtime: %v", err)
	}
	f.settings.set("good", Settings{}, nil)
	f.wait(t, "good", is(Ready))
}

func TestRemovedPluginIsEnded(t *testing.T) {
	f := newFixture(t, quick, nil, "good")
	f.start(t)
	pid := f.wait(t, "good", is(Ready)).PID
	if err := os.Remove(filepath.Join(f.dir, "good")); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for len(f.Status()) > 0 {
		select {
		case <-deadline:
			t.Fatalf("a removed plugin is still there: %+v", f.Status())
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("its process lives: %v", err)
	}
}
