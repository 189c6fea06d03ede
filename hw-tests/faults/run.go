package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// run is one seeded sequence of faults on a site.
type run struct {
	s        *site
	o        *observer
	seed     uint64
	n        int
	rnd      *rand.Rand
	hit      map[card]int
	missed   map[card]int
	owed     []*subject      // whose stop was asked for and not answered
	settled  []time.Duration // how long until all was as it should be, by run
	subjects []*subject      // of this run, but for the keepers
	keepers  []*subject
	active   []active // faults that are not healed yet
	tokens   int
	journal  func(string, ...any)
	kills    int           // of plugins since the agent's start
	patience time.Duration // with a phase to be reached
}

type active struct {
	kind kind
	card card
}

// reachWithin is how long a task may take to come into a phase. An idle device
// behind a router that forgot its connection hears nothing until its next
// keepalive, every 25 s over QUIC and every 40 s over TCP.
const reachWithin = 55 * time.Second

// step brings a task into a phase, puts the fault there, and heals it after a
// while, or leaves that to the next step.
func (r *run) step(ctx context.Context, c card, leave bool) error {
	k := kinds[c.kind]
	if slices.ContainsFunc(r.active, func(a active) bool { return a.kind.class.excludes(k.class) }) {
		if err := r.heal(); err != nil {
			return err
		}
	}
	if strings.Contains(k.name, "plugin-kill") {
		if err := r.spare(); err != nil {
			return err
		}
	}
	r.patience = reachWithin
	if len(r.active) > 0 {
		r.patience = 3 * time.Second
	}
	after, err := r.reach(ctx, c.phase)
	r.patience = reachWithin
	if err != nil && len(r.active) > 0 {
		// What is still broken is in the way.
		r.journal("%s not reached (%v): healing first", c.phase, err)
		if err := r.heal(); err != nil {
			return err
		}
		after, err = r.reach(ctx, c.phase)
	}
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		r.missed[c]++
		r.o.violate("run %d: %s was not reached with nothing in the way: %v", r.n, c.phase, err)
		return nil
	}
	r.journal("fault %s in %s", k.name, c.phase)
	if err := k.begin(r.s); err != nil {
		return fmt.Errorf("fault %s: %w", k.name, err)
	}
	r.hit[c]++
	r.active = append(r.active, active{k, c})
	switch {
	case strings.Contains(k.name, "plugin-kill"):
		r.kills++
	case k.name == "agent-kill" || k.name == "clock" || k.name == "state-damaged" || k.name == "reboot":
		r.kills = 0
	}
	lasts := time.Duration(r.rnd.Int64N(int64(k.longest))) + 100*time.Millisecond
	if r.rnd.IntN(10) == 0 {
		lasts = 2 * k.longest
	}
	pause(ctx, lasts/2)
	if after != nil {
		after()
	}
	pause(ctx, lasts/2)
	if leave {
		return nil
	}
	return r.heal()
}

// heal ends every fault.
func (r *run) heal() error {
	var errs error
	for _, a := range r.active {
		r.journal("heal %s", a.kind.name)
		if err := a.kind.heal(r.s); err != nil {
			errs = errors.Join(errs, fmt.Errorf("heal %s: %w", a.kind.name, err))
		}
	}
	r.active = nil
	return errs
}

// spare restarts the agent before a plugin has crashed so often that it is
// quarantined, which is as it should be and would take long.
func (r *run) spare() error {
	if r.kills < 3 {
		return nil
	}
	r.kills = 0
	r.journal("restart the agent: its plugins were killed often enough")
	if err := r.heal(); err != nil {
		return err
	}
	if err := r.s.stopAgent(); err != nil {
		return err
	}
	return r.s.startAgent()
}

func (r *run) token() string {
	r.tokens++
	return fmt.Sprintf("%d-%d-%d-%s", r.seed, r.n, r.tokens, filepath.Base(r.s.dir))
}

// launch starts a task and puts it under observation.
func (r *run) launch(ctx context.Context, sub *subject) error {
	token := r.token()
	err := until(r.patience, "a task to be placed", func() error {
		c, cancel := context.WithTimeout(ctx, 4*time.Second)
		defer cancel()
		return r.s.launch(c, sub, token)
	})
	if err != nil {
		return err
	}
	r.journal("task %s is a %s", sub.id, sub.breed)
	r.o.follow(sub)
	if sub.breed == keeper {
		r.keepers = append(r.keepers, sub)
	} else {
		r.subjects = append(r.subjects, sub)
	}
	return nil
}

// up says whether the agent holds a subject's main container for running.
func (r *run) up(ctx context.Context, sub *subject) error {
	held, err := r.s.held(ctx)
	if err != nil {
		return err
	}
	c := held[sub.id].container("main")
	if held[sub.id].LastStatus != "RUNNING" || c.LastStatus != "RUNNING" {
		return fmt.Errorf("task %s is %q, its container %q: %s", sub.id, held[sub.id].LastStatus, c.LastStatus, held[sub.id].Note)
	}
	if n := last(r.s.testimony(sub.id).starts, "main"); n != c.Attempt {
		return fmt.Errorf("task %s is in attempt %d and has started %d", sub.id, c.Attempt, n)
	}
	// An agent that has just started says what it said last.
	if pids := alive()[who{sub.id, "main", c.Attempt}]; len(pids) != 1 {
		return fmt.Errorf("task %s is said to run, and its processes are %v", sub.id, pids)
	}
	return nil
}

func (r *run) awaitUp(ctx context.Context, sub *subject) error {
	return until(r.patience, "task "+sub.id+" to run", func() error { return r.up(ctx, sub) })
}

// stoppable is a running task of this run, started if there is none.
func (r *run) stoppable(ctx context.Context) (*subject, error) {
	var able []*subject
	for _, sub := range r.subjects {
		if !sub.asked && sub.breed != oneshot && r.up(ctx, sub) == nil {
			able = append(able, sub)
		}
	}
	if len(able) > 0 {
		return able[r.rnd.IntN(len(able))], nil
	}
	sub := &subject{breed: []breed{long, process, pair}[r.rnd.IntN(3)]}
	if err := r.launch(ctx, sub); err != nil {
		return nil, err
	}
	return sub, r.awaitUp(ctx, sub)
}

// ask asks the control plane to stop a task.
func (r *run) ask(ctx context.Context, sub *subject) error {
	r.o.mu.Lock()
	sub.asked = true
	r.o.mu.Unlock()
	token := r.token()
	err := until(r.patience, "a stop to be taken", func() error {
		c, cancel := context.WithTimeout(ctx, 4*time.Second)
		defer cancel()
		var answer struct{}
		return r.s.api.Call(c, "StopTask", map[string]any{"id": sub.id, "clientToken": token}, &answer)
	})
	if err != nil {
		r.owed = append(r.owed, sub) // it may have been taken: asked again later
	}
	return err
}

// reach brings a task into a phase and returns at that moment. after lets go of
// what holds it there.
func (r *run) reach(ctx context.Context, phase string) (after func(), err error) {
	switch phase {
	case inPull:
		repo, err := r.s.freshImage()
		if err != nil {
			return nil, err
		}
		h := r.s.proxy.hold(repo)
		release := func() { r.s.proxy.release(repo) }
		sub := &subject{breed: []breed{long, pair, oneshot}[r.rnd.IntN(3)], health: true, image: registryName + "/" + repo + ":1"}
		if err := r.launch(ctx, sub); err != nil {
			release()
			return nil, err
		}
		select {
		case <-h.asked:
			return release, nil
		case <-time.After(r.patience):
			release()
			return nil, errors.New("nobody pulled")
		}
	case inStart:
		sub := &subject{breed: []breed{long, process, pair, oneshot}[r.rnd.IntN(4)], health: true}
		if err := r.launch(ctx, sub); err != nil {
			return nil, err
		}
		err := until(r.patience, "the agent to have the task", func() error {
			held, err := r.s.held(ctx)
			if err == nil && held[sub.id].ID == "" {
				err = errors.New("it has not")
			}
			return err
		})
		pause(ctx, r.upTo(300*time.Millisecond))
		return nil, err
	case inRun:
		_, err := r.stoppable(ctx)
		return nil, err
	case inHealth:
		before := r.probes()
		return nil, until(r.patience, "a health check", func() error {
			if now := r.probes(); now <= before {
				return errors.New("there is none")
			}
			return nil
		})
	case inRestart:
		return nil, r.crash(ctx)
	}
	// Of stop and clean-up.
	sub, err := r.stoppable(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.ask(ctx, sub); err != nil {
		return nil, err
	}
	err = until(r.patience, "the stop to begin", func() error {
		said := r.s.testimony(sub.id)
		if phase == inStop && len(said.terms) == 0 || phase == inCleanup && last(said.ends, "main") == 0 {
			return fmt.Errorf("it said %+v", said)
		}
		return nil
	})
	if phase == inCleanup {
		pause(ctx, r.upTo(200*time.Millisecond))
	}
	return nil, err
}

func (r *run) upTo(d time.Duration) time.Duration { return time.Duration(r.rnd.Int64N(int64(d))) }

// probes counts the health checks that have run so far.
func (r *run) probes() (n int) {
	for _, k := range append(append([]*subject(nil), r.keepers...), r.subjects...) {
		b, _ := os.ReadFile(filepath.Join(r.s.witness, k.id+".probe"))
		n += strings.Count(string(b), "\n")
	}
	return n
}

// crash lets a keeper crash that has run long enough for its policy to restart
// it; where there is none, the agent is restarted with clocks so much later.
func (r *run) crash(ctx context.Context) error {
	sub := r.keepers[r.rnd.IntN(len(r.keepers))]
	if err := r.awaitUp(ctx, sub); err != nil {
		return err
	}
	if err := r.age(ctx, sub); err != nil {
		return err
	}
	n := last(r.s.testimony(sub.id).starts, "main")
	r.o.mu.Lock()
	sub.crashes++
	r.o.mu.Unlock()
	r.journal("task %s crashes in attempt %d", sub.id, n)
	if err := os.WriteFile(filepath.Join(r.s.witness, fmt.Sprintf("%s.crash.%d", sub.id, n)), nil, 0o644); err != nil {
		return err
	}
	err := until(r.patience, "the crash", func() error {
		if last(r.s.testimony(sub.id).ends, "main") < n {
			return errors.New("it runs")
		}
		return nil
	})
	pause(ctx, r.upTo(400*time.Millisecond))
	return err
}

// age makes sure that the agent believes a keeper's attempt to have run for
// long enough.
func (r *run) age(ctx context.Context, sub *subject) error {
	pids := alive()[who{sub.id, "main", last(r.s.testimony(sub.id).starts, "main")}]
	if len(pids) != 1 {
		return fmt.Errorf("task %s has processes %v", sub.id, pids)
	}
	key := fmt.Sprintf("%s %d", sub.id, pids[0])
	if r.s.aged[key] {
		return nil
	}
	// Damage makes the agent count anew.
	if info, err := os.Stat(fmt.Sprintf("/proc/%d", pids[0])); err == nil && min(time.Since(info.ModTime()), time.Since(r.s.young[sub.id])) > minAge*time.Second {
		return nil
	}
	if slices.ContainsFunc(r.active, func(a active) bool { return a.kind.class.excludes(ofDevice) }) {
		return errors.New("the device has another fault")
	}
	r.journal("the device sleeps for %d s, so that task %s is old enough", minAge, sub.id)
	if err := r.s.stopAgent(); err != nil {
		return err
	}
	r.kills = 0
	r.s.device.awake += minAge
	if err := r.s.startAgent(); err != nil {
		return err
	}
	for _, k := range r.keepers { // whatever runs now is as old
		if n := last(r.s.testimony(k.id).starts, "main"); n > 0 {
			for _, pid := range alive()[who{k.id, "main", n}] {
				r.s.aged[fmt.Sprintf("%s %d", k.id, pid)] = true
			}
		}
	}
	return r.awaitUp(ctx, sub)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
