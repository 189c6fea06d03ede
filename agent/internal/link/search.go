package link

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

const (
	// quicHeadStart is how long QUIC may take to register before TCP is tried
	// beside it, and shortHeadStart the same once QUIC has failed on this network
	// or a session is in doubt.
	quicHeadStart  = 2 * time.Second
	shortHeadStart = 300 * time.Millisecond
	// addressStagger is between the tries of two addresses.
	addressStagger = 250 * time.Millisecond
	// raceWidth is how many addresses one wave tries: the preferred one, and
	// the others by turns.
	raceWidth = 4
	// wavePatience is how long a wave has before another may be started beside
	// it: packets that were lost are repeated ever more rarely, and what comes
	// back after a cut is met by new ones.
	wavePatience = time.Second
	// answerPatience is how long a wave is waited for in which something has
	// answered: the link is there, and who is slow, over there or here, is made
	// no quicker by more of the same work.
	answerPatience = 5 * time.Second
	// dialTimeout bounds one try. While one of a way has so long, others of the
	// same way get freshTimeout: they are there for the link's return, it is
	// there for a slow link.
	dialTimeout  = 15 * time.Second
	freshTimeout = 2500 * time.Millisecond
	// answeredTimeout bounds a try that was answered: it waits for its turn
	// among as many as there are, and would be the last again if it began anew.
	answeredTimeout = time.Minute
	// probeTimeout is for trying QUIC beside a session over TCP.
	probeTimeout = 3 * time.Second
	// registerTimeout bounds the answer to Hello, registerPatience too when
	// another way waits to say it.
	registerTimeout  = 15 * time.Second
	registerPatience = 5 * time.Second
)

// way is one way to a control plane.
type way struct{ transport, address string }

// kind is why a search is made.
type kind int

const (
	seeking  kind = iota // there is no session
	doubtful             // there is one, in doubt: registering has to be allowed
	probing              // there is one over TCP
)

// search looks for a session until one has registered. Tries go on side by
// side in waves; what answers registers one at a time, and the first that is
// registered ends the search: of two registrations the later would take the
// place of the earlier. A search is not used again.
type search struct {
	l       *Link
	back    *backoff
	said    *complaints
	probe   bool // QUIC only, and once
	doubted bool // there is a session, in doubt
	began   time.Time
	crowded bool // a session has ended, of others perhaps too: the first wave knocks as well

	ctx    context.Context // ends with the search
	cancel context.CancelFunc
	tries  context.Context // ends with ctx and when the control plane refuses
	giveUp context.CancelFunc
	work   sync.WaitGroup

	turn    chan struct{} // cap 1: held by the try that registers
	hurry   chan struct{} // received when the one registering has had enough time
	allowed chan struct{} // closed once registering is allowed
	allow   func()
	kicked  chan struct{} // cap 1: the network has changed

	won     chan *session // cap 1
	failed  chan error    // cap 1: of a probe
	refusal chan error    // cap 1: the control plane has spoken

	mu      sync.Mutex
	patient map[way]bool      // has a try with dialTimeout
	begun   map[way]time.Time // its latest try
	latest  map[way]error     // of tries that failed
	under   map[*underway]bool
	busy    map[string]time.Time // since when an address has said so over QUIC each time
}

// seek starts a search. After says why it is needed; nil: do not wait for
// what backoff says.
func (l *Link) seek(ctx context.Context, back *backoff, said *complaints, kind kind, after error) *search {
	s := &search{
		l: l, back: back, said: said, probe: kind == probing, doubted: kind == doubtful, began: time.Now(),
		turn: make(chan struct{}, 1), hurry: make(chan struct{}), allowed: make(chan struct{}), kicked: make(chan struct{}, 1),
		won: make(chan *session, 1), failed: make(chan error, 1), refusal: make(chan error, 1),
		patient: map[way]bool{}, begun: map[way]time.Time{}, latest: map[way]error{}, under: map[*underway]bool{}, busy: map[string]time.Time{},
	}
	s.allow = sync.OnceFunc(func() { close(s.allowed) })
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.tries, s.giveUp = context.WithCancel(s.ctx)
	s.work.Go(func() { s.run(ctx, after) })
	return s
}

// stop ends the search unless a registration is under way: that may have
// happened, and is for whoever waits for it. False: it goes on.
func (s *search) stop() bool {
	select {
	case s.turn <- struct{}{}:
	default:
		return false
	}
	s.cancel()
	s.work.Wait()
	return true
}

// registering tells whether one says hello just now, or has been welcomed.
func (s *search) registering() bool { return len(s.turn) > 0 }

// kick makes it try at once.
func (s *search) kick() {
	select {
	case s.kicked <- struct{}{}:
	default:
	}
}

func (s *search) run(ctx context.Context, after error) {
	err := after
	s.crowded = after != nil || s.doubted
	for n := 0; ; n++ {
		if err != nil && !s.rest(err) {
			return
		}
		s.l.connecting()
		if err = s.watch(s.launch(ctx, n)); err == nil {
			return
		}
		if s.probe {
			s.failed <- err
			return
		}
	}
}

// rest waits as backoff says. False: the search is over.
func (s *search) rest(err error) bool {
	for {
		wait := s.back.next(time.Now(), err)
		s.l.resting(err, wait, s.said)
		t := time.NewTimer(wait)
		var refusal *wire.Error
		kicked := s.kicked
		if errors.As(err, &refusal) {
			kicked = nil // another network leads to the same control plane
		}
		select {
		case <-s.ctx.Done():
			t.Stop()
			return false
		case <-t.C:
			return true
		case <-kicked:
			t.Stop()
			s.back.reset(time.Now(), 0) // a new patience, not a new series
			return true
		case err = <-s.refusal: // of an earlier wave's try
			t.Stop()
			s.startOver()
		}
	}
}

// startOver gives every try up.
func (s *search) startOver() {
	s.giveUp()
	s.tries, s.giveUp = context.WithCancel(s.ctx)
}

// watch waits until a wave has failed, or has had its time. Nil: the search is
// over.
func (s *search) watch(w *wave) error {
	t := time.NewTimer(wavePatience)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return nil
		case err := <-s.refusal:
			s.startOver()
			return err
		case <-w.done:
			if s.ctx.Err() != nil {
				return nil
			}
			select {
			case err := <-s.refusal:
				s.startOver()
				return err
			default:
			}
			return s.failure(w)
		case <-s.kicked:
			s.kick() // for rest
			return s.failure(w)
		case <-t.C:
			if s.probe || s.held() || s.answered() {
				t.Reset(wavePatience / 10)
				continue
			}
			return s.failure(w)
		}
	}
}

// held says that something has answered: a new wave would find no more.
func (s *search) held() bool {
	select {
	case <-s.allowed:
		return len(s.turn) > 0
	default:
		return true
	}
}

// failure is why there is no session yet.
func (s *search) failure(w *wave) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, way := range w.ways {
		err := s.latest[way]
		if err == nil && w.asked(way) {
			err = fmt.Errorf("dial %s over %s: %w in time", way.address, way.transport, carrier.ErrUnreachable)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return carrier.ErrUnreachable
	}
	return joined(errs)
}

// wave is one try of several ways.
type wave struct {
	ways   []way
	knocks bool          // its tries over QUIC ask first whether to come
	done   chan struct{} // closed when every try has failed
	noQUIC chan struct{} // closed when every try over QUIC has

	mu      sync.Mutex
	left    int
	quic    int
	started map[way]bool
	wrong   map[string]bool // addresses that have another key
	spared  map[string]bool // addresses that are busy
}

func (w *wave) asked(way way) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.started[way]
}

// launch starts the wave of number n.
func (s *search) launch(ctx context.Context, n int) *wave {
	w := &wave{knocks: s.knocks(n), done: make(chan struct{}), noQUIC: make(chan struct{}), started: map[way]bool{}, wrong: map[string]bool{}, spared: map[string]bool{}}
	addresses := s.l.candidates(n)
	transports := []string{s.l.cfg.Transport}
	switch {
	case s.probe:
		transports = []string{wire.TransportQUIC}
	case s.l.cfg.Transport == TransportAuto:
		transports = []string{wire.TransportQUIC, wire.TransportTCP}
	}
	head := time.Duration(0)
	if len(transports) > 1 {
		head = s.headStart()
	}
	var delays []time.Duration
	for _, t := range transports {
		for i, a := range addresses {
			delay := time.Duration(i) * addressStagger
			if t == wire.TransportQUIC {
				w.quic++
			} else {
				delay += head
			}
			w.ways, delays = append(w.ways, way{t, a}), append(delays, delay)
		}
	}
	w.left = len(w.ways)
	if w.quic == 0 {
		close(w.noQUIC)
	}
	tries := s.tries
	for i, way := range w.ways {
		s.work.Go(func() { s.end(w, way, s.try(ctx, tries, w, way, delays[i])) })
	}
	return w
}

// headStart is how much later than QUIC TCP is tried.
func (s *search) headStart() time.Duration {
	if s.doubted || s.l.quicFailed() {
		return shortHeadStart
	}
	return max(shortHeadStart, quicHeadStart-time.Since(s.began))
}

func (s *search) end(w *wave, way way, err error) {
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	spare := s.note(way, err)
	w.mu.Lock()
	defer w.mu.Unlock()
	if errors.Is(err, carrier.ErrWrongPin) {
		w.wrong[way.address] = true
	}
	if spare {
		w.spared[way.address] = true
	}
	if w.left--; w.left == 0 {
		close(w.done)
	}
	if way.transport == wire.TransportQUIC {
		if w.quic--; w.quic == 0 {
			close(w.noQUIC)
		}
	}
}

// try dials one way and registers.
func (s *search) try(ctx, tries context.Context, w *wave, way way, delay time.Duration) error {
	if !w.wait(tries, way, delay) {
		return tries.Err()
	}
	limit := s.claim(way)
	if limit == 0 {
		return context.Canceled
	}
	conn, err := s.dial(tries, way, limit, w.knocks && way.transport == wire.TransportQUIC)
	s.release(way, limit)
	if err != nil {
		if tries.Err() != nil {
			return tries.Err()
		}
		return err
	}
	return s.use(ctx, tries, conn, way)
}

// use waits for the turn of a way that has shaken hands, and registers.
func (s *search) use(ctx, tries context.Context, conn wire.Session, way way) error {
	if way.transport == wire.TransportTCP && s.l.cfg.Transport == TransportAuto && !s.l.quicFailed() && !s.isBusy(way.address) {
		s.callQUIC(ctx, tries, way.address)
	}
	if err := s.await(tries, conn); err != nil {
		conn.Close("", "")
		return err
	}
	found, err := s.register(ctx, conn, way)
	if err == nil {
		// The turn is kept: nobody else may register.
		s.won <- found
		s.cancel()
		return nil
	}
	code := ""
	if errors.Is(err, wire.ErrFrame) {
		code = wire.CodeProtocol
	}
	conn.Close(code, "")
	<-s.turn
	err = fmt.Errorf("register at %s over %s: %w", way.address, way.transport, err)
	var refusal *wire.Error
	if errors.As(err, &refusal) {
		// Another way to this control plane is still the same control plane.
		select {
		case s.refusal <- err:
		default:
		}
	}
	return err
}

// wait is until the way's time has come. False: it need not be tried.
func (w *wave) wait(tries context.Context, way way, delay time.Duration) bool {
	t := time.NewTimer(delay)
	defer t.Stop()
	var noQUIC <-chan struct{}
	if way.transport == wire.TransportTCP {
		noQUIC = w.noQUIC
	}
	select {
	case <-t.C:
	case <-noQUIC:
	case <-tries.Done():
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.started[way] = !w.spared[way.address]
	return tries.Err() == nil && !w.wrong[way.address] && !w.spared[way.address]
}

// claim says how long a try of the way may take; 0: one has just begun.
func (s *search) claim(way way) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.probe:
		return probeTimeout
	case s.patient[way] && time.Since(s.begun[way]) < wavePatience:
		return 0
	}
	waiting := 0
	for u := range s.under {
		if u.way == way && !u.answered.IsZero() {
			waiting++
		}
	}
	if waiting >= mostAnswered {
		return 0
	}
	s.begun[way] = time.Now()
	if errors.Is(s.latest[way], carrier.ErrBusy) {
		delete(s.latest, way) // when it said to ask again is now
	}
	if s.patient[way] {
		return freshTimeout
	}
	s.patient[way] = true
	return dialTimeout
}

func (s *search) release(way way, limit time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if limit == dialTimeout {
		delete(s.patient, way)
	}
}

// await returns nil once the caller holds the turn to register.
func (s *search) await(tries context.Context, conn wire.Session) error {
	gone := func() error { return fmt.Errorf("the session broke before it registered: %w", conn.Err()) }
	select {
	case <-s.allowed:
	case <-conn.Done():
		return gone()
	case <-tries.Done():
		return tries.Err()
	}
	for {
		select {
		case s.turn <- struct{}{}:
			if tries.Err() != nil {
				<-s.turn
				return tries.Err()
			}
			return nil
		case s.hurry <- struct{}{}: // it will be our turn
		case <-conn.Done():
			return gone()
		case <-tries.Done():
			return tries.Err()
		}
	}
}

// register says hello. What is under way here is not given up with the search,
// only with the link: the control plane may have taken it.
func (s *search) register(ctx context.Context, conn wire.Session, way way) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	hurried := make(chan struct{})
	done := make(chan struct{})
	defer func() { cancel(); <-done }()
	go func() {
		defer close(done)
		t := time.NewTimer(registerPatience)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		select {
		case <-s.hurry:
			close(hurried)
			cancel()
		case <-ctx.Done():
		}
	}()
	found, err := s.l.hello(ctx, conn)
	if err != nil {
		select {
		case <-hurried:
			err = fmt.Errorf("%w to the hello in %s, and another way waits", carrier.ErrUnreachable, registerPatience)
		default:
		}
		return nil, err
	}
	found.address = way.address
	return found, nil
}
