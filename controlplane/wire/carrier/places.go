package carrier

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// places are those of handshakes over TCP. Who finds none waits: being turned
// away would only bring it back, with the same to do. One source may hold half
// of them, and sources have a turn each, one after the other: who has thousands
// waiting keeps nobody else from the next place.
type places struct {
	limit, each int

	mu      sync.Mutex
	held    int
	sources map[netip.Prefix]*source // those that hold or wait
	next    []*source                // those that wait and may hold more, by turns
}

type source struct {
	key    netip.Prefix
	held   int
	queue  []*waiter // the longest first
	listed bool      // in next
}

type waiter struct {
	got  chan struct{} // closed when it has a place
	gone bool          // it has given up
}

func newPlaces(limit int) *places {
	return &places{limit: limit, each: max(1, limit/2), sources: map[netip.Prefix]*source{}}
}

// take waits for a place until ctx ends, and returns nil then. Free gives the
// place back and is to be called once.
func (p *places) take(ctx context.Context, from net.Addr) (free func()) {
	key, known := sourceOf(from)
	if !known {
		key = netip.Prefix{}
	}
	w, s := p.wait(key)
	select {
	case <-w.got:
	case <-ctx.Done():
		if p.giveUp(w, s) {
			return nil
		}
	}
	return func() { p.giveBack(s) }
}

func (p *places) wait(key netip.Prefix) (*waiter, *source) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.sources[key]
	if s == nil {
		s = &source{key: key}
		p.sources[key] = s
	}
	w := &waiter{got: make(chan struct{})}
	s.queue = append(s.queue, w)
	p.admit(s)
	return w, s
}

// giveUp ends a wait. False: too late, it has a place.
func (p *places) giveUp(w *waiter, s *source) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-w.got:
		return false
	default:
	}
	w.gone = true
	s.trim()
	p.admit(s)
	return true
}

func (p *places) giveBack(s *source) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held--
	s.held--
	p.admit(s)
}

// admit gives places to those whose turn it is, after s has changed; p.mu is
// held.
func (p *places) admit(s *source) {
	p.list(s)
	for p.held < p.limit && len(p.next) > 0 {
		first := p.next[0]
		p.next[0], p.next = nil, p.next[1:]
		first.listed = false
		if w := first.pop(); w != nil {
			first.held++
			p.held++
			close(w.got)
		}
		p.list(first)
	}
}

// list has a source wait for its turn, if it has anyone waiting and may hold
// more, and forgets one that has nothing; p.mu is held.
func (p *places) list(s *source) {
	switch {
	case s.listed:
	case len(s.queue) > 0 && s.held < p.each:
		s.listed = true
		p.next = append(p.next, s)
	case len(s.queue) == 0 && s.held == 0:
		delete(p.sources, s.key)
	}
}

// pop takes out who has waited the longest; nil: nobody waits.
func (s *source) pop() *waiter {
	s.trim()
	if len(s.queue) == 0 {
		return nil
	}
	w := s.queue[0]
	s.queue[0], s.queue = nil, s.queue[1:]
	s.trim()
	return w
}

// trim drops those in front that have given up.
func (s *source) trim() {
	for len(s.queue) > 0 && s.queue[0].gone {
		s.queue[0], s.queue = nil, s.queue[1:]
	}
}
