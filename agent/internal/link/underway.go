package link

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// underway is a try that has not ended.
type underway struct {
	way      way
	answered time.Time // zero: not yet
	let      time.Time // when it was told that its handshake may begin; zero: not yet
}

// mostAnswered is how many answered tries of one way wait at a time.
const mostAnswered = 2

// answered tells whether a try is under way that was answered a moment ago.
func (s *search) answered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for u := range s.under {
		if time.Since(u.answered) < answerPatience || time.Since(u.let) < wavePatience {
			return true
		}
	}
	return false
}

// dial is one try. It has so long to be answered, as long again once it was let
// in, and answeredTimeout in all.
func (s *search) dial(tries context.Context, way way, limit time.Duration, knock bool) (wire.Session, error) {
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
	if knock {
		word.let = func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if u.let.IsZero() && u.answered.IsZero() && silence.Stop() {
				u.let = time.Now()
				silence.Reset(limit)
			}
		}
	}
	conn, err := s.l.cfg.dial(context.WithValue(ctx, wordsKey{}, word), way.transport, way.address)
	if err != nil && ctx.Err() != nil && tries.Err() == nil && !errors.Is(err, carrier.ErrBusy) {
		err = fmt.Errorf("dial %s over %s: %w in time", way.address, way.transport, carrier.ErrUnreachable)
	}
	return conn, err
}

// words are what a dial says while it is under way; where let is nil, it is not
// to knock.
type words struct {
	answered func()
	let      func()
}

// wordsKey finds them in a dial's context.
type wordsKey struct{}

func wordsOf(ctx context.Context) words {
	w, _ := ctx.Value(wordsKey{}).(words)
	return w
}
