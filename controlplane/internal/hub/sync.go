package hub

import (
	"context"
	"errors"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

// converse makes every call about this session into the domain, one after the
// other: assignments out, statuses and facts in. What fails for now is tried
// again; levels that arrive meanwhile replace what waits.
func (s *session) converse() {
	const slowest = 5 * time.Second
	var facts *wire.Facts
	var held *[]*wire.Holding
	stale := false // assignments have to be looked at
	wait := time.Duration(0)
	if s.succeed() {
		facts = s.told
	}
	for {
		var retry <-chan time.Time
		var timer *time.Timer
		if wait > 0 {
			timer = time.NewTimer(wait)
			retry = timer.C
		}
		// With enough waiting, the device is made to wait by flow control.
		statuses := s.statuses
		if len(s.late) >= maxLate {
			statuses = nil
		}
		select {
		case <-s.ctx.Done():
		case <-s.changed:
			stale = true
		case facts = <-s.facts:
		case hs := <-s.holdings:
			held = &hs
		case st := <-statuses:
			s.late[st.GetTaskId()] = st
		case <-retry:
		}
		if timer != nil {
			timer.Stop()
		}
		if s.ctx.Err() != nil {
			return
		}
		s.gather()
		ok := true
		if stale {
			stale = !s.sendChanges()
			ok = ok && !stale
		}
		if facts != nil && s.takeFacts(facts) {
			facts = nil
		}
		// Before the statuses: those of tasks nobody knows wait for it.
		if held != nil && s.takeHoldings(*held) {
			held = nil
		}
		ok = s.takeStatuses() && facts == nil && held == nil && ok
		switch {
		case ok:
			wait = 0
		case wait == 0:
			wait = 50 * time.Millisecond
		default:
			wait = min(wait*2, slowest)
		}
	}
}

// succeed waits until nothing of the session before reaches the domain any
// more: what it had queued is older than anything this one has. True: there was
// one, which may have stored older facts than those of this one's Hello.
func (s *session) succeed() bool {
	old := s.before
	if old == nil {
		return false
	}
	s.before = nil
	t := time.NewTimer(callTimeout)
	defer t.Stop()
	select {
	case <-old.silent:
		// What it stored but could not acknowledge comes again.
		if old.nonce == s.nonce {
			s.taken = old.taken
		}
	case <-t.C:
		s.log.Warn("the session before has not ended its calls", "after", callTimeout)
	}
	return true
}

// maxTaken bounds what is remembered of statuses stored. A status comes twice
// only when its acknowledgement was lost with a session, and storing it again
// changes nothing: it is but a write saved.
const maxTaken = 1024

// gather takes what else has arrived, so that only the latest status of each
// task reaches the domain.
func (s *session) gather() {
	for len(s.late) < maxLate {
		select {
		case st := <-s.statuses:
			s.late[st.GetTaskId()] = st
		default:
			return
		}
	}
}

func (s *session) call() (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.ctx, callTimeout)
}

// sendChanges looks whether the instance may still be here and sends what
// changed in its assignments. False: try again later.
func (s *session) sendChanges() bool {
	ctx, cancel := s.call()
	defer cancel()
	if _, err := s.hub.devices.Authenticate(ctx, s.instance, s.key); err != nil {
		switch controlplane.CodeOf(err) {
		case controlplane.NotFound, controlplane.Denied, controlplane.Unauthenticated:
			s.hub.drop(s)
			s.end(failureOf(err, s.log, "authenticate a device"))
			return true
		}
		s.complain("authenticate a device", err)
		return false
	}
	set, err := s.hub.devices.Assignments(ctx, s.instance, s.hub.devices.Incarnation(), s.sent)
	if err != nil {
		s.complain("read a device's assignments", err)
		return false
	}
	if set.Sequence == s.sent && len(set.Set) == 0 {
		return true
	}
	for _, f := range s.framesOf(set) {
		if !s.say(f) {
			return true
		}
	}
	s.sent = set.Sequence
	return true
}

func (s *session) takeFacts(f *wire.Facts) bool {
	ctx, cancel := s.call()
	defer cancel()
	s.hello.Facts = factsOf(f)
	if host := f.GetAttributes()["belay.hostname"]; host != "" {
		s.hello.Hostname = host
	}
	err := s.hub.devices.ReportFacts(ctx, s.instance, s.hello)
	if err != nil {
		s.complain("store a device's facts", err)
	}
	return err == nil || !passing(err)
}

// takeStatuses reports what waits and acknowledges what was stored.
func (s *session) takeStatuses() bool {
	ok := true
	for task, st := range s.late {
		var err error
		last, known := s.taken[task]
		if known = known && last >= st.GetSequence(); !known {
			ctx, cancel := s.call()
			err = s.hub.devices.ReportTask(ctx, s.instance, st)
			cancel()
		}
		switch {
		case err == nil:
			if len(s.taken) >= maxTaken {
				clear(s.taken)
			}
			s.log.Debug("status taken", "task", task, "sequence", st.GetSequence(), "status", st.GetLastStatus(), "again", known)
			s.taken[task] = max(s.taken[task], st.GetSequence())
		case errors.Is(err, controlplane.NotFound):
			// The device has something the control plane does not know.
			removed := &wire.Assignment{TaskId: task, Removed: true, Desired: controlplane.StatusStopped, Sequence: s.sent}
			if !s.say(&wire.Frame{Body: &wire.Frame_Assignment{Assignment: removed}}) ||
				!s.say(&wire.Frame{Body: &wire.Frame_EndOfSet{EndOfSet: &wire.EndOfSet{Sequence: s.sent, Mark: s.mark()}}}) {
				return true
			}
		case passing(err):
			s.complain("store a task's status", err)
			ok = false
			continue
		default:
			// It can never be stored: asking for it again would not help.
			s.log.Warn("a task's status was refused", "task", task, "err", err)
		}
		delete(s.late, task)
		if !s.say(&wire.Frame{Body: &wire.Frame_StatusAck{StatusAck: &wire.StatusAck{Sequence: st.GetSequence(), Mark: s.mark()}}}) {
			return true
		}
	}
	return ok
}

func (s *session) complain(doing string, err error) {
	if s.ctx.Err() == nil {
		s.log.Warn(doing, "err", err)
	}
}

// passing tells failures that another try may not have.
func passing(err error) bool {
	switch controlplane.CodeOf(err) {
	case controlplane.InvalidArgument, controlplane.NotFound, controlplane.Denied,
		controlplane.Unauthenticated, controlplane.Precondition, controlplane.AlreadyExists:
		return false
	}
	return true
}

func (s *session) framesOf(set controlplane.AssignmentSet) []*wire.Frame {
	frames := make([]*wire.Frame, 0, len(set.Set)+1)
	for _, a := range set.Set {
		frames = append(frames, &wire.Frame{Body: &wire.Frame_Assignment{Assignment: a}})
	}
	return append(frames, &wire.Frame{Body: &wire.Frame_EndOfSet{EndOfSet: &wire.EndOfSet{
		Sequence: set.Sequence, Full: set.Full, Settled: set.Settled, Mark: s.mark(),
	}}})
}
