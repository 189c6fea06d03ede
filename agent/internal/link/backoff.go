package link

import (
	"errors"
	"math/rand/v2"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

const (
	backoffBase = 100 * time.Millisecond
	silenceCap  = time.Second      // for the first patience after the link was lost
	longCap     = 15 * time.Second // later
	patience    = 2 * time.Minute
	refusalCap  = time.Minute      // also the most a server may ask for
	busyCap     = 15 * time.Second // what follows is a knock
	stable      = 3 * time.Second
)

// backoff says how long to wait before the next try: full jitter under a cap
// that doubles. Silence, where trying costs the other side nothing, has a low
// one; a server that refuses may have thousands more to refuse.
type backoff struct {
	lost    time.Time // when the last registered session ended, or the start
	tries   int       // since then
	uniform func() float64
}

func newBackoff(now time.Time, uniform func() float64) *backoff {
	if uniform == nil {
		uniform = rand.Float64
	}
	return &backoff{lost: now, uniform: uniform}
}

// reset is called when a registered session ended, and at no other time: a
// dial that succeeds proves nothing. A session that ended at once, because one
// side cannot work, begins a new patience but no new series: else both would
// be kept busy by it.
func (b *backoff) reset(now time.Time, lived time.Duration) {
	b.lost = now
	if lived >= stable {
		b.tries = 0
	}
}

func (b *backoff) next(now time.Time, err error) time.Duration {
	limit := silenceCap
	if now.Sub(b.lost) > patience {
		limit = longCap
	}
	least := time.Duration(0)
	var refusal *wire.Error
	var busy *carrier.BusyError
	switch {
	case errors.As(err, &refusal) && refused(refusal.Code):
		if hopeless(refusal.Code) {
			b.tries++
			return refusalCap/2 + time.Duration(b.uniform()*float64(refusalCap/2))
		}
		limit = refusalCap
		least = min(refusal.RetryAfter, refusalCap)
	case errors.As(err, &refusal):
		least = min(refusal.RetryAfter, refusalCap)
	case errors.As(err, &busy) && busy.Again > 0:
		return min(busy.Again, refusalCap) // a time of this device's own
	case errors.Is(err, carrier.ErrBusy):
		limit = busyCap
	case errors.Is(err, carrier.ErrWrongPin), errors.Is(err, carrier.ErrNotControlPlane):
		limit = longCap
	}
	ceiling := limit
	if b.tries < 30 {
		ceiling = min(limit, backoffBase<<b.tries)
	}
	b.tries++
	jitter := time.Duration(b.uniform() * float64(ceiling))
	return min(least+jitter, refusalCap)
}

// refused tells a decision of the server from the end of a session.
func refused(code string) bool { return code != wire.CodeShutdown && code != "" }

// hopeless refusals need a person: the device asks again slowly, for ever.
func hopeless(code string) bool {
	switch code {
	case wire.CodeDenied, wire.CodeNotFound, wire.CodeUnknownKey, wire.CodeVersion, wire.CodeCloned:
		return true
	}
	return false
}
