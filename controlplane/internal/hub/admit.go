package hub

import (
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

const (
	// ratePerCPU is how many registrations a second one core is trusted with
	// when nothing is configured: it can do about 1000 handshakes a second, and
	// a registration is a handshake and some calls into the domain.
	ratePerCPU = 500
	// headroom is the part of the rate that is promised to those sent away: the
	// rest is for those who come by themselves meanwhile.
	headroom = 0.9
	// longestHint is the most a device lets itself be asked to wait.
	longestHint = time.Minute
	// hintJitter is added to every hint: promises alone are an even row, but
	// devices that were sent away in one batch must not come back as one.
	hintJitter = 500 * time.Millisecond
	// shedLog is how often shedding is logged.
	shedLog = 10 * time.Second
)

// gate is the control plane's own rate of registrations: a token bucket of one
// second's worth. Whoever finds it empty is told when to come back, each at
// another time, over as long as it takes at that rate to serve all who were
// sent away. Sessions that have registered never pass it.
type gate struct {
	now     func() time.Time
	uniform func() float64
	log     *slog.Logger

	mu     sync.Mutex
	rate   float64 // a second
	tokens float64
	at     time.Time // when tokens were counted
	row    time.Time // the last promise that was made
	shed   int       // since logged
	logged time.Time
}

func newGate(perSecond int, log *slog.Logger) *gate {
	if perSecond <= 0 {
		perSecond = ratePerCPU * runtime.GOMAXPROCS(0)
	}
	rate := float64(perSecond)
	return &gate{now: time.Now, uniform: rand.Float64, log: log, rate: rate, tokens: rate, at: time.Now()}
}

// enter takes a token, or says what to tell the device.
func (g *gate) enter() *wire.Failure {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	g.tokens = min(g.rate, g.tokens+now.Sub(g.at).Seconds()*g.rate)
	g.at = now
	if g.tokens >= 1 {
		g.tokens--
		return nil
	}
	if g.row.Before(now) {
		g.row = now
	}
	if g.row.Before(now.Add(longestHint)) { // past that a promise means nothing
		g.row = g.row.Add(time.Duration(float64(time.Second) / (g.rate * headroom)))
	}
	hint := g.row.Sub(now) + time.Duration(g.uniform()*float64(hintJitter))
	if hint > longestHint {
		hint = longestHint/2 + time.Duration(g.uniform()*float64(longestHint/2))
	}
	g.shed++
	if now.Sub(g.logged) >= shedLog {
		g.log.Warn("more devices register than this control plane takes at a time: they are asked to come back",
			"sent away", g.shed, "a second", g.rate, "backlog", g.row.Sub(now).Round(time.Millisecond))
		g.shed, g.logged = 0, now
	}
	f := wire.Failf(wire.CodeOverloaded, "the control plane takes %.0f registrations a second and more devices ask: come back in %s", g.rate, hint.Round(time.Millisecond))
	f.RetryAfterMs = uint32(hint.Milliseconds())
	return f
}
