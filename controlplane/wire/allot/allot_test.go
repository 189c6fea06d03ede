package allot

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func gpu(id string, shares int, attributes ...string) Device {
	d := Device{Ref: Ref{"nvidia", id}, Kind: "gpu", Usable: true, Shares: shares, Attributes: map[string]string{}}
	for i := 0; i < len(attributes); i += 2 {
		d.Attributes[attributes[i]] = attributes[i+1]
	}
	return d
}

func want(t testing.TB, kind string, count int, where string) Request {
	t.Helper()
	e, err := Where(where)
	if err != nil {
		t.Fatal(err)
	}
	return Request{Kind: kind, Count: count, Where: e}
}

func refs(ids ...string) (out []Ref) {
	for _, id := range ids {
		out = append(out, Ref{"nvidia", id})
	}
	return out
}

func TestGiven(t *testing.T) {
	big := want(t, "gpu", 1, "attribute:memory_mib >= 8192")
	any1, any2 := want(t, "gpu", 1, ""), want(t, "gpu", 2, "")
	ask := func(rs ...Request) []Request { return rs }
	two := []Device{gpu("a", 1, "memory_mib", "8192"), gpu("b", 1, "memory_mib", "4096")}
	for _, tc := range []struct {
		name    string
		devices []Device
		taken   []Ref
		claims  [][]Request
		want    [][]Ref // nil: refused
	}{
		{"the first in order", two, nil, [][]Request{ask(any1)}, [][]Ref{refs("a")}},
		{"what is taken is not given", two, refs("a"), [][]Request{ask(any1)}, [][]Ref{refs("b")}},
		{"an earlier choice moves out of the way", two, nil, [][]Request{ask(any1), ask(big)}, [][]Ref{refs("b"), refs("a")}},
		{"a fixed one does not", two, refs("a"), [][]Request{ask(big)}, [][]Ref{nil}},
		{"one refused does not harm the others", two, nil, [][]Request{ask(any1), ask(any2), ask(big)}, [][]Ref{refs("b"), nil, refs("a")}},
		{"several of one container", two, nil, [][]Request{ask(any1, big)}, [][]Ref{refs("a", "b")}},
		{"a container has a shared one once", []Device{gpu("a", 4)}, nil, [][]Request{ask(any2), ask(any1, any1), ask(any1), ask(any1)},
			[][]Ref{nil, nil, refs("a"), refs("a")}},
		{"the least shared first", []Device{gpu("a", 2), gpu("b", 2)}, nil, [][]Request{ask(any1), ask(any1), ask(any1), ask(any1), ask(any1)},
			[][]Ref{refs("a"), refs("b"), refs("a"), refs("b"), nil}},
		{"of another kind", two, nil, [][]Request{ask(want(t, "tpu", 1, ""))}, [][]Ref{nil}},
		{"by id and plugin", two, nil, [][]Request{ask(want(t, "gpu", 1, "id == b and plugin == nvidia"))}, [][]Ref{refs("b")}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := NewPool(tc.devices)
			p.Take(tc.taken)
			for i, c := range tc.claims {
				if got := p.Add(c, nil); got != (tc.want[i] != nil) {
					t.Errorf("claim %d: %v", i, got)
				}
			}
			for i := range tc.claims {
				if d := cmp.Diff(tc.want[i], p.Given(i)); d != "" {
					t.Errorf("claim %d (-want +got):\n%s", i, d)
				}
			}
		})
	}
}

func TestPreferredFirst(t *testing.T) {
	p := NewPool([]Device{gpu("a", 1), gpu("b", 1), gpu("c", 1)})
	p.Add([]Request{want(t, "gpu", 2, "")}, refs("c", "b"))
	if d := cmp.Diff(refs("b", "c"), p.Given(0)); d != "" {
		t.Error(d)
	}
}

func TestExplain(t *testing.T) {
	away := gpu("c", 1, "memory_mib", "16384")
	away.Usable, away.Reason = false, "its driver is not bound"
	devices := []Device{gpu("a", 1, "memory_mib", "8192"), gpu("b", 2, "memory_mib", "4096"), away}
	for _, tc := range []struct {
		name    string
		request Request
		want    string
	}{
		{"none of the kind", want(t, "tpu", 1, ""), "no device of kind tpu"},
		{"not met", want(t, "gpu", 1, "attribute:memory_mib > 20000"),
			`no gpu of 3 for which attribute:memory_mib > 20000 (a: attribute:memory_mib > 20000: it is "8192"; b: attribute:memory_mib > 20000: it is "4096"; c: attribute:memory_mib > 20000: it is "16384")`},
		{"in use and not ready", want(t, "gpu", 1, "attribute:memory_mib >= 8192"),
			"1 wanted, 2 device(s) of kind gpu for which attribute:memory_mib >= 8192: 1 of 2 in use, 1 not ready (c: its driver is not bound)"},
		{"too many", want(t, "gpu", 4, ""), "4 wanted, 3 device(s) of kind gpu: 1 of 3 in use, 1 not ready (c: its driver is not bound)"},
		{"met", want(t, "gpu", 1, ""), "no choice of the free devices meets all requests together"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := NewPool(devices)
			p.Take(refs("a"))
			if got := p.Explain([]Request{tc.request}); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func TestBlocked(t *testing.T) {
	p := NewPool([]Device{gpu("a", 3, "x", "1"), gpu("b", 1, "x", "2")})
	p.Block([]Request{want(t, "gpu", 1, "attribute:x == 1")})
	if !p.Add([]Request{want(t, "gpu", 1, "")}, nil) || p.Given(0)[0].ID != "b" {
		t.Errorf("given: %v", p.Given(0))
	}
	p.BlockAll()
	if p.Add([]Request{want(t, "gpu", 1, "")}, nil) {
		t.Errorf("given: %v", p.Given(1))
	}
}

// drawn is a small world: small enough to try every assignment.
func drawn(t *rapid.T) (devices []Device, taken []Ref, claims [][]Request) {
	for i := range rapid.IntRange(0, 5).Draw(t, "devices") {
		d := gpu(fmt.Sprint(i), rapid.IntRange(0, 3).Draw(t, "shares"), "x", fmt.Sprint(rapid.IntRange(0, 2).Draw(t, "x")))
		d.Kind = rapid.SampledFrom([]string{"gpu", "gpu", "tpu"}).Draw(t, "kind")
		d.Usable = rapid.IntRange(0, 5).Draw(t, "usable") > 0
		devices = append(devices, d)
		if rapid.IntRange(0, 3).Draw(t, "taken") == 0 {
			taken = append(taken, d.Ref)
		}
	}
	for range rapid.IntRange(1, 4).Draw(t, "claims") {
		var c []Request
		for range rapid.IntRange(1, 2).Draw(t, "requests") {
			e, err := Where(rapid.SampledFrom([]string{"", "", "attribute:x == 0", "attribute:x >= 1", "attribute:x in [0, 2]"}).Draw(t, "where"))
			if err != nil {
				t.Fatal(err)
			}
			c = append(c, Request{Kind: rapid.SampledFrom([]string{"gpu", "gpu", "tpu"}).Draw(t, "kind"), Count: rapid.IntRange(1, 2).Draw(t, "count"), Where: e})
		}
		claims = append(claims, c)
	}
	return devices, taken, claims
}

// possible tries every assignment.
func possible(devices []Device, free []int, claims [][]Request) bool {
	type want struct {
		claim   int
		request *Request
	}
	var units []want
	for i := range claims {
		for k := range claims[i] {
			for range claims[i][k].Count {
				units = append(units, want{i, &claims[i][k]})
			}
		}
	}
	has := make([]map[int]bool, len(claims))
	for i := range has {
		has[i] = map[int]bool{}
	}
	var try func(n int) bool
	try = func(n int) bool {
		if n == len(units) {
			return true
		}
		u := units[n]
		for d := range devices {
			if free[d] < 1 || has[u.claim][d] || !devices[d].Usable || !u.request.fits(&devices[d]) {
				continue
			}
			free[d]--
			has[u.claim][d] = true
			if try(n + 1) {
				return true
			}
			free[d]++
			delete(has[u.claim], d)
		}
		return false
	}
	return try(0)
}

// Whatever is asked for: what has room for all gets it, one that has not is
// refused, and no device has more containers than shares.
func TestAnAssignmentIsFoundWheneverThereIsOne(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		devices, taken, claims := drawn(t)
		p := NewPool(devices)
		p.Take(taken)
		var in [][]Request
		var added []int
		for i, c := range claims {
			free := slices.Clone(NewPool(devices).free)
			for _, r := range taken {
				n, _ := p.find(r)
				free[n]--
			}
			got, want := p.Add(c, nil), possible(devices, free, append(slices.Clone(in), c))
			if got != want {
				t.Fatalf("claim %d: added %v, by trying everything %v", i, got, want)
			}
			if got {
				in, added = append(in, c), append(added, i)
			}
			check(t, p, devices, taken, claims, added)
		}
	})
}

func check(t *rapid.T, p *Pool, devices []Device, taken []Ref, claims [][]Request, added []int) {
	has := map[Ref]int{}
	for _, r := range taken {
		has[r]++
	}
	for _, i := range added {
		given := p.Given(i)
		for k, r := range given {
			if has[r]++; k > 0 && given[k-1] == r {
				t.Fatalf("claim %d has %v twice", i, r)
			}
		}
		wanted, fits := 0, 0
		for _, r := range claims[i] {
			wanted += r.Count
		}
		for _, u := range p.claims[i].units {
			if slices.Contains(u.fits, u.at) {
				fits++
			}
		}
		if len(given) != wanted || fits != wanted {
			t.Fatalf("claim %d wants %d, has %v, of which %d fit", i, wanted, given, fits)
		}
	}
	for _, d := range devices {
		if has[d.Ref] > max(1, d.Shares) {
			t.Fatalf("device %v has %d containers, %d shares", d.Ref, has[d.Ref], d.Shares)
		}
	}
}

// One that waits takes from nobody, and keeps what it can use.
func TestWhatFitsIsReserved(t *testing.T) {
	p := NewPool([]Device{gpu("a", 1), gpu("b", 1)})
	p.AddWhatFits([]Request{want(t, "gpu", 3, "")})
	if len(p.Given(0)) != 2 || p.Add([]Request{want(t, "gpu", 1, "")}, nil) {
		t.Errorf("given: %v", p.Given(0))
	}
}
