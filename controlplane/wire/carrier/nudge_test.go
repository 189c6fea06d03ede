package carrier

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// An idle agent has nothing to say, so a restarted control plane has to make
// the first move: else the agent notices with its next keepalive, up to
// wire.KeepAlive later.
func TestNudgeAfterARestartEndsAnIdleSession(t *testing.T) {
	var key [32]byte
	copy(key[:], "the same from start to start")
	r := newRig(t, func(c *ListenConfig) { c.ResetKey = key })
	agent, control := r.pair(t, wire.TransportQUIC)
	st, err := agent.OpenStream(within(t, 5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	cfg := r.l.cfg
	cfg.Address = r.l.Addr().String()
	peer := control.RemoteAddr().(*net.UDPAddr).AddrPort()
	_ = r.l.udp.Close() // no last words
	_ = r.l.Close()
	again, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Nudge(peer); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	select {
	case <-agent.(wire.Doubter).Doubt():
	case <-time.After(silenceLimit / 2): // what the watch of silence would take
		t.Fatal("the nudge raised no doubt")
	}
	// What a link does then.
	_ = wire.WriteFrame(st, &wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 1}}})
	select {
	case <-agent.Done():
		t.Logf("from nudge to end: %s", time.Since(begun))
	case <-time.After(5 * time.Second):
		t.Fatal("the agent still believes in its session")
	}
}

func TestNudgeDoesNotHarmALiveSession(t *testing.T) {
	r := newRig(t, nil)
	agent, control := r.pair(t, wire.TransportQUIC)
	peer := control.RemoteAddr().(*net.UDPAddr).AddrPort()
	for range 2000 {
		_ = r.l.Nudge(peer)
	}
	select {
	case <-agent.(wire.Doubter).Doubt():
	case <-time.After(5 * time.Second):
		t.Fatal("no doubt")
	}
	echo(t, agent, control)
}

func TestNudgesRaiseDoubt(t *testing.T) {
	server := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7443}
	mapped := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("[::ffff:192.0.2.1]:7443"))
	type packet struct {
		after time.Duration
		from  net.Addr
		text  string
	}
	tests := []struct {
		name    string
		packets []packet
		doubts  int
	}{
		{"one", []packet{{0, server, string(nudge)}}, 1},
		{"by the address's other name", []packet{{0, mapped, string(nudge)}}, 1},
		{"of a later version, with more in it", []packet{{0, server, string(nudge) + "more"}}, 1},
		{"from another port", []packet{{0, &net.UDPAddr{IP: server.IP, Port: 7444}, string(nudge)}}, 0},
		{"from another host", []packet{{0, &net.UDPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 7443}, string(nudge)}}, 0},
		{"from no UDP address", []packet{{0, &net.TCPAddr{IP: server.IP, Port: 7443}, string(nudge)}}, 0},
		{"cut short", []packet{{0, server, string(nudge[:len(nudge)-1])}}, 0},
		{"something else", []packet{{0, server, "\x00hello"}, {0, server, "\x01"}, {0, server, ""}}, 0},
		{"garbage before it", []packet{{0, server, "\x00hello"}, {0, server, string(nudge)}}, 1},
		{"three at once", []packet{{0, server, string(nudge)}, {0, server, string(nudge)}, {time.Second, server, string(nudge)}}, 1},
		{"two, well apart", []packet{{0, server, string(nudge)}, {nudgeInterval, server, string(nudge)}}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				next, doubts := 0, 0
				read := func(_ context.Context, b []byte) (int, net.Addr, error) {
					if next == len(tt.packets) {
						return 0, nil, errors.New("closed")
					}
					p := tt.packets[next]
					next++
					<-time.After(p.after)
					return copy(b, p.text), p.from, nil
				}
				watchNudges(read, func() net.Addr { return server }, func() { doubts++ })
				if doubts != tt.doubts {
					t.Errorf("%d doubts, want %d", doubts, tt.doubts)
				}
			})
		})
	}
}

func TestFloodOfNudgesRaisesDoubtSlowly(t *testing.T) {
	server := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7443}
	synctest.Test(t, func(t *testing.T) {
		const flood = 60000
		sent, doubts := 0, 0
		watchNudges(func(_ context.Context, b []byte) (int, net.Addr, error) {
			if sent++; sent > flood {
				return 0, nil, errors.New("closed")
			}
			<-time.After(time.Millisecond)
			return copy(b, nudge), server, nil
		}, func() net.Addr { return server }, func() { doubts++ })
		if most := int(time.Duration(flood) * time.Millisecond / nudgeInterval); doubts > most {
			t.Errorf("%d doubts in a minute, want at most %d", doubts, most)
		}
	})
}
