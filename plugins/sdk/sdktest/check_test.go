package sdktest

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/sdk"
)

// try runs rules as a plain program does.
func try(ctx context.Context, kill func(), rules ...rule) map[string]Verdict {
	c := &checker{timeout: 200 * time.Millisecond, grace: 200 * time.Millisecond}
	c.suite(ctx, sdk.KindDevice, suite{rules: rules, kill: kill})
	got := map[string]Verdict{}
	for _, v := range c.out.Verdicts {
		got[v.Rule] = v
	}
	return got
}

// A program gets of every rule what go test would have told.
func TestVerdicts(t *testing.T) {
	var order []string
	dir := ""
	got := try(t.Context(), func() {},
		rule{"first", func(T) {}},
		rule{"fails", func(t T) { t.Logf("the plugin wrote this"); t.Errorf("one"); t.Error("two") }},
		rule{"fatal", func(t T) { t.Fatal("that is all"); t.Error("not reached") }},
		rule{"skips", func(t T) { t.Skipf("no %s", "device") }},
		rule{"panics", func(T) { panic("boom") }},
		rule{"cleans up", func(t T) {
			dir = t.TempDir()
			t.Cleanup(func() { order = append(order, "first") })
			t.Cleanup(func() { order = append(order, "second"); t.Fatal("in clean-up") })
		}},
	)
	for name, want := range map[string]Verdict{
		"first": {Result: Pass},
		"fails": {Result: Fail, Messages: []string{"one", "two"}, Log: []string{"the plugin wrote this"}},
		"fatal": {Result: Fail, Messages: []string{"that is all"}},
		"skips": {Result: Skip, Messages: []string{"no device"}},
	} {
		v := got[name]
		if d := cmp.Diff([]any{want.Result, want.Messages, want.Log}, []any{v.Result, v.Messages, v.Log}); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	if v := got["panics"]; v.Result != Fail || !strings.Contains(v.Messages[0], "boom") {
		t.Errorf("panics: %+v", v)
	}
	if v := got["cleans up"]; v.Result != Fail || !slices.Equal(order, []string{"second", "first"}) {
		t.Errorf("clean-ups ran in order %v: %+v", order, v)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("%s is left", dir)
	}
}

// A rule that takes too long fails; the plugin is killed to get it back. One
// that is stuck even so is left behind, and nothing is tried after it.
func TestRulesHaveADeadline(t *testing.T) {
	killed := make(chan struct{})
	got := try(t.Context(), func() { close(killed) },
		rule{"first", func(T) {}},
		rule{"slow", func(T) { <-killed }},
		rule{"next", func(T) {}},
	)
	if v := got["slow"]; v.Result != Fail || !strings.Contains(v.Messages[0], "expected an end within 200ms") || got["next"].Result != Pass {
		t.Errorf("%+v", got)
	}
	forEver := make(chan struct{})
	defer close(forEver)
	got = try(t.Context(), func() {},
		rule{"first", func(T) {}},
		rule{"stuck", func(T) { <-forEver }},
		rule{"next", func(T) {}},
	)
	if got["stuck"].Result != Fail || got["next"].Result != Skip || !strings.Contains(got["next"].Messages[0], "is stuck") {
		t.Errorf("%+v", got)
	}
}

// A plugin that does not start, and a check that is interrupted, say so once.
func TestNothingIsTriedForNothing(t *testing.T) {
	got := try(t.Context(), func() {}, rule{"first", func(t T) { t.Error("no") }}, rule{"next", func(T) {}})
	if got["first"].Result != Fail || got["next"].Result != Skip {
		t.Errorf("%+v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got = try(ctx, func() {}, rule{"first", func(t T) { cancel(); <-t.Context().Done() }}, rule{"next", func(T) {}})
	if got["first"].Result != Fail || got["next"].Result != Skip || (Report{}).Passed() {
		t.Errorf("%+v", got)
	}
}

// Programs link this package: package testing is for tests.
func TestPackageTestingIsNotImported(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{join .Imports " "}}`, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if slices.Contains(strings.Fields(string(out)), "testing") {
		t.Errorf("imports are %s", out)
	}
}
