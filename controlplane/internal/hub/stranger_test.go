package hub

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// book is a log that many may write.
type book struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *book) Write(p []byte) (int, error) { b.mu.Lock(); defer b.mu.Unlock(); return b.b.Write(p) }
func (b *book) String() string              { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

// Ids that a peer only says it has went whole into the log: 256 KiB a try, from
// anybody.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	log := &book{}
	r := newRigWith(t, newDevices(), slog.New(slog.NewTextHandler(log, nil)))
	r.devices.refuse = context.DeadlineExceeded
	long := strings.Repeat("x", 200<<10)

	p := r.agent(wire.TransportTCP, wire.ProtocolTunnel)
	p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
	p.Send(&wire.Frame{Body: &wire.Frame_Hello{Hello: &wire.Hello{InstanceId: long}}})
	p.Expect("welcome")
	p = r.agent(wire.TransportTCP, wire.ProtocolEnroll)
	p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
	p.Send(&wire.Frame{Body: &wire.Frame_EnrollRequest{EnrollRequest: &wire.EnrollRequest{Version: 1, ActivationId: long}}})
	p.Expect("enroll_response")
	until(t, "both refusals are in the log", func() bool {
		return strings.Contains(log.String(), "session refused") && strings.Contains(log.String(), "enrolment refused")
	})
	if n := len(log.String()); n > 4096 {
		t.Errorf("%d bytes of log for two refusals", n)
	}
}

// A peer could open streams for as long as it liked without one being what is
// due, and yamux keeps what arrives on each of them for a while.
func TestStrangersOpenFewStreams(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			r := newRig(t, newDevices())
			_, cert := wiretest.NewDevice(t)
			ctx, cancel := context.WithTimeout(t.Context(), wiretest.Patience)
			defer cancel()
			s, err := carrier.Dial(ctx, carrier.DialConfig{
				Address: r.control.Address(), Transport: transport, Protocol: wire.ProtocolTunnel,
				Certificate: cert, Pins: []wire.Pin{r.control.CA.Pin()},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close("", "")
			opened := 0
			for ctx.Err() == nil {
				stream, err := s.OpenStream(ctx)
				if err != nil {
					break
				}
				_ = wire.WriteFrame(stream, open(wire.StreamType_STREAM_TYPE_LOGS))
				_, _ = stream.Read(make([]byte, 1)) // until it is given up
				_ = stream.Close()
				opened++
			}
			<-s.Done()
			if opened > 2*maxOpening {
				t.Errorf("%d streams were taken", opened)
			}
		})
	}
}

// A peer that had said nothing yet held a shutdown up for all of its time, and
// was told that it broke the rules.
func TestShutdownDoesNotWaitForStrangers(t *testing.T) {
	for _, transport := range transports {
		for _, protocol := range []string{wire.ProtocolTunnel, wire.ProtocolEnroll} {
			t.Run(transport+" "+protocol, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, newDevices())
				half := r.agent(transport, protocol)
				_, _ = half.Control.Write([]byte{0, 0})
				due := r.agent(transport, protocol)
				due.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
				until(t, "both are taken in", func() bool { return len(r.hub.pending) == 2 })
				begun := time.Now()
				r.stop()
				for _, err := range []error{half.ExpectEnd(), due.ExpectEnd()} {
					// Over TCP the reason of an early end does not travel.
					if code := wire.CodeOf(err); transport == wire.TransportQUIC && code != wire.CodeShutdown {
						t.Errorf("they were told %q: %v", code, err)
					}
				}
				if took := time.Since(begun); took > stopTimeout/2 {
					t.Errorf("they ended after %s", took)
				}
			})
		}
	}
}
