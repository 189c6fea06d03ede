package link

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// over is a pipe that says which carrier it is.
type over struct {
	*pipe
	transport string
}

func (o over) Transport() string { return o.transport }

// world is a network in a bubble: what each dial comes to.
type world struct {
	l     *Link
	down  *downlink
	began time.Time

	mu    sync.Mutex
	dials []string // "1.5s quic a:1"
	hello []string // the same, of those that said hello
	conns []*pipe
}

// open hands out a session whose control plane welcomes it after some time;
// less than 0: never.
func (w *world) open(transport string, welcome time.Duration) wire.Session {
	p := newPipe()
	w.mu.Lock()
	w.conns = append(w.conns, p)
	w.mu.Unlock()
	go func() {
		for i := 0; ; i++ {
			f, err := wire.ReadFrame(p.control)
			if err != nil {
				return
			}
			switch {
			case f.GetHello() != nil:
				w.note(&w.hello, transport, fmt.Sprint(f.GetHello().Ordinal))
				if welcome < 0 {
					continue
				}
				<-time.After(welcome)
				_ = wire.WriteFrame(p.control, &wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Version: 1, Incarnation: "i"}}})
			case f.GetPing() != nil:
				w.note(&w.hello, transport, "ping")
				_ = wire.WriteFrame(p.control, &wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: f.GetPing().Id}}})
			}
		}
	}()
	return over{p, transport}
}

func (w *world) note(list *[]string, transport, what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*list = append(*list, fmt.Sprintf("%s %s %s", time.Since(w.began), transport, what))
}

func (w *world) told(list *[]string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(*list)
}

// live counts the sessions that nobody has closed.
func (w *world) live() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.conns {
		if p.Err() == nil {
			n++
		}
	}
	return n
}

func inWorld(t *testing.T, edit func(*Config), dial func(ctx context.Context, w *world, transport, address string) (wire.Session, error), f func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{began: time.Now(), down: &downlink{}}
		cfg := Config{InstanceID: instanceA, Addresses: []string{"a:1"}, Clock: clock{}, rand: func() float64 { return 0.5 }}
		if edit != nil {
			edit(&cfg)
		}
		cfg.dial = func(ctx context.Context, transport, address string) (wire.Session, error) {
			w.note(&w.dials, transport, address)
			return dial(ctx, w, transport, address)
		}
		var err error
		if w.l, err = New(cfg); err != nil {
			t.Fatal(err)
		}
		w.l.Attach(w.down)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.l.Run(ctx) }()
		f(t, w)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if n := w.live(); n != 0 {
			t.Errorf("%d sessions were left open", n)
		}
	})
}

// silent is a way where nothing answers.
func silent(ctx context.Context) (wire.Session, error) {
	<-ctx.Done()
	return nil, fmt.Errorf("%w in time", carrier.ErrUnreachable)
}

func TestRace(t *testing.T) {
	quic, tcp := wire.TransportQUIC, wire.TransportTCP
	tests := []struct {
		name      string
		quic, tcp func(context.Context, *world) (wire.Session, error)
		over      string
		after     time.Duration
		hellos    []string
	}{
		{"both answer", at(quic, 50*time.Millisecond, 0), at(tcp, 0, 0), quic, 50 * time.Millisecond, []string{"50ms quic 0"}},
		{"UDP is blocked", func(ctx context.Context, _ *world) (wire.Session, error) { return silent(ctx) }, at(tcp, 100*time.Millisecond, 0),
			tcp, 2400 * time.Millisecond, []string{"2.4s tcp 0"}},
		{"QUIC fails at once", func(context.Context, *world) (wire.Session, error) { return nil, errors.New("network is unreachable") }, at(tcp, 0, 0),
			tcp, 0, []string{"0s tcp 0"}},
		{"QUIC is slow", at(quic, 2500*time.Millisecond, 0), at(tcp, 0, time.Second), tcp, 3300 * time.Millisecond, []string{"2.3s tcp 0"}},
		{"the link comes back", comesBack(quic, 9*time.Second, 0, 200, 600, 1400), comesBack(tcp, 9*time.Second, 0, 1000, 3000, 7000), quic, 10 * time.Second, nil},
		{"QUIC registers slowly", at(quic, 0, 4*time.Second), at(tcp, 0, 0), quic, 4 * time.Second, []string{"0s quic 0"}},
		{"QUIC shakes hands and no more", at(quic, 0, -1), at(tcp, 0, 0), tcp, registerPatience, []string{"0s quic 0", "5s tcp 1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inWorld(t, nil, func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
				if transport == quic {
					return tt.quic(ctx, w)
				}
				return tt.tcp(ctx, w)
			}, func(t *testing.T, w *world) {
				for w.l.Status().State != StateConnected {
					<-time.After(10 * time.Millisecond)
					if time.Since(w.began) > time.Minute {
						t.Fatal("never connected")
					}
				}
				took := time.Since(w.began)
				if s := w.l.Status(); s.Transport != tt.over || took > tt.after+10*time.Millisecond {
					t.Errorf("connected over %s after %s, want %s after %s", s.Transport, took, tt.over, tt.after)
				}
				<-time.After(10 * time.Second)
				if diff := cmp.Diff(tt.hellos, w.told(&w.hello)); diff != "" && tt.hellos != nil {
					t.Errorf("who said hello (-want +got):\n%s", diff)
				}
				if n := w.live(); n != 1 {
					t.Errorf("%d sessions are open, want the one that won", n)
				}
			})
		})
	}
}

// comesBack is a way that drops everything until some time, with the
// milliseconds at which a try's first packet is repeated.
func comesBack(transport string, up time.Duration, repeats ...time.Duration) func(context.Context, *world) (wire.Session, error) {
	return func(ctx context.Context, w *world) (wire.Session, error) {
		began := time.Since(w.began)
		for _, r := range repeats {
			if sent := began + r*time.Millisecond; sent >= up {
				select {
				case <-time.After(sent - began):
					return w.open(transport, 0), nil
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			}
		}
		return silent(ctx)
	}
}

// at is a way that answers after some time, and welcomes some time after that.
func at(transport string, dial, welcome time.Duration) func(context.Context, *world) (wire.Session, error) {
	return func(ctx context.Context, w *world) (wire.Session, error) {
		select {
		case <-time.After(dial):
			return w.open(transport, welcome), nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func TestOfManyAddressesNoneIsForgottenAndTheGoodOneIsFirst(t *testing.T) {
	var addresses []string
	for i := range 12 {
		addresses = append(addresses, fmt.Sprintf("a%d:1", i))
	}
	var down atomic.Bool
	dial := func(ctx context.Context, w *world, transport, address string) (wire.Session, error) {
		if address != "a11:1" || down.Load() {
			return silent(ctx)
		}
		return w.open(transport, 0), nil
	}
	inWorld(t, func(c *Config) { c.Addresses = addresses }, dial, func(t *testing.T, w *world) {
		for w.l.Status().State != StateConnected {
			<-time.After(100 * time.Millisecond)
			if time.Since(w.began) > 20*time.Second {
				t.Fatal("never connected")
			}
		}
		seen := map[string]bool{}
		for _, d := range w.told(&w.dials) {
			var took, transport, address string
			_, _ = fmt.Sscan(d, &took, &transport, &address)
			seen[address] = true
		}
		if len(seen) != len(addresses) {
			t.Errorf("only %d of %d addresses were tried", len(seen), len(addresses))
		}
		n := len(w.told(&w.dials))
		w.mu.Lock()
		last := w.conns[len(w.conns)-1]
		w.mu.Unlock()
		last.Close("", "")
		synctest.Wait()
		<-time.After(time.Second)
		if next := w.told(&w.dials)[n]; next[len(next)-5:] != "a11:1" {
			t.Errorf("tried first: %s", next)
		}
	})
}

// While a link that drops packets silently is down, new ones have to go out
// often enough for its return to be noticed within a second.
func TestSilentLinkIsTriedAnewEverySecond(t *testing.T) {
	for _, transport := range []string{wire.TransportQUIC, wire.TransportTCP, TransportAuto} {
		inWorld(t, func(c *Config) { c.Transport, c.rand = transport, func() float64 { return 0.999 } }, func(ctx context.Context, _ *world, _, _ string) (wire.Session, error) {
			return silent(ctx)
		}, func(t *testing.T, w *world) {
			<-time.After(100 * time.Second)
			last := map[string]time.Duration{}
			for _, d := range w.told(&w.dials) {
				var took, transport, address string
				_, _ = fmt.Sscan(d, &took, &transport, &address)
				at, err := time.ParseDuration(took)
				if err != nil {
					t.Fatal(err)
				}
				// A try repeats its packets after 1 s at the latest, when it is young.
				if gap := at - last[transport]; gap > quicHeadStart+time.Second {
					t.Errorf("%s over %s: nothing new for %s", took, transport, gap)
				}
				last[transport] = at
			}
			if n := len(w.told(&w.dials)); n < 45 || n > 150 {
				t.Errorf("%d tries in 100 s", n)
			}
		})
	}
}

func TestChangedNetworkIsDialledAtOnce(t *testing.T) {
	var refuse atomic.Bool
	dial := func(_ context.Context, w *world, transport, _ string) (wire.Session, error) {
		if refuse.Load() {
			return nil, &wire.Error{Code: wire.CodeOverloaded, RetryAfter: 50 * time.Second}
		}
		return nil, carrier.ErrUnreachable
	}
	inWorld(t, func(c *Config) { c.Transport, c.rand = wire.TransportQUIC, func() float64 { return 0.9 } }, dial, func(t *testing.T, w *world) {
		<-time.After(10 * time.Minute)
		synctest.Wait()
		n := len(w.told(&w.dials))
		w.l.NetworkChanged("test")
		synctest.Wait()
		if got := len(w.told(&w.dials)); got != n+1 {
			t.Errorf("%d dials at once, want 1", got-n)
		}
		<-time.After(10 * time.Second)
		if got := len(w.told(&w.dials)) - n; got < 9 {
			t.Errorf("%d dials in the ten seconds after, want one a second as after a loss", got)
		}
	})
}

func TestSuspendAndChangedNetworkAskAtOnce(t *testing.T) {
	c := &jumping{}
	inWorld(t, func(cfg *Config) { cfg.Clock = c }, func(_ context.Context, w *world, transport, _ string) (wire.Session, error) {
		return w.open(transport, 0), nil
	}, func(t *testing.T, w *world) {
		<-time.After(65 * time.Second)
		if got := w.told(&w.hello); len(got) != 1 {
			t.Fatalf("said %v, want hello and nothing more", got)
		}
		c.add(time.Hour)
		<-time.After(resumeCheck)
		synctest.Wait()
		w.l.NetworkChanged("test")
		<-time.After(time.Minute)
		want := []string{"0s quic 0", "1m10s quic ping", "1m15s quic ping"}
		if diff := cmp.Diff(want, w.told(&w.hello)); diff != "" {
			t.Error(diff)
		}
		if w.l.Status().State != StateConnected {
			t.Error("the session was given up")
		}
	})
}

// jumping is a clock that goes on while the process's timers stand.
type jumping struct {
	clock
	mu   sync.Mutex
	more time.Duration
}

func (j *jumping) add(d time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.more += d
}

func (j *jumping) Now() time.Duration {
	j.mu.Lock()
	defer j.mu.Unlock()
	return time.Duration(time.Now().UnixNano()) + j.more
}

func TestRebuildBeginsAnew(t *testing.T) {
	inWorld(t, func(c *Config) { c.Addresses = []string{"a:1", "b:1"} }, func(_ context.Context, w *world, transport, _ string) (wire.Session, error) {
		return w.open(transport, 0), nil
	}, func(t *testing.T, w *world) {
		<-time.After(time.Minute)
		w.l.Rebuild()
		<-time.After(10 * time.Second)
		got := w.told(&w.dials)
		if len(got) < 2 || got[len(got)-1] == got[0] {
			t.Errorf("dials %v", got)
		}
		var first string
		for _, d := range got {
			var took, transport, address string
			_, _ = fmt.Sscan(d, &took, &transport, &address)
			if took != "0s" && took != "250ms" {
				first = address
				break
			}
		}
		if first != "b:1" {
			t.Errorf("after the rebuild, %q was tried first: the preference was kept (%v)", first, got)
		}
		if w.l.Status().State != StateConnected || w.live() != 1 {
			t.Errorf("%s with %d sessions", w.l.Status().State, w.live())
		}
	})
}

// A control plane that is slow to store must not be met by a second handshake
// of everyone: over a carrier that acknowledges, its silence means nothing yet.
func TestSlowControlPlaneIsNotDoubted(t *testing.T) {
	inWorld(t, func(c *Config) { c.Transport = wire.TransportQUIC }, func(_ context.Context, w *world, transport, _ string) (wire.Session, error) {
		return &beating{Session: w.open(transport, 0), n: new(atomic.Uint64)}, nil
	}, func(t *testing.T, w *world) {
		<-time.After(time.Minute)
		for i := range uint64(20) {
			w.l.TaskStatus(&wire.TaskStatus{Sequence: i + 1, TaskId: taskB}) // never acknowledged, pings are answered
			<-time.After(5 * time.Second)
		}
		if got := w.told(&w.dials); len(got) != 1 {
			t.Errorf("dials %v", got)
		}
	})
}

// beating hears an acknowledgement whenever it is asked.
type beating struct {
	wire.Session
	n *atomic.Uint64
}

func (b *beating) Heard() uint64 { return b.n.Add(1) }

// dead hears nothing.
type dead struct{ wire.Session }

func (dead) Heard() uint64 { return 7 }

func TestBlockedMidSessionTCPTakesOverWithinFiveSeconds(t *testing.T) {
	var blocked atomic.Bool
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		switch {
		case transport == wire.TransportTCP:
			<-time.After(300 * time.Millisecond)
			return w.open(transport, 100*time.Millisecond), nil
		case blocked.Load():
			return silent(ctx)
		}
		p := newPipe()
		serve(p, &wire.Welcome{Version: 1, Incarnation: "i"}, func() {
			for {
				if _, err := wire.ReadFrame(p.control); err != nil {
					return
				}
			}
		})
		return dead{over{p, transport}}, nil
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(time.Minute)
		blocked.Store(true)
		began := time.Now()
		w.l.TaskStatus(&wire.TaskStatus{Sequence: 1, TaskId: taskB})
		for w.l.Status().Transport != wire.TransportTCP {
			<-time.After(50 * time.Millisecond)
			if time.Since(began) > time.Minute {
				t.Fatal("never over TCP")
			}
		}
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("over TCP after %s", took)
		}
		<-time.After(time.Second)
		if ups := w.down.read; ups(func(d *downlink) bool { return !slices.Equal(d.ups, []bool{true}) }) {
			t.Error("the agent was told of a break")
		}
	})
}

func TestQUICIsProbedForEverEverMoreRarely(t *testing.T) {
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		if transport == wire.TransportTCP {
			return w.open(transport, 0), nil
		}
		return silent(ctx)
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(24 * time.Hour)
		var probes []time.Duration
		for _, d := range w.told(&w.dials) {
			var took, transport, address string
			_, _ = fmt.Sscan(d, &took, &transport, &address)
			if at, _ := time.ParseDuration(took); transport == wire.TransportQUIC && at > 10*time.Second {
				probes = append(probes, at)
			}
		}
		if len(probes) < 48 || len(probes) > 100 {
			t.Errorf("%d probes in a day, want one in 15 to 30 minutes", len(probes))
		}
		if probes[0] > time.Minute || probes[len(probes)-1] < 23*time.Hour {
			t.Errorf("probes from %s to %s", probes[0], probes[len(probes)-1])
		}
		if w.live() != 1 || len(w.told(&w.hello)) != 1 {
			t.Errorf("%d sessions, hellos %v", w.live(), w.told(&w.hello))
		}
	})
}
