package link

import (
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// relay stands between an agent and a control plane, TCP and UDP on one port of
// loopback, as a NAT does. For one agent at a time.
type relay struct {
	t      testing.TB
	tcp    net.Listener
	udp    *net.UDPConn
	target *net.UDPAddr
	closed chan struct{}
	work   sync.WaitGroup

	udpBlocked atomic.Bool
	mu         sync.Mutex
	flows      map[string]*net.UDPConn // to the control plane, by the agent's address
	conns      []net.Conn
}

func newRelay(t testing.TB, control *wiretest.ControlPlane) *relay {
	t.Helper()
	r := &relay{t: t, closed: make(chan struct{}), flows: map[string]*net.UDPConn{}}
	var err error
	for range 20 {
		if r.tcp, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if r.udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(r.tcp.Addr().(*net.TCPAddr).AddrPort())); err == nil {
			break
		}
		_ = r.tcp.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if r.target, err = net.ResolveUDPAddr("udp", control.Address()); err != nil {
		t.Fatal(err)
	}
	r.work.Go(func() { r.acceptTCP(control.Address()) })
	r.work.Go(r.forward)
	t.Cleanup(r.close)
	return r
}

func (r *relay) address() string { return r.tcp.Addr().String() }

func (r *relay) close() {
	select {
	case <-r.closed:
		return
	default:
	}
	close(r.closed)
	_ = r.tcp.Close()
	_ = r.udp.Close()
	r.rebind()
	r.mu.Lock()
	for _, c := range r.conns {
		_ = c.Close()
	}
	r.mu.Unlock()
	r.work.Wait()
}

// rebind forgets every mapping, as a NAT that was started again: what comes next
// from the agent leaves from another port.
func (r *relay) rebind() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for from, c := range r.flows {
		_ = c.Close()
		delete(r.flows, from)
	}
}

func (r *relay) acceptTCP(address string) {
	for {
		in, err := r.tcp.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", address)
		if err != nil {
			_ = in.Close()
			continue
		}
		r.mu.Lock()
		r.conns = append(r.conns, in, out)
		r.mu.Unlock()
		for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
			r.work.Go(func() {
				_, _ = io.Copy(pair[0], pair[1])
				_ = pair[0].Close()
				_ = pair[1].Close()
			})
		}
	}
}

func (r *relay) forward() {
	b := make([]byte, 2048)
	for {
		n, from, err := r.udp.ReadFromUDP(b)
		if err != nil {
			return
		}
		if r.udpBlocked.Load() {
			continue
		}
		r.mu.Lock()
		out := r.flows[from.String()]
		if out == nil {
			if out, err = net.DialUDP("udp", nil, r.target); err != nil {
				r.mu.Unlock()
				continue
			}
			r.flows[from.String()] = out
			r.work.Go(func() { r.back(out, from) })
		}
		r.mu.Unlock()
		_, _ = out.Write(b[:n])
	}
}

func (r *relay) back(out *net.UDPConn, to *net.UDPAddr) {
	b := make([]byte, 2048)
	for {
		n, err := out.Read(b)
		if err != nil {
			return
		}
		if !r.udpBlocked.Load() {
			_, _ = r.udp.WriteToUDP(b[:n], to)
		}
	}
}

// goroutines are those of this package, of the carriers and of what they use,
// tests' own left out.
func goroutines() (all []string) {
	b := make([]byte, 1<<20)
	b = b[:runtime.Stack(b, true)]
	for g := range strings.SplitSeq(string(b), "\n\n") {
		if strings.Contains(g, "testing.tRunner") || strings.Contains(g, "testing.(*T)") {
			continue
		}
		for _, ours := range []string{"belay/agent/internal/link.", "wire/carrier.", "quic-go", "yamux"} {
			if strings.Contains(g, ours) {
				all = append(all, g)
				break
			}
		}
	}
	return all
}

// sockets counts those that are open.
func sockets() (n int) {
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// noLeaks fails the test when it leaves goroutines or sockets behind; call it
// first.
func noLeaks(t *testing.T) {
	t.Helper()
	before, open := len(goroutines()), sockets()
	t.Cleanup(func() {
		deadline := time.Now().Add(wiretest.Patience)
		for {
			left := goroutines()
			if len(left) <= before && sockets() <= open {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("%d goroutines and %d sockets were left behind:\n%s", len(left)-before, sockets()-open, strings.Join(left, "\n\n"))
				return
			}
			<-time.After(10 * time.Millisecond)
		}
	})
}
