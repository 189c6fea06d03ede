package agent

import "time"

// A device that sleeps does nothing for its tasks, and they do nothing either.
// Boot time goes on meanwhile, so that what is due is done at once after it;
// but what only ran out of patience while nothing could happen gets the rest of
// its time: retries are not given up, containers not called too slow to start.

// Sleeper is a Clock that knows how long the device was awake. Optional.
type Sleeper interface {
	// Awake is the time since boot, suspend left out (CLOCK_MONOTONIC).
	Awake() time.Duration
}

// sleepWorth is how long a sleep must be to count: the two clocks are not read
// at the same moment.
const sleepWorth = time.Second

// noticeSleep compares the clocks since the last look and returns the time of
// boot that it went by: a sleep that begins after it is for the next look, and
// nothing may be decided by a later time until then.
func (a *Agent) noticeSleep() (now time.Duration) {
	now = a.cfg.Clock.Now()
	clock, ok := a.cfg.Clock.(Sleeper)
	if !ok {
		return now
	}
	slept := now - clock.Awake()
	if d := slept - a.slept; d >= sleepWorth {
		a.cfg.Logger.Info("the device slept", "for", d.Round(time.Second))
		a.state.wokeAfter(d)
		a.slept = slept
	}
	return now
}

// wokeAfter moves on what counts how long something was tried.
func (s *State) wokeAfter(d time.Duration) {
	s.began += d
	if s.away.up {
		s.away.since += d // a session that slept was of no use
	}
	s.journal.since += d
	for _, rt := range s.Runtimes {
		rt.since += d
		rt.retry.since += d
	}
	for _, t := range s.Tasks {
		t.retry.since += d
		if t.stopDeadline > 0 {
			t.stopDeadline += d
		}
		for _, c := range t.Containers {
			c.pullRetry.since += d
			c.retry.since += d
			c.deviceRetry.since += d
			if c.Phase != phaseExited {
				c.slept += d
			}
		}
	}
}

// awakeSince is when the container would have started, had the device not slept
// since: what it has had of its time.
func (c *Container) awakeSince() time.Duration { return c.StartedAt + c.slept }
