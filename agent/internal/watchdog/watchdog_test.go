package watchdog

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// turn is a loop that answers until it is told to hang.
func turn(ctx context.Context, pulse <-chan struct{}, hang <-chan time.Duration) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-pulse:
		case d := <-hang:
			select {
			case <-ctx.Done():
				return
			case <-time.After(d):
			}
		}
	}
}

func TestStuckLoopIsNamed(t *testing.T) {
	for _, c := range []struct {
		name  string
		hangs time.Duration
		want  string
	}{
		{"never", 0, ""},
		{"less than its deadline", 110 * time.Second, ""},
		{"for ever", time.Hour, "tunnel has not turned for 2m0s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
				defer cancel()
				d := New(nil, 20*time.Second)
				good, _ := d.Watch("task loop", time.Minute)
				bad, _ := d.Watch("tunnel", 2*time.Minute)
				hang := make(chan time.Duration)
				go turn(ctx, good, nil)
				go turn(ctx, bad, hang)
				go func() {
					time.Sleep(5 * time.Minute)
					if c.hangs > 0 {
						hang <- c.hangs
					}
				}()
				fed := 0
				err := d.Run(ctx, func() { fed++ })
				switch {
				case c.want == "" && err != nil:
					t.Fatalf("after %d feeds: %v", fed, err)
				case c.want == "" && fed < 88:
					t.Errorf("fed %d times in 30 minutes", fed)
				case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "task loop")):
					t.Errorf("error %v, want %q and nothing of the other loop", err, c.want)
				}
			})
		})
	}
}

func TestLoopThatEndedIsNotMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		d := New(nil, 0)
		_, done := d.Watch("plugin", time.Minute)
		done()
		done() // twice does no harm
		if err := d.Run(ctx, func() {}); err != nil {
			t.Error(err)
		}
	})
}

func TestReach(t *testing.T) {
	for _, c := range []struct {
		name       string
		registered func(at time.Duration) bool
		answers    bool
		rebuilt    int
		ends       time.Duration // 0: it does not
	}{
		{"connected", func(time.Duration) bool { return true }, true, 0, 0},
		{"no network", func(time.Duration) bool { return false }, false, 18, 0},
		{"stuck", func(time.Duration) bool { return false }, true, 6, time.Hour},
		{"comes back at the first rebuilding", func(at time.Duration) bool { return at > 10*time.Minute }, true, 1, 0},
		{"comes back late", func(at time.Duration) bool { return at > 55*time.Minute }, true, 5, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Hour+time.Second)
				defer cancel()
				began := time.Now()
				rebuilt := 0
				err := Reach{
					Registered: func() bool { return c.registered(time.Since(began)) },
					Answers:    func(context.Context) bool { return c.answers },
					Rebuild:    func() { rebuilt++ },
				}.Run(ctx, nil)
				took := time.Since(began)
				if ended := err != nil; ended != (c.ends > 0) {
					t.Fatalf("after %s: %v", took, err)
				}
				if c.ends > 0 && (took < c.ends || took > c.ends+2*time.Minute) {
					t.Errorf("ended after %s, want %s", took, c.ends)
				}
				if rebuilt != c.rebuilt {
					t.Errorf("rebuilt %d times, want %d", rebuilt, c.rebuilt)
				}
			})
		})
	}
}

// The network came back 5 minutes ago: the tunnel gets its hour from then on.
func TestReachCountsFromTheFirstAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		err := Reach{
			Registered: func() bool { return false },
			Answers:    func(context.Context) bool { return time.Since(began) > 24*time.Hour },
			Rebuild:    func() {},
		}.Run(t.Context(), nil)
		if took := time.Since(began); err == nil || took < 24*time.Hour+49*time.Minute || took > 25*time.Hour+10*time.Minute {
			t.Errorf("ended after %s: %v", took, err)
		}
	})
}

// A loop that waits in calls is looked at only while it has something to do.
func TestMindedLoop(t *testing.T) {
	for _, c := range []struct {
		name  string
		lives func(busy func(bool))
		want  string
	}{
		{"waits for ever", func(busy func(bool)) { busy(true); busy(false) }, ""},
		{"was never busy", func(func(bool)) {}, ""},
		{"works for less than its deadline", func(busy func(bool)) {
			for range 10 {
				busy(true)
				time.Sleep(50 * time.Second)
				busy(false)
				time.Sleep(time.Millisecond)
			}
		}, ""},
		{"has one thing to do after the other", func(busy func(bool)) {
			for range 60 {
				busy(true)
				time.Sleep(25 * time.Second)
			}
			busy(false)
		}, ""},
		{"never ends what it does", func(busy func(bool)) { time.Sleep(10 * time.Minute); busy(true) }, "reader has not turned for 1m0s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
				defer cancel()
				d := New(nil, 20*time.Second)
				busy, done := d.Mind("reader", time.Minute)
				defer done()
				go c.lives(busy)
				began := time.Now()
				err := d.Run(ctx, func() {})
				switch took := time.Since(began); {
				case c.want == "" && err != nil:
					t.Fatalf("after %s: %v", took, err)
				case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
					t.Errorf("error %v, want %q", err, c.want)
				case c.want != "" && took > 12*time.Minute:
					t.Errorf("seen after %s", took)
				}
			})
		})
	}
}
