package agent

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// crashed is a service's container that was found to have exited now, after it
// was started at that time; the runtime says it ran for that long.
func crashed(started, said, now time.Duration) *Container {
	s := stateOf(&wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main")}}, nil)
	t := s.Tasks[0]
	c := t.container("main")
	in(c, phaseUnknown, 0) // as after a restart of the agent
	c.Started, c.StartedAt, c.BootID, c.crashes = true, started, s.BootID, 3
	code := 1
	s.observe(t, c, sdk.Container{Attempt: t.attempt(c), State: sdk.StateExited, ExitCode: &code, RanFor: said}, now, true)
	return c
}

// The agent was away for an hour, at the beginning of which a container
// crashed that had run for 5 s: it took the hour for a steady run.
func TestOutageIsNoRunTime(t *testing.T) {
	const hour = time.Hour
	for _, c := range []struct {
		name     string
		said     time.Duration
		backsOff bool
	}{
		{"the runtime knows", 5 * time.Second, true},
		{"it ran for long", 10 * time.Minute, false},
		{"an old plugin says nothing", 0, false},
		{"a wall clock was set meanwhile", 50 * 365 * 24 * hour, false},
		{"and back", -50 * 365 * 24 * hour, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := crashed(time.Minute, c.said, time.Minute+hour)
			if got.RanFor != hour { // what a restart policy goes by
				t.Errorf("ran for %s, want %s", got.RanFor, hour)
			}
			if backsOff := got.crashes == 4; backsOff != c.backsOff {
				t.Errorf("%d crashes in a row: backs off %t, want %t", got.crashes, backsOff, c.backsOff)
			}
		})
	}
}

// A container that crashes and crashes waits as long as it would have, had the
// agent not been started again meanwhile.
func TestRestartOfTheAgentSkipsNoBackoff(t *testing.T) {
	const now = time.Hour
	c := crashed(now-2*time.Second, 0, now)
	if c.crashes != 4 || c.notBefore <= now {
		t.Fatalf("%d crashes, again at %s", c.crashes, c.notBefore)
	}
	for _, r := range []struct {
		name, boot string
		written    time.Duration
		want       time.Duration
	}{
		{"the same boot", c.BootID, c.notBefore, c.notBefore},
		{"a damaged record", c.BootID, 1000 * time.Hour, now + time.Second + retryCap},
		{"another boot", "another", c.notBefore, 0},
	} {
		t.Run(r.name, func(t *testing.T) {
			s := stateOf(&wire.TaskSpec{}, nil)
			record := c.record()
			record.BootID, record.NotBefore = r.boot, r.written
			s.Tasks = nil
			s.load(SavedTask{
				Assignment: &wire.Assignment{TaskId: "t", Spec: &wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main")}}},
				Attempts:   []AttemptRecord{record},
			}, now+time.Second)
			again := s.Tasks[0].container("main")
			if again.crashes != 4 || again.notBefore != r.want {
				t.Errorf("%d crashes, again at %s, want 4 and %s", again.crashes, again.notBefore, r.want)
			}
			if again.dirty() && r.name == "the same boot" {
				t.Errorf("it is written again: %+v, %+v", again.record(), again.saved)
			}
		})
	}
}

// Whatever a runtime says, a run is never negative and never longer than what
// this boot knows of it, and what it says can only lengthen the back-off.
func TestWhatARuntimeSaysOfARun(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		span := func(name string) time.Duration {
			return time.Duration(rapid.Int64Range(0, int64(100*365*24*time.Hour)).Draw(t, name))
		}
		started, after := span("started"), span("after")
		now := started + after
		said := time.Duration(rapid.Int64().Draw(t, "said"))
		c := crashed(started, said, now)
		silent := crashed(started, 0, now)
		if c.RanFor != silent.RanFor || c.RanFor < 0 || c.RanFor > after {
			t.Fatalf("ran for %s of %s, said %s", c.RanFor, after, said)
		}
		if c.crashes < silent.crashes || c.notBefore < now || c.notBefore > now+retryCap {
			t.Fatalf("%d crashes, again at %s, now %s; without a word %d", c.crashes, c.notBefore, now, silent.crashes)
		}
	})
}
