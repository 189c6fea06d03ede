package hub

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

var transports = []string{wire.TransportQUIC, wire.TransportTCP}

func TestHubSpeaksTheTranscriptOfVersion1(t *testing.T) {
	for _, transport := range transports {
		for _, grease := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, grease %t", transport, grease), func(t *testing.T) {
				t.Parallel()
				tr := wiretest.Must(t, "v1-session")
				d := newDevices()
				r := newRig(t, d)
				p := r.agent(transport, wire.ProtocolTunnel)
				p.Grease = grease
				for _, s := range tr.Steps {
					if a := s.Frame.GetAssignment(); a != nil {
						d.assign(a)
						break
					}
				}
				p.Play(tr, wiretest.Agent, func(f *wire.Frame) {
					switch {
					case f.GetAssignment().GetStopReason() != "":
						d.assign(f.GetAssignment())
					case f.GetGoodbye() != nil:
						until(t, "the facts arrive", func() bool {
							d.mu.Lock()
							defer d.mu.Unlock()
							return d.facts[len(d.facts)-1].Facts.MemoryMiB == 3000
						})
						g := f.GetGoodbye().Failure
						r.hub.Disconnect(instanceA, g.Code, g.Message)
					}
				})
				if err := p.ExpectEnd(); transport == wire.TransportQUIC && wire.CodeOf(err) != wire.CodeDenied {
					t.Errorf("the session ended with %v", err)
				}
				want := controlplane.Facts{
					Attributes: map[string]string{"belay.arch": "arm64", "belay.hostname": "shelf-7"}, CPU: 4096, MemoryMiB: 3584,
					Plugins: []controlplane.PluginInfo{{Name: "containerd", Version: "0.1.0", Kinds: []string{"runtime"}, State: "ready",
						Networks: []string{"bridge", "host", "none"}}},
					ReservedPorts: []controlplane.PortKey{{Protocol: "tcp", Port: 22}},
				}
				d.mu.Lock()
				defer d.mu.Unlock()
				if diff := cmp.Diff(controlplane.Hello{AgentVersion: "0.1.0", Hostname: "shelf-7", HashedMachineID: "m1", Capabilities: []string{"logs"}, Facts: want}, d.facts[0]); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

func TestHubResumesByTheTranscriptOfVersion1(t *testing.T) {
	tr := wiretest.Must(t, "v1-resume")
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			d := newDevices()
			d.assign(&wire.Assignment{Sequence: 7, TaskId: taskB, Desired: "RUNNING"})
			for _, s := range tr.Steps {
				if a := s.Frame.GetAssignment(); a != nil {
					d.assign(a)
				}
			}
			r := newRig(t, d)
			r.agent(transport, wire.ProtocolTunnel).Play(tr, wiretest.Agent, func(f *wire.Frame) {
				if f.GetGoodbye() != nil {
					r.stop()
				}
			})
		})
	}
}

func TestHubEnrolsByTheTranscriptOfVersion1(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			d := newDevices()
			r := newRig(t, d)
			d.answer(controlplane.Instance{ID: instanceA, Cluster: "default"}, nil)
			p := r.agent(transport, wire.ProtocolEnroll)
			p.Play(wiretest.Must(t, "v1-enroll"), wiretest.Agent, nil)
			if e := d.asked(); e.KeyFingerprint == "" || e.Hostname != "shelf-7" || string(e.Secret) != "0123456789abcdef0123456789abcdef" {
				t.Errorf("the domain was asked for %+v", e)
			}
			d.answer(controlplane.Instance{}, controlplane.Errorf(controlplane.Exhausted, "the activation is used up"))
			p = r.agent(transport, wire.ProtocolEnroll)
			p.Play(wiretest.Must(t, "v1-enroll-refused"), wiretest.Agent, nil)
		})
	}
}

func TestRefusals(t *testing.T) {
	tests := []struct {
		name  string
		edit  func(*devices)
		hello *wire.Frame
		code  string
	}{
		{"unknown instance", nil, hello("nobody", "n", 0), wire.CodeNotFound},
		{"another key", func(d *devices) { d.key = "other" }, hello(instanceA, "n", 0), wire.CodeUnknownKey},
		{"deregistered", func(d *devices) { d.denied = true }, hello(instanceA, "n", 0), wire.CodeDenied},
		{"no version", nil, &wire.Frame{Body: &wire.Frame_Hello{Hello: &wire.Hello{InstanceId: instanceA}}}, wire.CodeVersion},
	}
	for _, tt := range tests {
		for _, transport := range transports {
			t.Run(tt.name+" "+transport, func(t *testing.T) {
				t.Parallel()
				d := newDevices()
				if tt.edit != nil {
					tt.edit(d)
				}
				r := newRig(t, d)
				p := r.agent(transport, wire.ProtocolTunnel)
				p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
				p.Send(tt.hello)
				if f := p.Expect("welcome").GetWelcome().GetFailure(); f.GetCode() != tt.code || f.GetMessage() == "" {
					t.Errorf("refused with %v, want %s", f, tt.code)
				}
				_ = p.ExpectEnd()
				if _, ok := r.hub.Session(instanceA); ok {
					t.Error("a refused device has a session")
				}
			})
		}
	}
}

func TestLaterVersionOfAnAgentIsWelcome(t *testing.T) {
	r := newRig(t, newDevices())
	p := r.agent(wire.TransportQUIC, wire.ProtocolTunnel)
	// A stream of a type from the future comes before the control stream.
	other, err := p.OpenStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := wire.WriteFrame(other, open(77)); err != nil {
		t.Fatal(err)
	}
	f := hello(instanceA, "n", 0)
	f.GetHello().Version = 12
	p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
	p.Send(f)
	if w := p.Expect("welcome").GetWelcome(); w.Failure != nil || w.Version != wire.Version {
		t.Errorf("welcome %v", w)
	}
}

func TestDeregistrationEndsTheSessionAtOnce(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			d := newDevices()
			r := newRig(t, d)
			p := r.connect(transport, "n", 0)
			p.Expect("end_of_set")
			start := time.Now()
			d.change(func() { d.denied = true })
			if f := p.Expect("goodbye").GetGoodbye().Failure; f.Code != wire.CodeDenied {
				t.Errorf("goodbye says %v", f)
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("it took %s", took)
			}
			if _, ok := r.hub.Session(instanceA); ok {
				t.Error("it still has a session")
			}
			_ = p.ExpectEnd()
		})
	}
}

func TestNewerSessionReplacesTheOlder(t *testing.T) {
	r := newRig(t, newDevices())
	first := r.connect(wire.TransportTCP, "one", 0)
	first.Expect("end_of_set")
	second := r.connect(wire.TransportQUIC, "two", 0)
	second.Expect("end_of_set")
	if f := first.Expect("goodbye").GetGoodbye().Failure; f.Code != wire.CodeReplaced {
		t.Errorf("goodbye says %v", f)
	}
	_ = first.ExpectEnd()
	s, ok := r.hub.Session(instanceA)
	if !ok || s.AgentNonce != "two" || s.Transport != wire.TransportQUIC {
		t.Errorf("the session is %+v, %t", s, ok)
	}
	second.Send(&wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 9}}})
	if got := second.Expect("pong").GetPong().Id; got != 9 {
		t.Errorf("pong %d", got)
	}
}

func TestIncrementAfterReconnect(t *testing.T) {
	d := newDevices()
	d.assign(&wire.Assignment{Sequence: 3, TaskId: taskB, Desired: "RUNNING"})
	d.assign(&wire.Assignment{Sequence: 5, TaskId: "c", Desired: "RUNNING"})
	r := newRig(t, d)
	p := r.connect(wire.TransportQUIC, "n", 3)
	if a := p.Expect("assignment").GetAssignment(); a.TaskId != "c" {
		t.Errorf("got %v, want what changed after 3", a)
	}
	if e := p.Expect("end_of_set").GetEndOfSet(); e.Full || e.Sequence != 5 {
		t.Errorf("end of set %v", e)
	}
}

func TestStatusIsAcknowledgedOnceStored(t *testing.T) {
	d := newDevices()
	d.assign(&wire.Assignment{Sequence: 1, TaskId: taskB})
	d.gate = make(chan struct{})
	r := newRig(t, d)
	p := r.connect(wire.TransportTCP, "n", 1)
	p.Expect("end_of_set")
	p.Send(status(1, taskB, "PENDING"))
	p.Send(status(2, taskB, "ACTIVATING"))
	p.Send(status(3, taskB, "RUNNING"))
	p.Send(&wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 1}}})
	// A store that hangs does not keep the ping waiting, nor acknowledges.
	p.Expect("pong")
	close(d.gate)
	for p.Expect("status_ack").GetStatusAck().Sequence != 3 {
	}
}

func TestStatusWaitsForTheStore(t *testing.T) {
	d := newDevices()
	d.assign(&wire.Assignment{Sequence: 1, TaskId: taskB})
	d.down = errors.New("etcd: no leader")
	r := newRig(t, d)
	p := r.connect(wire.TransportQUIC, "n", 1)
	p.Expect("end_of_set")
	p.Send(status(1, taskB, "RUNNING"))
	p.Send(&wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 1}}})
	p.Expect("pong")
	d.mu.Lock()
	d.down = nil
	d.mu.Unlock()
	if got := p.Expect("status_ack").GetStatusAck().Sequence; got != 1 {
		t.Errorf("acknowledged %d", got)
	}
}

// Random bytes and random frames cost the peer its own session, and others
// nothing.
func TestHostilePeersCostTheirOwnSession(t *testing.T) {
	junk := make([]byte, 4096)
	_, _ = rand.Read(junk)
	attacks := map[string][]byte{
		"random bytes":         append([]byte{0, 0, 15, 0}, junk...),
		"a length of 4 GiB":    {0xff, 0xff, 0xff, 0xff, 1, 2, 3},
		"HTTP":                 []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"a frame out of place": mustEncode(t, status(1, "x", "RUNNING")),
		"nothing but future":   futures(200),
	}
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			d := newDevices()
			r := newRig(t, d)
			good := r.connect(wire.TransportQUIC, "good", 0)
			good.Expect("end_of_set")
			for name, attack := range attacks {
				before := r.agent(transport, wire.ProtocolTunnel)
				_, _ = before.Control.Write(attack)
				_ = before.ExpectEnd()
				enrol := r.agent(transport, wire.ProtocolEnroll)
				_, _ = enrol.Control.Write(attack)
				_ = enrol.ExpectEnd()
				good.Send(&wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 1}}})
				if f := good.Expect("pong"); f == nil {
					t.Fatalf("%s: the good session suffered", name)
				}
			}
		})
	}
	t.Run("after registering", func(t *testing.T) {
		r := newRig(t, newDevices())
		p := r.connect(wire.TransportTCP, "n", 0)
		p.Expect("end_of_set")
		_, _ = p.Control.Write(attacks["a length of 4 GiB"])
		if f := p.Expect("goodbye").GetGoodbye().Failure; f.Code != wire.CodeProtocol {
			t.Errorf("goodbye says %v", f)
		}
		_ = p.ExpectEnd()
	})
}

// A device that takes nothing fills its own queue and no other's, and can
// still be sent away.
func TestSlowDeviceDelaysNobody(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			d := newDevices()
			r := newRig(t, d)
			slow := r.agent(transport, wire.ProtocolTunnel)
			slow.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
			slow.Send(hello(instanceS, "s", 0))
			until(t, "the slow one is there", func() bool { _, ok := r.hub.Session(instanceS); return ok })
			good := r.connect(transport, "good", 0)
			good.Expect("end_of_set")
			big := &wire.TaskSpec{Family: strings.Repeat("x", 1<<20)}
			for i := range uint64(30) {
				d.assign(&wire.Assignment{Sequence: i + 1, TaskId: taskB, Spec: big})
				for good.Expect("assignment").GetAssignment().Sequence != i+1 {
					good.Expect("end_of_set")
				}
				good.Expect("end_of_set")
			}
			r.hub.Disconnect(instanceS, wire.CodeDenied, "deregistered")
			if _, ok := r.hub.Session(instanceS); ok {
				t.Error("the slow one still has a session")
			}
			_ = slow.ExpectEnd()
			good.Send(&wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 1}}})
			good.Expect("pong")
		})
	}
}

func TestShutdownTellsDevicesToComeBack(t *testing.T) {
	r := newRig(t, newDevices())
	p := r.connect(wire.TransportTCP, "n", 0)
	p.Expect("end_of_set")
	r.stop()
	f := p.Expect("goodbye").GetGoodbye().Failure
	if f.Code != wire.CodeShutdown || f.RetryAfterMs == 0 {
		t.Errorf("goodbye says %v", f)
	}
	_ = p.ExpectEnd()
}

func TestLastSeen(t *testing.T) {
	r := newRig(t, newDevices())
	if !r.hub.LastSeen(instanceA).IsZero() {
		t.Error("seen before it came")
	}
	p := r.connect(wire.TransportQUIC, "n", 0)
	p.Expect("end_of_set")
	p.Close("", "")
	until(t, "the session is gone", func() bool { _, ok := r.hub.Session(instanceA); return !ok })
	if r.hub.LastSeen(instanceA).IsZero() {
		t.Error("not seen though it was there")
	}
}

func TestLogsByTheTranscriptOfVersion1(t *testing.T) {
	tr := wiretest.Must(t, "v1-request-logs")
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			r := newRig(t, newDevices())
			p := r.connect(transport, "n", 0)
			p.Expect("end_of_set")
			got := make(chan string, 1)
			failed := make(chan error, 1)
			go func() {
				text := ""
				failed <- r.hub.Logs(t.Context(), instanceA, tr.Steps[1].Frame.GetRequest().GetLogs(), func(c *wire.Chunk) error {
					text += c.Stream + ":" + string(c.Data)
					return nil
				})
				got <- text
			}()
			ctx, cancel := context.WithTimeout(t.Context(), wiretest.Patience)
			defer cancel()
			stream, err := p.AcceptStream(ctx)
			if err != nil {
				t.Fatal(err)
			}
			p.Control = stream
			p.Grease = true
			p.Play(tr, wiretest.Agent, nil)
			if err := <-failed; err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff("stdout:hello\nstderr:oops\n", <-got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestLogsThatFail(t *testing.T) {
	r := newRig(t, newDevices())
	ask := func(ctx context.Context) error {
		return r.hub.Logs(ctx, instanceA, &wire.LogsRequest{TaskId: taskB}, func(*wire.Chunk) error { return nil })
	}
	if err := ask(t.Context()); !errors.Is(err, controlplane.Unavailable) {
		t.Errorf("not connected: %v", err)
	}
	p := r.connect(wire.TransportTCP, "n", 0)
	p.Expect("end_of_set")
	answer := func(f *wire.Frame) {
		stream, err := p.AcceptStream(t.Context())
		if err == nil && f != nil {
			_ = wire.WriteFrame(stream, f)
		}
	}
	go answer(&wire.Frame{Body: &wire.Frame_Done{Done: &wire.Done{Failure: wire.Failf(wire.CodeNotFound, "no such task")}}})
	if err := ask(t.Context()); !errors.Is(err, controlplane.NotFound) {
		t.Errorf("the device does not know the task: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		answer(nil)
		cancel()
	}()
	if err := ask(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("the asker went away: %v", err)
	}
	go func() {
		answer(nil)
		p.Close("", "")
	}()
	if err := ask(t.Context()); !errors.Is(err, controlplane.Unavailable) {
		t.Errorf("the device went away: %v", err)
	}
}

func mustEncode(t *testing.T, f *wire.Frame) []byte {
	t.Helper()
	b, err := wire.AppendFrame(nil, f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func futures(n int) []byte {
	var b []byte
	for range n {
		b = append(b, wiretest.Future()...)
	}
	return b
}
