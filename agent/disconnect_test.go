package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// simLink is the link of a simulated device, and what is true of it.
type simLink struct {
	linkUp   bool
	cutAt    time.Duration // since when it is down, in this boot
	awayThen time.Duration // before this boot
	lives    int           // of the agent since the cut
}

func (s *simulation) setLink(up bool) {
	if up == s.linkUp {
		return
	}
	s.linkUp, s.cutAt, s.awayThen, s.lives = up, s.clock.now, 0, 0
	s.state.connected(up, s.clock.now)
}

// linkAtBoot: an agent that has just started has no session yet.
func (s *simulation) linkAtBoot() {
	if s.linkUp {
		s.linkUp, s.cutAt, s.awayThen = false, s.clock.now, 0
	}
	s.lives++
	if s.reboots == 0 && s.lives == 1 { // most tests are about something else
		s.setLink(true)
	}
}

func (s *simulation) linkAtReboot() {
	if !s.linkUp {
		s.awayThen += s.clock.now - s.cutAt
		s.cutAt = 0
		return
	}
	s.linkUp, s.cutAt, s.awayThen = false, 0, 0
}

func (s *simulation) trulyAway() time.Duration {
	if s.linkUp {
		return 0
	}
	return s.awayThen + s.clock.now - s.cutAt
}

func (s *simulation) linkHostile() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"the link goes or comes": func(*rapid.T) { s.setLink(!s.linkUp) },
		"the link comes":         func(*rapid.T) { s.setLink(true) },
	}
}

// checkLink: no task stops for an absence that was shorter than it allows, and
// none outlives one that was longer, as far as the agent can know.
func (s *simulation) checkLink() {
	away := s.trulyAway()
	if known := s.state.awayFor(s.clock.now); known > away && !s.journal.everBroken {
		s.t.Fatalf("the agent thinks it was away for %s, it was for %s", known, away)
	} else if s.lives == 0 && known != away {
		s.t.Fatalf("the agent lived through an absence of %s and counted %s", away, known)
	}
	for _, t := range s.state.Tasks {
		limit := stopAfter(t)
		stopped := t.Stop != nil && t.Stop.code == CodeDisconnected && t.saved.status.StopCode == ""
		switch {
		case limit == 0 && t.Stop != nil && t.Stop.code == CodeDisconnected:
			s.t.Fatalf("task %s stopped because the link is down, and never asked for that", t.ID)
		case stopped && away < limit && !s.journal.everBroken:
			s.t.Fatalf("task %s stopped after an absence of %s, it allows %s", t.ID, away, limit)
		case limit > 0 && s.lives == 0 && away >= limit && t.Stop == nil && t.Status != Stopped:
			s.t.Fatalf("task %s goes on after an absence of %s, it allows %s", t.ID, away, limit)
		}
	}
}

func stopsAfter(s uint32) *wire.TaskSpec {
	return &wire.TaskSpec{RestartInPlace: true, DisconnectStopAfterS: s, Containers: []*wire.Container{essential("main")}}
}

func TestTaskStopsWhenTheDeviceWasAwayForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.assign(running(stopsAfter(600)))
		b.Connected(false)
		time.Sleep(599 * time.Second)
		if st := b.last(); st.GetLastStatus() != Running {
			t.Fatalf("status %v", st)
		}
		b.Connected(true) // whoever comes back in time starts anew
		synctest.Wait()
		b.Connected(false)
		time.Sleep(599 * time.Second)
		if st := b.last(); st.GetLastStatus() != Running {
			t.Fatalf("status %v", st)
		}
		time.Sleep(2 * time.Second)
		st := b.last()
		want := "The device had no connection to the control plane for 10m0s, which is as long as the task's disconnect.stopAfter allows"
		if st.GetLastStatus() != Stopped || st.GetStopCode() != CodeDisconnected || st.GetStoppedReason() != want {
			t.Errorf("status %v", st)
		}
	})
}

// A pull needs the network: what counts towards giving up is the time there
// was a session.
func TestPullIsNotGivenUpWhileAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.runtime.pull = func(_ context.Context, _ func(sdk.PullProgress)) error {
			return sdk.Errorf(sdk.Unavailable, "pull main:1", "network is unreachable")
		}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		time.Sleep(2 * time.Minute)
		b.Connected(false)
		time.Sleep(48 * time.Hour)
		if st := b.last(); st.GetLastStatus() != Pending || !strings.Contains(st.GetNote(), "network is unreachable") {
			t.Fatalf("status %v", st)
		}
		b.Connected(true)
		time.Sleep(2*time.Minute + 50*time.Second)
		if st := b.last(); st.GetLastStatus() != Pending {
			t.Fatalf("status %v", st)
		}
		time.Sleep(20 * time.Second)
		if st := b.last(); st.GetLastStatus() != Stopped || st.GetStopCode() != CodeFailedToStart {
			t.Errorf("status %v", st)
		}
	})
}

// life drives a State through an absence, told in words: what is known of
// it at the end.
type life struct {
	t       *testing.T
	journal *simJournal
	state   *State
	boot    int
	wall    int64 // 0: no clock is set
	writes  int
}

func (l *life) start(now time.Duration) {
	l.state = newState(Limits{}, fmt.Sprint("boot-", l.boot), l.journal.saved(), now, nil)
}

func (l *life) at(now time.Duration) {
	w := &wire.When{}
	if l.wall != 0 {
		w = &wire.When{Synchronized: true, WallUnixNs: l.wall + int64(now)}
	}
	l.state.told(w, now)
	before := len(l.journal.records)
	if _, _, err := l.state.step(l.journal, now); err != nil {
		l.t.Fatal(err)
	}
	for _, r := range l.journal.records[before:] {
		if r.Away != nil {
			l.writes++
		}
	}
}

// pass lets time pass in steps of ten seconds.
func (l *life) pass(from, to time.Duration) {
	for now := from; now <= to; now += 10 * time.Second {
		l.at(now)
	}
}

func (l *life) reboot() { l.boot++; l.start(20 * time.Second) }

func TestAbsenceIsCountedAcrossRestarts(t *testing.T) {
	const day = 24 * time.Hour
	for _, tc := range []struct {
		name      string
		stopAfter uint32
		live      func(*life)
		now       time.Duration
		want      time.Duration
		writes    int
	}{
		{"the agent alone, before anything was worth a write", 3600, func(l *life) {
			l.pass(0, 100*time.Second)
			l.start(200 * time.Second)
			l.at(200 * time.Second)
		}, 300 * time.Second, 100 * time.Second, 0},
		{"the agent alone, after a write: nothing is lost", 3600, func(l *life) {
			l.pass(0, 200*time.Second)
			l.start(900 * time.Second)
			l.at(900 * time.Second)
		}, 1000 * time.Second, 1000 * time.Second, 2},
		{"a reboot loses what was not written", 3600, func(l *life) {
			l.pass(0, 350*time.Second)
			l.reboot()
			l.at(20 * time.Second)
		}, 30 * time.Second, 180*time.Second + 30*time.Second, 1},
		{"ten reboots", 3600, func(l *life) {
			for range 10 {
				l.pass(20*time.Second, 200*time.Second)
				l.reboot()
			}
		}, 20 * time.Second, 10*180*time.Second + 20*time.Second, 10},
		{"a session between: all is forgotten", 3600, func(l *life) {
			l.pass(0, 1000*time.Second)
			l.state.connected(true, 1000*time.Second)
			l.at(1000 * time.Second)
			l.reboot()
			l.at(20 * time.Second)
		}, 50 * time.Second, 30 * time.Second, 6},
		{"time without power counts between clocks that were set", 3600, func(l *life) {
			l.wall = int64(20_000 * day)
			l.pass(0, 200*time.Second)
			l.reboot()
			l.wall += int64(180*time.Second + 600*time.Second) // it was off for 600 s
			l.wall -= int64(20 * time.Second)
			l.at(20 * time.Second)
		}, 20 * time.Second, 180*time.Second + 600*time.Second, 2},
		{"not when only one was set", 3600, func(l *life) {
			l.wall = int64(20_000 * day)
			l.pass(0, 200*time.Second)
			l.reboot()
			l.wall = 0
			l.at(20 * time.Second)
		}, 20 * time.Second, 200 * time.Second, 1},
		{"not when it went back", 3600, func(l *life) {
			l.wall = int64(20_000 * day)
			l.pass(0, 200*time.Second)
			l.reboot()
			l.wall = int64(9_000 * day)
			l.at(20 * time.Second)
		}, 20 * time.Second, 200 * time.Second, 1},
		{"a clock that is set later", 3600, func(l *life) {
			l.wall = int64(20_000 * day)
			l.pass(0, 200*time.Second)
			l.reboot()
			l.wall = 0
			l.pass(20*time.Second, 60*time.Second)
			l.wall = int64(20_000*day) + int64(180*time.Second+600*time.Second) - int64(20*time.Second)
			l.at(70 * time.Second)
		}, 70 * time.Second, 180*time.Second + 650*time.Second, 2},
		{"nobody asks, nothing is written", 0, func(l *life) { l.pass(0, 3*time.Hour) }, 3 * time.Hour, 3 * time.Hour, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := &life{t: t, journal: newSimJournal()}
			l.journal.assignments[id(1)] = running(stopsAfter(tc.stopAfter))
			l.start(0)
			tc.live(l)
			if got := l.state.awayFor(tc.now); got != tc.want || l.writes != tc.writes {
				t.Errorf("it counts %s after %d writes, want %s after %d", got, l.writes, tc.want, tc.writes)
			}
		})
	}
}

// However the link behaves, the count costs less than a hundred writes a day
// on top of one a session.
func TestAbsenceSparesTheFlash(t *testing.T) {
	const day = 24 * time.Hour
	for name, flap := range map[string]time.Duration{"cut": 30 * day, "comes and goes": 130 * time.Second} {
		t.Run(name, func(t *testing.T) {
			l := &life{t: t, journal: newSimJournal()}
			l.journal.assignments[id(1)] = running(stopsAfter(1200))
			l.journal.assignments[id(2)] = &wire.Assignment{TaskId: id(2), Desired: Running, Spec: stopsAfter(30 * 86400)}
			l.start(0)
			up, turn := false, flap
			for now := time.Duration(0); now < day; now += 10 * time.Second {
				if now >= turn {
					up, turn = !up, turn+flap
					l.state.connected(up, now)
				}
				l.at(now)
			}
			t.Logf("%d writes in a day", l.writes)
			if l.writes == 0 || l.writes > 150 {
				t.Errorf("%d writes in a day", l.writes)
			}
		})
	}
}

// The time a container was granted to end runs on while the agent is away.
func TestStopTimeoutRunsOn(t *testing.T) {
	for _, tc := range []struct {
		name    string
		haltAt  time.Duration
		boot    string
		now     time.Duration
		want    time.Duration
		timeout uint32
	}{
		{"not told yet", 0, "boot", time.Minute, 30 * time.Second, 0},
		{"told just now", time.Minute, "boot", time.Minute, 30 * time.Second, 0},
		{"told a while ago", time.Minute, "boot", 70 * time.Second, 20 * time.Second, 0},
		{"told long ago", time.Minute, "boot", time.Hour, leastGrace, 0},
		{"no patience at all", time.Minute, "boot", time.Hour, time.Second, 1},
		{"of another boot", time.Minute, "before", 70 * time.Second, 30 * time.Second, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := &wire.TaskSpec{Containers: []*wire.Container{essential("main")}}
			spec.Containers[0].StopTimeoutS = tc.timeout
			s := stateOf(spec, func(s *State, task *Task) {
				c := task.container("main")
				in(c, phaseRunning, 0)
				c.HaltedAt, c.BootID = tc.haltAt, tc.boot
				c.saved = c.record()
				s.decide(action{Verb: decideStop, Attempt: sdk.Attempt{Task: "t"}, Code: CodeUserInitiated}, tc.now)
			})
			acts, _ := plan(s, tc.now)
			acts = slices.DeleteFunc(acts, func(a action) bool { return a.Verb == callList })
			if len(acts) != 1 || acts[0].Verb != callHalt || acts[0].Grace != tc.want {
				t.Errorf("plan says %+v, want a grace of %s", acts, tc.want)
			}
		})
	}
}

// What was on its way to its end when the agent died is on record with when
// that began.
func TestHaltIsOnRecordBeforeItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		synctest.Wait()
		hold := make(chan struct{})
		b.runtime.halt = func() { <-hold }
		a := running(nil)
		a.Desired, a.Sequence = Stopped, 2
		b.assign(a)
		time.Sleep(time.Second)
		synctest.Wait()
		saved := b.journal.saved()
		at := saved.Tasks[0].Attempts[0].HaltedAt
		close(hold)
		if d := cmp.Diff(time.Minute, at); d != "" {
			t.Errorf("told to stop at (-want +got):\n%s", d)
		}
		if st := b.last(); st.GetLastStatus() != Stopped {
			t.Errorf("status %v", st)
		}
	})
}
