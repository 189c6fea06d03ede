package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

// session is the registered tunnel of one instance. Four goroutines serve it:
// one reads the control stream, one writes it, one talks to the domain (sync.go)
// and one follows changes; any of them ending ends the session.
type session struct {
	hub      *Hub
	wire     wire.Session
	control  wire.Stream
	instance string
	key      string // fingerprint
	nonce    string
	machine  string // hashed
	ordinal  uint64 // among the sessions of this start of the agent
	boot     string
	host     string
	since    time.Time
	log      *slog.Logger

	ctx      context.Context
	cancel   context.CancelCauseFunc
	open     context.Context // until requests are no longer answered: at ctx's end, or later
	hangUp   context.CancelFunc
	out      chan *wire.Frame
	statuses chan *wire.TaskStatus
	facts    chan *wire.Facts
	holdings chan []*wire.Holding
	pong     chan struct{} // cap 1: the device answered a probe
	changed  chan struct{} // cap 1: look at the domain again
	requests chan struct{} // one element for each open request
	before   *session      // that this one replaced, until the domain goroutine has waited for it
	silent   chan struct{} // closed when nothing of this session reaches the domain any more

	sent  uint64                      // sequence up to which assignments were sent; domain goroutine only
	told  *wire.Facts                 // in Hello
	hello controlplane.Hello          // what facts are reported with; domain goroutine only
	late  map[string]*wire.TaskStatus // statuses the domain could not take yet, by task; domain goroutine only
	taken map[string]uint64           // sequence of the latest status the domain took, by task; domain goroutine only
}

// tunnel serves a session of wire.ProtocolTunnel.
func (h *Hub) tunnel(ctx context.Context, ws wire.Session, log *slog.Logger, registered func()) {
	stream, err := acceptControl(ctx, ws)
	if err != nil {
		log.Debug("session ended before it registered", "err", err)
		closeEarly(ctx, ws, err)
		return
	}
	f, err := await(ctx, stream, func(f *wire.Frame) bool { return f.GetHello() != nil })
	if err != nil {
		log.Debug("session ended before it registered", "err", err)
		closeEarly(ctx, ws, err)
		return
	}
	hello := f.GetHello()
	log = log.With("instance", legible(hello.InstanceId))
	s := &session{
		hub: h, wire: ws, control: stream, instance: hello.InstanceId,
		key: wire.Fingerprint(ws.PeerCertificate()), nonce: hello.AgentNonce, machine: hello.HashedMachineId, ordinal: hello.Ordinal, told: hello.Facts,
		boot: hello.BootId, host: hello.GetFacts().GetAttributes()["belay.hostname"],
		since: h.cfg.Now(), log: log,
		out:      make(chan *wire.Frame, outFrames),
		statuses: make(chan *wire.TaskStatus, inStatuses),
		facts:    make(chan *wire.Facts, 1),
		holdings: make(chan []*wire.Holding, 1),
		pong:     make(chan struct{}, 1),
		changed:  make(chan struct{}, 1),
		requests: make(chan struct{}, maxRequests),
		silent:   make(chan struct{}),
		late:     map[string]*wire.TaskStatus{},
		taken:    map[string]uint64{},
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	defer s.cancel(nil)
	s.open, s.hangUp = context.WithCancel(context.Background())
	defer s.hangUp()
	refuse := func(failure *wire.Failure) {
		registered() // its place is for others: what is left takes lastWords at most
		level := slog.LevelInfo
		if failure.Code == wire.CodeOverloaded {
			level = slog.LevelDebug // the gate tells how many
		}
		log.Log(ctx, level, "session refused", "code", failure.Code, "reason", failure.Message)
		_ = stream.SetDeadline(time.Now().Add(lastWords))
		if wire.WriteFrame(stream, &wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Failure: failure}}}) == nil {
			linger(ws, stream)
		}
		ws.Close(failure.Code, failure.Message)
	}
	var work sync.WaitGroup
	defer work.Wait()
	if failure := h.gate.enter(); failure != nil {
		refuse(failure)
		return
	}
	installed := make(chan struct{})
	first, failure := s.register(hello, func() { work.Go(func() { s.watch(installed) }) })
	if failure != nil {
		s.cancel(nil)
		refuse(failure)
		return
	}
	_ = stream.SetDeadline(time.Time{})
	registered()
	if !h.install(s) {
		s.cancel(nil)
		refuse(wire.Failf(wire.CodeReplaced, "a newer session of this agent has registered already"))
		return
	}
	close(installed)
	log.Info("device connected", "agent", hello.AgentVersion)
	s.serve(&work, first)
	h.drop(s)
	work.Wait()
	s.farewell(ctx)
}

// register checks who it is and what it should get first. It starts the watch
// before it reads, and the watch looks once at its start: no change is missed.
func (s *session) register(hello *wire.Hello, watch func()) ([]*wire.Frame, *wire.Failure) {
	if hello.Version == 0 {
		return nil, wire.Failf(wire.CodeVersion, "the agent does not say which version of the protocol it speaks")
	}
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	known, err := s.hub.devices.Authenticate(ctx, s.instance, s.key)
	if err != nil {
		return nil, failureOf(err, s.log, "authenticate a device")
	}
	if failure := s.hub.admitMachine(ctx, s, known); failure != nil {
		return nil, failure
	}
	met, err := s.hub.devices.Meet(ctx, s.instance, positionOf(hello), slices.Contains(hello.Capabilities, wire.CapabilityReconcile))
	if err != nil {
		return nil, failureOf(err, s.log, "compare a device with the store")
	}
	watch()
	s.hello = controlplane.Hello{
		AgentVersion:    hello.AgentVersion,
		Hostname:        s.host,
		HashedMachineID: hello.HashedMachineId,
		Capabilities:    hello.Capabilities,
		Facts:           factsOf(hello.Facts),
	}
	if err := s.hub.devices.ReportFacts(ctx, s.instance, s.hello); err != nil {
		return nil, failureOf(err, s.log, "store a device's facts")
	}
	set, err := s.hub.devices.Assignments(ctx, s.instance, hello.Incarnation, met.Sequence)
	if err != nil {
		return nil, failureOf(err, s.log, "read a device's assignments")
	}
	now := s.hub.cfg.Now()
	frames := []*wire.Frame{{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{
		Version:        min(hello.Version, wire.Version),
		Incarnation:    s.hub.devices.Incarnation(),
		ControlVersion: s.hub.cfg.Version,
		Addresses:      s.hub.cfg.Advertise,
		Full:           set.Full,
		Now:            &wire.When{WallUnixNs: now.UnixNano(), Synchronized: true},
		Mark:           s.mark(),
		Reconcile:      met.Reconcile,
	}}}}
	s.sent = set.Sequence
	return append(frames, s.framesOf(set)...), nil
}

// serve runs the session until its context ends.
func (s *session) serve(work *sync.WaitGroup, first []*wire.Frame) {
	stop := func(doing string, err error) {
		if err != nil {
			s.cancel(fmt.Errorf("%s: %w", doing, err))
		}
	}
	var writer sync.WaitGroup
	writer.Go(func() { stop("write", s.write(first)) })
	work.Go(func() { stop("read", s.read()) })
	work.Go(func() {
		defer close(s.silent)
		s.converse()
	})
	work.Go(func() { stop("accept", s.acceptStreams()) })
	select {
	case <-s.ctx.Done():
	case <-s.wire.Done():
		s.cancel(fmt.Errorf("session: %w", s.wire.Err()))
	}
	if !s.draining() {
		s.hangUp()
	}
	// Wake the reader now, and give the writer a moment to finish a frame.
	_ = s.control.SetReadDeadline(time.Now())
	_ = s.control.SetWriteDeadline(time.Now().Add(lastWords))
	writer.Wait()
}

// end makes the session say goodbye and end. It does not wait.
func (s *session) end(f *wire.Failure) { s.cancel(&ending{failure: f}) }

// farewell tells the device why, when it was this side's wish.
func (s *session) farewell(ctx context.Context) {
	cause := context.Cause(s.ctx)
	var e *ending
	switch {
	case errors.As(cause, &e):
	case errors.Is(cause, wire.ErrFrame):
		e = &ending{failure: wire.Failf(wire.CodeProtocol, "%s", cause)}
	default:
		s.log.Info("device disconnected", "reason", cause)
		s.wire.Close("", "")
		return
	}
	s.log.Info("session ended by the control plane", "code", e.failure.Code, "reason", e.failure.Message)
	_ = s.control.SetWriteDeadline(time.Now().Add(lastWords))
	if wire.WriteFrame(s.control, &wire.Frame{Body: &wire.Frame_Goodbye{Goodbye: &wire.Goodbye{Failure: e.failure}}}) == nil {
		if e.drain {
			s.drain(ctx)
		}
		linger(s.wire, s.control)
	}
	s.wire.Close(e.failure.Code, e.failure.Message)
}

// drain lets requests under way finish. It takes their places, so that no new
// ones come.
func (s *session) drain(ctx context.Context) {
	t := time.NewTimer(drainTimeout)
	defer t.Stop()
	for range maxRequests {
		select {
		case s.requests <- struct{}{}:
		case <-s.wire.Done():
			return
		case <-ctx.Done():
			return
		case <-t.C:
			s.log.Info("requests on a session that was replaced did not finish in time", "after", drainTimeout)
			return
		}
	}
}

func (s *session) write(first []*wire.Frame) error {
	put := func(f *wire.Frame) error {
		_ = s.control.SetWriteDeadline(time.Now().Add(writeTimeout))
		return wire.WriteFrame(s.control, f)
	}
	for _, f := range first {
		if err := put(f); err != nil {
			return err
		}
	}
	for {
		select {
		case <-s.ctx.Done():
			return nil
		case f := <-s.out:
			if err := put(f); err != nil {
				return err
			}
		}
	}
}

// say queues a frame. The queue being full means the device is slow, and the
// caller, who serves this device only, waits with it.
func (s *session) say(f *wire.Frame) bool {
	select {
	case s.out <- f:
		return true
	case <-s.ctx.Done():
		return false
	}
}

func (s *session) read() error {
	var holdings holdings
	for {
		f, err := wire.ReadFrame(s.control)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the device closed it")
			}
			return err
		}
		switch b := f.Body.(type) {
		case *wire.Frame_TaskStatus:
			select {
			case s.statuses <- b.TaskStatus:
			case <-s.ctx.Done():
				return nil
			}
		case *wire.Frame_Facts:
			// Facts are a level: a newer one replaces one not yet taken.
			select {
			case <-s.facts:
			default:
			}
			s.facts <- b.Facts
		case *wire.Frame_Ping:
			if !s.say(&wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: b.Ping.GetId()}}}) {
				return nil
			}
		case *wire.Frame_Pong:
			select {
			case s.pong <- struct{}{}:
			default:
			}
		case *wire.Frame_Holding:
			if err := holdings.add(b.Holding); err != nil {
				return err
			}
		case *wire.Frame_EndOfHoldings:
			// The latest are what counts, as with facts.
			select {
			case <-s.holdings:
			default:
			}
			s.holdings <- holdings.take()
		case *wire.Frame_AssignmentAck:
			s.log.Debug("assignments persisted", "sequence", b.AssignmentAck.GetSequence())
		}
	}
}

// acceptStreams gives up streams of types this version does not serve, which
// for now are all but the control stream.
func (s *session) acceptStreams() error {
	for {
		stream, err := s.wire.AcceptStream(s.ctx)
		if err != nil {
			return err
		}
		_ = stream.Close()
	}
}

// watch follows the instance's record and assignments. A change before the
// session is installed is kept in changed.
func (s *session) watch(installed <-chan struct{}) {
	err := s.hub.devices.WatchInstance(s.ctx, s.instance, func() {
		select {
		case s.changed <- struct{}{}:
		default:
		}
	})
	if s.ctx.Err() != nil {
		return
	}
	select {
	case <-installed:
		s.log.Error("follow an instance's changes", "err", err)
		s.end(wire.Failf(wire.CodeUnavailable, "the control plane lost sight of its store, connect again"))
	case <-s.ctx.Done():
	}
}
