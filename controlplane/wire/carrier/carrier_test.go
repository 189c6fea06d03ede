package carrier

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

var transports = []string{wire.TransportQUIC, wire.TransportTCP}

type rig struct {
	ca     *CA
	device tls.Certificate
	l      *Listener
}

func newRig(t *testing.T, edit func(*ListenConfig)) *rig {
	t.Helper()
	r := new(rig)
	var err error
	if r.ca, err = NewCA(); err != nil {
		t.Fatal(err)
	}
	leaf, err := r.ca.Leaf([]string{"127.0.0.1", "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if r.device, err = SelfSigned(key); err != nil {
		t.Fatal(err)
	}
	cfg := ListenConfig{Address: "127.0.0.1:0", Tunnel: leaf}
	if edit != nil {
		edit(&cfg)
	}
	if r.l, err = Listen(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.l.Close() })
	return r
}

func (r *rig) config(transport string) DialConfig {
	return DialConfig{
		Address: r.l.Addr().String(), Transport: transport, Protocol: wire.ProtocolTunnel,
		Certificate: r.device, Pins: []wire.Pin{r.ca.Pin()},
	}
}

func (r *rig) pair(t *testing.T, transport string) (agent, control wire.Session) {
	t.Helper()
	ctx := within(t, 10*time.Second)
	agent, err := Dial(ctx, r.config(transport))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Close("", "") })
	control, err = r.l.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close("", "") })
	return agent, control
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestSessionCarriesStreamsBothWays(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			r := newRig(t, nil)
			agent, control := r.pair(t, transport)
			if got, want := wire.Fingerprint(control.PeerCertificate()), wire.Fingerprint(r.device.Leaf); got != want {
				t.Errorf("the server sees key %s, want %s", got, want)
			}
			for _, s := range []wire.Session{agent, control} {
				if s.Transport() != transport || s.Protocol() != wire.ProtocolTunnel {
					t.Errorf("session says %s, %s", s.Transport(), s.Protocol())
				}
			}
			echo(t, agent, control)
			echo(t, control, agent)
		})
	}
}

func echo(t *testing.T, from, to wire.Session) {
	t.Helper()
	ctx := within(t, 10*time.Second)
	big := bytes.Repeat([]byte("belay"), 1<<19)
	done := make(chan error, 1)
	go func() {
		st, err := to.AcceptStream(ctx)
		if err != nil {
			done <- err
			return
		}
		defer st.Close()
		b, err := io.ReadAll(st)
		if err == nil {
			_, err = st.Write(b)
		}
		if err == nil {
			err = st.CloseWrite()
		}
		done <- err
	}()
	st, err := from.OpenStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := st.Write(big); err != nil {
		t.Fatal(err)
	}
	if err := st.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(st)
	if err != nil || !bytes.Equal(got, big) {
		t.Fatalf("echo came back with %d of %d bytes: %v", len(got), len(big), err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestCloseEndsTheOtherSide(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			agent, control := newRig(t, nil).pair(t, transport)
			control.Close(wire.CodeDenied, "deregistered")
			select {
			case <-agent.Done():
			case <-time.After(10 * time.Second):
				t.Fatal("the agent's session goes on")
			}
			if transport == wire.TransportQUIC && wire.CodeOf(agent.Err()) != wire.CodeDenied {
				t.Errorf("the agent learns %v", agent.Err())
			}
			if agent.Err() == nil || wire.CodeOf(control.Err()) != wire.CodeDenied {
				t.Errorf("ends are %v and %v", agent.Err(), control.Err())
			}
			if _, err := agent.OpenStream(t.Context()); err == nil {
				t.Error("a stream opened on a session that ended")
			}
		})
	}
}

// Killed and started again, a control plane tells agents that their sessions
// are gone as soon as they say something, instead of after wire.Idle.
func TestAgentNoticesARestart(t *testing.T) {
	var key [32]byte
	copy(key[:], "the same from start to start")
	r := newRig(t, func(c *ListenConfig) { c.ResetKey = key })
	agent, _ := r.pair(t, wire.TransportQUIC)
	cfg := r.l.cfg
	cfg.Address = r.l.Addr().String()
	_ = r.l.udp.Close() // no last words
	_ = r.l.Close()
	again, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	st, err := agent.OpenStream(within(t, 5*time.Second))
	if err == nil {
		// The smallest thing an agent says.
		_ = wire.WriteFrame(st, &wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 1}}})
	}
	select {
	case <-agent.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the agent still believes in its session")
	}
}

func TestSilenceRaisesDoubt(t *testing.T) {
	r := newRig(t, nil)
	agent, _ := r.pair(t, wire.TransportQUIC)
	_ = r.l.udp.Close()
	if st, err := agent.OpenStream(within(t, 5*time.Second)); err == nil {
		_, _ = st.Write([]byte("hello?"))
	}
	select {
	case <-agent.(wire.Doubter).Doubt():
	case <-agent.Done():
		t.Fatal("the session ended by itself")
	case <-time.After(10 * time.Second):
		t.Fatal("no doubt")
	}
}

func TestStreamsPastTheLimitAreRefused(t *testing.T) {
	r := newRig(t, nil)
	agent, control := r.pair(t, wire.TransportTCP)
	ctx := within(t, 10*time.Second)
	var open []wire.Stream
	for range serverStreams + 1 {
		st, err := agent.OpenStream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, st)
		if len(open) <= serverStreams {
			if _, err := control.AcceptStream(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	accepted := make(chan error, 1)
	go func() {
		_, err := control.AcceptStream(ctx)
		accepted <- err
	}()
	last := open[serverStreams]
	_ = last.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := last.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the stream past the limit: %v, want EOF", err)
	}
	select {
	case err := <-accepted:
		t.Errorf("the stream past the limit was accepted: %v", err)
	default:
	}
}

func TestDialSaysWhatIsWrong(t *testing.T) {
	other, err := NewCA()
	if err != nil {
		t.Fatal(err)
	}
	web := newRig(t, nil)
	foreign := tlsServer(t, &tls.Config{Certificates: []tls.Certificate{web.device}, NextProtos: []string{"h2"}})
	noALPN := tlsServer(t, &tls.Config{Certificates: []tls.Certificate{web.device}})
	rude := rawServer(t, func(c net.Conn) { _ = c.Close() })
	http := rawServer(t, func(c net.Conn) {
		_, _ = c.Write([]byte("HTTP/1.0 400 Bad Request\r\n\r\n"))
		_, _ = io.Copy(io.Discard, c)
	})
	silent := rawServer(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	tests := []struct {
		name, transport string
		edit            func(*DialConfig)
		want            error
	}{
		{"another key over QUIC", wire.TransportQUIC, func(c *DialConfig) { c.Pins = []wire.Pin{other.Pin()} }, ErrWrongPin},
		{"another key over TCP", wire.TransportTCP, func(c *DialConfig) { c.Pins = []wire.Pin{other.Pin()} }, ErrWrongPin},
		{"no pin at all", wire.TransportTCP, func(c *DialConfig) { c.Pins = nil }, ErrWrongPin},
		{"pin of the leaf", wire.TransportTCP, func(c *DialConfig) { c.Pins = []wire.Pin{wire.PinOf(web.l.cfg.Tunnel.Leaf)} }, ErrWrongPin},
		{"TLS of something else", wire.TransportTCP, func(c *DialConfig) { c.Address = foreign }, ErrNotControlPlane},
		{"TLS without ALPN", wire.TransportTCP, func(c *DialConfig) { c.Address = noALPN }, ErrNotControlPlane},
		{"a port that hangs up", wire.TransportTCP, func(c *DialConfig) { c.Address = rude }, ErrNotControlPlane},
		{"plain HTTP", wire.TransportTCP, func(c *DialConfig) { c.Address = http }, ErrNotControlPlane},
		{"a port that says nothing", wire.TransportTCP, func(c *DialConfig) { c.Address = silent }, ErrUnreachable},
		{"nothing over TCP", wire.TransportTCP, func(c *DialConfig) { c.Address = closedPort(t) }, ErrUnreachable},
		{"nothing over QUIC", wire.TransportQUIC, func(c *DialConfig) { c.Address = closedPort(t) }, ErrUnreachable},
		{"no such name", wire.TransportTCP, func(c *DialConfig) { c.Address = "nowhere.invalid:7443" }, ErrUnreachable},
		{"an unknown ALPN over QUIC", wire.TransportQUIC, func(c *DialConfig) { c.Protocol = "belay/999" }, ErrNotControlPlane},
		{"an unknown ALPN over TCP", wire.TransportTCP, func(c *DialConfig) { c.Protocol = "belay/999" }, ErrNotControlPlane},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := web.config(tt.transport)
			tt.edit(&cfg)
			s, err := Dial(within(t, 700*time.Millisecond), cfg)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if s != nil {
				t.Error("a session with an error")
			}
			if !strings.Contains(err.Error(), cfg.Address) {
				t.Errorf("%q does not name the address", err)
			}
		})
	}
}

func TestClockAndNamesDoNotMatterToTheAgent(t *testing.T) {
	r := newRig(t, nil)
	// Expired long ago: a device whose clock is ahead. Not valid for centuries:
	// one that booted in 1970.
	for _, year := range []int{1999, 2400} {
		leaf, err := r.ca.leaf([]string{"elsewhere.example"}, time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(year+1, 1, 1, 0, 0, 0, 0, time.UTC))
		if err != nil {
			t.Fatal(err)
		}
		l, err := Listen(ListenConfig{Address: "127.0.0.1:0", Tunnel: leaf})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		for _, transport := range transports {
			cfg := r.config(transport)
			cfg.Address = l.Addr().String()
			s, err := Dial(within(t, 5*time.Second), cfg)
			if err != nil {
				t.Fatalf("%s, leaf of %d: %v", transport, year, err)
			}
			s.Close("", "")
		}
	}
}

func TestNameWithAnAddressNobodyListensOn(t *testing.T) {
	ips, err := net.DefaultResolver.LookupNetIP(t.Context(), "ip", "localhost")
	if err != nil || len(ips) < 2 {
		t.Skip("localhost has one address here")
	}
	r := newRig(t, nil)
	_, port, _ := net.SplitHostPort(r.l.Addr().String())
	for _, transport := range transports {
		cfg := r.config(transport)
		cfg.Address = "localhost:" + port
		s, err := Dial(within(t, time.Second), cfg)
		if err != nil {
			t.Fatalf("%s: %v", transport, err)
		}
		s.Close("", "")
	}
}

func TestLeafOfTheCAThatIsNoServerIsRefused(t *testing.T) {
	r := newRig(t, nil)
	leaf := r.l.cfg.Tunnel.Leaf
	device := *leaf
	device.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	pins := []wire.Pin{r.ca.Pin()}
	if err := checkPin([]*x509.Certificate{leaf, r.ca.Certificate}, pins); err != nil {
		t.Fatal(err)
	}
	chains := map[string][]*x509.Certificate{
		"not for servers":       {&device, r.ca.Certificate},
		"the CA itself, alone":  {r.ca.Certificate},
		"a leaf without its CA": {leaf},
		"signed by nobody":      {r.device.Leaf, r.ca.Certificate},
		"nothing":               nil,
	}
	for name, chain := range chains {
		if err := checkPin(chain, pins); !errors.Is(err, ErrWrongPin) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTunnelNeedsAKey(t *testing.T) {
	r := newRig(t, nil)
	for _, transport := range transports {
		cfg := r.config(transport)
		cfg.Certificate = tls.Certificate{}
		s, err := Dial(within(t, 5*time.Second), cfg)
		if err != nil {
			continue
		}
		// TLS 1.3 tells the client only after its own handshake is done.
		select {
		case <-s.Done():
		case <-time.After(5 * time.Second):
			t.Errorf("%s: a session without a device key goes on", transport)
		}
	}
}

func TestStalledHandshakesDelayNobody(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.HandshakeTimeout = 500 * time.Millisecond; c.MaxHandshakes = 200 })
	var stalled []net.Conn
	for range 40 {
		c, err := net.Dial("tcp", r.l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		stalled = append(stalled, c)
	}
	r.pair(t, wire.TransportTCP)
	for _, c := range stalled {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil && errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a stalled handshake was kept: %v", err)
		}
	}
}

func TestStalledHandshakesOfOneSourceTookAllPlaces(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxHandshakes = 20 })
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	for range 40 {
		c, err := d.Dial("tcp", r.l.Addr().String())
		if err != nil {
			t.Skipf("another address of loopback cannot be used here: %v", err)
		}
		defer c.Close()
	}
	r.pair(t, wire.TransportTCP)
}

// TestBusy: whoever comes over QUIC while as many handshakes are under way as are
// done at a time is told so at once, and the places are freed.
func TestBusy(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxHandshakes = 20 }) // of one source: 10
	ctx, cancel := context.WithCancel(t.Context())
	var stalled sync.WaitGroup
	defer stalled.Wait()
	defer cancel()
	answered := make(chan struct{}, 10)
	for range 10 {
		stalled.Go(func() {
			cfg := r.config(wire.TransportQUIC)
			// After the server's part, and before this side's.
			cfg.Answered = func() { answered <- struct{}{}; <-ctx.Done() }
			if s, err := Dial(ctx, cfg); err == nil {
				s.Close("", "")
			}
		})
	}
	for range 10 {
		select {
		case <-answered:
		case <-time.After(10 * time.Second):
			t.Fatal("a handshake below the limit is not answered")
		}
	}
	begun := time.Now()
	s, err := Dial(within(t, 5*time.Second), r.config(wire.TransportQUIC))
	if err == nil {
		s.Close("", "")
	}
	if !errors.Is(err, ErrBusy) || !errors.Is(err, ErrUnreachable) {
		t.Errorf("one more than the limit: %v, want %v", err, ErrBusy)
	}
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("told so after %s", took)
	}
	cancel()
	stalled.Wait()
	// Nobody told the control plane: it notices.
	for ctx := within(t, 15*time.Second); ; <-time.After(100 * time.Millisecond) {
		if s, err := Dial(ctx, r.config(wire.TransportQUIC)); err == nil {
			s.Close("", "")
			return
		} else if !errors.Is(err, ErrBusy) || ctx.Err() != nil {
			t.Fatalf("after the others gave up: %v", err)
		}
	}
}

func TestConnectionCapFreesPlaces(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxConns = 1 })
	for _, transport := range transports {
		first, _ := r.pair(t, transport)
		if s, err := Dial(within(t, time.Second), r.config(transport)); err == nil {
			select {
			case <-s.Done():
			case <-time.After(5 * time.Second):
				t.Fatalf("%s: a second session past the cap", transport)
			}
		}
		first.Close("", "")
		ctx := within(t, 10*time.Second)
		for {
			s, err := Dial(ctx, r.config(transport))
			if err == nil {
				s.Close("", "")
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("%s: the place was never freed: %v", transport, err)
			}
		}
	}
}

func tlsServer(t *testing.T, conf *tls.Config) string {
	return rawServer(t, func(c net.Conn) {
		s := tls.Server(c, conf)
		_ = s.Handshake()
		_, _ = io.Copy(io.Discard, s)
	})
}

func rawServer(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
	return l.Addr().String()
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
