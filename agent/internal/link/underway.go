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
}

// mostAnswered is how many answered tries of one way wait at a time.
const mostAnswered = 2

// answered tells whether a try is under way that was answered a moment ago.
func (s *search) answered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for u := range s.under {
		if time.Since(u.answered) < answerPatience {
			return true
		}
	}
	return false
}

// dial is one try. It has so long to be answered, and answeredTimeout in all.
func (s *search) dial(tries context.Context, way way, limit time.Duration) (wire.Session, error) {
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
	conn, err := s.l.cfg.dial(context.WithValue(ctx, answeredKey{}, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !u.answered.IsZero() || !silence.Stop() {
			return
		}
		u.answered = time.Now()
	}), way.transport, way.address)
	if err != nil && ctx.Err() != nil && tries.Err() == nil {
		err = fmt.Errorf("dial %s over %s: %w in time", way.address, way.transport, carrier.ErrUnreachable)
	}
	return conn, err
}

// answeredKey finds in a dial's context what notes that it was answered.
type answeredKey struct{}

func answered(ctx context.Context) func() {
	f, _ := ctx.Value(answeredKey{}).(func())
	return f
}
