package faults

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Report is what a campaign has drawn, checked and found.
type Report struct {
	Seed       uint64
	Runs       int
	Hit        map[card]int
	Missed     map[card]int
	Checks     map[string]int
	Violations []string
	Kept       []string // directories with the logs of violations

	agreed, settled []time.Duration
	took            time.Duration
}

func newReport(seed uint64) *Report {
	return &Report{Seed: seed, Hit: map[card]int{}, Missed: map[card]int{}, Checks: map[string]int{}}
}

func (r *Report) run(_ int, took, agreed time.Duration) {
	r.Runs++
	r.took += took
	if agreed > 0 {
		r.agreed = append(r.agreed, agreed)
	}
}

// faults counts those that were brought about.
func (r *Report) faults() (n int) {
	for _, hits := range r.Hit {
		n += hits
	}
	return n
}

func (r *Report) add(o *observer, dir string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for what, n := range o.checks {
		r.Checks[what] += n
	}
	if len(o.broken) > 0 {
		r.Violations = append(r.Violations, o.broken...)
		r.Kept = append(r.Kept, dir)
	}
}

// String is the report for people.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d runs of seed %d in %s\n\nfaults by kind and phase:\n%-24s", r.Runs, r.Seed, r.took.Round(time.Second), "")
	for _, p := range phases {
		fmt.Fprintf(&b, "%9s", p)
	}
	total, least := 0, -1
	for k := range kinds {
		fmt.Fprintf(&b, "\n%-24s", kinds[k].name)
		for _, p := range phases {
			n := r.Hit[card{k, p}]
			total += n
			if least < 0 || n < least {
				least = n
			}
			fmt.Fprintf(&b, "%9d", n)
		}
	}
	missed := 0
	for _, n := range r.Missed {
		missed += n
	}
	fmt.Fprintf(&b, "\n%d faults, at least %d of each pair; %d phases were not reached\n\nchecks made:\n", total, least, missed)
	for _, what := range slices.Sorted(maps.Keys(r.Checks)) {
		fmt.Fprintf(&b, "%9d  %s\n", r.Checks[what], what)
	}
	b.WriteString("\nafter the last fault was healed:")
	for _, d := range []struct {
		what string
		took []time.Duration
	}{{"API and device agree", r.agreed}, {"every task is as it should be", r.settled}} {
		slices.Sort(d.took)
		if n := len(d.took); n > 0 {
			at := func(p float64) time.Duration { return d.took[min(n-1, int(p*float64(n)))].Round(time.Millisecond) }
			fmt.Fprintf(&b, "\n  %-30s p50 %s, p99 %s, most %s", d.what, at(0.5), at(0.99), at(1))
		}
	}
	fmt.Fprintf(&b, "\n\n%d violations\n", len(r.Violations))
	for _, v := range r.Violations {
		fmt.Fprintf(&b, "  %s\n", v)
	}
	for _, k := range r.Kept {
		fmt.Fprintf(&b, "kept for a look: %s\n", k)
	}
	return b.String()
}
