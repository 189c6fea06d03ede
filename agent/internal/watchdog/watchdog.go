// Package watchdog makes stuck impossible. A Dog asks the loops it was given,
// by name, whether they still turn, and ends the agent when one no longer does;
// a Reach does the same for a tunnel that should be up and is not. Ending is
// harmless: tasks go on without the agent, and the next start takes them over.
package watchdog

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Every is how often a Dog asks when nothing says otherwise.
const Every = 20 * time.Second

// Dog asks loops whether they turn. A loop is asked by a token in its channel
// and answers by taking it: nothing else is asked of it, and a loop that waits
// for something to do costs one wake-up each time.
//
// It counts questions, not time: after the machine was suspended, or the
// process stopped, a loop is asked again before it is judged.
type Dog struct {
	log   *slog.Logger
	every time.Duration

	mu    sync.Mutex
	loops []*loop
}

type loop struct {
	name     string
	deadline time.Duration
	asked    chan struct{} // cap 1; nil: it is minded
	work     atomic.Uint64 // of one that is minded; odd: it is at work
	seen     uint64        // of work, at the last question
	missed   int           // questions not answered, one after the other
	said     bool
}

// New makes a Dog that asks as often as every; 0: Every.
func New(log *slog.Logger, every time.Duration) *Dog {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if every <= 0 {
		every = Every
	}
	return &Dog{log: log, every: every}
}

// Watch adds a loop until done is called. The loop must receive from pulse
// whenever it waits for something to do, and is stuck once it has not for
// deadline.
func (d *Dog) Watch(name string, deadline time.Duration) (pulse <-chan struct{}, done func()) {
	l := &loop{name: name, deadline: deadline, asked: make(chan struct{}, 1)}
	return l.asked, d.add(l)
}

// Mind adds a loop that cannot be asked, because what it waits for is a call
// that may rightly take for ever, such as a read from the network. Instead it
// says when it has something to do, and is stuck once that takes longer than
// deadline without another word of it. Waiting, it is not looked at: that what
// it waits for still comes is for somebody else to notice. Busy is for one
// goroutine at a time, or for one after another.
func (d *Dog) Mind(name string, deadline time.Duration) (busy func(bool), done func()) {
	l := &loop{name: name, deadline: deadline}
	return l.busy, d.add(l)
}

func (d *Dog) add(l *loop) (done func()) {
	l.deadline = hasten(l.deadline, 6)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.loops = append(d.loops, l)
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.loops = slices.DeleteFunc(d.loops, func(o *loop) bool { return o == l })
	}
}

// busy counts on: to be at work again is another piece of work.
func (l *loop) busy(at bool) {
	n := l.work.Load() + 1
	if (n%2 == 1) != at {
		n++
	}
	l.work.Store(n)
}

// turns tells whether the loop has turned since the last question, and asks
// the next.
func (l *loop) turns() bool {
	if l.asked != nil {
		select {
		case l.asked <- struct{}{}:
			return true
		default:
			return false
		}
	}
	now := l.work.Load()
	turned := now%2 == 0 || now != l.seen
	l.seen = now
	return turned
}

// Loops names those that are watched, sorted.
func (d *Dog) Loops() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	names := make([]string, 0, len(d.loops))
	for _, l := range d.loops {
		names = append(names, l.name)
	}
	slices.Sort(names)
	return names
}

// Run asks until ctx ends, calling fed after each time when no loop is stuck.
// It returns an error that names those which are.
func (d *Dog) Run(ctx context.Context, fed func()) error {
	tick := time.NewTicker(d.every)
	defer tick.Stop()
	for {
		if stuck := d.ask(); len(stuck) > 0 {
			d.log.Error("stuck; where every goroutine is follows", "loops", strings.Join(stuck, "; "), "stacks", stacks())
			return fmt.Errorf("stuck: %s: ending, to be started again; tasks go on", strings.Join(stuck, "; "))
		}
		fed()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// ask looks who answered the last question, asks the next and names the stuck.
func (d *Dog) ask() (stuck []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.loops {
		if l.turns() {
			if l.said {
				d.log.Info("a loop turns again", "loop", l.name)
			}
			l.missed, l.said = 0, false
			continue
		}
		l.missed++
		silent := time.Duration(l.missed) * d.every
		switch {
		case silent >= l.deadline:
			stuck = append(stuck, fmt.Sprintf("%s has not turned for %s", l.name, silent))
		case silent >= l.deadline/2 && !l.said:
			l.said = true
			d.log.Warn("a loop is slow to turn", "loop", l.name, "for", silent, "deadline", l.deadline)
		}
	}
	return stuck
}

// maxStacks bounds what a stuck agent logs.
const maxStacks = 64 << 10

func stacks() string {
	b := make([]byte, maxStacks)
	return string(b[:runtime.Stack(b, true)])
}
