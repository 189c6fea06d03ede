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
// hold half of them.
type places struct {
	limit, each int

	mu      sync.Mutex
	held    int
	of      map[netip.Prefix]int // by source
	waiting []*waiter            // the longest first
}

type waiter struct {
	source netip.Prefix
	got    chan struct{} // closed when it has a place
}

func newPlaces(limit int) *places {
	return &places{limit: limit, each: max(1, limit/2), of: map[netip.Prefix]int{}}
}

// take waits for a place until ctx ends; then it returns nil. Free gives the
// place back and is to be called once.
func (p *places) take(ctx context.Context, from net.Addr) (free func()) {
	source, known := sourceOf(from)
	if !known {
		source = netip.Prefix{}
	}
	w := &waiter{source, make(chan struct{})}
	p.mu.Lock()
	p.waiting = append(p.waiting, w)
	p.admit()
	p.mu.Unlock()
	select {
	case <-w.got:
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		if i := slices.Index(p.waiting, w); i >= 0 {
			p.waiting = slices.Delete(p.waiting, i, i+1)
			return nil
		}
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.held--
		if p.of[source]--; p.of[source] == 0 {
			delete(p.of, source)
		}
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
		p.waiting = slices.Delete(p.waiting, i, i+1)
		p.held++
		p.of[w.source]++
		close(w.got)
	}
}
