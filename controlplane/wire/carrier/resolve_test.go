package carrier

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

var byText = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestFamiliesTakeTurns(t *testing.T) {
	got := alternate(addrs("2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1", "::ffff:192.0.2.2"))
	if diff := cmp.Diff(addrs("2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "2001:db8::3"), got, byText); diff != "" {
		t.Error(diff)
	}
}

func TestNamesAreKnownWithoutDNS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := addrs("192.0.2.1")
		var told []map[string][]netip.Addr
		r := NewResolver(map[string][]netip.Addr{"old.example": addrs("192.0.2.9")}, func(k map[string][]netip.Addr) { told = append(told, k) })
		var asked atomic.Int32
		answer := func(context.Context) ([]netip.Addr, error) { return good, nil }
		r.lookup = func(ctx context.Context, _ string) ([]netip.Addr, error) {
			asked.Add(1)
			return answer(ctx)
		}
		look := func(host string, want []netip.Addr, within time.Duration) {
			t.Helper()
			began := time.Now()
			got, err := r.Lookup(t.Context(), host)
			if diff := cmp.Diff(want, got, byText); diff != "" || err != nil != (want == nil) {
				t.Errorf("%s: %v, %s", host, err, diff)
			}
			if took := time.Since(began); took > within {
				t.Errorf("%s took %s", host, took)
			}
		}
		look("192.0.2.7", addrs("192.0.2.7"), 0)
		look("control.example", good, 0)
		synctest.Wait()
		if len(told) != 1 || len(told[0]) != 2 {
			t.Errorf("told %v", told)
		}
		answer = func(context.Context) ([]netip.Addr, error) { return nil, errors.New("server misbehaving") }
		look("control.example", good, 0)
		look("old.example", addrs("192.0.2.9"), 0)
		look("new.example", nil, 0)
		// A name server that says nothing costs a moment, not the dial.
		answer = func(ctx context.Context) ([]netip.Addr, error) { <-ctx.Done(); return nil, ctx.Err() }
		n := asked.Load()
		look("control.example", good, lookupPatience)
		look("control.example", good, lookupPatience)
		if got := asked.Load() - n; got != 1 {
			t.Errorf("asked %d times at once", got)
		}
		look("new.example", nil, lookupTimeout)
		<-time.After(lookupTimeout)
		// The same addresses in another order are no news, others are.
		good = addrs("192.0.2.2", "192.0.2.1")
		answer = func(context.Context) ([]netip.Addr, error) { return good, nil }
		look("control.example", good, 0)
		good = addrs("192.0.2.1", "192.0.2.2")
		look("control.example", good, 0)
		synctest.Wait()
		if len(told) != 2 {
			t.Errorf("told %d times, want 2", len(told))
		}
	})
}

func TestRaceOfAddresses(t *testing.T) {
	type outcome struct {
		after time.Duration
		err   error
	}
	fail := errors.New("refused")
	tests := []struct {
		name  string
		tries []outcome
		want  int // index; -1: none
		after time.Duration
	}{
		{"the first answers", []outcome{{100 * time.Millisecond, nil}, {0, nil}}, 0, 100 * time.Millisecond},
		{"the first is silent", []outcome{{time.Hour, nil}, {10 * time.Millisecond, nil}}, 1, 260 * time.Millisecond},
		{"the first is refused", []outcome{{5 * time.Millisecond, fail}, {10 * time.Millisecond, nil}}, 1, 15 * time.Millisecond},
		{"the second overtakes", []outcome{{400 * time.Millisecond, nil}, {time.Millisecond, nil}}, 1, 251 * time.Millisecond},
		{"one is silent, one busy", []outcome{{time.Hour, nil}, {10 * time.Millisecond, &BusyError{time.Second}}, {0, nil}}, -1, 260 * time.Millisecond},
		{"all are refused", []outcome{{0, fail}, {0, fail}, {0, fail}}, -1, 0},
	}
	for _, tt := range tests {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			var open atomic.Int32
			got, err := race(t.Context(), len(tt.tries), func(ctx context.Context, i int) (int, error) {
				// One that succeeds though it was cancelled, as a dial may.
				select {
				case <-time.After(tt.tries[i].after):
				case <-ctx.Done():
				}
				if tt.tries[i].err != nil {
					return 0, tt.tries[i].err
				}
				open.Add(1)
				return i, nil
			}, func(int) { open.Add(-1) })
			took := time.Since(began)
			synctest.Wait()
			want := int32(1)
			if tt.want < 0 {
				want = 0
			}
			if err != nil != (tt.want < 0) || err == nil && got != tt.want || took != tt.after || open.Load() != want {
				t.Errorf("%s: %d, %v after %s with %d left open; want %d after %s", tt.name, got, err, took, open.Load(), tt.want, tt.after)
			}
		})
	}
}
