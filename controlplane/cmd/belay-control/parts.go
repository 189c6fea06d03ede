package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// parts are the long-lived loops of the process. They are stopped one by one,
// the latest first, since each stands on those before it.
type parts struct {
	log  *slog.Logger
	all  []part
	fail chan error
}

type part struct {
	name string
	stop func() error // returns once the part has ended
}

// run starts a loop that ends with its context.
func (p *parts) run(name string, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	fail := p.failed()
	go func() {
		err := f(ctx)
		if ctx.Err() == nil {
			if err == nil {
				err = errors.New("it ended by itself")
			}
			select {
			case fail <- fmt.Errorf("%s: %w", name, err):
			default:
			}
		}
		done <- err
	}()
	p.onStop(name, func() error { cancel(); return <-done })
}

func (p *parts) onStop(name string, stop func() error) { p.all = append(p.all, part{name, stop}) }

// failed delivers the first failure of a loop.
func (p *parts) failed() chan error {
	if p.fail == nil {
		p.fail = make(chan error, 1)
	}
	return p.fail
}

// stop ends all parts and returns err, joined by what went wrong in that.
// What does not end in time is named and left behind.
func (p *parts) stop(err error) error {
	deadline := time.NewTimer(stopDeadline)
	defer deadline.Stop()
	for i := len(p.all) - 1; i >= 0; i-- {
		part, done := p.all[i], make(chan error, 1)
		go func() { done <- part.stop() }()
		select {
		case e := <-done:
			if e != nil && err == nil {
				err = fmt.Errorf("stopping %s: %w", part.name, e)
			}
			p.log.Debug("stopped", "part", part.name)
		case <-deadline.C:
			return errors.Join(err, fmt.Errorf("shutdown took longer than %s: %s did not end", stopDeadline, part.name))
		}
	}
	return err
}
