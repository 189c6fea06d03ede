package agent

import (
	"fmt"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Away is on record while the device is without a session and holds a task
// that must not outlive that for long. What it says holds until the next
// record, or a registered session, replaces it: nobody was connected since.
type Away struct {
	BootID string `json:"bootId"`
	// At is since that boot: the moment at which For was true.
	At time.Duration `json:"at"`
	// For is how long the device had been without a session; 0: it has one.
	For time.Duration `json:"for"`
	// WallUnixNs is the same moment by a clock that a time service had set;
	// 0: there was none.
	WallUnixNs int64 `json:"wallUnixNs,omitempty"`
}

// absence counts how long the device has been without a registered session,
// as far as that is known: by the time since boot, so no clock has to be set.
// Time without power is known only when the clocks at both of its ends were
// set by a time service.
type absence struct {
	up     bool
	since  time.Duration // from here on counted in this boot, while not up
	before time.Duration // counted until then

	// online is for how long there was a session in this life of the agent,
	// up to since when up.
	online time.Duration

	saved Away
	stale bool // a session was registered since: what is saved says too much
	// off is the record of an earlier boot while the time without power that
	// followed it may yet become known.
	off *Away
	// wall is the time by a clock that was set, at the moment of the step.
	wall int64
	// allowance is when the budget of writes will be whole again.
	allowance time.Duration
}

const (
	// awayWrite is the least time, and awayShare the share of the shortest
	// stopAfter, that a sudden reboot may lose from the count.
	awayWrite = time.Minute
	awayShare = 20
	// A link that comes and goes all day must not wear the flash: so many
	// writes at once, one more each time this has passed.
	awayBurst  = 24
	awayRefill = 30 * time.Minute
)

func loadAbsence(saved *Away, bootID string, now time.Duration) absence {
	a := absence{since: now}
	if saved == nil {
		return a
	}
	a.saved = *saved
	switch {
	case saved.For <= 0: // it was connected
	case saved.BootID == bootID:
		// The agent was away since, and so was the session.
		a.before = saved.For + max(0, now-saved.At)
	default:
		a.before, a.since = saved.For, 0
		if saved.WallUnixNs != 0 {
			off := *saved
			a.off = &off
		}
	}
	return a
}

// connected says that a session was registered, or ended.
func (s *State) connected(up bool, now time.Duration) {
	a := &s.away
	if up == a.up {
		return
	}
	if !up {
		a.online += max(0, now-a.since)
	}
	a.up, a.since, a.before, a.off = up, now, 0, nil
	a.stale = a.saved.For > 0
}

// awayFor is how long there has been no session.
func (s *State) awayFor(now time.Duration) time.Duration {
	if s.away.up {
		return 0
	}
	return s.away.before + max(0, now-s.away.since)
}

// onlineFor is how long there was a session in this life of the agent. It
// goes on only while there is one.
func (s *State) onlineFor(now time.Duration) time.Duration {
	if !s.away.up {
		return s.away.online
	}
	return s.away.online + max(0, now-s.away.since)
}

// told takes in what all clocks say now. If they were set before the device
// was switched off and are set again, the time without power counts.
func (s *State) told(when *wire.When, now time.Duration) {
	a := &s.away
	a.wall = 0
	if !when.GetSynchronized() || when.GetWallUnixNs() <= 0 {
		return
	}
	a.wall = when.GetWallUnixNs()
	if a.off == nil || a.up {
		return
	}
	if more := a.off.For + time.Duration(a.wall-a.off.WallUnixNs) - s.awayFor(now); a.wall > a.off.WallUnixNs && more > 0 {
		a.before += more
	}
	a.off = nil
}

func stopAfter(t *Task) time.Duration {
	return time.Duration(t.Spec.GetDisconnectStopAfterS()) * time.Second
}

// shortest is the least stopAfter of the tasks that have one and are not over;
// 0: there is none.
func (s *State) shortest() time.Duration {
	least := time.Duration(0)
	for _, t := range s.Tasks {
		if d := stopAfter(t); d > 0 && t.Stop == nil && t.Status != Stopped && (least == 0 || d < least) {
			least = d
		}
	}
	return least
}

// abandoned says that the device was away for longer than the task allows.
func (p *planner) abandoned(t *Task) bool {
	limit := stopAfter(t)
	return limit > 0 && !p.s.away.up && p.due(p.now+limit-p.s.awayFor(p.now))
}

func reasonDisconnected(t *Task) string {
	return fmt.Sprintf("The device had no connection to the control plane for %s, which is as long as the task's disconnect.stopAfter allows", stopAfter(t))
}

// gaveUpPulling is gaveUp for pulls, which cannot succeed without a network:
// what counts is the time with a session.
func (p *planner) gaveUpPulling(t *Task, c *Container) bool {
	if c.pullRetry.failures == 0 || t.inPlace() || !p.s.away.up {
		return false // the next session brings it up again
	}
	return p.due(after(p.now, p.s.Limits.PullGiveUp-(p.s.onlineFor(p.now)-c.pullSince)))
}

// nextAway is when the count is worth a write of its own; never when it is not.
func (s *State) nextAway() time.Duration {
	least := s.shortest()
	if least == 0 || s.away.up {
		return never
	}
	a := &s.away
	at := a.since + a.saved.For + max(awayWrite, least/awayShare) - a.before
	return max(at, a.allowance-(awayBurst-1)*awayRefill, 0)
}

// unsavedAway adds the record of the absence when it is due. alone: nothing
// else is written now; otherwise it rides along for nothing.
func (s *State) unsavedAway(now time.Duration, alone bool, add func(Record, func())) {
	a := &s.away
	r := Away{BootID: s.BootID, At: now, For: s.awayFor(now), WallUnixNs: a.wall}
	if !a.stale {
		at := s.nextAway()
		worth := !alone && at != never && r.For-a.saved.For >= awayWrite/6
		if !worth && (at == never || now < at) {
			return
		}
	}
	add(Record{Away: &r}, func() {
		a.saved, a.stale = r, false
		if alone {
			a.allowance = max(a.allowance, now) + awayRefill
		}
	})
}
