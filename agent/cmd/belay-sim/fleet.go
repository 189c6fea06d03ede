package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

type config struct {
	codes     []string
	devices   int
	transport string
	enrolling int
	summary   time.Duration
}

// event is a line of the output.
type event struct {
	At        int64  `json:"at"` // Unix time, ns
	Device    int    `json:"device,omitempty"`
	Up        *bool  `json:"up,omitempty"`
	Transport string `json:"transport,omitempty"`
	Enrolled  int    `json:"enrolled,omitempty"`
	Connected int    `json:"connected,omitempty"`
}

// fleet is all the devices.
type fleet struct {
	config
	notes io.Writer

	mu    sync.Mutex
	out   *bufio.Writer
	up    int
	whole bool // all were connected once
}

func newFleet(c config, out, notes io.Writer) *fleet {
	return &fleet{config: c, notes: notes, out: bufio.NewWriter(out)}
}

// run enrols the devices and keeps their tunnels until ctx ends.
func (f *fleet) run(ctx context.Context) error {
	if err := f.moreFiles(); err != nil {
		return err
	}
	devices, err := f.enrol(ctx)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.tell(event{Enrolled: len(devices)})
	f.mu.Unlock()
	var all sync.WaitGroup
	for _, d := range devices {
		all.Go(func() { _ = d.link.Run(ctx) }) // nil: it ends with ctx
	}
	all.Go(func() { f.summarize(ctx) })
	all.Wait()
	return nil
}

// moreFiles raises the limit of open files to what so many devices take. With
// fewer than two each, tries of many at once fail for want of one, and are
// repeated.
func (f *fleet) moreFiles() error {
	want, least := uint64(2*f.devices+256), uint64(f.devices+f.devices/4+256)
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	if l.Cur >= want {
		return nil
	}
	raised := unix.Rlimit{Cur: want, Max: max(l.Max, want)}
	err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised)
	if err != nil && l.Max >= least {
		fmt.Fprintf(f.notes, "%d devices would like %d open files and may have %d\n", f.devices, want, l.Max)
		l.Cur = l.Max
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	}
	if err != nil {
		return fmt.Errorf("%d devices need %d open files, better %d: %w: raise the hard limit, or run as root", f.devices, least, want, err)
	}
	return nil
}

// enrol makes every device an instance, some of them at a time.
func (f *fleet) enrol(ctx context.Context) ([]*device, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	devices := make([]*device, f.devices)
	next := make(chan int)
	var all sync.WaitGroup
	for range f.enrolling {
		all.Go(func() {
			for n := range next {
				d, err := f.enrolOne(ctx, n)
				if err != nil {
					cancel(fmt.Errorf("device %d: %w", n, err))
					return
				}
				devices[n-1] = d
			}
		})
	}
feeding:
	for n := 1; n <= f.devices; n++ {
		select {
		case next <- n:
		case <-ctx.Done():
			break feeding
		}
		if n%1000 == 0 {
			fmt.Fprintf(f.notes, "%d devices of %d enrolled\n", n, f.devices)
		}
	}
	close(next)
	all.Wait()
	return devices, context.Cause(ctx)
}

// perCode is how many devices one activation takes at most.
const perCode = 1000

func (f *fleet) enrolOne(ctx context.Context, number int) (*device, error) {
	which := (number - 1) / perCode
	if which >= len(f.codes) {
		return nil, fmt.Errorf("there are %d activations, for %d devices: one is needed for every %d", len(f.codes), f.devices, perCode)
	}
	key, err := carrier.NewKey()
	if err != nil {
		return nil, err
	}
	machine := fmt.Sprintf("sim-%05d", number)
	ask := link.EnrollConfig{
		Code: f.codes[which], Key: key, Transport: f.transport,
		HashedMachineID: machine, AgentVersion: "sim", Hostname: machine, Facts: facts(number),
	}
	var e link.Enrollment
	for try := 0; ; try++ {
		if e, err = link.Enroll(ctx, ask); err == nil {
			break
		}
		// Asking again with the same key is harmless.
		if refused := errors.Is(err, link.ErrRefused) && wire.CodeOf(err) != wire.CodeOverloaded; refused || try == 5 || ctx.Err() != nil {
			return nil, err
		}
		var told *wire.Error
		wait := time.Second
		if errors.As(err, &told) {
			wait = cmp.Or(told.RetryAfter, wait)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
	d := &device{number: number, fleet: f, tasks: map[string]*wire.Assignment{}}
	d.link, err = link.New(link.Config{
		InstanceID: e.InstanceID, Key: key, Pins: []wire.Pin{e.Pin}, Addresses: e.Addresses, Transport: f.transport,
		AgentVersion: "sim", HashedMachineID: machine, Facts: facts(number),
	})
	if err != nil {
		return nil, err
	}
	d.link.Attach(d)
	return d, nil
}

// connected counts, and tells of every change.
func (f *fleet) connected(d *device, up bool) {
	transport := ""
	if up {
		transport = d.link.Status().Transport
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if up {
		f.up++
	} else {
		f.up--
	}
	f.tell(event{Device: d.number, Up: &up, Transport: transport})
	if f.up == f.devices && !f.whole {
		f.whole = true
		f.tell(event{Connected: f.up})
		_ = f.out.Flush()
	}
}

// moved tells of the session that a device has now.
func (f *fleet) moved(d *device) {
	up, transport := true, d.link.Status().Transport
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tell(event{Device: d.number, Up: &up, Transport: transport})
}

// tell writes a line; f.mu is held. Nobody reading is no reason to stop.
func (f *fleet) tell(e event) {
	e.At = time.Now().UnixNano()
	b, err := json.Marshal(e)
	if err != nil {
		return
	}
	_, _ = f.out.Write(append(b, '\n'))
}

func (f *fleet) summarize(ctx context.Context) {
	tick := time.NewTicker(f.summary)
	defer tick.Stop()
	last := -1
	for {
		select {
		case <-ctx.Done():
			f.mu.Lock()
			_ = f.out.Flush()
			f.mu.Unlock()
			return
		case <-tick.C:
		}
		f.mu.Lock()
		_ = f.out.Flush()
		up := f.up
		f.mu.Unlock()
		if up != last {
			fmt.Fprintf(f.notes, "%d of %d connected\n", up, f.devices)
			last = up
		}
	}
}
