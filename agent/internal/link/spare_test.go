package link

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// TestWhatAnswersIsWaitedFor: a thousand devices that each begin anew every
// second keep a control plane from ever finishing with one.
func TestWhatAnswersIsWaitedFor(t *testing.T) {
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		<-time.After(100 * time.Millisecond)
		wordsOf(ctx).answered()
		return at(transport, 4*time.Second, 0)(ctx, w)
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(10 * time.Second)
		if s := w.l.Status(); s.State != StateConnected {
			t.Errorf("after 10 s it is %+v", s)
		}
		// TCP has its turn, and is not repeated either.
		if d := w.told(&w.dials); len(d) > 2 {
			t.Errorf("dialled %d times: %v", len(d), d)
		}
	})
}

// TestAnswersThatLeadNowhereAreNotWaitedForForEver: the link is cut in the
// middle of a handshake.
func TestAnswersThatLeadNowhereAreNotWaitedForForEver(t *testing.T) {
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		if time.Since(w.began) < time.Second {
			wordsOf(ctx).answered()
			return silent(ctx)
		}
		return comesBack(transport, 30*time.Second, 0, 200, 600, 1400)(ctx, w)
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(31 * time.Second)
		if s := w.l.Status(); s.State != StateConnected {
			t.Errorf("a second after the link's return: %+v", s)
		}
	})
}

// TestAnswersPileUpNowhere: a control plane that was stopped in the middle
// leaves it to its kernel to answer.
func TestAnswersPileUpNowhere(t *testing.T) {
	var now, most atomic.Int64
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		if transport == wire.TransportTCP {
			wordsOf(ctx).answered()
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			defer now.Add(-1)
		}
		if time.Since(w.began) > 5*time.Minute {
			return w.open(transport, 0), nil
		}
		return silent(ctx)
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(6 * time.Minute)
		if s := w.l.Status(); s.State != StateConnected {
			t.Errorf("a minute after it went on: %+v", s)
		}
		if n := most.Load(); n > mostAnswered {
			t.Errorf("%d connections at a time", n)
		}
	})
}

// TestBusy: a control plane that is too busy for QUIC is not asked over TCP as
// well, unless it is for long, and is asked ever more rarely.
func TestBusy(t *testing.T) {
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		if transport == wire.TransportTCP {
			return w.open(transport, 0), nil
		}
		return nil, fmt.Errorf("%w: %w", carrier.ErrUnreachable, carrier.ErrBusy)
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(busyPatience - time.Second)
		dials := w.told(&w.dials)
		for _, d := range dials {
			if strings.Contains(d, wire.TransportTCP) {
				t.Errorf("asked over TCP, too: %s", d)
			}
		}
		if n := len(dials); n < 4 || n > 20 {
			t.Errorf("asked %d times: %v", n, dials)
		}
		<-time.After(busyCap + time.Second)
		if s := w.l.Status(); s.State != StateConnected || s.Transport != wire.TransportTCP {
			t.Errorf("busy for long: %+v", s)
		}
	})
}

// TestKnocks: what has never been reached is tried outright first, and every so
// often again; all else asks before.
func TestKnocks(t *testing.T) {
	var outrights, knocks atomic.Int64
	var lastOutright atomic.Int64
	var back atomic.Bool
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		if back.Load() {
			return w.open(transport, 0), nil
		}
		switch {
		case transport == wire.TransportTCP:
			if wordsOf(ctx).let != nil {
				t.Error("TCP is to knock")
			}
		case wordsOf(ctx).let != nil:
			knocks.Add(1)
		default:
			outrights.Add(1)
			lastOutright.Store(int64(time.Since(w.began)))
		}
		return silent(ctx)
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(500 * time.Millisecond)
		if outrights.Load() != 1 || knocks.Load() != 0 {
			t.Errorf("begins with %d outright and %d knocks", outrights.Load(), knocks.Load())
		}
		<-time.After(time.Hour)
		if o, k := outrights.Load(), knocks.Load(); o < k/40 || o > k/20 || o < 8 {
			t.Errorf("%d outright and %d knocks in an hour", o, k)
		}
		if since := time.Since(w.began) - time.Duration(lastOutright.Load()); since > 8*time.Minute {
			t.Errorf("not tried outright for %s", since)
		}
		back.Store(true)
		<-time.After(longCap + time.Second)
		if s := w.l.Status(); s.State != StateConnected {
			t.Fatalf("it is %+v", s)
		}
		back.Store(false)
		before := outrights.Load()
		w.mu.Lock()
		last := w.conns[len(w.conns)-1]
		w.mu.Unlock()
		last.Close("", "")
		<-time.After(5 * time.Second)
		if o := outrights.Load(); o != before {
			t.Errorf("after the end of a session tried outright %d times", o-before)
		}
	})
}

// TestBusyAfterLong: how long a control plane was away before it was busy does
// not matter, and when it said to ask again is not obeyed once it is silent.
func TestBusyAfterLong(t *testing.T) {
	const away, busy = 5 * time.Minute, 30 * time.Second
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		since := time.Since(w.began)
		switch {
		case since < away:
			return silent(ctx)
		case since >= away+2*busy:
			return w.open(transport, 0), nil
		case since >= away+busy:
			return silent(ctx)
		case transport == wire.TransportTCP:
			t.Errorf("asked over TCP %s after it was back", since-away)
			return silent(ctx)
		}
		return nil, fmt.Errorf("%w: %w", carrier.ErrUnreachable, &carrier.BusyError{Again: 14 * time.Second})
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(away + 2*busy)
		from := len(w.told(&w.dials))
		<-time.After(longCap + time.Second)
		if s := w.l.Status(); s.State != StateConnected {
			t.Errorf("it is %+v", s)
		}
		var last time.Duration
		for _, d := range w.told(&w.dials)[:from] {
			var took string
			_, _ = fmt.Sscan(d, &took)
			last, _ = time.ParseDuration(took)
		}
		if gap := away + 2*busy - last; gap > longCap {
			t.Errorf("not tried for %s while it was silent", gap)
		}
	})
}

// TestKnocksUnknownToAControlPlane: one that answered knocks was replaced by one
// that does not know them, or the device has moved to a network that lets none
// through.
func TestKnocksUnknownToAControlPlane(t *testing.T) {
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		switch {
		case time.Since(w.began) < 10*time.Second:
			return nil, fmt.Errorf("%w: %w", carrier.ErrUnreachable, &carrier.BusyError{Again: time.Second})
		case wordsOf(ctx).let != nil:
			return silent(ctx)
		}
		return w.open(transport, 0), nil
	}
	inWorld(t, func(c *Config) { c.Transport = wire.TransportQUIC }, dial, func(t *testing.T, w *world) {
		<-time.After(time.Minute)
		if s := w.l.Status(); s.State != StateConnected {
			t.Errorf("after a minute it is %+v", s)
		}
	})
}

// TestBusyIsAskedWhenItSays: a control plane that answers knocks is asked at
// the times it names, and over TCP only after long.
func TestBusyIsAskedWhenItSays(t *testing.T) {
	const again = 3 * time.Second
	var knocks atomic.Int64
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		let := wordsOf(ctx).let
		switch {
		case transport == wire.TransportTCP:
			if since := time.Since(w.began); since < busyPatience {
				t.Errorf("asked over TCP after %s", since)
			}
			return w.open(transport, 0), nil
		case let == nil:
			return nil, fmt.Errorf("%w: %w", carrier.ErrUnreachable, carrier.ErrBusy)
		}
		knocks.Add(1)
		return nil, fmt.Errorf("%w: %w", carrier.ErrUnreachable, &carrier.BusyError{Again: again})
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(busyPatience - time.Second)
		if n, want := knocks.Load(), int64(busyPatience/again); n < want-2 || n > want {
			t.Errorf("%d knocks in %s, want one each %s", n, busyPatience, again)
		}
		<-time.After(2 * again)
		if s := w.l.Status(); s.State != StateConnected || s.Transport != wire.TransportTCP {
			t.Errorf("busy for long: %+v", s)
		}
	})
}

// TestLetInAndSilent: what lets in by small datagrams may swallow large ones.
func TestLetInAndSilent(t *testing.T) {
	dial := func(ctx context.Context, w *world, transport, _ string) (wire.Session, error) {
		if transport == wire.TransportTCP {
			if time.Since(w.began) < 10*time.Second {
				return silent(ctx)
			}
			return w.open(transport, 0), nil
		}
		if let := wordsOf(ctx).let; let != nil {
			<-time.After(50 * time.Millisecond)
			let()
		}
		return silent(ctx)
	}
	inWorld(t, nil, dial, func(t *testing.T, w *world) {
		<-time.After(15 * time.Second)
		if s := w.l.Status(); s.State != StateConnected || s.Transport != wire.TransportTCP {
			t.Errorf("it is %+v", s)
		}
	})
}
