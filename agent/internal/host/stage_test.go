package host

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func processStatus(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestOnlyDetectorsAreConfined(t *testing.T) {
	f := newFixture(t, quick, map[string]json.RawMessage{"dev": json.RawMessage(`{"mood":"curious"}`)}, "dev", "good", "devfree")
	f.Host.config.Stage = []string{"/proc/self/exe", "plugin-stage"}
	f.settings.set("devfree", Settings{Profile: ProfileNone}, nil)
	f.write(t, "words", "just words\n", 0o755)
	added, err := f.scan()
	if err != nil || len(added) != 1 {
		t.Fatal(added, err)
	}
	f.start(t)
	dev, good, free := f.wait(t, "dev", is(Ready)), f.wait(t, "good", is(Ready)), f.wait(t, "devfree", is(Ready))
	s := processStatus(t, dev.PID)
	for _, line := range []string{"NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"} {
		if !strings.Contains(s, line) {
			t.Errorf("status of the detector lacks %q:\n%s", line, s)
		}
	}
	if os.Geteuid() == 0 {
		if !strings.Contains(s, "CapBnd:\t0000000000000000") {
			t.Errorf("the detector can get capabilities again:\n%s", s)
		}
	}
	for _, p := range []Status{good, free} {
		if s := processStatus(t, p.PID); !strings.Contains(s, "NoNewPrivs:\t0") {
			t.Errorf("%s is confined:\n%s", p.Name, s)
		}
		if p.Missing != nil {
			t.Errorf("%s: %q", p.Name, p.Missing)
		}
	}
	tried, _ := os.ReadFile(filepath.Join(f.state, "dev", "tried"))
	landlock := len(dev.Missing) == 0
	if landlock && !strings.Contains(string(tried), "not-mine: permission denied") {
		t.Errorf("the detector wrote outside its directories: %s", tried)
	}
	if !landlock && !strings.Contains(strings.Join(dev.Missing, ";"), "Landlock") {
		t.Errorf("missing: %q", dev.Missing)
	}
	if !strings.Contains(string(tried), "operation not permitted") && !strings.HasSuffix(string(tried), "permission denied") {
		t.Errorf("the detector made a device node: %s", tried)
	}
	// What exec says still explains the failure of a launch.
	if s := f.wait(t, "words", func(s Status) bool { return s.State == Failed && s.Error != "" }); !strings.Contains(s.Error, "text file") {
		t.Errorf("a text file: %s", s.Error)
	}
	// The second launch need not ask what it is.
	if err := syscall.Kill(dev.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.wait(t, "dev", func(s Status) bool { return s.State == Ready && s.PID != dev.PID })
	if b, err := os.ReadFile(filepath.Join(f.state, ".described", "dev")); err != nil || !strings.Contains(string(b), dev.SHA256) {
		t.Errorf("remembered: %s, %v", b, err)
	}
}
