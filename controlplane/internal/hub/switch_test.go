package hub

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// as registers one session of the agent "n".
func (r *rig) as(transport string, ordinal uint64) *wiretest.Peer {
	r.t.Helper()
	p := r.agent(transport, wire.ProtocolTunnel)
	p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
	h := hello(instanceA, "n", 0)
	h.GetHello().Ordinal = ordinal
	p.Send(h)
	return p
}

func (p *devices) sequences() []uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []uint64
	for _, s := range p.reported {
		out = append(out, s.Sequence)
	}
	return out
}

func TestLateRegistrationDoesNotReplaceTheOneTheAgentMeans(t *testing.T) {
	r := newRig(t, newDevices())
	second := r.as(wire.TransportTCP, 2)
	second.Expect("welcome")
	first := r.as(wire.TransportQUIC, 1)
	if f := first.Expect("welcome").GetWelcome().GetFailure(); f.GetCode() != wire.CodeReplaced {
		t.Errorf("the late one was told %v", f)
	}
	_ = first.ExpectEnd()
	if s, ok := r.hub.Session(instanceA); !ok || s.Transport != wire.TransportTCP {
		t.Errorf("the session is %+v", s)
	}
	// An agent that was started again counts from 1.
	p := r.agent(wire.TransportQUIC, wire.ProtocolTunnel)
	p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
	h := hello(instanceA, "later", 0)
	h.GetHello().Ordinal = 1
	p.Send(h)
	if f := p.Expect("welcome").GetWelcome().GetFailure(); f != nil {
		t.Errorf("refused: %v", f)
	}
}

// The store hangs while the session is replaced: what the old one had queued
// must not arrive after what the new one says, and what was stored without
// being acknowledged is not stored again.
func TestStatusesStayInOrderAcrossASwitch(t *testing.T) {
	for _, from := range transports {
		t.Run(from, func(t *testing.T) {
			d := newDevices()
			d.assign(&wire.Assignment{Sequence: 1, TaskId: taskB, Desired: "RUNNING"})
			r := newRig(t, d)
			old := r.as(from, 1)
			old.Expect("welcome")
			old.Expect("assignment")
			old.Expect("end_of_set")
			old.Send(status(1, taskB, "PENDING"))
			old.Expect("status_ack")
			gate := make(chan struct{})
			d.change(func() { d.gate = gate })
			old.Send(status(2, taskB, "PENDING"))
			next := r.as(wire.TransportQUIC, 2)
			next.Expect("welcome")
			next.Expect("assignment")
			next.Expect("end_of_set")
			next.Send(status(1, taskB, "PENDING")) // as if its acknowledgement had been lost
			if got := next.Expect("status_ack").GetStatusAck().Sequence; got != 1 {
				t.Errorf("acknowledged %d", got)
			}
			next.Send(status(3, taskB, "RUNNING"))
			close(gate)
			if got := next.Expect("status_ack").GetStatusAck().Sequence; got != 3 {
				t.Errorf("acknowledged %d", got)
			}
			got := d.sequences()
			if diff := cmp.Diff([]uint64{1, 3}, got); diff != "" && cmp.Diff([]uint64{1, 2, 3}, got) != "" {
				t.Errorf("the domain saw %v", got)
			}
			if g := old.Expect("goodbye").GetGoodbye().Failure; g.GetCode() != wire.CodeReplaced {
				t.Errorf("goodbye %v", g)
			}
		})
	}
}

func TestRequestsUnderWayFinishOnTheSessionThatIsReplaced(t *testing.T) {
	for _, from := range transports {
		t.Run(from, func(t *testing.T) {
			r := newRig(t, newDevices())
			old := r.as(from, 1)
			old.Expect("welcome")
			old.Expect("end_of_set")
			answered := make(chan error, 1)
			var got []byte
			go func() {
				answered <- r.hub.Logs(context.Background(), instanceA, &wire.LogsRequest{TaskId: taskB}, func(c *wire.Chunk) error {
					got = append(got, c.Data...)
					return nil
				})
			}()
			ctx, cancel := context.WithTimeout(t.Context(), wiretest.Patience)
			defer cancel()
			st, err := old.AcceptStream(ctx)
			if err != nil {
				t.Fatal(err)
			}
			chunk := func(s string) {
				t.Helper()
				if err := wire.WriteFrame(st, &wire.Frame{Body: &wire.Frame_Chunk{Chunk: &wire.Chunk{Stream: "stdout", Data: []byte(s)}}}); err != nil {
					t.Fatal(err)
				}
			}
			chunk("one ")
			next := r.as(wire.TransportQUIC, 2)
			next.Expect("welcome")
			old.Expect("goodbye")
			if s, _ := r.hub.Session(instanceA); s.Transport != wire.TransportQUIC {
				t.Errorf("the session is %+v", s)
			}
			chunk("two")
			if err := wire.WriteFrame(st, &wire.Frame{Body: &wire.Frame_Done{Done: &wire.Done{}}}); err != nil {
				t.Fatal(err)
			}
			if err := <-answered; err != nil || string(got) != "one two" {
				t.Errorf("the answer was %q, %v", got, err)
			}
			_ = old.ExpectEnd()
		})
	}
}

func TestAnotherAgentsSessionIsNotDrained(t *testing.T) {
	r := newRig(t, newDevices())
	old := r.connect(wire.TransportQUIC, "n", 0)
	answered := make(chan error, 1)
	go func() {
		answered <- r.hub.Logs(context.Background(), instanceA, &wire.LogsRequest{TaskId: taskB}, func(*wire.Chunk) error { return nil })
	}()
	ctx, cancel := context.WithTimeout(t.Context(), wiretest.Patience)
	defer cancel()
	if _, err := old.AcceptStream(ctx); err != nil {
		t.Fatal(err)
	}
	r.connect(wire.TransportQUIC, "started again", 0)
	select {
	case err := <-answered:
		if controlplane.CodeOf(err) != controlplane.Unavailable {
			t.Errorf("the answer was %v", err)
		}
	case <-time.After(drainTimeout / 2):
		t.Error("a request waits for an agent that is gone")
	}
}

func TestOverloadedControlPlaneKeepsWhoIsConnected(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			r := newRig(t, newDevices())
			old := r.as(transport, 1)
			old.Expect("welcome")
			old.Expect("end_of_set")
			r.hub.gate.mu.Lock()
			r.hub.gate.tokens, r.hub.gate.rate = 0, 0.001
			r.hub.gate.mu.Unlock()
			next := r.as(transport, 2)
			if f := next.Expect("welcome").GetWelcome().GetFailure(); f.GetCode() != wire.CodeOverloaded || f.GetRetryAfterMs() == 0 {
				t.Errorf("told %v", f)
			}
			old.Send(&wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 9}}})
			if got := old.Expect("pong").GetPong().Id; got != 9 {
				t.Errorf("pong %d", got)
			}
		})
	}
}

// Sessions that do not register take places; those of one source are few enough
// that others find some. Each gives its place back, registered or not.
func TestOneSourceCannotTakeEveryPlace(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	h := New(Config{Devices: newDevices(), Version: "0.1.0"})
	h.fresh = carrier.NewSources(2)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- h.Serve(ctx, control) }()
	defer func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	r := &rig{t: t, control: control, hub: h}
	for range 3 {
		idle := []*wiretest.Peer{r.agent(wire.TransportQUIC, wire.ProtocolTunnel), r.agent(wire.TransportTCP, wire.ProtocolTunnel)}
		until(t, "both hold a place", func() bool { return len(h.pending) == 2 })
		third := r.agent(wire.TransportQUIC, wire.ProtocolTunnel)
		if err := third.ExpectEnd(); wire.CodeOf(err) != wire.CodeOverloaded {
			t.Errorf("one too many was told %v", err)
		}
		idle[0].Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
		idle[0].Send(hello(instanceA, "n", 0))
		if f := idle[0].Expect("welcome").GetWelcome().GetFailure(); f != nil {
			t.Errorf("refused: %v", f)
		}
		idle[1].Close("", "")
		until(t, "the places are free", func() bool { return len(h.pending) == 0 })
	}
}
