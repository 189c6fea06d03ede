package link

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

const (
	// probeFirst and probeMost are the times between two tries of QUIC beside a
	// session over TCP.
	probeFirst = time.Minute
	probeMost  = 30 * time.Minute
	// resumeCheck is how often the clocks are compared, and slept how far they
	// may be apart: more is a suspend, in which the timers of sessions stood.
	resumeCheck = 10 * time.Second
	slept       = 2 * time.Second
	// registering is how long a session may be waited for that seems to have
	// registered: the one before was told that it was replaced.
	registering = 2 * time.Second
)

// errRebuild ends a session on Rebuild.
var errRebuild = errors.New("the transport is built anew")

// keeper keeps the link up. Its loop owns the session in use, the search for
// another, and when each is due.
type keeper struct {
	l    *Link
	back *backoff
	said complaints

	cur    *session
	since  time.Time    // cur registered
	ended  chan outcome // of sessions, whether in use or not
	search *search      // nil: none
	gone   error        // cur has ended, but the one that replaced it registers just now
	grace  *time.Timer  // for that
	probes *time.Timer
	next   time.Duration // between two probes
	all    sync.WaitGroup
}

type outcome struct {
	s   *session
	err error
}

// Run keeps a session up until ctx ends; then it returns nil. It never gives
// up: what it cannot reach or what refuses it is tried again.
func (l *Link) Run(ctx context.Context) error {
	if l.down == nil {
		return errors.New("link: Attach was not called")
	}
	k := &keeper{
		l: l, back: newBackoff(time.Now(), l.cfg.rand), ended: make(chan outcome),
		probes: time.NewTimer(time.Hour), grace: time.NewTimer(time.Hour), next: l.cfg.ProbeFirst,
	}
	k.probes.Stop()
	k.grace.Stop()
	ctx, cancel := context.WithCancel(ctx)
	k.all.Go(func() { l.watchSuspend(ctx) })
	k.run(ctx)
	cancel()
	if k.search != nil {
		k.search.cancel()
		k.search.work.Wait()
		select {
		case s := <-k.search.won: // registered in the last moment
			s.conn.Close("", "")
		default:
		}
	}
	go func() { // sessions that end with ctx
		for range k.ended {
		}
	}()
	k.all.Wait()
	close(k.ended)
	l.setStatus(func(s *Status) {
		s.State, s.Transport, s.Address, s.Proxy, s.NextTry = StateWaiting, "", "", "", time.Time{}
	})
	return nil
}

// Deadlines of the loops. The keeper waits for the parts of a search to end, once
// they were told to, and for a session's reports. A session hands assignments
// to a task loop that may take two minutes, which its end waits for, too, and
// writes a frame for at most writeTimeout.
const (
	keeperDeadline  = 2 * time.Minute
	clockDeadline   = 2 * time.Minute
	assignDeadline  = 3 * time.Minute
	sessionDeadline = time.Minute
)

func (l *Link) watch(name string, deadline time.Duration) (pulse <-chan struct{}, done func()) {
	if l.cfg.Watch == nil {
		return nil, func() {}
	}
	return l.cfg.Watch(name, deadline)
}

func (l *Link) mind(name string, deadline time.Duration) (busy func(bool), done func()) {
	if l.cfg.Mind == nil {
		return func(bool) {}, func() {}
	}
	return l.cfg.Mind(name, deadline)
}

func (k *keeper) run(ctx context.Context) {
	pulse, unwatch := k.l.watch("tunnel", keeperDeadline)
	defer unwatch()
	k.seek(ctx, nil)
	for ctx.Err() == nil {
		var won <-chan *session
		var failed <-chan error
		var doubts <-chan doubt
		if k.search != nil {
			won, failed = k.search.won, k.search.failed
		}
		if k.cur != nil {
			doubts = k.cur.doubts
		}
		select {
		case <-ctx.Done():
		case <-pulse:
		case s := <-won:
			k.take(ctx, s)
		case err := <-failed:
			k.probed(ctx, err)
		case o := <-k.ended:
			switch {
			case o.s != k.cur:
			case wire.CodeOf(o.err) == wire.CodeReplaced && k.search != nil && k.search.registering():
				// The Goodbye was quicker than the Welcome.
				k.gone = o.err
				k.grace.Reset(registering)
			default:
				k.lose(ctx, o.err)
			}
		case <-k.grace.C:
			if k.gone != nil {
				k.lose(ctx, k.gone)
			}
		case level := <-doubts:
			k.doubt(ctx, level)
		case <-k.probes.C:
			k.probe(ctx)
		case why := <-k.l.changed:
			k.networkChanged(why)
		case <-k.l.rebuild:
			k.rebuild(ctx)
		}
	}
	if k.cur != nil {
		<-k.cur.stopped
		k.l.down.Connected(false)
	}
}

// seek looks for a session where there is none.
func (k *keeper) seek(ctx context.Context, after error) {
	k.search = k.l.seek(ctx, k.back, &k.said, seeking, after)
	k.search.allow()
}

// take puts a session that has registered in the place of the one in use, if
// there is one: make before break. At the control plane it has its place
// already; here the old one ends its reports and assignments before the new
// one begins, and finishes what it was asked beside it.
func (k *keeper) take(ctx context.Context, s *session) {
	k.search.work.Wait()
	k.search = nil
	old := k.cur
	if old != nil {
		old.retire()
		k.l.log.Info("the link moves to another way", "from", old.conn.Transport(), "to", s.conn.Transport())
		k.unlearn(old)
	} else {
		k.l.down.Connected(true)
	}
	k.gone = nil
	s.begin(ctx)
	k.cur, k.since = s, time.Now()
	k.said = complaints{}
	k.l.registered(s)
	k.all.Go(func() {
		err := s.serve(&k.all)
		k.ended <- outcome{s, err}
	})
	k.plan()
}

// unlearn forgets what was learned of QUIC when it has worked for long.
func (k *keeper) unlearn(s *session) {
	if s.conn.Transport() == wire.TransportQUIC && time.Since(k.since) > k.l.cfg.ProbeMost {
		k.next = k.l.cfg.ProbeFirst
	}
}

// lose is called when the session in use has ended.
func (k *keeper) lose(ctx context.Context, err error) {
	k.unlearn(k.cur)
	k.cur, k.gone = nil, nil
	k.probes.Stop()
	k.l.down.Connected(false)
	k.l.setStatus(func(s *Status) {
		s.State, s.Transport, s.Address, s.Proxy, s.LastError = StateConnecting, "", "", "", err.Error()
	})
	switch {
	case k.search == nil, k.search.probe && k.search.stop():
		k.back.reset(time.Now(), time.Since(k.since))
		k.said = complaints{}
		k.seek(ctx, err)
	default:
		// It is being looked for already, or registered a moment ago.
		k.search.allow()
	}
}

// doubt is what the session in use tells of itself.
func (k *keeper) doubt(ctx context.Context, level doubt) {
	k.l.log.Debug("whether the control plane is still reached", "doubt", level)
	if level == calm {
		if k.search != nil && !k.search.probe && k.search.stop() {
			k.search = nil
			k.plan()
		}
		return
	}
	if k.search != nil && k.search.probe {
		if !k.search.stop() {
			return // it registers
		}
		k.search = nil
	}
	if k.search == nil {
		k.back.reset(time.Now(), time.Since(k.since))
		k.said = complaints{}
		k.search = k.l.seek(ctx, k.back, &k.said, doubtful, nil)
	}
	if level == alarmed {
		k.search.allow()
	}
}

// plan sets when QUIC is tried next.
func (k *keeper) plan() {
	k.probes.Stop()
	if k.cur == nil || k.cur.conn.Transport() != wire.TransportTCP || k.l.cfg.Transport != TransportAuto {
		return
	}
	k.probes.Reset(k.jitter(k.next))
	k.next = min(2*k.next, k.l.cfg.ProbeMost)
}

// jitter is between half of d and d.
func (k *keeper) jitter(d time.Duration) time.Duration {
	return d/2 + time.Duration(k.back.uniform()*float64(d/2))
}

// probe tries QUIC while TCP works.
func (k *keeper) probe(ctx context.Context) {
	if k.cur == nil || k.search != nil {
		return
	}
	k.search = k.l.seek(ctx, k.back, &k.said, probing, nil)
	k.search.allow()
}

// probed is called when QUIC did not register, or was refused.
func (k *keeper) probed(ctx context.Context, err error) {
	k.search.cancel()
	k.search.work.Wait()
	k.search = nil
	k.l.log.Debug("still over TCP: QUIC was tried", "err", err)
	if k.cur == nil { // lost meanwhile
		k.back.reset(time.Now(), time.Since(k.since))
		k.seek(ctx, err)
		return
	}
	k.plan()
	var refusal *wire.Error
	if errors.As(err, &refusal) && refusal.RetryAfter > 0 && k.next > 0 {
		k.probes.Reset(max(k.jitter(k.next), min(refusal.RetryAfter, refusalCap)))
	}
}

// networkChanged is called when addresses or routes did, and after a suspend.
// A session may have outlived it: QUIC's socket belongs to no address.
func (k *keeper) networkChanged(why string) {
	k.l.log.Debug("the network may be another", "why", why)
	k.l.forgive()
	k.next = k.l.cfg.ProbeFirst
	if k.cur != nil {
		k.cur.check()
		k.plan()
	}
	if k.search != nil {
		k.search.kick()
	}
}

// rebuild begins as Run does.
func (k *keeper) rebuild(ctx context.Context) {
	k.l.log.Warn("the transport is built anew")
	if k.search != nil {
		k.search.cancel()
		k.search.work.Wait()
		select {
		case s := <-k.search.won:
			s.conn.Close("", "")
		default:
		}
		k.search = nil
	}
	k.l.forgetWays()
	k.next = k.l.cfg.ProbeFirst
	k.back = newBackoff(time.Now(), k.l.cfg.rand)
	k.said = complaints{}
	if k.cur != nil {
		k.cur.cancel(errRebuild)
		return // lose goes on
	}
	k.seek(ctx, nil)
}

// watchSuspend notices that the device was suspended.
func (l *Link) watchSuspend(ctx context.Context) {
	c := l.cfg.Clock
	if c == nil {
		return
	}
	// It waits by the device's clock alone, so that a clock whose timers fire no
	// more is stuck with it.
	busy, unwatch := l.mind("clock", clockDeadline)
	defer unwatch()
	for {
		busy(true)
		boot, begun := c.Now(), time.Now()
		select {
		case <-ctx.Done():
			return
		case <-c.After(resumeCheck):
		}
		if c.Now()-boot-time.Since(begun) > slept {
			l.NetworkChanged("the device was suspended")
		}
	}
}

// NetworkChanged makes the link doubt what it has and try at once what it has
// not. It does not block.
func (l *Link) NetworkChanged(why string) {
	select {
	case l.changed <- why:
	default: // one waits
	}
}

// Rebuild makes the link begin again as at its start: the session and every try
// end, and with them their sockets; what was learned of addresses and
// transports is forgotten. For a watchdog: a working session is cut, too. It
// does not block.
func (l *Link) Rebuild() {
	select {
	case l.rebuild <- struct{}{}:
	default:
	}
}

// candidates are the addresses of wave n, the preferred one first: all of them
// where they are few, else the others by turns.
func (l *Link) candidates(n int) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.addresses) <= raceWidth {
		return slices.Clone(l.addresses)
	}
	out := []string{l.addresses[0]}
	rest := l.addresses[1:]
	for i := range raceWidth - 1 {
		out = append(out, rest[(n*(raceWidth-1)+i)%len(rest)])
	}
	return out
}

// registered notes what worked.
func (l *Link) registered(s *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ordered := []string{s.address}
	for _, a := range l.addresses {
		if a != s.address {
			ordered = append(ordered, a)
		}
	}
	l.addresses = ordered
	l.noQUIC = l.cfg.Transport == TransportAuto && s.conn.Transport() == wire.TransportTCP
}

// quicFailed tells whether TCP was needed last.
func (l *Link) quicFailed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.noQUIC
}

// forgive forgets that QUIC failed.
func (l *Link) forgive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.noQUIC = false
}

// forgetWays forgets all that was learned on the way.
func (l *Link) forgetWays() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.noQUIC = false
	l.addresses = append(slices.Clone(l.addresses[1:]), l.addresses[0])
	l.resolver = carrier.NewResolver(l.resolver.Known(), l.cfg.Resolved)
}
