package link

import (
	"context"
	"fmt"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// underway is a try that has not ended.
type underway struct {
	way      way
	answered time.Time // zero: not yet
	turn     time.Time // when its handshake begins, as it was told; zero: it was told nothing
}

// mostAnswered is how many answered tries of one way wait at a time.
const mostAnswered = 2

// answered tells whether a try is under way that was answered a moment ago.
func (s *search) answered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for u := range s.under {
		if time.Since(u.answered) < answerPatience || time.Since(u.turn) < wavePatience {
			return true
		}
	}
	return false
}

// dial is one try. It has so long to be answered, from the time on at which it
// was told to come, and answeredTimeout in all. What it is told of that goes to
// told, too, which may be nil: it does not knock.
func (s *search) dial(tries context.Context, way way, limit time.Duration, told func(wait time.Duration)) (wire.Session, error) {
	u := &underway{way: way}
	s.mu.Lock()
	s.under[u] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.under, u)
	}()
	ctx, cancel := context.WithTimeout(tries, answeredTimeout)
	defer cancel()
	silence := time.AfterFunc(limit, cancel)
	defer silence.Stop()
	word := words{answered: func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !u.answered.IsZero() || !silence.Stop() {
			return
		}
		u.answered = time.Now()
	}}
	if told != nil {
		word.turn = func(wait time.Duration) {
			s.mu.Lock()
			if u.turn.IsZero() && u.answered.IsZero() && silence.Stop() {
				u.turn = time.Now().Add(wait)
				silence.Reset(wait + limit)
			}
			s.mu.Unlock()
			told(wait)
		}
	}
	conn, err := s.l.cfg.dial(context.WithValue(ctx, wordsKey{}, word), way.transport, way.address)
	if err != nil && ctx.Err() != nil && tries.Err() == nil {
		err = fmt.Errorf("dial %s over %s: %w in time", way.address, way.transport, carrier.ErrUnreachable)
	}
	return conn, err
}

// words are what a dial says while it is under way; a turn that is nil is not to
// be asked for.
type words struct {
	answered func()
	turn     func(wait time.Duration)
}

// wordsKey finds them in a dial's context.
type wordsKey struct{}

func wordsOf(ctx context.Context) words {
	w, _ := ctx.Value(wordsKey{}).(words)
	return w
}
