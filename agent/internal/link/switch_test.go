package link

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// welcome plays the control plane's part for a session that has come, and says
// to the one before what a control plane says.
func welcome(p *wiretest.Peer, before *wiretest.Peer) *wire.Hello {
	p.Expect("open")
	h := p.Expect("hello").GetHello()
	if before != nil {
		before.Send(&wire.Frame{Body: &wire.Frame_Goodbye{Goodbye: &wire.Goodbye{Failure: wire.Failf(wire.CodeReplaced, "a newer session")}}})
	}
	p.Send(&wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Version: 1, Incarnation: "i1"}}})
	return h
}

func endOfSet(sequence uint64, full bool) *wire.Frame {
	return &wire.Frame{Body: &wire.Frame_EndOfSet{EndOfSet: &wire.EndOfSet{Sequence: sequence, Full: full}}}
}

func TestMoveToQUICLosesNothing(t *testing.T) {
	noLeaks(t)
	control := wiretest.NewControlPlane(t)
	r := newRelay(t, control)
	r.udpBlocked.Store(true)
	cfg := config(t, control, TransportAuto)
	cfg.Addresses = []string{r.address()}
	cfg.ProbeFirst, cfg.ProbeMost = 500*time.Millisecond, 500*time.Millisecond
	d := &downlink{}
	half, rest := make(chan struct{}), make(chan struct{})
	d.setLogs(func(ctx context.Context, _ *wire.LogsRequest, chunk func(string, []byte) error) error {
		if err := chunk("stdout", []byte("before ")); err != nil {
			return err
		}
		close(half)
		select {
		case <-rest:
		case <-ctx.Done():
			return ctx.Err()
		}
		return chunk("stdout", []byte("after"))
	})
	l := start(t, cfg, d)
	old := control.Next(t)
	if old.Transport() != wire.TransportTCP {
		t.Fatalf("it came over %s though UDP is blocked", old.Transport())
	}
	first := welcome(old, nil)
	// A request is under way and a status not acknowledged.
	request := openStream(t, old)
	asked := &wiretest.Peer{Session: old.Session, Control: request}
	for _, f := range []*wire.Frame{
		{Body: &wire.Frame_Open{Open: &wire.Open{Type: wire.StreamType_STREAM_TYPE_REQUEST}}},
		{Body: &wire.Frame_Request{Request: &wire.Request{Body: &wire.Request_Logs{Logs: &wire.LogsRequest{TaskId: taskB}}}}},
	} {
		if err := wire.WriteFrame(asked.Control, f); err != nil {
			t.Fatal(err)
		}
	}
	<-half
	l.TaskStatus(&wire.TaskStatus{Sequence: 1, TaskId: taskB, LastStatus: "RUNNING"})
	old.Expect("task_status")

	r.udpBlocked.Store(false)
	next := control.Next(t)
	if next.Transport() != wire.TransportQUIC {
		t.Fatalf("the next session came over %s", next.Transport())
	}
	second := welcome(next, old)
	if second.Ordinal <= first.Ordinal {
		t.Errorf("hello says it is number %d after %d", second.Ordinal, first.Ordinal)
	}
	if got := next.Expect("task_status").GetTaskStatus().Sequence; got != 1 {
		t.Errorf("sent %d", got)
	}
	next.Send(ack(1))
	// What the old one says of assignments now is not heard any more.
	_ = wire.WriteFrame(old.Control, endOfSet(9, true))
	next.Send(&wire.Frame{Body: &wire.Frame_Assignment{Assignment: &wire.Assignment{TaskId: "a", Desired: "RUNNING", Sequence: 10}}})
	next.Send(endOfSet(10, false))
	if got := next.Expect("assignment_ack").GetAssignmentAck().Sequence; got != 10 {
		t.Errorf("acknowledged %d", got)
	}
	// The request under way goes on where it was.
	close(rest)
	text := ""
	for {
		_ = request.SetReadDeadline(time.Now().Add(wiretest.Patience))
		f, err := wire.ReadFrame(request)
		if err != nil {
			t.Fatalf("the answer was cut off after %q: %v", text, err)
		}
		if f.GetDone() != nil {
			break
		}
		text += string(f.GetChunk().GetData())
	}
	if text != "before after" {
		t.Errorf("the answer was %q", text)
	}
	_ = old.ExpectEnd()
	until(t, "the status says quic", func() bool { return l.Status().Transport == wire.TransportQUIC })
	if d.read(func(d *downlink) bool { return !slices.Equal(d.ups, []bool{true}) || len(d.acks) != 1 }) {
		t.Errorf("the agent was told: up %v, acknowledged %v", d.ups, d.acks)
	}
	if d.read(func(d *downlink) bool { return len(d.sets) != 1 || d.sets[0].Sequence != 10 }) {
		t.Errorf("assigned %v", d.sets)
	}
}

// A probe that is refused, or that finds a control plane which says nothing,
// leaves the session over TCP alone.
func TestFailedProbeLeavesTheSessionAlone(t *testing.T) {
	noLeaks(t)
	control := wiretest.NewControlPlane(t)
	r := newRelay(t, control)
	r.udpBlocked.Store(true)
	cfg := config(t, control, TransportAuto)
	cfg.Addresses = []string{r.address()}
	cfg.ProbeFirst, cfg.ProbeMost = 200*time.Millisecond, 200*time.Millisecond
	d := &downlink{}
	l := start(t, cfg, d)
	old := control.Next(t)
	welcome(old, nil)
	r.udpBlocked.Store(false)
	for range 3 {
		p := control.Next(t)
		p.Expect("open")
		p.Expect("hello")
		f := wire.Failf(wire.CodeOverloaded, "later")
		f.RetryAfterMs = 100
		p.Send(&wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Failure: f}}})
		_ = p.ExpectEnd()
	}
	l.TaskStatus(&wire.TaskStatus{Sequence: 1, TaskId: taskB, LastStatus: "RUNNING"})
	old.Expect("task_status")
	old.Send(ack(1))
	if s := l.Status(); s.State != StateConnected || s.Transport != wire.TransportTCP {
		t.Errorf("status %+v", s)
	}
	if d.read(func(d *downlink) bool { return len(d.ups) != 1 }) {
		t.Error("the agent was told of a break")
	}
}

// The NAT gives the agent another port: the same session goes on.
func TestNATRebindingKeepsTheSession(t *testing.T) {
	noLeaks(t)
	control := wiretest.NewControlPlane(t)
	r := newRelay(t, control)
	cfg := config(t, control, TransportAuto)
	cfg.Addresses = []string{r.address()}
	d := &downlink{}
	l := start(t, cfg, d)
	p := control.Next(t)
	welcome(p, nil)
	until(t, "it is connected", func() bool { return l.Status().State == StateConnected })
	was := p.RemoteAddr().String()
	for i := range uint64(3) {
		r.rebind()
		// What the agent says next comes from a new port; its answer finds there.
		l.TaskStatus(&wire.TaskStatus{Sequence: i + 1, TaskId: taskB, LastStatus: "RUNNING"})
		if got := p.Expect("task_status").GetTaskStatus().Sequence; got != i+1 {
			t.Errorf("status %d", got)
		}
		p.Send(ack(i + 1))
		until(t, "the acknowledgement arrives", func() bool { return d.read(func(d *downlink) bool { return len(d.acks) == int(i)+1 }) })
	}
	until(t, "the control plane sees the new address", func() bool { return p.RemoteAddr().String() != was })
	// With nothing to say, a change of address makes it say something.
	r.rebind()
	l.NetworkChanged("test")
	p.Expect("ping")
	p.Send(&wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: 1}}})
	if d.read(func(d *downlink) bool { return !slices.Equal(d.ups, []bool{true}) }) {
		t.Errorf("told %v", d.ups)
	}
	if s := l.Status(); s.State != StateConnected || s.Transport != wire.TransportQUIC {
		t.Errorf("status %+v", s)
	}
}

// No sockets or goroutines stay behind of tries, lost races and moves.
func TestNothingIsLeftBehind(t *testing.T) {
	noLeaks(t)
	control := wiretest.NewControlPlane(t)
	r := newRelay(t, control)
	cfg := config(t, control, TransportAuto)
	cfg.Addresses = []string{r.address(), "127.0.0.1:1", "[::1]:1"}
	cfg.ProbeFirst, cfg.ProbeMost = 100*time.Millisecond, 100*time.Millisecond
	l := start(t, cfg, &downlink{})
	var sessions atomic.Int32
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			s, err := control.Accept(ctx)
			if err != nil {
				return
			}
			t.Cleanup(func() { s.Close("", "") })
			st, err := s.AcceptStream(ctx)
			if err != nil {
				continue
			}
			sessions.Add(1)
			_ = wire.WriteFrame(st, &wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Version: 1, Incarnation: "i1"}}})
		}
	}()
	for i := range 5 {
		r.udpBlocked.Store(i%2 == 0)
		n := sessions.Load()
		l.Rebuild()
		until(t, "another session", func() bool { return sessions.Load() > n && l.Status().State == StateConnected })
	}
	cancel()
	<-served
}
