package carrier

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// lookupTimeout bounds one question to DNS.
	lookupTimeout = 10 * time.Second
	// lookupPatience is how long DNS may take while older answers are known.
	lookupPatience = 500 * time.Millisecond
	// maxKnown bounds the names whose addresses are remembered.
	maxKnown = 128
)

// Resolver finds the addresses of names by DNS, and remembers them for when
// there is none: a control plane that can be reached must not be out of reach
// because a name server is.
type Resolver struct {
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	mu      sync.Mutex
	known   map[string][]netip.Addr
	asking  map[string]*question
	changed func(known map[string][]netip.Addr)
	telling sync.Mutex // held while changed is called, which may take its time
}

// question is one under way; all who ask for the name meanwhile wait for it.
type question struct {
	done  chan struct{}
	addrs []netip.Addr
	err   error
}

// NewResolver makes one that knows what is given. changed, which may be nil, is
// told when that changes; calls to it do not overlap.
func NewResolver(known map[string][]netip.Addr, changed func(map[string][]netip.Addr)) *Resolver {
	r := &Resolver{
		lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		known: map[string][]netip.Addr{}, asking: map[string]*question{}, changed: changed,
	}
	for host, addrs := range known {
		if len(addrs) > 0 && len(r.known) < maxKnown {
			r.known[host] = slices.Clone(addrs)
		}
	}
	return r
}

// Known is what is remembered.
func (r *Resolver) Known() map[string][]netip.Addr {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.known)
}

// Lookup returns the addresses of a name or an IP address, in the order to try
// them: both families in turn. It returns those of an earlier answer when there
// is none in time.
func (r *Resolver) Lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip.Unmap()}, nil
	}
	r.mu.Lock()
	known := r.known[host]
	q := r.asking[host]
	if q == nil {
		q = &question{done: make(chan struct{})}
		r.asking[host] = q
		// Not ended with ctx: a late answer is one for the next time.
		go r.ask(context.WithoutCancel(ctx), host, q)
	}
	r.mu.Unlock()
	var late <-chan time.Time
	if len(known) > 0 {
		t := time.NewTimer(lookupPatience)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-q.done:
		if q.err == nil {
			return slices.Clone(q.addrs), nil
		}
		if len(known) > 0 {
			return slices.Clone(known), nil
		}
		return nil, q.err
	case <-late:
		return slices.Clone(known), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("look up %s: %w", host, ctx.Err())
	}
}

func (r *Resolver) ask(ctx context.Context, host string, q *question) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	addrs, err := r.lookup(ctx, host)
	if err == nil && len(addrs) == 0 {
		err = &net.DNSError{Err: "no addresses", Name: host, IsNotFound: true}
	}
	q.addrs, q.err = alternate(addrs), err
	r.mu.Lock()
	delete(r.asking, host)
	close(q.done)
	news := err == nil && !sameAddrs(r.known[host], q.addrs) && (r.known[host] != nil || len(r.known) < maxKnown)
	if news {
		r.known[host] = q.addrs
	}
	r.mu.Unlock()
	if news && r.changed != nil {
		r.telling.Lock()
		defer r.telling.Unlock()
		r.changed(r.Known())
	}
}

// sameAddrs compares as sets: name servers rotate their answers.
func sameAddrs(a, b []netip.Addr) bool {
	byAddr := netip.Addr.Compare
	return slices.Equal(slices.SortedFunc(slices.Values(a), byAddr), slices.SortedFunc(slices.Values(b), byAddr))
}

// alternate orders addresses as RFC 8305 does: by turns of one family and the
// other, beginning with that of the first.
func alternate(addrs []netip.Addr) []netip.Addr {
	var first, second []netip.Addr
	for _, a := range addrs {
		a = a.Unmap()
		if len(first) == 0 || a.Is4() == first[0].Is4() {
			first = append(first, a)
		} else {
			second = append(second, a)
		}
	}
	out := make([]netip.Addr, 0, len(addrs))
	for i := range max(len(first), len(second)) {
		if i < len(first) {
			out = append(out, first[i])
		}
		if i < len(second) {
			out = append(out, second[i])
		}
	}
	return out
}

// resolve makes what can be dialled of host:port.
func (r *Resolver) resolve(ctx context.Context, network, address string) ([]netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	number, err := net.DefaultResolver.LookupPort(ctx, network, port)
	if err != nil {
		return nil, err
	}
	addrs, err := r.Lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	if len(addrs) == 0 {
		return nil, errors.New("no addresses")
	}
	out := make([]netip.AddrPort, 0, min(len(addrs), maxRace))
	for _, a := range addrs[:min(len(addrs), maxRace)] {
		out = append(out, netip.AddrPortFrom(a, uint16(number)))
	}
	return out, nil
}
