package hub

import (
	"log/slog"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// A whole fleet comes back in the same second; each device does what it is
// told, with some jitter of its own.
func TestShedDevicesComeBackInNoWaves(t *testing.T) {
	const fleet, rate = 10_000, 1000
	now := time.Unix(0, 0)
	rng := rand.New(rand.NewPCG(1, 2))
	g := newGate(rate, slog.New(slog.DiscardHandler))
	g.now, g.uniform, g.at = func() time.Time { return now }, rng.Float64, now
	var due []time.Duration // when somebody comes, a heap would be quicker
	for range fleet {
		due = append(due, time.Duration(rng.Float64()*float64(time.Second)))
	}
	slices.Sort(due)
	perSecond := map[int]int{} // registered
	tries, sent, last := 0, 0, time.Duration(0)
	for len(due) > 0 {
		at := due[0]
		due = due[1:]
		now = time.Unix(0, 0).Add(at)
		tries++
		f := g.enter()
		if f == nil {
			perSecond[int(at/time.Second)]++
			last = at
			continue
		}
		sent++
		if f.Code != wire.CodeOverloaded || f.RetryAfterMs == 0 || f.RetryAfterMs > uint32(longestHint.Milliseconds()) {
			t.Fatalf("sent away with %v", f)
		}
		back := at + time.Duration(f.RetryAfterMs)*time.Millisecond + time.Duration(rng.Float64()*100)*time.Millisecond
		i, _ := slices.BinarySearch(due, back)
		due = slices.Insert(due, i, back)
	}
	t.Logf("all back after %s, %d tries, %d sent away", last, tries, sent)
	if last > 14*time.Second {
		t.Errorf("the last was in after %s, want about 10 s at this rate", last)
	}
	if tries > fleet*5/2 {
		t.Errorf("%d tries of %d devices: they are sent away again and again", tries, fleet)
	}
	for second, n := range perSecond {
		if n > rate*21/10 { // the first second has the bucket, too
			t.Errorf("%d registered in second %d", n, second)
		}
	}
	// Nobody idles while devices wait: no second of the row is half empty.
	for s := range 9 {
		if perSecond[s] < rate/2 {
			t.Errorf("only %d registered in second %d: %v", perSecond[s], s, perSecond)
		}
	}
}

func TestHintsOfALongRowStayWithinAMinute(t *testing.T) {
	now := time.Unix(0, 0)
	g := newGate(1, slog.New(slog.DiscardHandler))
	g.now, g.at = func() time.Time { return now }, now
	if f := g.enter(); f != nil {
		t.Fatalf("the first is sent away: %v", f)
	}
	spread := map[uint32]int{}
	for range 1000 {
		f := g.enter()
		if f == nil || f.RetryAfterMs > 60_000 {
			t.Fatalf("answer %v", f)
		}
		spread[f.RetryAfterMs/10_000]++
	}
	for tens := range uint32(3) {
		if spread[3+tens] < 200 {
			t.Errorf("hints beyond the row are not spread: %v", spread)
		}
	}
	now = now.Add(2 * time.Minute)
	if f := g.enter(); f != nil {
		t.Errorf("sent away though the row has passed: %v", f)
	}
	if f := g.enter(); f.GetRetryAfterMs() > 3000 {
		t.Errorf("a row that has passed still counts: %v", f)
	}
}
