// Package wiretest plays the other side: a scripted agent for tests of the
// hub, a scripted control plane for tests of the link, both over the real
// carriers on loopback, and the golden transcripts of every protocol version
// that both have to keep to.
package wiretest

import (
	"context"
	"crypto"
	"crypto/tls"
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// Patience is how long a Peer waits for what it expects.
const Patience = 10 * time.Second

// ControlPlane listens on a port of loopback, over both transports, and leaves
// the talking to the test.
type ControlPlane struct {
	*carrier.Listener
	CA *carrier.CA
}

// NewControlPlane starts one that ends with the test.
func NewControlPlane(t testing.TB) *ControlPlane {
	t.Helper()
	ca, err := carrier.NewCA()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Leaf([]string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	l, err := carrier.Listen(carrier.ListenConfig{Address: "127.0.0.1:0", Tunnel: leaf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return &ControlPlane{Listener: l, CA: ca}
}

// Address is host:port.
func (c *ControlPlane) Address() string { return c.Addr().String() }

// Next waits for a session and its control stream, Open not yet read. A session
// that ends without one lost a race of the device's, and is passed over.
func (c *ControlPlane) Next(t testing.TB) *Peer {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for {
		s, err := c.Accept(ctx)
		if err != nil {
			t.Fatalf("no session came: %v", err)
		}
		stream, err := s.AcceptStream(ctx)
		if err == nil {
			t.Cleanup(func() { s.Close("", "") })
			return &Peer{Session: s, Control: stream, t: t}
		}
		s.Close("", "")
		if ctx.Err() != nil {
			t.Fatalf("no control stream came: %v", err)
		}
	}
}

// NewDevice makes a device's key.
func NewDevice(t testing.TB) (crypto.Signer, tls.Certificate) {
	t.Helper()
	key, err := carrier.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := carrier.SelfSigned(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

// DialAgent opens a session as an agent would, and a stream, nothing sent yet.
func DialAgent(t testing.TB, cfg carrier.DialConfig) *Peer {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	s, err := carrier.Dial(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close("", "") })
	stream, err := s.OpenStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return &Peer{Session: s, Control: stream, t: t}
}

// Peer is a scripted end of a session. Its methods fail the test when the
// other side does not keep to the script.
type Peer struct {
	wire.Session
	Control wire.Stream
	// Grease sends frames of a future version before each frame of ours.
	Grease bool

	t testing.TB
}

// Send writes one frame to the control stream.
func (p *Peer) Send(f *wire.Frame) {
	p.t.Helper()
	var b []byte
	if p.Grease {
		for range rand.IntN(3) {
			b = append(b, Future()...)
		}
	}
	b, err := wire.AppendFrame(b, f)
	if err != nil {
		p.t.Fatal(err)
	}
	_ = p.Control.SetWriteDeadline(time.Now().Add(Patience))
	// What ends a session may be heard, and the session gone, before the
	// write is done.
	last := f.GetGoodbye() != nil || f.GetEnrollResponse() != nil
	if _, err := p.Control.Write(b); err != nil && !last {
		p.t.Fatalf("send %s: %v", f.Kind(), err)
	}
}

// Expect reads the next frame of the control stream, which has to be of this
// kind (a name of the fields of Frame, as "task_status").
func (p *Peer) Expect(kind string) *wire.Frame {
	p.t.Helper()
	_ = p.Control.SetReadDeadline(time.Now().Add(Patience))
	f, err := wire.ReadFrame(p.Control)
	if err != nil {
		p.t.Fatalf("waiting for %s: %v", kind, err)
	}
	if f.Kind() != kind {
		p.t.Fatalf("got %s (%v), want %s", f.Kind(), f, kind)
	}
	return f
}

// ExpectEnd waits for the other side to end the session.
func (p *Peer) ExpectEnd() error {
	p.t.Helper()
	select {
	case <-p.Done():
	case <-time.After(Patience):
		p.t.Fatal("the session goes on, want its end")
	}
	return p.Err()
}

// Future is an encoded frame as a later version may send: a body of an unknown
// number with random bytes in it.
func Future() []byte {
	junk := make([]byte, rand.IntN(200))
	for i := range junk {
		junk[i] = byte(rand.Uint32())
	}
	body := protowire.AppendTag(nil, protowire.Number(1000+rand.IntN(10000)), protowire.BytesType)
	body = protowire.AppendBytes(body, junk)
	return append([]byte{0, 0, byte(len(body) >> 8), byte(len(body))}, body...)
}
