package agent

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// Years of suspend must not be taken for years of trying in vain.
func TestSleepIsNotPatience(t *testing.T) {
	const year = 365 * 24 * time.Hour
	spec := &wire.TaskSpec{Containers: []*wire.Container{
		{Name: "db", Essential: true, StartTimeoutS: 30, HealthCheck: &wire.HealthCheck{Command: []string{"CMD", "true"}, StartPeriodS: 60, Retries: 1}},
		{Name: "main", Essential: true, DependsOn: []*wire.Dependency{{Container: "db", Condition: "HEALTHY"}}},
	}}
	for _, tc := range []struct {
		name   string
		change func(*State, *Task)
	}{
		{"pull", func(_ *State, t *Task) {
			t.container("main").pullRetry = retry{failures: 3, since: 10 * time.Second, at: 20 * time.Second, err: "no route"}
		}},
		{"prepare", func(_ *State, t *Task) {
			t.retry = retry{failures: 1, since: 10 * time.Second, at: 20 * time.Second, err: "no"}
		}},
		{"start", func(_ *State, t *Task) {
			in(t.container("main"), phaseRecorded, 0)
			t.container("main").retry = retry{failures: 1, since: 10 * time.Second, at: 20 * time.Second, err: "no"}
		}},
		{"startTimeout", func(*State, *Task) {}},
		{"plugin missing", func(s *State, t *Task) {
			rt := s.runtime(defaultRuntime)
			rt.known, rt.missing, rt.since = false, true, 10*time.Second
			*t.container("db") = Container{Spec: t.container("db").Spec}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := stateOf(spec, func(s *State, t *Task) {
				in(t.container("db"), phaseRunning, 0)
				t.container("db").StartedAt = 10 * time.Second
				tc.change(s, t)
			})
			stops := func(at time.Duration) bool {
				acts, _ := plan(s, at)
				for _, a := range acts {
					if a.Verb == decideStop {
						return true
					}
				}
				return false
			}
			if stops(15 * time.Second) {
				t.Fatal("given up before it slept")
			}
			s.wokeAfter(year)
			if stops(15*time.Second + year) {
				t.Error("given up for having slept")
			}
			if !stops(15*time.Second + year + 6*time.Minute) {
				t.Error("never given up")
			}
			c := s.Tasks[0].container("db")
			if c.Phase != phaseRunning {
				return
			}
			c.probed(result{exec: sdk.ExecResult{ExitCode: 1}}, 30*time.Second+year)
			if c.health.status == HealthUnhealthy {
				t.Error("unhealthy in its start period")
			}
			code := 1
			s.exit(c, &code, "", 0, 40*time.Second+year)
			if c.RanFor != 30*time.Second || c.crashes != 1 {
				t.Errorf("ran for %s, %d crashes; want 30s awake and a back-off", c.RanFor, c.crashes)
			}
		})
	}
}

// sleepyClock tells of sleep, and of a wall clock that means nothing.
type sleepyClock struct {
	*bubbleClock
	slept atomic.Int64
	wall  atomic.Int64
}

func (c *sleepyClock) Now() time.Duration   { return c.Awake() + time.Duration(c.slept.Load()) }
func (c *sleepyClock) Awake() time.Duration { return c.bubbleClock.Now() }
func (c *sleepyClock) When() *wire.When {
	return &wire.When{BootId: "boot", BoottimeNs: int64(c.Now()), WallUnixNs: c.wall.Add(-1 << 40)}
}

// However the clocks jump, a service's container that runs goes on, one that
// crashes waits its back-off of awake or boot time once, and nothing counts
// backwards.
func TestJumpingClocksRestartNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := stateOf(&wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main"), essential("flaky")}}, nil)
		task := s.Tasks[0]
		in(task.container("main"), phaseRunning, 0)
		flaky := task.container("flaky")
		in(flaky, phaseRunning, 0)
		now := time.Minute
		journal := newSimJournal()
		for range rapid.IntRange(1, 30).Draw(t, "events") {
			jump := time.Duration(rapid.SampledFrom([]int64{
				0, 0, int64(time.Millisecond), int64(time.Second), int64(time.Minute), int64(24 * time.Hour), int64(20 * 365 * 24 * time.Hour),
			}).Draw(t, "jump"))
			now += jump
			if rapid.Bool().Draw(t, "asleep") {
				s.wokeAfter(jump)
			}
			if flaky.Phase == phaseRunning && rapid.Bool().Draw(t, "crash") {
				code := 1
				s.exit(flaky, &code, "", 0, now)
				flaky.Removed = true
				if flaky.RanFor < 0 || flaky.notBefore < now || flaky.notBefore > now+retryCap {
					t.Fatalf("ran for %s, again at %s, now %s", flaky.RanFor, flaky.notBefore, now)
				}
			}
			acts, wake, err := s.step(journal, now)
			if err != nil || wake != never && wake < 0 {
				t.Fatalf("wake at %s: %v", wake, err)
			}
			for _, a := range acts {
				if a.Attempt.Container == "main" || a.Verb == callHalt {
					t.Fatalf("%s %s", a.Verb, a.Attempt)
				}
				if a.Verb == callStart {
					if now < flaky.notBefore {
						t.Fatalf("started at %s, before %s", now, flaky.notBefore)
					}
					flaky.Phase, flaky.Started, flaky.StartedAt, flaky.slept = phaseRunning, true, now, 0
				}
			}
			if flaky.Phase == phaseExited && now >= flaky.notBefore {
				t.Fatal("its back-off is over and it is not started")
			}
			if task.Stop != nil {
				t.Fatalf("the task stops: %+v", task.Stop)
			}
		}
	})
}

// The loop itself: asleep in the middle of retries, by a clock that shows it.
func TestAgentTellsSleepFromTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := &sleepyClock{}
		b := newBubble(t, 0.5, func(c *Config) {
			clock.bubbleClock = c.Clock.(*bubbleClock)
			c.Clock = clock
		})
		b.runtime.pull = func(context.Context, func(sdk.PullProgress)) error { return sdk.Unavailable }
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		<-time.After(2 * time.Minute)
		clock.slept.Add(int64(10 * 365 * 24 * time.Hour))
		<-time.After(2 * time.Minute)
		if st := b.last(); st.GetLastStatus() != Pending {
			t.Fatalf("given up for having slept: %v", st)
		}
		if n := b.log.count("the device slept"); n != 1 {
			t.Errorf("%d sleeps noticed", n)
		}
		<-time.After(2 * time.Minute)
		if st := b.last(); st.GetStopCode() != CodeFailedToStart {
			t.Errorf("not given up after 6 minutes awake: %v", st)
		}
	})
}
