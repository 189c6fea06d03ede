package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// Campaign is a number of seeded runs.
type Campaign struct {
	Bin   rig.Binaries
	Seed  uint64
	First int // the run to begin with, to play one again
	Runs  int
	// Whole is after how many runs the site is taken down and looked at, and a
	// new one is made: 25.
	Whole int
	Log   func(format string, args ...any)
	// Bug is one planted in binaries that were built with it, if any.
	Bug string
}

// Run runs the campaign on one site after the other. It ends at the first
// violation, which is in the report.
func (c Campaign) Run(ctx context.Context) (*Report, error) {
	if c.Whole == 0 {
		c.Whole = 25
	}
	rep := newReport(c.Seed)
	for n := c.First; n < c.First+c.Runs && len(rep.Violations) == 0 && ctx.Err() == nil; {
		most := min(c.Whole, c.First+c.Runs-n)
		done, err := c.site(ctx, rep, n, most)
		if err != nil {
			return rep, err
		}
		n += done
	}
	return rep, ctx.Err()
}

// site makes a site, does up to so many runs on it, and looks at what is left.
func (c Campaign) site(ctx context.Context, rep *Report, first, runs int) (done int, err error) {
	dir, err := os.MkdirTemp("", "faults-")
	if err != nil {
		return 0, err
	}
	j := &journal{out: c.Log, began: time.Now()}
	if j.file, err = os.Create(filepath.Join(dir, "journal")); err != nil {
		return 0, err
	}
	defer j.file.Close()
	opening, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	s, err := open(opening, c.Bin, c.Bug, dir, "belay-"+filepath.Base(dir))
	if err != nil {
		return 0, fmt.Errorf("open a site (%s is kept): %w", dir, err)
	}
	defer func() {
		err = errors.Join(err, s.close())
		if err == nil && len(rep.Violations) == 0 {
			err = os.RemoveAll(dir)
		} else {
			c.Log("kept for a look: %s", dir)
		}
	}()
	base, err := s.baseline(opening)
	if err != nil {
		return 0, err
	}
	o := newObserver(s, j.say)
	s.damaged = o.excuse
	watching, unwatch := context.WithCancel(ctx)
	var watched sync.WaitGroup
	watched.Go(func() { o.run(watching) })
	defer watched.Wait()
	defer unwatch()

	r := &run{s: s, o: o, seed: c.Seed, n: first, rnd: dice(c.Seed, -1), hit: rep.Hit, missed: rep.Missed, journal: j.say, patience: reachWithin}
	for range 2 {
		if err := r.launch(ctx, &subject{breed: keeper, health: true}); err != nil {
			return 0, err
		}
	}
	for ; done < runs && ctx.Err() == nil && len(o.violations()) == 0; done++ {
		r.n, r.rnd, r.subjects = first+done, dice(c.Seed, first+done), nil
		began := time.Now()
		took, err := r.play(ctx)
		if err != nil && ctx.Err() == nil {
			o.violate("run %d: %v", r.n, err)
		}
		rep.run(r.n, time.Since(began), took)
		state := "ok"
		if v := o.violations(); len(v) > 0 {
			state = "VIOLATION " + v[0]
		}
		c.Log("run %d of seed %d: %s in %.1fs, agreed after %s: %s", r.n, c.Seed, r.drawn(), time.Since(began).Seconds(), took.Round(time.Millisecond), state)
	}
	if len(o.violations()) == 0 && ctx.Err() == nil {
		if err := r.finish(ctx, base); err != nil {
			o.violate("after run %d: %v", r.n, err)
		}
	}
	unwatch()
	watched.Wait()
	rep.add(o, dir)
	rep.settled = append(rep.settled, r.settled...)
	return done, nil
}

// play is one run: its faults, then agreement, then the end of its tasks.
func (r *run) play(ctx context.Context) (took time.Duration, err error) {
	r.journal("run %d", r.n)
	r.s.rnd = r.rnd
	defer func() { err = errors.Join(err, r.heal()) }()
	for _, b := range []breed{long, process, pair, oneshot}[:1+r.rnd.IntN(3)] {
		if err := r.launch(ctx, &subject{breed: b, health: true}); err != nil {
			return 0, err
		}
	}
	for _, c := range deal(r.seed, r.n) {
		if err := r.step(ctx, c, r.rnd.IntN(4) == 0); err != nil {
			return 0, err
		}
		if len(r.o.violations()) > 0 || ctx.Err() != nil {
			return 0, nil
		}
	}
	if err := r.heal(); err != nil {
		return 0, err
	}
	r.journal("all is healed")
	owed := r.owed
	r.owed = nil
	for _, sub := range owed {
		if err := r.ask(ctx, sub); err != nil {
			return 0, err
		}
	}
	if took, err = r.agree(ctx, false); err != nil {
		return took, err
	}
	r.journal("API and device agree after %s", took)
	settled, err := r.agree(ctx, true)
	r.settled = append(r.settled, took+settled)
	if err != nil {
		return took, err
	}
	r.journal("every task is as it should be after %s", took+settled)
	if err := r.clear(ctx); err != nil {
		return took, err
	}
	for _, sub := range r.subjects {
		r.o.forget(sub.id)
	}
	return took, r.s.leaks(r.keepers)
}

func (r *run) drawn() string {
	var all []string
	for _, c := range deal(r.seed, r.n) {
		all = append(all, kinds[c.kind].name+"@"+c.phase)
	}
	return strings.Join(all, " ")
}

// baseline is what the processes of Belay have when there is nothing to do.
type baseline struct {
	open       map[string]counts
	goroutines map[string]map[string]int
}

// told makes agent and control plane tell of their goroutines, which ends them.
func (s *site) told() (map[string]map[string]int, error) {
	all := map[string]map[string]int{}
	size := func(path string) int64 {
		if i, err := os.Stat(path); err == nil {
			return i.Size()
		}
		return 0
	}
	var err error
	agent := filepath.Join(s.dir, "agent.log")
	if all["agent"], err = goroutines(agent, size(agent), func() error {
		if err := s.device.signal("agent", syscall.SIGQUIT); err != nil {
			return err
		}
		return s.device.gone("agent", 10*time.Second)
	}); err != nil {
		return nil, err
	}
	all["control"], err = goroutines(s.control.Log, size(s.control.Log), func() error {
		if err := s.control.Signal(syscall.SIGQUIT); err != nil {
			return err
		}
		<-s.control.Done()
		return nil
	})
	return all, err
}

// baseline measures a site before anything has happened on it.
func (s *site) baseline(ctx context.Context) (b baseline, err error) {
	if b.open, err = s.measure(); err != nil {
		return b, err
	}
	if b.goroutines, err = s.told(); err != nil {
		return b, err
	}
	if err := s.control.Restart(ctx); err != nil {
		return b, err
	}
	if err := s.startAgent(); err != nil {
		return b, err
	}
	_, err = s.cli.Connected(ctx, cluster, 1, "containerd", "process")
	return b, err
}

// finish ends the keepers too and compares with the beginning.
func (r *run) finish(ctx context.Context, base baseline) error {
	// A little of everything leaves a little of each leak.
	for range 5 {
		if _, err := r.s.control.Stop(20 * time.Second); err != nil {
			return err
		}
		if err := r.s.control.Restart(ctx); err != nil {
			return err
		}
		if err := until(bound, "the device to be connected", func() error {
			var status struct{ Link struct{ Connected bool } }
			if err := r.s.local(ctx, "/v1/status", &status); err != nil {
				return err
			}
			if !status.Link.Connected {
				return errors.New("it is not")
			}
			return nil
		}); err != nil {
			return err
		}
	}
	r.journal("the keepers end")
	if err := r.clear(ctx, r.keepers...); err != nil {
		return err
	}
	if err := r.s.leaks(nil); err != nil {
		return err
	}
	if err := until(bound, "no more open files than at the beginning", func() error {
		now, err := r.s.measure()
		if err != nil {
			return err
		}
		var more []string
		for name, c := range now {
			more = append(more, grown(name, base.open[name], c)...)
		}
		if more != nil {
			return errors.New(strings.Join(more, "; "))
		}
		return nil
	}); err != nil {
		return err
	}
	told, err := r.s.told()
	if err != nil {
		return err
	}
	var more []string
	for name, g := range told {
		more = append(more, moreGoroutines(name, base.goroutines[name], g)...)
	}
	if more != nil {
		return errors.New("goroutines leaked: " + strings.Join(more, "; "))
	}
	r.o.mu.Lock()
	r.o.checks["no leak after everything ended"]++
	r.o.mu.Unlock()
	return nil
}

// journal is what happened on a site, with its time.
type journal struct {
	mu    sync.Mutex
	file  *os.File
	out   func(string, ...any)
	began time.Time
}

func (j *journal) say(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	fmt.Fprintf(j.file, "%s %7.2f  %s\n", time.Now().UTC().Format("15:04:05.000"), time.Since(j.began).Seconds(), fmt.Sprintf(format, args...))
}
