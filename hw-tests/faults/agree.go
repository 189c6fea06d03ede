package faults

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// bound is how long API and device may differ once every fault is healed. A
// session over TCP that is idle learns with its next keepalive, after 40 s at the
// most, that a router has forgotten its connection.
const bound = 45 * time.Second

// describe reads a task from the API.
func (s *site) describe(ctx context.Context, id string) (apiTask, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var d struct{ Task apiTask }
	return d.Task, s.api.Call(ctx, "DescribeTask", map[string]any{"id": id}, &d)
}

// settleBound is how long until every task is as it should be: a pull whose
// connection was lost without a word is tried again when TCP has noticed.
const settleBound = 100 * time.Second

// agree waits until the API, the agent and the kernel say the same of every
// task; wanted: and that it is as it should be. It returns how long that took.
func (r *run) agree(ctx context.Context, wanted bool) (time.Duration, error) {
	began, within, what := time.Now(), bound, "API and device to agree"
	if wanted {
		within, what = settleBound, "every task to be as it should"
	}
	err := until(within, what, func() error {
		held, err := r.s.held(ctx)
		if err != nil {
			return err
		}
		mains := alive()
		var errs error
		for _, sub := range append(append([]*subject(nil), r.keepers...), r.subjects...) {
			told, err := r.s.describe(ctx, sub.id)
			if err != nil {
				return err
			}
			if err := r.s.settled(sub, told, held, mains, wanted); err != nil {
				errs = errors.Join(errs, fmt.Errorf("%s %s: %w", sub.breed, sub.id, err))
			}
		}
		return errs
	})
	return time.Since(began), err
}

// settled says what is not yet as it should be with a subject.
func (s *site) settled(sub *subject, told apiTask, held map[string]apiTask, mains map[who][]int, wanted bool) error {
	has, known := held[sub.id]
	want := "RUNNING"
	if sub.asked || sub.breed == oneshot {
		want = "STOPPED"
	}
	if wanted && told.LastStatus != want {
		return fmt.Errorf("the API says %s (%s), not %s; the agent says %q (%s)", told.LastStatus, told.Note, want, has.LastStatus, has.Note)
	}
	if known && has.LastStatus != told.LastStatus {
		return fmt.Errorf("the API says %s, the agent %s", told.LastStatus, has.LastStatus)
	}
	if told.LastStatus == "STOPPED" {
		for w := range mains {
			if w.task == sub.id {
				return fmt.Errorf("it is STOPPED, and %s runs", w)
			}
		}
		return nil
	}
	if !known {
		return errors.New("the agent does not know it, and the API says it is " + told.LastStatus)
	}
	for _, name := range sub.containers {
		a, b := told.container(name), has.container(name)
		if a.Attempt != b.Attempt || a.LastStatus != b.LastStatus || a.PID != b.PID {
			return fmt.Errorf("of container %s the API says %+v, the agent %+v", name, a, b)
		}
		w := who{sub.id, name, b.Attempt}
		if runs := len(mains[w]) == 1; runs != (b.LastStatus == "RUNNING") {
			return fmt.Errorf("container %s is %s, and its processes are %v", w, b.LastStatus, mains[w])
		}
		if wanted && name == "main" && b.LastStatus != "RUNNING" {
			return fmt.Errorf("container main is %s: %s %s", b.LastStatus, b.Reason, has.Note)
		}
	}
	return nil
}

// clear stops every task of this run, with no fault about, and waits until the
// agent has forgotten them.
func (r *run) clear(ctx context.Context, also ...*subject) error {
	all := append(append([]*subject(nil), r.subjects...), also...)
	for _, sub := range all {
		if sub.asked {
			continue
		}
		if err := r.ask(ctx, sub); err != nil {
			return err
		}
	}
	err := until(bound, "all tasks of the run to end and to be forgotten", func() error {
		held, err := r.s.held(ctx)
		if err != nil {
			return err
		}
		for _, sub := range all {
			told, err := r.s.describe(ctx, sub.id)
			if err != nil {
				return err
			}
			if t, known := held[sub.id]; known || told.LastStatus != "STOPPED" {
				return fmt.Errorf("%s %s: the API says %s, the agent %q: %s", sub.breed, sub.id, told.LastStatus, t.LastStatus, t.Note)
			}
		}
		return nil
	})
	for _, sub := range all {
		r.o.audit(sub)
	}
	for _, sub := range r.keepers {
		r.o.audit(sub)
	}
	return err
}
