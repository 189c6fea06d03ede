package agent

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// inbox is how everything reaches the loop. Nothing blocks on it and nothing
// in it grows without bound: results are as many as the calls under way,
// levels replace each other, questions have a caller waiting.
type inbox struct {
	mu     *sync.Mutex
	in     *contents
	wake   chan struct{} // holds one token while there is something new
	wakeAt time.Duration // owned by the loop
}

type contents struct {
	results []outcome
	pulls   map[sdk.Attempt]sdk.PullProgress
	acks    map[string]uint64
	hints   []string // runtimes to list
	changed bool     // a plugin came up or went down
	refound bool     // the inventory of devices changed
	up      *bool
	// reconcile: the control plane asks for all that is held.
	reconcile bool
	asks      []*question
}

type outcome struct {
	r    result
	name string
}

// question is something to run in the loop.
type question struct {
	f    func(*State)
	done chan struct{}
}

func newInbox() inbox {
	return inbox{mu: &sync.Mutex{}, in: &contents{changed: true, refound: true}, wake: make(chan struct{}, 1), wakeAt: never}
}

func (b *inbox) put(f func(*contents)) {
	b.mu.Lock()
	f(b.in)
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take empties the inbox.
func (b *inbox) take() contents {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := *b.in
	*b.in = contents{}
	return out
}

func (b *inbox) result(r result, name string) {
	b.put(func(c *contents) { c.results = append(c.results, outcome{r, name}) })
}

func (b *inbox) progress(a sdk.Attempt, p sdk.PullProgress) {
	b.put(func(c *contents) {
		if c.pulls == nil {
			c.pulls = map[sdk.Attempt]sdk.PullProgress{}
		}
		c.pulls[a] = p
	})
}

// maxAcks bounds the acknowledgements that wait for one turn: a peer that
// makes up task ids must not fill the memory.
const maxAcks = 10_000

func (b *inbox) ack(task string, sequence uint64) {
	b.put(func(c *contents) {
		if c.acks == nil {
			c.acks = map[string]uint64{}
		}
		if _, known := c.acks[task]; known || len(c.acks) < maxAcks {
			c.acks[task] = max(c.acks[task], sequence)
		}
	})
}

func (b *inbox) connected(up bool) { b.put(func(c *contents) { c.up = &up }) }

func (b *inbox) pluginChanged() { b.put(func(c *contents) { c.changed = true }) }

func (b *inbox) hint(name string) {
	b.put(func(c *contents) {
		if !slices.Contains(c.hints, name) {
			c.hints = append(c.hints, name)
		}
	})
}

func (b *inbox) ask(q *question) { b.put(func(c *contents) { c.asks = append(c.asks, q) }) }

// withdraw takes a question back unless the loop has it already.
func (b *inbox) withdraw(q *question) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.in.asks, q)
	if i < 0 {
		return false
	}
	b.in.asks = slices.Delete(b.in.asks, i, i+1)
	return true
}

// watchDevices turns changes of the inventory into a look at it until ctx ends.
func (a *Agent) watchDevices(ctx context.Context, under *sync.WaitGroup) {
	if a.cfg.Devices == nil {
		return
	}
	pulse, unwatch := a.watch("device changes", watchDeadline)
	under.Go(func() {
		defer unwatch()
		for {
			select {
			case <-ctx.Done():
				return
			case <-pulse:
			case <-a.cfg.Devices.DeviceChanges():
				a.inbox.put(func(c *contents) { c.refound = true })
			}
		}
	})
}

const (
	eventsRetry    = 200 * time.Millisecond
	eventsRetryCap = 5 * time.Second
)

// watchRuntimes turns plugin changes and runtime events into hints until ctx
// ends. Runtimes that appear later are found when a plugin changes.
func (a *Agent) watchRuntimes(ctx context.Context, under *sync.WaitGroup) {
	pulse, unwatch := a.watch("runtime changes", watchDeadline)
	under.Go(func() {
		defer unwatch()
		var watchers sync.WaitGroup
		defer watchers.Wait()
		watched := map[string]chan struct{}{}
		over := make(chan string)
		for {
			for _, name := range a.cfg.Runtimes.RuntimeNames() {
				if watched[name] == nil {
					poke := make(chan struct{}, 1)
					watched[name] = poke
					watchers.Go(func() {
						a.watchEvents(ctx, name, poke)
						select {
						case over <- name:
						case <-ctx.Done():
						}
					})
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-pulse:
			case name := <-over:
				delete(watched, name)
			case name := <-a.cfg.Runtimes.Changes():
				a.inbox.pluginChanged()
				select {
				case watched[name] <- struct{}{}: // nil when not watched: never ready
				default:
				}
			}
		}
	})
}

// watchEvents follows one runtime's events for as long as ctx lasts, or until
// the plugin turns out to be none, or to be gone. Waiting for them may take for
// ever, as long as the process is there that tells them: its own loop pings it,
// and kills it if need be, which ends the wait.
func (a *Agent) watchEvents(ctx context.Context, name string, poke <-chan struct{}) {
	busy, unwatch := a.mind("events of "+name, watchDeadline)
	defer unwatch()
	wait := eventsRetry
	for ctx.Err() == nil {
		busy(true)
		rt, err := a.cfg.Runtimes.Runtime(name)
		if errors.Is(err, sdk.NotFound) {
			return
		}
		if err == nil {
			began := a.cfg.Clock.Now()
			busy(false)
			_ = rt.Events(ctx, func(sdk.Attempt) { // however it broke, List repairs it
				busy(true)
				a.inbox.hint(name)
				busy(false)
			})
			busy(true)
			a.inbox.hint(name)
			if a.cfg.Clock.Now()-began > eventsRetryCap {
				wait = eventsRetry
			}
		}
		select {
		case <-ctx.Done():
		case <-poke:
			wait = eventsRetry
		case <-a.cfg.Clock.After(wait):
			wait = min(2*wait, eventsRetryCap)
		}
	}
}
