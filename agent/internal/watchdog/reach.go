package watchdog

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// Reach watches that the device has a session, or that there is a good reason
// why it has none. No network is one, and so is a control plane that answers
// with a refusal. What is left is an agent whose way out has gone wrong in a
// manner nobody thought of, and there is a cure for that: begin anew.
type Reach struct {
	// Registered tells whether there is a session, or the control plane has
	// lately answered that there shall be none.
	Registered func() bool
	// Answers asks the network, by means that share nothing with the tunnel,
	// whether a control plane's port can be reached.
	Answers func(context.Context) bool
	// Rebuild throws away all that the tunnel has made or remembers.
	Rebuild func()
	// RebuildAfter and EndAfter are how long there may be no session before
	// the one and the other; 0: 10 min and 1 h.
	RebuildAfter, EndAfter time.Duration
	Logger                 *slog.Logger
}

// Run watches until ctx ends. It returns an error when a device that reaches
// its control plane has had no session for EndAfter.
func (r Reach) Run(ctx context.Context, pulse <-chan struct{}) error {
	if r.RebuildAfter <= 0 {
		r.RebuildAfter = hasten(10*time.Minute, 120)
	}
	if r.EndAfter <= 0 {
		r.EndAfter = hasten(time.Hour, 120)
	}
	if r.Logger == nil {
		r.Logger = slog.New(slog.DiscardHandler)
	}
	// Looks are counted, not time: what was slept through says nothing.
	every := min(r.RebuildAfter/10, time.Minute)
	tick := time.NewTicker(every)
	defer tick.Stop()
	var without, sinceRebuilt, answered time.Duration
	answers := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-pulse:
			continue
		case <-tick.C:
		}
		if r.Registered() {
			without, sinceRebuilt, answered, answers = 0, 0, 0, false
			continue
		}
		without += every
		sinceRebuilt += every
		if sinceRebuilt >= r.RebuildAfter {
			sinceRebuilt = 0
			r.Logger.Warn("no session for long: the tunnel is built anew", "for", without)
			r.Rebuild()
		}
		if without < r.RebuildAfter {
			continue
		}
		if answers {
			answered += every
		}
		// Asked only as often as it is rebuilt, so that an outage of weeks
		// costs next to nothing.
		if sinceRebuilt == 0 {
			if answers = r.Answers(ctx); !answers {
				answered = 0
			}
		}
		if answered >= r.EndAfter-r.RebuildAfter {
			return fmt.Errorf("no session for %s although the control plane's port answers: ending, to be started again; tasks go on", without)
		}
	}
}
