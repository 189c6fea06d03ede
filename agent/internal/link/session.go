package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

const (
	// unanswered is how long something sent may stay without any answer
	// before a ping asks whether the other side is there.
	unanswered = 3 * time.Second
	// lost is how long the answer to that ping may take.
	lost = 7 * time.Second
	// writeTimeout bounds one frame to a control plane that reads slowly.
	writeTimeout = 30 * time.Second
	// applyRetry is how soon the agent is handed again what it could not
	// persist; it doubles up to the cap.
	applyRetry    = time.Second
	applyRetryCap = time.Minute
	// maxSet bounds the assignments between two EndOfSets.
	maxSet = 10000
)

// session is one registered session.
type session struct {
	link    *Link
	conn    wire.Session
	control wire.Stream
	welcome *wire.Welcome
	address string

	life    context.Context         // ends with the session
	end     context.CancelFunc      // of life
	active  context.Context         // of reports and assignments, within life
	cancel  context.CancelCauseFunc // of active
	stopped chan struct{}           // closed when there are no more of them
	leaving chan struct{}           // closed by the control plane's Goodbye
	doubts  chan doubt              // cap 1, the latest: whether it still reaches the control plane
	checks  chan struct{}           // cap 1: ask at once whether it does
	answers atomic.Int32            // requests under way

	sets  chan set
	pongs chan uint64  // ids of pings to answer
	heard atomic.Int64 // frames read so far

	// What this session has sent already; the writer's own.
	sent     map[string]uint64
	factsGen int
	ack      ackLevel
	heldGen  int             // of the holdings made before this session
	holdings []*wire.Holding // still to be sent, of told
	told     int
}

// set is one complete batch of assignments.
type set struct {
	full        bool
	settled     bool
	sequence    uint64
	assignments []*wire.Assignment
}

// hello opens the control stream and registers.
func (l *Link) hello(ctx context.Context, conn wire.Session) (*session, error) {
	stream, err := conn.OpenStream(ctx)
	if err != nil {
		return nil, err
	}
	if bug("deaf-transport") {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	incarnation, sequence := l.down.Held()
	l.mu.Lock()
	hello := &wire.Hello{
		Version:         wire.Version,
		InstanceId:      l.cfg.InstanceID,
		AgentNonce:      l.cfg.Nonce,
		HashedMachineId: l.cfg.HashedMachineID,
		AgentVersion:    l.cfg.AgentVersion,
		Capabilities:    l.cfg.Capabilities,
		Incarnation:     incarnation,
		Sequence:        sequence,
		Facts:           l.facts,
		Ordinal:         l.ordinal,
		Mark:            l.mark(),
	}
	l.ordinal++
	s := &session{
		link: l, conn: conn, control: stream,
		sets: make(chan set, 4), pongs: make(chan uint64, 4),
		stopped: make(chan struct{}), leaving: make(chan struct{}),
		doubts: make(chan doubt, 1), checks: make(chan struct{}, 1),
		sent: map[string]uint64{}, factsGen: l.factsGen,
		// Hello says what is held: it needs no acknowledgement.
		ack:     ackLevel{incarnation, sequence},
		heldGen: l.heldGen,
	}
	l.mu.Unlock()
	if c := l.cfg.Clock; c != nil {
		hello.BootId, hello.Now = c.BootID(), c.When()
	}
	defer context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Now()) })()
	if deadline, ok := ctx.Deadline(); ok {
		_ = stream.SetDeadline(deadline)
	}
	if err := writeFrames(stream,
		&wire.Frame{Body: &wire.Frame_Open{Open: &wire.Open{Type: wire.StreamType_STREAM_TYPE_CONTROL}}},
		&wire.Frame{Body: &wire.Frame_Hello{Hello: hello}},
	); err != nil {
		return nil, ended(conn, err)
	}
	f, err := wire.Await(stream, func(f *wire.Frame) bool { return f.GetWelcome() != nil })
	if err != nil {
		return nil, ended(conn, err)
	}
	s.welcome = f.GetWelcome()
	if err := s.welcome.GetFailure().Err(); err != nil {
		return nil, err
	}
	if v := s.welcome.Version; v == 0 || v > wire.Version {
		return nil, &wire.Error{Code: wire.CodeVersion, Message: fmt.Sprintf(
			"the control plane wants protocol version %d, this agent speaks up to %d: update one of them", v, wire.Version)}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	l.welcomed(s.welcome)
	return s, nil
}

// ended prefers what the other side said when it closed the session to the
// broken stream that came of it.
func ended(conn wire.Session, err error) error {
	if errors.Is(err, wire.ErrFrame) {
		return err
	}
	if said := conn.Err(); said != nil && wire.CodeOf(said) != "" {
		return said
	}
	if errors.Is(err, io.EOF) {
		return errors.New("the control plane closed the session")
	}
	return err
}

func writeFrames(w io.Writer, frames ...*wire.Frame) error {
	var b []byte
	var err error
	for _, f := range frames {
		if b, err = wire.AppendFrame(b, f); err != nil {
			return err
		}
	}
	_, err = w.Write(b)
	return err
}

const (
	// finish is how long requests under way may take on a session that another
	// has replaced, and parting how long the control plane has to say so there.
	finish  = 10 * time.Second
	parting = 2 * time.Second
)

// errRetired ends the reports of a session in whose place there is another.
var errRetired = errors.New("another session has taken over")

// begin comes before serve, and before anything else that ends the session.
func (s *session) begin(ctx context.Context) {
	s.life, s.end = context.WithCancel(ctx)
	s.active, s.cancel = context.WithCancelCause(s.life)
}

// retire makes the session end, but for requests under way, and returns when
// nothing of it reaches the agent any more.
func (s *session) retire() {
	s.cancel(errRetired)
	<-s.stopped
}

// check asks at once whether the control plane is still there.
func (s *session) check() {
	select {
	case s.checks <- struct{}{}:
	default:
	}
}

// serve runs the session until it ends or is retired, and says why. What it was
// asked may go on for some time after that, counted in all.
func (s *session) serve(all *sync.WaitGroup) error {
	l := s.link
	defer close(s.stopped)
	_ = s.control.SetDeadline(time.Time{})
	defer s.cancel(nil)
	proxy := ""
	if s.conn.Transport() == wire.TransportTCP {
		proxy = l.cfg.Proxy.Describe(s.address)
	}
	l.setStatus(func(st *Status) {
		st.State, st.Transport, st.Address, st.Proxy = StateConnected, s.conn.Transport(), s.address, proxy
		st.Control, st.LastError, st.Refused, st.NextTry = s.welcome.ControlVersion, "", false, time.Time{}
	})
	l.log.Info("connected", "address", s.address, "transport", s.conn.Transport(), "control", s.welcome.ControlVersion, "proxy", proxy)
	s.rememberAddresses()

	var reporting, living sync.WaitGroup
	run := func(work *sync.WaitGroup, ctx context.Context, f func(context.Context) error) {
		work.Go(func() {
			if err := f(ctx); err != nil {
				s.cancel(err)
			}
		})
	}
	if bug("leaked-goroutine") {
		go func() { select {} }()
	}
	// A session's end is work; before that there is none here.
	ending, unwatch := l.mind("session end", assignDeadline)
	run(&living, s.life, func(context.Context) error { return s.read() })
	run(&living, s.life, s.answerRequests)
	run(&reporting, s.active, s.write)
	run(&reporting, s.active, s.apply)
	select {
	case <-s.active.Done():
	case <-s.conn.Done():
		s.cancel(fmt.Errorf("the session broke: %w", s.conn.Err()))
	}
	ending(true)
	cause := context.Cause(s.active)
	if !errors.Is(cause, errRetired) {
		cause = ended(s.conn, cause)
	}
	_ = s.control.SetWriteDeadline(time.Now())
	part := errors.Is(cause, errRetired) || wire.CodeOf(cause) == wire.CodeReplaced
	if !part {
		s.hangUp(cause)
	}
	reporting.Wait()
	if part {
		all.Go(func() {
			s.part()
			s.hangUp(cause)
			living.Wait()
			unwatch()
		})
	} else {
		living.Wait()
		unwatch()
	}
	l.log.Info("disconnected", "reason", cause, "transport", s.conn.Transport())
	return cause
}

// hangUp ends the session for good.
func (s *session) hangUp(cause error) {
	code := ""
	if errors.Is(cause, wire.ErrFrame) {
		code = wire.CodeProtocol
	}
	// What is left in the stream does not matter: levels come again.
	s.conn.Close(code, "")
	s.end()
	_ = s.control.SetDeadline(time.Now())
	_ = s.control.Close()
}

// part waits until the control plane asks nothing more here and what it asked
// is answered.
func (s *session) part() {
	most := time.NewTimer(finish)
	defer most.Stop()
	soon := time.NewTimer(parting)
	defer soon.Stop()
	leaving, check := s.leaving, time.NewTicker(parting/20)
	defer check.Stop()
	for said := false; ; {
		select {
		case <-s.life.Done():
			return
		case <-s.conn.Done():
			return
		case <-most.C:
			return
		case <-soon.C:
			said = true
		case <-leaving:
			said, leaving = true, nil
		case <-check.C:
		}
		if said && s.answers.Load() == 0 {
			return
		}
	}
}

func (s *session) rememberAddresses() {
	l := s.link
	told := slices.DeleteFunc(slices.Clone(s.welcome.Addresses), func(a string) bool { return wire.CheckAddress(a) != nil })
	if len(told) == 0 || len(told) > 64 {
		return
	}
	l.mu.Lock()
	was := slices.Sorted(slices.Values(l.addresses))
	// The one that works stays first, and stays even when it is not among
	// those told: a forwarded port can be the only way there is.
	ordered := []string{s.address}
	for _, a := range told {
		if a != s.address {
			ordered = append(ordered, a)
		}
	}
	l.addresses = ordered
	changed := !slices.Equal(was, slices.Sorted(slices.Values(ordered)))
	l.mu.Unlock()
	if changed && l.cfg.Remember != nil {
		l.cfg.Remember(slices.Clone(ordered))
	}
}

// read takes what the control plane says. After the end of active, when another
// session has taken over, only acknowledgements count.
func (s *session) read() error {
	busy, unwatch := s.link.mind("session reader", assignDeadline)
	defer unwatch()
	pending := set{}
	for {
		// For how long nothing may come, the carrier and the writer know.
		busy(false)
		f, err := wire.ReadFrame(s.control)
		busy(true)
		if err != nil {
			return ended(s.conn, err)
		}
		s.heard.Add(1)
		switch b := f.Body.(type) {
		case *wire.Frame_Assignment:
			if s.active.Err() != nil {
				continue
			}
			if len(pending.assignments) >= maxSet {
				return fmt.Errorf("%w: more than %d assignments in a set", wire.ErrFrame, maxSet)
			}
			pending.assignments = append(pending.assignments, b.Assignment)
		case *wire.Frame_EndOfSet:
			pending.full, pending.sequence = b.EndOfSet.GetFull(), b.EndOfSet.GetSequence()
			pending.settled = pending.full && b.EndOfSet.GetSettled()
			if !s.link.saw(b.EndOfSet.GetMark()) {
				return errSuperseded
			}
			select {
			case s.sets <- pending:
			case <-s.active.Done(): // nobody takes it
			}
			pending = set{}
		case *wire.Frame_StatusAck:
			if !s.link.saw(b.StatusAck.GetMark()) {
				return errSuperseded
			}
			s.link.acked(b.StatusAck.GetSequence())
		case *wire.Frame_Ping:
			select {
			case s.pongs <- b.Ping.GetId():
			case <-s.active.Done():
			}
		case *wire.Frame_Goodbye:
			close(s.leaving)
			if err := b.Goodbye.GetFailure().Err(); err != nil {
				return err
			}
			return errors.New("the control plane said goodbye")
		}
	}
}

// apply hands sets to the agent one after the other, beside the reader: a
// slow disk does not delay acknowledgements. What the agent cannot persist is
// tried again here, together with what came since: a new session for each try
// would cost a handshake and bring the same set.
func (s *session) apply(ctx context.Context) error {
	pulse, unwatch := s.link.watch("session assignments", assignDeadline)
	defer unwatch()
	var todo *set
	var retry <-chan time.Time
	wait := applyRetry
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-pulse:
			continue
		case next := <-s.sets:
			if todo = todo.and(next); len(todo.assignments) > maxSet {
				return errors.New("take over assignments: too many wait for a disk that cannot be written")
			}
		case <-retry:
		}
		err := s.assign(ctx, todo)
		switch {
		case err == nil:
			s.link.AckAssignments(s.welcome.Incarnation, todo.sequence)
			todo, retry, wait = nil, nil, applyRetry
		case ctx.Err() != nil:
			return nil
		default:
			s.link.log.Debug("assignments are not taken over", "err", err, "retry", wait) // the agent says it aloud
			retry = time.After(wait)
			wait = min(2*wait, applyRetryCap)
		}
	}
}

// and is a set that waits with a later one added to it.
func (s *set) and(next set) *set {
	if s != nil && !next.full {
		next.full, next.settled = s.full, s.settled
		next.assignments = slices.Concat(s.assignments, next.assignments)
	}
	return &next
}

// write sends levels when they change, and pings when what it sent brought no
// answer.
func (s *session) write(ctx context.Context) error {
	var (
		timer    *time.Timer
		due      <-chan time.Time
		heard    int64 // frames read when the oldest unanswered one was sent
		last     int64 // and when the latest one was
		pings    uint64
		awaiting bool // the ping, not just any frame
	)
	// arm waits for an answer; before is what was heard before the question
	// was written, since the answer may be here by now.
	arm := func(d time.Duration, before int64) {
		if timer != nil {
			timer.Stop()
		}
		timer = time.NewTimer(d)
		due, heard = timer.C, before
	}
	watch := newVigil(s)
	defer watch.timer.Stop()
	// Minded and not asked: each frame that a slow link took is a turn.
	busy, unwatch := s.link.mind("session reports", sessionDeadline)
	defer unwatch()
	defer func() {
		if timer != nil {
			timer.Stop()
		}
	}()
	ask := func() error {
		busy(true)
		watch.ask(true)
		pings++
		_ = s.control.SetWriteDeadline(time.Now().Add(writeTimeout))
		if err := wire.WriteFrame(s.control, &wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: pings}}}); err != nil {
			return ended(s.conn, err)
		}
		return nil
	}
	ping := func() error {
		before := s.heard.Load()
		if err := ask(); err != nil {
			return err
		}
		awaiting, last = true, before
		arm(lost, before)
		return nil
	}
	var doubt <-chan struct{}
	if d, ok := s.conn.(wire.Doubter); ok {
		doubt = d.Doubt()
	}
	// Even while a ping waits for its answer: the carrier repeats that one ever
	// more rarely, and a control plane that is back by now turns a new one down
	// at once. It gets no more time for it.
	again := func() error {
		if due != nil && awaiting && s.heard.Load() == heard {
			return ask()
		}
		return ping()
	}
	for {
		frames := s.news()
		for {
			busy(true)
			if len(frames) > 0 {
				if bug("stuck-reports") && s.heard.Load() > 0 {
					select {}
				}
				last = s.heard.Load()
				watch.ask(false)
				_ = s.control.SetWriteDeadline(time.Now().Add(writeTimeout))
				if err := writeFrames(s.control, frames...); err != nil {
					return ended(s.conn, err)
				}
				if due == nil {
					arm(unanswered, last)
				}
			}
			if frames = s.news(); len(frames) == 0 {
				break
			}
		}
		busy(false)
		select {
		case <-ctx.Done():
			return nil
		case <-s.link.wake:
		case id := <-s.pongs:
			busy(true)
			_ = s.control.SetWriteDeadline(time.Now().Add(writeTimeout))
			if err := wire.WriteFrame(s.control, &wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: id}}}); err != nil {
				return ended(s.conn, err)
			}
		case <-doubt:
			if err := again(); err != nil {
				return err
			}
		case <-s.checks:
			if err := again(); err != nil {
				return err
			}
		case <-watch.timer.C:
			watch.look()
		case <-due:
			due = nil
			switch {
			case s.heard.Load() != heard:
				awaiting = false
				if s.heard.Load() == last {
					// Something was sent since, and that is unanswered.
					arm(unanswered, last)
				}
			case awaiting:
				return fmt.Errorf("the control plane has not answered for %s", unanswered+lost)
			default:
				if err := ping(); err != nil {
					return err
				}
			}
		}
	}
}

// news is what there is to say that this session has not said, at most some
// frames of it.
func (s *session) news() []*wire.Frame {
	const batch = 32
	l := s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	var frames []*wire.Frame
	if s.factsGen != l.factsGen {
		s.factsGen = l.factsGen
		frames = append(frames, &wire.Frame{Body: &wire.Frame_Facts{Facts: l.facts}})
	}
	if l.ack != s.ack && l.ack.incarnation == s.welcome.Incarnation {
		s.ack = l.ack
		frames = append(frames, &wire.Frame{Body: &wire.Frame_AssignmentAck{AssignmentAck: &wire.AssignmentAck{Sequence: l.ack.sequence}}})
	}
	frames = append(frames, s.newHoldings()...)
	var due []*wire.TaskStatus
	for id, st := range l.statuses {
		if sent, ok := s.sent[id]; !ok || sent != st.Sequence {
			due = append(due, st)
		}
	}
	slices.SortFunc(due, func(a, b *wire.TaskStatus) int {
		switch {
		case a.Sequence < b.Sequence:
			return -1
		case a.Sequence > b.Sequence:
			return 1
		}
		return 0
	})
	for _, st := range due[:min(batch, len(due))] {
		s.sent[st.TaskId] = st.Sequence
		frames = append(frames, &wire.Frame{Body: &wire.Frame_TaskStatus{TaskStatus: st}})
	}
	for id := range s.sent {
		if _, ok := l.statuses[id]; !ok {
			delete(s.sent, id)
		}
	}
	return frames
}
