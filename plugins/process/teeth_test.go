package process_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// check runs every rule over the runtime that is the test binary as mode.
func check(t *testing.T, mode string) sdktest.Report {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), mode)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]string{
		"supervisor_mode": "own", "cgroup_parent": cgroupParent(), "supervisor": filepath.Join(built, "bin", "belay-supervise"),
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := sdktest.Check(t.Context(), sdktest.CheckOptions{Executable: path, Config: config, Image: fakeImage, HangUp: 6})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A runtime that keeps the contract keeps every rule, and none is left out;
// for each rule there is one that breaks it and no other.
func TestRuntimeSuiteHasTeeth(t *testing.T) {
	if os.Getenv("BELAY_TEST_TEETH") == "" {
		t.Skip("48 runtimes in a row, with no race detector: make test-teeth, which is part of make test")
	}
	if os.Geteuid() != 0 {
		t.Skip("not root: what pretends to be a runtime with images runs its programs as root, as images say")
	}
	good := check(t, goodRuntime)
	unproven := map[string]bool{}
	for _, v := range good.Verdicts {
		unproven[v.Rule] = true
		if v.Result != sdktest.Pass {
			t.Errorf("%s: %s: %s", v.Result, v.Rule, strings.Join(v.Messages, "; "))
		}
	}
	atOnce := make(chan bool, 8)
	var wg sync.WaitGroup
	for mode, rule := range brokenRuntimes {
		if !unproven[rule] {
			t.Errorf("the suite has no rule %q", rule)
		}
		delete(unproven, rule)
		wg.Go(func() {
			atOnce <- true
			defer func() { <-atOnce }()
			var broke []string
			var why strings.Builder
			for _, v := range check(t, mode).Verdicts {
				if v.Result == sdktest.Fail {
					broke = append(broke, v.Rule)
					why.WriteString(v.Rule + ": " + strings.Join(v.Messages, "; ") + "\n")
				}
			}
			if !slices.Equal(broke, []string{rule}) {
				t.Errorf("runtime %s is to break %q, it broke %q\n%s", mode, rule, broke, why.String())
			}
		})
	}
	wg.Wait()
	for rule := range unproven {
		t.Errorf("no runtime of the tests breaks %q", rule)
	}
}
