package faults

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// observer looks at device and API all the time and holds both to what must
// never be otherwise.
type observer struct {
	s *site

	mu       sync.Mutex
	subjects map[string]*subject
	checks   map[string]int
	broken   []string
	said     map[string]bool
	api      map[string]*seen     // by task
	device   map[string]*seen     // by task
	mains    map[who]sighting     // processes alive at the last look
	now      map[string]apiTask   // the agent's word at the last look
	rewatch  chan struct{}        // holds one token when subjects were added
	blind    int                  // looks at which the agent did not answer
	journal  func(string, ...any) // what happens, with its time
}

// seen is the furthest that somebody said a task had come.
type seen struct {
	status, desired string
	attempts        map[string]int
	end             string // what was said of it when it was STOPPED
}

type sighting struct {
	pid  int
	boot int
}

const looks = 150 * time.Millisecond

func newObserver(s *site, journal func(string, ...any)) *observer {
	return &observer{s: s, subjects: map[string]*subject{}, checks: map[string]int{}, said: map[string]bool{}, api: map[string]*seen{},
		device: map[string]*seen{}, mains: map[who]sighting{}, rewatch: make(chan struct{}, 1), journal: journal}
}

// follow adds a subject.
func (o *observer) follow(sub *subject) {
	o.mu.Lock()
	o.subjects[sub.id] = sub
	o.mu.Unlock()
	select {
	case o.rewatch <- struct{}{}:
	default:
	}
}

// forget ends the observation of a subject that is gone.
func (o *observer) forget(id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.subjects, id)
	delete(o.api, id)
	delete(o.device, id)
}

// excuse lets the agent begin anew with a task whose record was damaged.
func (o *observer) excuse(id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.journal("the record of task %s is damaged", id)
	delete(o.device, id)
	if sub := o.subjects[id]; sub != nil {
		sub.damaged = true
	}
}

// violation notes what must not be, once.
func (o *observer) violation(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if o.said[text] {
		return
	}
	o.said[text] = true
	o.broken = append(o.broken, text)
	o.journal("VIOLATION %s", text)
}

// violate is violation for callers without the lock.
func (o *observer) violate(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.violation(format, args...)
}

func (o *observer) violations() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.broken)
}

// run looks until ctx ends.
func (o *observer) run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() { o.listen(ctx) })
	tick := time.NewTicker(looks)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			o.look(ctx)
		}
	}
}

// listen keeps a watch on every subject in the API.
func (o *observer) listen(ctx context.Context) {
	for ctx.Err() == nil {
		o.mu.Lock()
		var ids []string
		for id := range o.subjects {
			ids = append(ids, id)
		}
		o.mu.Unlock()
		stream, cancel := context.WithCancel(ctx)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if len(ids) == 0 {
				<-stream.Done()
				return
			}
			// However it ends, the next one begins with everything.
			_ = o.s.watch(stream, ids, func(t apiTask) {
				o.mu.Lock()
				defer o.mu.Unlock()
				o.heard("the API", o.api, t)
			})
			select { // one that ends at once shall not be asked for at once
			case <-stream.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}()
		select {
		case <-ended:
		case <-o.rewatch:
		case <-ctx.Done():
		}
		cancel()
		<-ended
	}
}

// heard holds one word about a task to the ones before it.
func (o *observer) heard(by string, of map[string]*seen, t apiTask) {
	sub := o.subjects[t.ID]
	if sub == nil {
		return
	}
	before := of[t.ID]
	if before == nil {
		before = &seen{attempts: map[string]int{}}
		of[t.ID] = before
	}
	if by == "the agent" && before.end != "" && unheardOf(t) {
		// Forgotten and heard of again between two looks.
		before.attempts, before.end = map[string]int{}, ""
	}
	o.checks["no status goes backwards"]++
	if rank(t.LastStatus) < rank(before.status) {
		o.violation("%s: task %s (%s) went from %s back to %s", by, t.ID, sub.breed, before.status, t.LastStatus)
	}
	if before.desired == "STOPPED" && t.DesiredStatus != "STOPPED" {
		o.violation("%s: task %s (%s), which was to stop, is to be %s again", by, t.ID, sub.breed, t.DesiredStatus)
	}
	for _, c := range t.Containers {
		if c.Attempt < before.attempts[c.Name] {
			o.violation("%s: container %s of task %s went from attempt %d back to %d", by, c.Name, t.ID, before.attempts[c.Name], c.Attempt)
		}
		before.attempts[c.Name] = max(before.attempts[c.Name], c.Attempt)
	}
	o.checks["no task stops that was not asked to"]++
	if rank(t.LastStatus) > rank("RUNNING") && !sub.asked {
		c := t.container("main")
		ended := sub.breed == oneshot && c.ExitCode != nil && *c.ExitCode == exitWith
		// An agent that has forgotten a task that ended, and is sent all there
		// is, hears that it is to stop and no more.
		if told := o.api[t.ID]; told != nil && told.status == "STOPPED" {
			ended = true
		}
		if !ended {
			o.violation("%s: task %s (%s) is %s and nobody asked for it: %s %s", by, t.ID, sub.breed, t.LastStatus, t.StopCode, t.StoppedReason)
		}
	}
	if t.LastStatus == "STOPPED" {
		end := t.StopCode + " " + t.StoppedReason
		for _, c := range t.Containers {
			code := "none"
			if c.ExitCode != nil {
				code = fmt.Sprint(*c.ExitCode)
			}
			end += fmt.Sprintf("; %s attempt %d exit %s", c.Name, c.Attempt, code)
		}
		if before.end != "" && before.end != end && len(t.Containers) > 0 { // else it is heard of again
			o.violation("%s: what is told of stopped task %s changed from %q to %q", by, t.ID, before.end, end)
		}
		before.end = end
	}
	before.status, before.desired = t.LastStatus, t.DesiredStatus
}

// unheardOf tells a task that ended of which an agent knows no more than that:
// one that it has forgotten, and was then told to stop.
func unheardOf(t apiTask) bool {
	return t.LastStatus == "STOPPED" && !slices.ContainsFunc(t.Containers, func(c apiContainer) bool { return c.Attempt > 0 })
}

// look samples the device once.
func (o *observer) look(ctx context.Context) {
	boot := int(o.s.device.boots.Load())
	dark := o.s.device.dark.Load() // after boots: see cut
	mains := alive()
	held, err := o.s.held(ctx)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.checks["looks at the device"]++
	if err != nil {
		o.blind++
	} else {
		o.now = held
		for id := range o.device {
			if _, ok := held[id]; !ok {
				// It is forgotten; a control plane that is asked for all of
				// its tasks tells of those that ended, too.
				delete(o.device, id)
			}
		}
		for _, t := range held {
			o.heard("the agent", o.device, t)
		}
	}
	if dark || boot != int(o.s.device.boots.Load()) {
		o.mains = map[who]sighting{} // it was rebooted meanwhile
		return
	}
	running := map[string][]who{} // by task and container
	for w, pids := range mains {
		o.checks["no container runs twice"]++
		sub := o.subjects[w.task]
		if len(pids) > 1 {
			o.violation("attempt %s runs %d times: processes %v", w, len(pids), pids)
		}
		running[w.task+"/"+w.container] = append(running[w.task+"/"+w.container], w)
		if s, ok := o.mains[w]; ok && s.boot == boot && s.pid != pids[0] {
			o.violation("attempt %s was started again: it was process %d and is process %d", w, s.pid, pids[0])
		}
		if sub != nil && sub.runtime() == "containerd" {
			o.checks["what runs has its network"]++
			if missing := o.s.network(w); missing != "" && alive1(pids[0]) && boot == int(o.s.device.boots.Load()) {
				o.violation("%s (%s) runs and %s", w, sub.breed, missing)
			}
		}
		if sub != nil {
			o.checks["no more attempts than crashes and reboots"]++
			if most := 1 + sub.crashes + boot - sub.bornAt; w.attempt > most {
				o.violation("%s is attempt %d, with %d crashes and %d reboots", w, w.attempt, sub.crashes, boot-sub.bornAt)
			}
		}
	}
	for name, attempts := range running {
		if len(attempts) > 1 {
			o.violation("%s runs in %d attempts at the same time: %v", name, len(attempts), attempts)
		}
	}
	for w, s := range o.mains {
		sub := o.subjects[w.task]
		if sub == nil || s.boot != boot || len(mains[w]) > 0 {
			continue
		}
		o.checks["no container is killed"]++
		said := o.s.testimony(w.task)
		name := fmt.Sprintf("%s %d", w.container, w.attempt)
		switch {
		case sub.asked:
		case said.ends[name] == 0:
			o.violation("%s (%s) was killed: it is gone and has not said its end", w, sub.breed)
		case said.terms[name] > 0:
			o.violation("%s (%s) was told to end, and nobody had asked for it", w, sub.breed)
		}
	}
	clear(o.mains)
	for w, pids := range mains {
		o.mains[w] = sighting{pids[0], boot}
	}
}

// audit looks at all that a subject has said so far.
func (o *observer) audit(sub *subject) {
	said := o.s.testimony(sub.id)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.checks["each attempt started once"]++
	for name, n := range said.starts {
		// Of a container that ended before the damage, nothing tells.
		if n > 1 && !(sub.damaged && strings.HasPrefix(name, "first ")) {
			o.violation("task %s (%s): attempt %q was started %d times", sub.id, sub.breed, name, n)
		}
	}
	if t := o.now[sub.id]; sub.breed == oneshot && o.api[sub.id] != nil && o.api[sub.id].status == "STOPPED" && !sub.asked {
		o.checks["an exit is not lost"]++
		if !strings.Contains(o.api[sub.id].end, fmt.Sprintf("exit %d", exitWith)) {
			o.violation("task %s ended with %d, and the API says %q (the agent: %+v)", sub.id, exitWith, o.api[sub.id].end, t)
		}
	}
}
