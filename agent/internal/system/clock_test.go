package system

import (
	"math"
	"testing"
	"time"
)

func newClock(t *testing.T) *Clock {
	t.Helper()
	c, err := NewClock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestClockFiresInOrderAndNotEarly(t *testing.T) {
	c := newClock(t)
	start := c.Now()
	late, soon, now := c.After(120*time.Millisecond), c.After(30*time.Millisecond), c.After(-time.Second)
	wait := func(name string, ch <-chan time.Time, least time.Duration) {
		t.Helper()
		select {
		case <-ch:
		case <-time.After(5 * time.Second):
			t.Fatalf("%s never fired", name)
		}
		if got := c.Now() - start; got < least {
			t.Errorf("%s fired after %v, want at least %v", name, got, least)
		}
	}
	wait("now", now, 0)
	wait("soon", soon, 30*time.Millisecond)
	select {
	case <-late:
		if c.Now()-start < 120*time.Millisecond {
			t.Error("late fired with soon")
		}
	default:
		wait("late", late, 120*time.Millisecond)
	}
}

func TestClockTells(t *testing.T) {
	c := newClock(t)
	w := c.When()
	if w.BootId == "" || w.BootId != c.BootID() || w.BoottimeNs <= 0 || w.WallUnixNs <= 0 {
		t.Errorf("incomplete: %v", w)
	}
	if a, b := c.Now(), c.Now(); b < a {
		t.Errorf("went back from %v to %v", a, b)
	}
}

// The end of time is not the past, and a device that has not slept was awake.
func TestClockForEver(t *testing.T) {
	c := newClock(t)
	for _, d := range []time.Duration{math.MaxInt64, math.MaxInt64 - time.Minute} {
		select {
		case <-c.After(d):
			t.Errorf("fired after no time at all instead of %v", d)
		case <-c.After(20 * time.Millisecond):
		}
	}
	before, awake, now := c.Now(), c.Awake(), c.Now()
	if awake <= 0 || awake > now {
		t.Errorf("awake for %v of %v to %v", awake, before, now)
	}
}

// A closed clock must neither panic nor hang those who still ask it.
func TestClockAfterClose(t *testing.T) {
	c, err := NewClock()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.After(time.Hour)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.After(0):
		t.Error("a closed clock fired")
	default:
	}
}
