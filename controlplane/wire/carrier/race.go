package carrier

import (
	"context"
	"errors"
	"time"
)

const (
	// maxRace bounds how many addresses of one name are tried.
	maxRace = 8
	// raceStagger is RFC 8305's: how long one address has before the next is
	// tried beside it.
	raceStagger = 250 * time.Millisecond
)

// race starts try for 0, 1, ... n-1, each a moment after the one before or at
// once when one has failed, and returns the first success, or
// ErrBusy, which the others would meet, too. The others are cancelled and,
// should they succeed, given to drop.
func race[T any](ctx context.Context, n int, try func(ctx context.Context, i int) (T, error), drop func(T)) (T, error) {
	type outcome struct {
		got T
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	outcomes := make(chan outcome, n)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var failed []error
	for started := 0; ; {
		var next <-chan time.Time
		if started < n {
			next = timer.C
		}
		select {
		case <-next:
			i := started
			started++
			go func() {
				got, err := try(ctx, i)
				outcomes <- outcome{got, err}
			}()
			timer.Reset(raceStagger)
		case o := <-outcomes:
			if o.err == nil || errors.Is(o.err, ErrBusy) {
				left := started - len(failed) - 1
				go func() {
					for range left {
						if late := <-outcomes; late.err == nil {
							drop(late.got)
						}
					}
				}()
				return o.got, o.err
			}
			failed = append(failed, o.err)
			if len(failed) == n || ctx.Err() != nil && len(failed) == started {
				var none T
				return none, errors.Join(failed...)
			}
			timer.Reset(0)
		}
	}
}
