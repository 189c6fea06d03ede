package carrier

import (
	"context"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestPlacesAreGivenInTurnAndOneSourceHasHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(4, 100)
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
		if p.held != 0 || len(p.of) != 0 || len(p.wait) != 0 || len(p.waiting) != 0 {
			t.Errorf("left: %d held, %v, %d waiting", p.held, p.of, len(p.waiting))
		}
	})
}

func TestWaitingForAPlaceEnds(t *testing.T) {
	p := newPlaces(1, 100)
	free := p.take(t.Context(), from("192.0.2.1", 1))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if p.take(ctx, from("192.0.2.2", 1)) != nil {
		t.Error("two have the only place")
	}
	free()
	if p.held != 0 || len(p.waiting) != 0 {
		t.Errorf("left: %d held, %d waiting", p.held, len(p.waiting))
	}
}

func TestOneSourceDoesNotFillTheQueue(t *testing.T) {
	p := newPlaces(2, 1)
	free := p.take(t.Context(), from("192.0.2.1", 1))
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan func())
	go func() { waited <- p.take(ctx, from("192.0.2.1", 2)) }() // half is taken
	for waiting := 0; waiting == 0; <-time.After(time.Millisecond) {
		p.mu.Lock()
		waiting = len(p.waiting)
		p.mu.Unlock()
	}
	if p.take(t.Context(), from("192.0.2.1", 3)) != nil {
		t.Error("more wait of one source than may")
	}
	other := p.take(t.Context(), from("192.0.2.2", 1))
	if other == nil {
		t.Fatal("another source is kept out")
	}
	cancel()
	if <-waited != nil {
		t.Error("got a place after it gave up")
	}
	other()
	free()
	if p.held != 0 || len(p.wait) != 0 {
		t.Errorf("left: %d held, waiting %v", p.held, p.wait)
	}
}

func from(ip string, port int) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: port} }
