package sdktest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// The test binary is also every plugin: which one, its file name says.
func TestMain(m *testing.M) {
	mode := filepath.Base(os.Args[0])
	if mode == failingPlugin {
		serve.Main(failing{})
		return
	}
	if _, ok := brokenDevices[mode]; ok || mode == goodDevice {
		pretend(mode)
		return
	}
	os.Exit(m.Run())
}

// plugin makes the file that runs as mode.
func plugin(t *testing.T, mode string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), mode)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// verdicts runs the device suite over mode.
func verdicts(t *testing.T, mode string) []Verdict {
	t.Helper()
	hardware := t.TempDir()
	c := &checker{timeout: time.Minute, grace: 15 * time.Second}
	outer := newRecorder(t.Context())
	outer.relay = c.log
	s := deviceSuite(outer, DeviceOptions{
		Executable: plugin(t, mode), Config: []byte(`{"hardware":"` + hardware + `"}`),
		Change: func() error { return os.WriteFile(filepath.Join(hardware, "more"), nil, 0o600) },
	})
	c.suite(t.Context(), sdk.KindDevice, s)
	<-outer.run(func(T) {})
	return c.out.Verdicts
}

func failures(vs []Verdict) (names []string, all string) {
	var b strings.Builder
	for _, v := range vs {
		if v.Result == Fail {
			names = append(names, v.Rule)
			b.WriteString(v.Rule + ": " + strings.Join(v.Messages, "; ") + "\n  " + strings.Join(v.Log, "\n  ") + "\n")
		}
	}
	return names, b.String()
}

// A plugin that keeps the contract keeps every rule, and none is left out.
func TestDeviceSuitePassesAGoodPlugin(t *testing.T) {
	for _, v := range verdicts(t, goodDevice) {
		if v.Result != Pass {
			t.Errorf("%s: %s: %s", v.Result, v.Rule, strings.Join(v.Messages, "; "))
		}
	}
}

// The same from go test, as an author's own test has it.
func TestDeviceInGoTest(t *testing.T) {
	Device(t, DeviceOptions{Executable: plugin(t, goodDevice), Config: []byte(`{"hardware":"/nowhere"}`)})
}

// For each rule there is a plugin that breaks it and no other.
func TestDeviceSuiteHasTeeth(t *testing.T) {
	atOnce := make(chan bool, 10)
	var wg sync.WaitGroup
	for mode, rule := range brokenDevices {
		wg.Go(func() {
			atOnce <- true
			defer func() { <-atOnce }()
			names, all := failures(verdicts(t, mode))
			if !slices.Equal(names, []string{rule}) {
				t.Errorf("plugin %s is to break %q, it broke %q\n%s", mode, rule, names, all)
			}
		})
	}
	wg.Wait()
}

// No rule is without such a plugin.
func TestEveryDeviceRuleHasABrokenPlugin(t *testing.T) {
	outer := newRecorder(t.Context())
	s := deviceSuite(outer, DeviceOptions{Executable: "/none"})
	<-outer.run(func(T) {})
	has := map[string]bool{}
	for _, rule := range brokenDevices {
		has[rule] = true
	}
	for _, r := range s.rules {
		if !has[r.name] {
			t.Errorf("no plugin of the tests breaks %q", r.name)
		}
		delete(has, r.name)
	}
	for rule := range has {
		t.Errorf("the suite has no rule %q", rule)
	}
}
