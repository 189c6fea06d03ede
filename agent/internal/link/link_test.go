package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
	"github.com/belay-edge/belay/plugins/sdk"
)

var transports = []string{wire.TransportQUIC, wire.TransportTCP}

func TestLinkSpeaksTheTranscriptOfVersion1(t *testing.T) {
	for _, transport := range transports {
		for _, grease := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, grease %t", transport, grease), func(t *testing.T) {
				tr := wiretest.Must(t, "v1-session")
				control := wiretest.NewControlPlane(t)
				hello := tr.Steps[1].Frame.GetHello()
				cfg := config(t, control, transport)
				cfg.AgentVersion, cfg.HashedMachineID, cfg.Capabilities = hello.AgentVersion, hello.HashedMachineId, hello.Capabilities
				cfg.Facts = hello.Facts
				told := make(chan []string, 1)
				cfg.Remember = func(a []string) { told <- a }
				d := &downlink{}
				l := start(t, cfg, d)
				p := control.Next(t)
				p.Grease = grease
				p.Play(tr, wiretest.Control, func(f *wire.Frame) {
					if s := f.GetTaskStatus(); s != nil {
						l.TaskStatus(s)
					}
					if facts := f.GetFacts(); facts != nil {
						l.SetFacts(facts)
					}
				})
				_ = p.ExpectEnd()
				until(t, "the link says why it is down", func() bool {
					s := l.Status()
					return s.State == StateWaiting && strings.Contains(s.LastError, "deregistered") && s.NextTry.After(time.Now().Add(20*time.Second))
				})
				d.mu.Lock()
				defer d.mu.Unlock()
				want := []assigned{
					{"i1", true, []string{taskB + " RUNNING"}, 7},
					{"i1", false, []string{taskB + " STOPPED"}, 8},
					{"i1", false, []string{"b0000000000000000000000000000009 STOPPED"}, 8},
				}
				if diff := cmp.Diff(want, d.sets); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff([]uint64{1, 2, 3}, d.acks); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff([]bool{true, false}, d.ups); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff([]string{control.Address(), "control.example:7443"}, <-told); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

func TestLinkResumesByTheTranscriptOfVersion1(t *testing.T) {
	tr := wiretest.Must(t, "v1-resume")
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			control := wiretest.NewControlPlane(t)
			hello := tr.Steps[1].Frame.GetHello()
			cfg := config(t, control, transport)
			cfg.AgentVersion, cfg.HashedMachineID, cfg.Facts = hello.AgentVersion, hello.HashedMachineId, hello.Facts
			start(t, cfg, &downlink{incarnation: hello.Incarnation, sequence: hello.Sequence})
			p := control.Next(t)
			p.Play(tr, wiretest.Control, nil)
			_ = p.ExpectEnd()
			// It is back soon after the time it was asked to wait.
			p = control.Next(t)
			p.Expect("open")
			if h := p.Expect("hello").GetHello(); h.Sequence != 8 || h.AgentNonce != "nonce-1" {
				t.Errorf("hello %v", h)
			}
		})
	}
}

// register plays the control plane's part up to a session that is up.
func register(t *testing.T, control *wiretest.ControlPlane) *wiretest.Peer {
	t.Helper()
	p := control.Next(t)
	p.Expect("open")
	p.Expect("hello")
	p.Send(&wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Version: 1, Incarnation: "i1"}}})
	return p
}

func ack(sequence uint64) *wire.Frame {
	return &wire.Frame{Body: &wire.Frame_StatusAck{StatusAck: &wire.StatusAck{Sequence: sequence}}}
}

func TestStatusesAreSentOnEverySessionUntilAcknowledged(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	d := &downlink{}
	l := start(t, config(t, control, TransportAuto), d)
	l.TaskStatus(&wire.TaskStatus{Sequence: 1, TaskId: "a", LastStatus: "PENDING"})
	l.TaskStatus(&wire.TaskStatus{Sequence: 2, TaskId: "b", LastStatus: "RUNNING"})
	l.TaskStatus(&wire.TaskStatus{Sequence: 3, TaskId: "a", LastStatus: "RUNNING"})
	first := register(t, control)
	for _, want := range []uint64{2, 3} {
		if got := first.Expect("task_status").GetTaskStatus().Sequence; got != want {
			t.Errorf("sent %d, want %d: the latest of each task, in order", got, want)
		}
	}
	first.Send(ack(2))
	until(t, "the agent hears of it", func() bool { return d.read(func(d *downlink) bool { return len(d.acks) == 1 }) })
	first.Close("", "")
	second := register(t, control)
	if got := second.Expect("task_status").GetTaskStatus(); got.Sequence != 3 {
		t.Errorf("sent %v, want what was not acknowledged", got)
	}
	// An acknowledgement of what was replaced meanwhile is not one.
	l.TaskStatus(&wire.TaskStatus{Sequence: 4, TaskId: "a", LastStatus: "STOPPED"})
	second.Expect("task_status")
	second.Send(ack(3))
	second.Send(&wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 5}}})
	if got := second.Expect("pong").GetPong().Id; got != 5 {
		t.Errorf("pong %d", got)
	}
	second.Close("", "")
	third := register(t, control)
	if got := third.Expect("task_status").GetTaskStatus(); got.Sequence != 4 {
		t.Errorf("sent %v", got)
	}
}

func TestStatusOfAForgottenTaskWasKeptAndSentForEver(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	d := &downlink{}
	l := start(t, config(t, control, TransportAuto), d)
	l.TaskStatus(&wire.TaskStatus{Sequence: 1, TaskId: "a", LastStatus: "STOPPED"})
	l.TaskStatus(&wire.TaskStatus{Sequence: 2, TaskId: "b", LastStatus: "RUNNING"})
	first := register(t, control)
	first.Expect("task_status")
	first.Expect("task_status")
	l.ForgetTask("a")
	first.Close("", "")
	second := register(t, control)
	if got := second.Expect("task_status").GetTaskStatus(); got.TaskId != "b" {
		t.Errorf("a new session was told of the forgotten task: %v", got)
	}
}

func TestControlPlaneThatTalksNonsense(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	d := &downlink{}
	l := start(t, config(t, control, wire.TransportQUIC), d)
	for range 3 {
		p := register(t, control)
		until(t, "it is connected", func() bool { return l.Status().State == StateConnected })
		_, _ = p.Control.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
		if err := p.ExpectEnd(); wire.CodeOf(err) != wire.CodeProtocol {
			t.Errorf("the session ended with %v", err)
		}
	}
	register(t, control)
}

func TestAutoFallsBackToTCPWhereUDPIsBlocked(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	cfg := config(t, control, TransportAuto)
	cfg.Addresses = []string{tcpOnly(t, control.Address())}
	l := start(t, cfg, &downlink{})
	began := time.Now()
	p := control.Next(t)
	if p.Transport() != wire.TransportTCP {
		t.Fatalf("it came over %s", p.Transport())
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("the fallback took %s", took)
	}
	p.Expect("open")
	p.Expect("hello")
	p.Send(&wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Version: 1, Incarnation: "i1"}}})
	until(t, "the status says tcp", func() bool { s := l.Status(); return s.State == StateConnected && s.Transport == wire.TransportTCP })
}

func TestLogsByTheTranscriptOfVersion1(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			tr := wiretest.Must(t, "v1-request-logs")
			control := wiretest.NewControlPlane(t)
			d := &downlink{logs: func(_ context.Context, r *wire.LogsRequest, chunk func(string, []byte) error) error {
				if r.Tail != 10 || r.Container != "app" {
					t.Errorf("asked for %v", r)
				}
				if err := chunk("stdout", []byte("hello\n")); err != nil {
					return err
				}
				return chunk("stderr", []byte("oops\n"))
			}}
			start(t, config(t, control, transport), d)
			p := register(t, control)
			p.Control = openStream(t, p)
			p.Grease = true
			p.Play(tr, wiretest.Control, nil)
		})
	}
}

func TestRequestsThatEndEarly(t *testing.T) {
	request := func(p *wiretest.Peer, q *wire.Request) {
		p.Control = openStream(t, p)
		p.Send(&wire.Frame{Body: &wire.Frame_Open{Open: &wire.Open{Type: wire.StreamType_STREAM_TYPE_REQUEST}}})
		p.Send(&wire.Frame{Body: &wire.Frame_Request{Request: q}})
	}
	logs := &wire.Request{Body: &wire.Request_Logs{Logs: &wire.LogsRequest{TaskId: taskB}}}
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			control := wiretest.NewControlPlane(t)
			gone := make(chan struct{})
			d := &downlink{}
			d.setLogs(func(context.Context, *wire.LogsRequest, func(string, []byte) error) error {
				return sdk.Errorf(sdk.NotFound, "read logs", "no such task")
			})
			start(t, config(t, control, transport), d)
			p := register(t, control)
			request(p, logs)
			if f := p.Expect("done").GetDone().Failure; f.GetCode() != wire.CodeNotFound {
				t.Errorf("done says %v", f)
			}
			request(p, &wire.Request{})
			if f := p.Expect("done").GetDone().Failure; f.GetCode() != wire.CodeUnsupported {
				t.Errorf("done says %v", f)
			}
			// A stream of a type from the future is given up, the session goes on.
			p.Control = openStream(t, p)
			p.Send(&wire.Frame{Body: &wire.Frame_Open{Open: &wire.Open{Type: 99}}})
			_ = p.Control.SetReadDeadline(time.Now().Add(wiretest.Patience))
			if _, err := p.Control.Read(make([]byte, 1)); err == nil {
				t.Error("an answer to a stream of unknown type")
			}
			d.setLogs(func(ctx context.Context, _ *wire.LogsRequest, chunk func(string, []byte) error) error {
				defer close(gone)
				if err := chunk("stdout", []byte("x")); err != nil {
					return err
				}
				<-ctx.Done()
				return ctx.Err()
			})
			request(p, logs)
			p.Expect("chunk")
			_ = p.Control.Close()
			select {
			case <-gone:
			case <-time.After(wiretest.Patience):
				t.Error("the answer goes on though nobody wants it")
			}
		})
	}
}

func openStream(t *testing.T, p *wiretest.Peer) wire.Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wiretest.Patience)
	defer cancel()
	st, err := p.OpenStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// tcpOnly is a port that forwards TCP to address and has nothing on UDP.
func tcpOnly(t *testing.T, address string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", address)
			if err != nil {
				_ = in.Close()
				continue
			}
			for _, c := range [][2]net.Conn{{in, out}, {out, in}} {
				go func() {
					_, err := io.Copy(c[0], c[1])
					if !errors.Is(err, net.ErrClosed) {
						_ = c[0].Close()
					}
				}()
			}
		}
	}()
	return l.Addr().String()
}
