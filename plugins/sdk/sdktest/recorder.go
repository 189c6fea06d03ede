package sdktest

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
)

// recorder is a T that keeps what it is told.
type recorder struct {
	ctx    context.Context
	cancel context.CancelFunc
	relay  func(string) // where Logf goes; nil: lines

	mu       sync.Mutex
	failed   bool
	skipped  bool
	messages []string // of failures, or the reason of the skip
	lines    []string // the last of what was logged
	cleanups []func()
}

// keptLog is how many lines of log a verdict has at most.
const keptLog = 40

func newRecorder(ctx context.Context) *recorder {
	r := &recorder{}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

// run calls f as package testing would: FailNow ends its goroutine, a panic is
// a failure, clean-ups come last. done is closed after them.
func (r *recorder) run(f func(T)) (done <-chan struct{}) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer r.cleanUp()
		defer r.cancel()
		defer r.recovered()
		f(r)
	}()
	return ended
}

func (r *recorder) recovered() {
	if p := recover(); p != nil {
		r.Errorf("the rule itself panicked: %v\n%s", p, debug.Stack())
	}
}

// cleanUp runs each clean-up in a goroutine of its own, which it may end.
func (r *recorder) cleanUp() {
	for {
		r.mu.Lock()
		n := len(r.cleanups)
		if n == 0 {
			r.mu.Unlock()
			return
		}
		f := r.cleanups[n-1]
		r.cleanups = r.cleanups[:n-1]
		r.mu.Unlock()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			defer r.recovered()
			f()
		}()
		<-ended
	}
}

func (r *recorder) Helper()                  {}
func (r *recorder) Context() context.Context { return r.ctx }

func (r *recorder) Logf(format string, args ...any) {
	line := strings.TrimSpace(fmt.Sprintf(format, args...))
	if r.relay != nil {
		r.relay(line)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lines = append(r.lines, line); len(r.lines) > keptLog {
		r.lines = r.lines[1:]
	}
}

func (r *recorder) say(message string, failed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = r.failed || failed
	r.messages = append(r.messages, strings.TrimSpace(message))
}

func (r *recorder) Errorf(format string, args ...any) { r.say(fmt.Sprintf(format, args...), true) }
func (r *recorder) Error(args ...any)                 { r.say(fmt.Sprintln(args...), true) }

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Fatal(args ...any) {
	r.Error(args...)
	runtime.Goexit()
}

func (r *recorder) FailNow() {
	r.mu.Lock()
	r.failed = true
	r.mu.Unlock()
	runtime.Goexit()
}

func (r *recorder) Skipf(format string, args ...any) {
	r.say(fmt.Sprintf(format, args...), false)
	r.mu.Lock()
	r.skipped = true
	r.mu.Unlock()
	runtime.Goexit()
}

func (r *recorder) Skip(args ...any) { r.Skipf("%s", fmt.Sprintln(args...)) }

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

func (r *recorder) Skipped() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.skipped
}

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) TempDir() string {
	dir, err := os.MkdirTemp("", "sdktest")
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// verdict is what came of the rule.
func (r *recorder) verdict(name string, took time.Duration) Verdict {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := Verdict{Rule: name, Result: Pass, Duration: took, Messages: slices.Clone(r.messages)}
	switch {
	case r.failed:
		v.Result, v.Log = Fail, slices.Clone(r.lines)
	case r.skipped:
		v.Result = Skip
	}
	return v
}
