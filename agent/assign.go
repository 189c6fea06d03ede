package agent

import (
	"fmt"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// assign takes in a set of assignments. It writes each new task before it
// takes it in; a wish to stop is heeded even when it cannot be written, for a
// full disk must not keep a task alive. The set counts as applied, and nil is
// returned, only when all of it is on stable storage.
func (s *State) assign(j Journal, incarnation string, full bool, set []*wire.Assignment, sequence uint64, now time.Duration) error {
	var failed error
	vouched := s.vouches(incarnation)
	named := make(map[string]bool, len(set))
	for _, a := range set {
		named[a.GetTaskId()] = true
		if err := s.assignOne(j, incarnation, a); err != nil && failed == nil {
			failed = err
		}
	}
	if incarnation == s.Applied.Incarnation && sequence < s.Applied.Sequence {
		s.disown(named)
	}
	if full || bug("partial-set") {
		for _, t := range s.Tasks {
			// Absence speaks only for the incarnation that named the task:
			// after a restore from backup it stops nothing.
			speaks := s.speaksFor(incarnation, t) || vouched && t.Origin == ""
			if !named[t.ID] && speaks && !t.removed() {
				t.wish(&Desired{Status: Stopped, Reason: "The control plane no longer knows the task", Sequence: sequence, Removed: true})
			}
		}
	}
	if failed != nil {
		return failed
	}
	same := s.Applied.Incarnation == incarnation
	before := s.Applied
	if s.tellAll || len(set) > 0 || !same || before.Sequence != sequence {
		// An empty set that says nothing new is worth no write.
		s.Applied = Applied{Incarnation: incarnation, Sequence: sequence, Mark: s.mark}
	}
	if err := s.flush(j, now, true); err != nil {
		s.Applied = before
		return err
	}
	if full {
		s.resent(vouched) // everything the control plane wants here is known again
	}
	return nil
}

// speaksFor says whether an incarnation is the one that named the task. A
// task without a name on record is one whose set was cut short before it was
// taken over: with nothing damaged, it is of the incarnation held.
func (s *State) speaksFor(incarnation string, t *Task) bool {
	if t.Origin == "" && s.trusted {
		return s.Applied.Incarnation == "" || s.Applied.Incarnation == incarnation
	}
	return t.Origin == incarnation
}

// disown notes that a set is of before what was applied already: the control
// plane was restored from a backup. Of what it does not name it may have lost
// all knowledge, and to it that looks as if it were to be removed.
func (s *State) disown(named map[string]bool) {
	for _, t := range s.Tasks {
		if !named[t.ID] {
			t.Origin = lostOrigin + s.Applied.Incarnation
		}
	}
}

// lostOrigin begins the origin of a task that its incarnation may have lost.
const lostOrigin = "lost:"

// assignSettled takes in a full set that counts for all tasks.
func (s *State) assignSettled(j Journal, incarnation string, set []*wire.Assignment, sequence uint64, now time.Duration) error {
	for _, t := range s.Tasks {
		t.Origin = incarnation
	}
	if err := s.assign(j, incarnation, true, set, sequence, now); err != nil {
		return err
	}
	s.resent(true)
	return nil
}

func (s *State) assignOne(j Journal, incarnation string, a *wire.Assignment) error {
	id := a.GetTaskId()
	if id == "" {
		return fmt.Errorf("assignment without a task id")
	}
	t := s.task(id)
	stop := a.GetRemoved() || a.GetDesired() == Stopped
	if t != nil && a.GetRemoved() && t.Origin != "" && t.Origin != incarnation {
		return nil // not knowing a task is no wish, see disown
	}
	if t == nil {
		if a.GetRemoved() || stop && a.GetSpec() == nil {
			return nil // nothing to stop, nothing to forget
		}
		if _, ok := s.mislaid[id]; ok && a.GetSpec() == nil {
			return nil // meant for one who holds it; the whole set has been asked for
		}
		if s.mark.Life != "" {
			a.Mark = &wire.Mark{Life: s.mark.Life, Revision: s.mark.Revision}
		}
		if err := j.SaveAssignment(a); err != nil {
			return err // it names the task and the file
		}
		t = s.admit(a)
	}
	t.Origin, t.unsure = incarnation, false
	if stop {
		t.wish(&Desired{Status: Stopped, Reason: a.GetStopReason(), Sequence: a.GetSequence(), Removed: a.GetRemoved()})
	}
	return nil
}

// wish notes that the task is to stop. There is no way back from it; only
// that it is to be forgotten as well can still be added.
func (t *Task) wish(d *Desired) {
	if t.Desired == nil {
		t.Desired = d
		return
	}
	if d.Removed && !t.Desired.Removed {
		c := *t.Desired
		c.Removed = true
		t.Desired = &c
	}
}

// flush writes what is not on disk yet, all with one fsync, and removes the
// records of tasks that are to be forgotten. Without force it keeps to the
// backoff of a journal that does not work. It tells whether anything changed
// by way of wrote.
func (s *State) flush(j Journal, now time.Duration, force bool) error {
	_, err := s.write(j, now, force)
	return err
}

func (s *State) write(j Journal, now time.Duration, force bool) (wrote bool, err error) {
	if !force && s.journal.failures > 0 && now < s.journal.at {
		return false, nil
	}
	var records []Record
	var done []func()
	add := func(r Record, saved func()) {
		records = append(records, r)
		done = append(done, saved)
	}
	if s.Applied != s.savedApplied {
		a := s.Applied
		add(Record{Applied: &a}, func() { s.savedApplied = a })
	}
	if s.over {
		add(Record{Doubt: &Doubt{Cleared: true}}, func() { s.over = false })
	}
	if len(s.unneeded) > 0 {
		s.forgetUnneeded(j)
	}
	var forget []string
	for _, t := range s.Tasks {
		if t.forgotten {
			forget = append(forget, t.ID)
			continue
		}
		t.unsaved(add)
	}
	s.unsavedAway(now, len(records) == 0, add)
	s.unsavedUnused(now, len(records) == 0, add)
	if len(records) == 0 && len(forget) == 0 && (force || s.journal.failures == 0) {
		return false, nil
	}
	if !bug("skip-persist") && (len(records) > 0 || len(forget) == 0) { // without any: whether it works again
		if err := j.Append(records...); err != nil {
			s.journal.fail(now, s.jitter(), err)
			return false, fmt.Errorf("write state: %w", err)
		}
	}
	for _, f := range done {
		f()
	}
	for _, id := range forget {
		if err := j.ForgetTask(id); err != nil {
			s.journal.fail(now, s.jitter(), err)
			return len(records) > 0, fmt.Errorf("forget task %s: %w", id, err)
		}
		s.drop(id)
		s.unreported = append(s.unreported, id)
	}
	s.journal = retry{}
	return true, nil
}

// unsaved adds the records of a task that differ from what is on disk.
func (t *Task) unsaved(add func(Record, func())) {
	before := 0
	note := func(r Record, saved func()) { before++; add(r, saved) }
	if t.Origin != t.saved.origin {
		origin := t.Origin
		note(Record{Task: t.ID, Origin: origin}, func() { t.saved.origin = origin })
	}
	if d := t.Desired; d != nil && (t.saved.desired == nil || *d != *t.saved.desired) {
		note(Record{Task: t.ID, Desired: d}, func() { t.saved.desired = d })
	}
	for _, c := range t.Containers {
		if c.dirty() {
			r := c.record()
			note(Record{Task: t.ID, Attempt: &r}, func() { c.saved = r })
		}
	}
	if r := t.statusRecord(); r != t.saved.status {
		note(Record{Task: t.ID, Status: &r}, func() { t.saved.status = r })
	}
	if before == 0 {
		return
	}
	// What is worth no write of its own rides along.
	for _, c := range t.Containers {
		if !c.dirty() && c.Removed != c.saved.Removed {
			r := c.record()
			add(Record{Task: t.ID, Attempt: &r}, func() { c.saved = r })
		}
	}
}

// wakeJournal is when a failing journal is tried again; never when it works.
func (s *State) wakeJournal() time.Duration {
	if s.journal.failures == 0 {
		return never
	}
	return s.journal.at
}

// maxRounds bounds how often one step plans: decisions and writes open the
// way for further ones, but only so many.
const maxRounds = 64

// step decides and writes until nothing more follows, and returns the calls
// to make and when to step again if nothing happens before.
func (s *State) step(j Journal, now time.Duration) (calls []action, wake time.Duration, err error) {
	s.at = now
	for range maxRounds {
		var acts []action
		acts, wake = plan(s, now)
		calls = acts[:0:0]
		decided := false
		for _, a := range acts {
			if a.Verb.decision() {
				s.decide(a, now)
				decided = true
			} else {
				calls = append(calls, a)
			}
		}
		if decided {
			continue
		}
		var wrote bool
		wrote, err = s.write(j, now, false)
		if !wrote {
			break
		}
	}
	if at := s.wakeJournal(); at != never && (wake == never || at < wake) {
		wake = at
	}
	return calls, wake, err
}
