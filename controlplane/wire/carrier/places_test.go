package carrier

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
)

func TestPlacesAreGivenInTurnAndOneSourceHasHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(4)
		var order []int
		got := make(chan int)
		frees := map[int]func(){}
		take := func(n int, source string) {
			go func() {
				frees[n] = p.take(t.Context(), from(source, n))
				got <- n
			}()
			synctest.Wait()
			select {
			case n := <-got:
				order = append(order, n)
			default:
			}
		}
		take(1, "192.0.2.1")
		take(2, "192.0.2.1")
		take(3, "192.0.2.1") // waits: half is taken
		take(4, "192.0.2.2") // does not wait for it
		take(5, "192.0.2.3")
		take(6, "192.0.2.3") // waits: all are taken
		if !slices.Equal(order, []int{1, 2, 4, 5}) {
			t.Fatalf("got a place: %v", order)
		}
		frees[4]()
		if n := <-got; n != 6 { // 3's source still has its half
			t.Errorf("the next is %d, want 6", n)
		}
		frees[1]()
		if n := <-got; n != 3 {
			t.Errorf("the next is %d, want 3", n)
		}
		for _, n := range []int{2, 3, 5, 6} {
			frees[n]()
		}
		nothing(t, p)
	})
}

func TestWaitingForAPlaceEnds(t *testing.T) {
	p := newPlaces(1)
	free := p.take(t.Context(), from("192.0.2.1", 1))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if p.take(ctx, from("192.0.2.2", 1)) != nil {
		t.Error("two have the only place")
	}
	free()
	nothing(t, p)
}

func nothing(t *testing.T, p *places) {
	t.Helper()
	if p.held != 0 || len(p.sources) != 0 || len(p.next) != 0 {
		t.Errorf("left: %d held, sources %v, next %v", p.held, p.sources, p.next)
	}
}

// TestSourcesTakeTurns: one that has many waiting is not served before one that
// comes later.
func TestSourcesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(2)
		var mu sync.Mutex
		var order []string
		var all sync.WaitGroup
		wait := func(source string, n int) {
			all.Go(func() {
				free := p.take(t.Context(), from(source, n))
				mu.Lock()
				order = append(order, source)
				mu.Unlock()
				<-time.After(time.Second)
				free()
			})
			synctest.Wait()
		}
		for n := range 100 {
			wait("192.0.2.1", n)
		}
		wait("192.0.2.3", 0)
		wait("192.0.2.2", 0) // both places are taken
		wait("192.0.2.2", 1)
		all.Wait()
		if at := slices.Index(order, "192.0.2.2"); at < 0 || at > 4 {
			t.Errorf("served after %d others", at)
		}
		nothing(t, p)
	})
}

// TestPlaces: however they come, wait and give up, no more hold places than
// may, nobody waits while it could have one, and nothing is left.
func TestPlaces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := newPlaces(rapid.IntRange(1, 6).Draw(t, "limit"))
		type one struct {
			w *waiter
			s *source
		}
		var waiting, holding []one
		check := func() {
			of := map[*source]int{}
			still := waiting[:0]
			for _, o := range waiting {
				select {
				case <-o.w.got:
					holding = append(holding, o)
				default:
					still = append(still, o)
				}
			}
			waiting = still
			for _, o := range holding {
				of[o.s]++
			}
			if len(holding) > p.limit || len(holding) != p.held {
				t.Fatalf("%d hold places of %d, and %d are counted", len(holding), p.limit, p.held)
			}
			for s, n := range of {
				if n > p.each {
					t.Fatalf("a source holds %d places of %d", n, p.each)
				}
				if p.sources[s.key] != s {
					t.Fatal("a source that holds places is forgotten")
				}
			}
			for _, o := range waiting {
				if len(holding) < p.limit && of[o.s] < p.each {
					t.Fatal("one waits that could have a place")
				}
			}
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch k := rapid.IntRange(0, 3).Draw(t, "do"); {
			case k == 0 && len(waiting) > 0:
				i := rapid.IntRange(0, len(waiting)-1).Draw(t, "who gives up")
				p.giveUp(waiting[i].w, waiting[i].s)
				waiting = slices.Delete(waiting, i, i+1)
			case k == 1 && len(holding) > 0:
				i := rapid.IntRange(0, len(holding)-1).Draw(t, "who is done")
				p.giveBack(holding[i].s)
				holding = slices.Delete(holding, i, i+1)
			default:
				key, _ := sourceOf(from(fmt.Sprintf("192.0.2.%d", rapid.IntRange(1, 3).Draw(t, "source")), 0))
				w, s := p.wait(key)
				waiting = append(waiting, one{w, s})
			}
			check()
		}
		for _, o := range waiting {
			p.giveUp(o.w, o.s)
		}
		for _, o := range holding {
			p.giveBack(o.s)
		}
		if p.held != 0 || len(p.sources) != 0 || len(p.next) != 0 {
			t.Fatalf("left: %d held, %d sources, %d next", p.held, len(p.sources), len(p.next))
		}
	})
}

func from(ip string, port int) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: port} }

// TestAPISessionsAreResumed: a client that comes again is spared half of the
// handshake.
func TestAPISessionsAreResumed(t *testing.T) {
	r := newRig(t, nil)
	go func() {
		for {
			c, err := r.l.HTTP().Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte{1}) // tickets are read with what follows
			defer c.Close()
		}
	}()
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: apiProtocols, ClientSessionCache: tls.NewLRUClientSessionCache(1)} //nolint:gosec // whose it is does not matter
	for n := range 3 {
		c, err := tls.Dial("tcp", r.l.Addr().String(), conf)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Read(make([]byte, 1))
		if resumed := c.ConnectionState().DidResume; err != nil || resumed != (n > 0) {
			t.Errorf("connection %d: resumed %t, %v", n, resumed, err)
		}
		_ = c.Close()
	}
}

// TestOnlyTunnelsWaitForTunnels: the API does not wait for handshakes of
// devices, and who says nothing holds no place.
func TestOnlyTunnelsWaitForTunnels(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxHandshakes = 2 })
	for range 10 {
		silent, err := net.Dial("tcp", r.l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
	}
	ctx, cancel := context.WithCancel(t.Context())
	var stalled sync.WaitGroup
	defer stalled.Wait()
	defer cancel()
	helloed := make(chan struct{})
	stalled.Go(func() { // takes the one place of this source
		conf := clientTLS(r.device, []wire.Pin{r.ca.Pin()}, wire.ProtocolTunnel, "localhost")
		conf.VerifyConnection = func(tls.ConnectionState) error {
			close(helloed)
			<-ctx.Done()
			return ctx.Err()
		}
		if c, err := tls.Dial("tcp", r.l.Addr().String(), conf); err == nil {
			_ = c.Close()
		}
	})
	select {
	case <-helloed:
	case <-time.After(5 * time.Second):
		t.Fatal("the silent ones hold the place")
	}
	waiting, giveUp := context.WithTimeout(ctx, 300*time.Millisecond)
	defer giveUp()
	if s, err := Dial(waiting, r.config(wire.TransportTCP)); err == nil {
		s.Close("", "")
		t.Error("another device did not wait for its turn")
	}
	c, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: apiProtocols}}).DialContext(within(t, 2*time.Second), "tcp", r.l.Addr().String()) //nolint:gosec // whose it is does not matter
	if err != nil {
		t.Fatalf("the API: %v", err)
	}
	_ = c.Close()
}
