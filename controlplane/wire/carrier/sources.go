package carrier

import (
	"net"
	"net/netip"
	"sync"
)

// Sources counts what each source address holds, so that one cannot take what
// all share. An IPv6 network of 64 bits, which is what one subscriber gets,
// counts as one address. A limit has to be large: a whole fleet may be behind
// one NAT.
type Sources struct {
	limit int

	mu   sync.Mutex
	held map[netip.Prefix]int
}

// NewSources makes one that lets each source hold so many at once.
func NewSources(limit int) *Sources {
	return &Sources{limit: limit, held: map[netip.Prefix]int{}}
}

// Take counts one more for a source; free, which may be called more than once,
// gives it back. False: the source holds as many as it may.
func (s *Sources) Take(from net.Addr) (free func(), ok bool) {
	key, known := sourceOf(from)
	if !known {
		return func() {}, true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[key] >= s.limit {
		return func() {}, false
	}
	s.held[key]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[key]--; s.held[key] == 0 {
			delete(s.held, key)
		}
	}), true
}

// Held is how many a source holds.
func (s *Sources) Held(from net.Addr) int {
	key, _ := sourceOf(from)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[key]
}

func sourceOf(a net.Addr) (netip.Prefix, bool) {
	var ip netip.Addr
	switch a := a.(type) {
	case *net.UDPAddr:
		ip = a.AddrPort().Addr()
	case *net.TCPAddr:
		ip = a.AddrPort().Addr()
	}
	ip = ip.Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	p, err := ip.Prefix(bits)
	return p, err == nil && ip.IsValid()
}
