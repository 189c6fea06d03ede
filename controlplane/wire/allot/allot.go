// Package allot decides which devices containers get. Containers ask for so
// many devices of a kind for which an expression holds; a device goes to as
// many containers as it has shares, and to one container once. Both ends use
// it: the control plane to know whether a task fits on an instance, the agent
// to choose.
//
// It is bipartite matching with capacities: what was given to one claim, and is
// not fixed, moves to make room for another, so that whenever there is an
// assignment for all it is found.
package allot

import (
	"cmp"
	"slices"

	"github.com/belay-edge/belay/controlplane/wire/query"
)

// Limits of what a container may ask for.
const (
	MaxRequests = 8  // of one container
	MaxCount    = 16 // devices of one request
)

// Ref names a device of an instance.
type Ref struct{ Plugin, ID string }

// Compare orders devices by plugin, then id.
func (r Ref) Compare(o Ref) int {
	return cmp.Or(cmp.Compare(r.Plugin, o.Plugin), cmp.Compare(r.ID, o.ID))
}

// Device is a device as far as giving it away goes.
type Device struct {
	Ref
	Kind       string
	Usable     bool   // ready, not unhealthy, its plugin up
	Reason     string // why it is not usable, for a person
	Shares     int    // how many containers may have it at a time; less than 1: 1
	Attributes map[string]string
}

// Request asks for Count different devices of Kind for which Where holds.
type Request struct {
	Kind  string
	Count int
	Where query.Expr
}

// subjects are what an expression may ask for besides attributes.
var subjects = []string{"plugin", "id"}

// Where parses the expression of a request; "" holds for every device.
func Where(text string) (query.Expr, error) {
	if text == "" {
		return query.Expr{}, nil
	}
	return query.Parse(text, subjects...)
}

// Subjects are what the expression of a request may ask for besides attributes.
func Subjects() []string { return slices.Clone(subjects) }

func (d *Device) lookup() query.Lookup {
	attributes := query.Attributes(d.Attributes)
	return func(subject string) (string, bool) {
		switch subject {
		case "plugin":
			return d.Plugin, true
		case "id":
			return d.ID, true
		}
		return attributes(subject)
	}
}

// fits says whether a device could serve a request, leaving aside who has it.
func (r *Request) fits(d *Device) bool { return d.Kind == r.Kind && r.Where.Match(d.lookup()) }

// Fits says whether a device is one that some request asks for, usable or not.
func Fits(requests []Request, d Device) bool {
	return slices.ContainsFunc(requests, func(r Request) bool { return r.fits(&d) })
}

// Pool is an instance's devices and what is taken of them.
type Pool struct {
	devices []Device
	free    []int // shares that nobody holds for certain
	claims  []claim
}

// claim is what one container asks for.
type claim struct {
	requests []Request
	units    []unit
}

// unit is one device to be found.
type unit struct {
	fits []int // devices, the ones to be tried first in front
	at   int   // the device it has; -1: none
}

// NewPool makes a pool of which nothing is taken.
func NewPool(devices []Device) *Pool {
	p := &Pool{devices: slices.Clone(devices)}
	slices.SortStableFunc(p.devices, func(a, b Device) int { return a.Compare(b.Ref) })
	p.free = make([]int, len(p.devices))
	for i, d := range p.devices {
		p.free[i] = max(1, d.Shares)
	}
	return p
}

func (p *Pool) find(r Ref) (int, bool) {
	return slices.BinarySearchFunc(p.devices, r, func(d Device, r Ref) int { return d.Compare(r) })
}

// Take fixes a share of each device for a container; Release undoes it. What
// is not in the pool does not count.
func (p *Pool) Take(refs []Ref) { p.hold(refs, -1) }

// Release gives back what Take took.
func (p *Pool) Release(refs []Ref) { p.hold(refs, 1) }

func (p *Pool) hold(refs []Ref, n int) {
	for _, r := range refs {
		if i, ok := p.find(r); ok {
			p.free[i] += n
		}
	}
}

// Block makes unavailable what some request asks for: a container has one of
// them, and nobody knows which.
func (p *Pool) Block(requests []Request) {
	for i, d := range p.devices {
		if Fits(requests, d) {
			p.free[i] = min(p.free[i], 0)
		}
	}
}

// BlockAll makes everything unavailable.
func (p *Pool) BlockAll() {
	for i := range p.free {
		p.free[i] = min(p.free[i], 0)
	}
}

// usage is how many shares of a device are gone, fixed or to units.
func (p *Pool) usage(device int) int {
	n := max(1, p.devices[device].Shares) - p.free[device]
	for i := range p.claims {
		for _, u := range p.claims[i].units {
			if u.at == device {
				n++
			}
		}
	}
	return n
}

// Add makes room for one container beside what was added before and is not
// refused: false, and nothing changes, when that cannot be. Devices in prefer
// are tried first, then those with the fewest containers.
func (p *Pool) Add(requests []Request, prefer []Ref) bool {
	before := p.assignment()
	if p.add(requests, prefer) {
		return true
	}
	p.claims = p.claims[:len(p.claims)-1]
	p.restore(before)
	p.claims = append(p.claims, claim{})
	return false
}

// AddWhatFits is Add for a container that waits: it gets what there is.
func (p *Pool) AddWhatFits(requests []Request) { p.add(requests, nil) }

func (p *Pool) add(requests []Request, prefer []Ref) bool {
	c := claim{requests: requests}
	for i := range requests {
		fits := p.candidates(&requests[i], prefer)
		for range requests[i].Count {
			c.units = append(c.units, unit{fits: fits, at: -1})
		}
	}
	p.claims = append(p.claims, c)
	all := true
	for i := range c.units {
		s := search{pool: p, devices: make([]bool, len(p.devices)), pairs: map[pair]bool{}}
		all = s.place(len(p.claims)-1, i) && all
	}
	return all
}

func (p *Pool) candidates(r *Request, prefer []Ref) []int {
	type candidate struct{ device, preferred, used int }
	var cs []candidate
	for i := range p.devices {
		if d := &p.devices[i]; d.Usable && p.free[i] > 0 && r.fits(d) {
			cs = append(cs, candidate{i, slices.Index(prefer, d.Ref), p.usage(i)})
		}
	}
	slices.SortStableFunc(cs, func(a, b candidate) int {
		if (a.preferred >= 0) != (b.preferred >= 0) {
			return cmp.Compare(b.preferred, a.preferred) // -1 is last
		}
		return cmp.Compare(a.used, b.used)
	})
	out := make([]int, len(cs))
	for i, c := range cs {
		out[i] = c.device
	}
	return out
}

type pair struct{ claim, device int }

// search is one augmenting path: what it looked at once it need not look at
// again.
type search struct {
	pool    *Pool
	devices []bool
	pairs   map[pair]bool
}

// place finds a device for a unit, moving others out of the way.
func (s *search) place(c, u int) bool {
	p := s.pool
	from := p.claims[c].units[u].at
	for _, d := range p.claims[c].units[u].fits {
		if d == from || s.pairs[pair{c, d}] {
			continue
		}
		s.pairs[pair{c, d}] = true
		// A container has a device once: another unit of it has to move.
		if other := p.unitAt(c, d); other >= 0 {
			if s.place(c, other) {
				p.claims[c].units[u].at = d
				return true
			}
			continue
		}
		if s.devices[d] {
			continue
		}
		s.devices[d] = true
		if s.makeRoom(d) {
			p.claims[c].units[u].at = d
			return true
		}
	}
	return false
}

// makeRoom sees to it that one more container can have the device.
func (s *search) makeRoom(d int) bool {
	p := s.pool
	taken := 0
	for i := range p.claims {
		if p.unitAt(i, d) >= 0 {
			taken++
		}
	}
	if taken < p.free[d] {
		return true
	}
	for i := range p.claims {
		u := p.unitAt(i, d)
		if u < 0 || s.pairs[pair{i, d}] {
			continue
		}
		s.pairs[pair{i, d}] = true
		if s.place(i, u) {
			return true
		}
	}
	return false
}

func (p *Pool) unitAt(c, d int) int {
	return slices.IndexFunc(p.claims[c].units, func(u unit) bool { return u.at == d })
}

func (p *Pool) assignment() [][]int {
	out := make([][]int, len(p.claims))
	for i, c := range p.claims {
		for _, u := range c.units {
			out[i] = append(out[i], u.at)
		}
	}
	return out
}

func (p *Pool) restore(assignment [][]int) {
	for i, at := range assignment {
		for k := range at {
			p.claims[i].units[k].at = at[k]
		}
	}
}

// Given are the devices of the n-th container added, as things stand, sorted.
func (p *Pool) Given(n int) []Ref {
	var out []Ref
	for _, u := range p.claims[n].units {
		if u.at >= 0 {
			out = append(out, p.devices[u.at].Ref)
		}
	}
	slices.SortFunc(out, Ref.Compare)
	return out
}
