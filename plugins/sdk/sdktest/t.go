package sdktest

import "context"

// T is what a rule tells its result to. *testing.T is one; so is what Check
// uses in a plain program, where package testing has no place.
type T interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Error(args ...any)
	Fatalf(format string, args ...any)
	Fatal(args ...any)
	FailNow()
	Skipf(format string, args ...any)
	Skip(args ...any)
	Failed() bool
	Skipped() bool
	Cleanup(func())
	TempDir() string
	Context() context.Context
}

// Subtests is a T that can run others below it: *testing.T, without naming it.
type Subtests[S any] interface {
	T
	Run(name string, f func(S)) bool
}

// suite is the rules for one kind of plugin. The first one launches it: when
// it is broken there is nothing to try the others with.
type suite struct {
	rules []rule
	// kill ends the plugin's process so that a rule that is stuck comes back.
	kill func()
}

type rule struct {
	name string
	run  func(T)
}

// runIn runs the rules as subtests of t, one after the other.
func (s suite) runIn(t T, run func(name string, f func(T)) bool) {
	t.Helper()
	for i, r := range s.rules {
		if !run(r.name, r.run) && i == 0 {
			t.FailNow()
		}
	}
}

// under adapts S's own Run.
func under[S Subtests[S]](t S) func(string, func(T)) bool {
	return func(name string, f func(T)) bool { return t.Run(name, func(t S) { f(t) }) }
}
