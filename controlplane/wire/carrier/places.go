package carrier

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
)

// places are those of handshakes over TCP. Who finds none waits in turn: being
// turned away would only bring it back, with the same to do. One source may
// hold half of them, and so many may wait of each: who opens connections and
// says nothing must not take those that all share.
type places struct {
	limit, each, most int

	mu      sync.Mutex
	held    int
	of      map[netip.Prefix]int // held, by source
	wait    map[netip.Prefix]int // waiting, by source
	waiting []*waiter            // the longest first
}

type waiter struct {
	source netip.Prefix
	got    chan struct{} // closed when it has a place
}

func newPlaces(limit, mostWaiting int) *places {
	return &places{limit: limit, each: max(1, limit/2), most: mostWaiting, of: map[netip.Prefix]int{}, wait: map[netip.Prefix]int{}}
}

// take waits for a place until ctx ends. It returns nil then, and at once where
// too many of the source wait. Free gives the place back and is to be called
// once.
func (p *places) take(ctx context.Context, from net.Addr) (free func()) {
	source, known := sourceOf(from)
	if !known {
		source = netip.Prefix{}
	}
	w := &waiter{source, make(chan struct{})}
	p.mu.Lock()
	if p.wait[source] >= p.most {
		p.mu.Unlock()
		return nil
	}
	p.waiting = append(p.waiting, w)
	p.wait[source]++
	p.admit()
	p.mu.Unlock()
	select {
	case <-w.got:
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		if i := slices.Index(p.waiting, w); i >= 0 {
			p.leave(i)
			return nil
		}
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.held--
		less(p.of, source)
		p.admit()
	}
}

// admit gives places to those who wait; p.mu is held.
func (p *places) admit() {
	for i := 0; i < len(p.waiting) && p.held < p.limit; {
		w := p.waiting[i]
		if p.of[w.source] >= p.each {
			i++
			continue
		}
		p.leave(i)
		p.held++
		p.of[w.source]++
		close(w.got)
	}
}

// leave takes one out of those who wait; p.mu is held.
func (p *places) leave(i int) {
	less(p.wait, p.waiting[i].source)
	p.waiting = slices.Delete(p.waiting, i, i+1)
}

func less(counts map[netip.Prefix]int, source netip.Prefix) {
	if counts[source]--; counts[source] == 0 {
		delete(counts, source)
	}
}
