package sdktest

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Result of trying a rule.
type Result string

// The results.
const (
	Pass Result = "PASS"
	Fail Result = "FAIL"
	Skip Result = "SKIP" // could not be tried here; Messages say why
)

// Verdict on one rule.
type Verdict struct {
	Kind     sdk.Kind
	Rule     string
	Result   Result
	Duration time.Duration
	Messages []string // what was expected and what was seen, or why it was skipped
	Log      []string // the plugin's last words, when it failed
}

// CheckOptions say which plugin to check and what its kinds need for that.
type CheckOptions struct {
	// Executable is the plugin, under the plugin's name.
	Executable string
	// Config is the plugin's own configuration.
	Config json.RawMessage
	// Image with a shell, for runtimes that have images.
	Image string
	// HangUp is how often a runtime is killed at moments all over Start; 0: 10.
	HangUp int
	// Slow stretches the suites' patience; 0: what SlowEnv says, or 1.
	Slow int
	// RuleTimeout bounds each rule; 0: 5 minutes. Slow stretches it too.
	RuleTimeout time.Duration
	// OnInfo is told what the plugin says it is, once it has started; nil: nobody.
	OnInfo func(sdk.Info)
	// OnVerdict is told each verdict as it comes; nil: nobody.
	OnVerdict func(Verdict)
}

// Report is what a plugin said it is and what came of it.
type Report struct {
	Info     sdk.Info
	Verdicts []Verdict
}

// Count is how many rules had that result.
func (r Report) Count(result Result) int {
	n := 0
	for _, v := range r.Verdicts {
		if v.Result == result {
			n++
		}
	}
	return n
}

// Passed tells whether at least one rule was kept and none broken.
func (r Report) Passed() bool { return r.Count(Fail) == 0 && r.Count(Pass) > 0 }

// Check tries every rule for every kind the plugin says it is of, one after
// the other. It is for programs; in a test call Device or Runtime. It fails
// only when ctx ended: a plugin that cannot be launched has broken a rule.
func Check(ctx context.Context, o CheckOptions) (Report, error) {
	if o.RuleTimeout == 0 {
		o.RuleTimeout = 5 * time.Minute
	}
	abs, err := filepath.Abs(o.Executable)
	if err != nil {
		return Report{}, err
	}
	o.Executable = abs
	c := &checker{timeout: o.RuleTimeout * time.Duration(slowness(o.Slow)), grace: 15 * time.Second, report: o.OnVerdict}
	first, begun := newRecorder(ctx), time.Now()
	var info sdk.Info
	<-first.run(func(t T) {
		log := newRecorder(ctx)
		log.relay = func(line string) { first.Logf("%s", line) }
		defer log.cleanUp()
		b := newBench(log, benchOptions{executable: o.Executable, config: o.Config, slow: o.Slow})
		info = b.launch(t).Info()
	})
	if v := first.verdict(ruleLaunch, time.Since(begun)); v.Result != Pass {
		c.add(v)
		return c.out, ctx.Err()
	}
	if o.OnInfo != nil {
		o.OnInfo(info)
	}
	c.out.Info = info
	for _, kind := range info.Kinds {
		outer := newRecorder(ctx)
		outer.relay = c.log
		var s suite
		switch kind {
		case sdk.KindDevice:
			s = deviceSuite(outer, DeviceOptions{Executable: o.Executable, Config: o.Config, Slow: o.Slow})
		case sdk.KindRuntime:
			s = runtimeSuite(outer, RuntimeOptions{Executable: o.Executable, Config: o.Config, Image: o.Image, HangUp: o.HangUp, Slow: o.Slow})
		default:
			c.add(Verdict{Kind: kind, Rule: "its kind is known", Result: Fail,
				Messages: []string{fmt.Sprintf("the plugin is of kind %q, known are %s and %s", kind, sdk.KindRuntime, sdk.KindDevice)}})
			continue
		}
		c.suite(ctx, kind, s)
		s.kill()
		<-outer.run(func(T) {}) // what belongs to the whole suite is cleaned up
	}
	if len(info.Kinds) == 0 {
		c.add(Verdict{Rule: "it is of a kind", Result: Fail, Messages: []string{"the plugin names no kind, so it can do nothing"}})
	}
	return c.out, ctx.Err()
}

// checker runs suites in a plain program.
type checker struct {
	timeout time.Duration
	grace   time.Duration // for a rule whose time is up to come back
	report  func(Verdict)
	out     Report

	mu      sync.Mutex
	current *recorder // gets what the plugin writes
}

func (c *checker) log(line string) {
	c.mu.Lock()
	r := c.current
	c.mu.Unlock()
	if r != nil {
		r.Logf("%s", line)
	}
}

func (c *checker) add(v Verdict) {
	c.out.Verdicts = append(c.out.Verdicts, v)
	if c.report != nil {
		c.report(v)
	}
}

func (c *checker) suite(ctx context.Context, kind sdk.Kind, s suite) {
	broken := ""
	for i, rule := range s.rules {
		if ctx.Err() != nil {
			broken = "the check was interrupted"
		}
		if broken != "" {
			c.add(Verdict{Kind: kind, Rule: rule.name, Result: Skip, Messages: []string{broken}})
			continue
		}
		v, stuck := c.rule(ctx, rule, s.kill)
		v.Kind = kind
		c.add(v)
		switch {
		case stuck:
			broken = fmt.Sprintf("not tried: %q is stuck", rule.name)
		case i == 0 && v.Result == Fail:
			broken = fmt.Sprintf("not tried: %q failed", rule.name)
		}
	}
}

// rule runs one rule. When its time is up the plugin is killed, which ends
// every call to it; a rule that is still stuck then is left behind.
func (c *checker) rule(ctx context.Context, rule rule, kill func()) (v Verdict, stuck bool) {
	r := newRecorder(ctx)
	c.mu.Lock()
	c.current = r
	c.mu.Unlock()
	begun := time.Now()
	done := r.run(rule.run)
	timer := time.NewTimer(c.timeout)
	defer timer.Stop()
	select {
	case <-done:
		if ctx.Err() != nil { // what it came to then says nothing
			r.Errorf("interrupted")
		}
		return r.verdict(rule.name, time.Since(begun)), false
	case <-timer.C:
		r.Errorf("expected an end within %s, it was still going on then", c.timeout)
	case <-ctx.Done():
		r.Errorf("interrupted")
	}
	r.cancel()
	kill()
	select {
	case <-done:
	case <-time.After(c.grace):
		stuck = true
	}
	return r.verdict(rule.name, time.Since(begun)), stuck
}
