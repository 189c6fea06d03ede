package process

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// pollEvery is how often processes are looked at on kernels without pidfds,
// before 5.3.
const pollEvery = 50 * time.Millisecond

// watcher notices the end of processes that need not be our children, with one
// thread for all of them, and reaps those that are.
type watcher struct {
	fired func(sdk.Attempt)

	mu      sync.Mutex
	targets map[sdk.Attempt]*target
	wake    int // eventfd, -1 when there is none: then polling is all there is
	running bool

	resolving   map[sdk.Attempt]bool // fired is at it
	subscribers map[*subscriber]struct{}
}

// target is one watched process.
type target struct {
	pid   int
	start uint64
	fd    int // pidfd, -1: poll
}

func newWatcher(fired func(sdk.Attempt)) *watcher {
	w := &watcher{fired: fired, targets: map[sdk.Attempt]*target{}, resolving: map[sdk.Attempt]bool{}, subscribers: map[*subscriber]struct{}{}}
	var err error
	if w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		w.wake = -1
	}
	return w
}

// add watches pid for an attempt, in place of what was watched for it before.
// A process that is gone already fires at once.
func (w *watcher) add(a sdk.Attempt, pid int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t, ok := w.targets[a]; ok {
		if t.pid == pid {
			return
		}
		t.close()
	}
	t := &target{pid: pid, fd: -1}
	// The descriptor first: if the start time is read from a later process of
	// that number, the descriptor fires at once and we look again.
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		t.fd = fd
	}
	if p, err := record.ReadProcess(pid); err == nil {
		t.start = p.Start
	}
	w.targets[a] = t
	if !w.running {
		w.running = true
		go w.loop()
	} else if w.wake >= 0 {
		_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

func (t *target) close() {
	if t.fd >= 0 {
		_ = unix.Close(t.fd)
	}
}

// over says whether the process ended, and reaps it if it was our child.
func (t *target) over(ready bool) bool {
	if !ready {
		p, err := record.ReadProcess(t.pid)
		if err == nil && p.Start == t.start && p.Alive() {
			return false
		}
	}
	var ws unix.WaitStatus
	_, _ = unix.Wait4(t.pid, &ws, unix.WNOHANG, nil)
	return true
}

// loop runs while there is something to watch.
func (w *watcher) loop() {
	for {
		w.mu.Lock()
		if len(w.targets) == 0 {
			w.running = false
			w.mu.Unlock()
			return
		}
		timeout := -1
		fds := []unix.PollFd{{Fd: int32(w.wake), Events: unix.POLLIN}}
		watched := []sdk.Attempt{{}}
		for a, t := range w.targets {
			if t.fd < 0 || w.wake < 0 {
				timeout = int(pollEvery / time.Millisecond)
			}
			fds = append(fds, unix.PollFd{Fd: int32(t.fd), Events: unix.POLLIN}) // negative ones are ignored
			watched = append(watched, a)
		}
		w.mu.Unlock()

		if _, err := unix.Poll(fds, timeout); err != nil && !errors.Is(err, unix.EINTR) {
			time.Sleep(pollEvery) // out of memory: do not spin
		}
		if fds[0].Revents != 0 {
			var buf [8]byte
			_, _ = unix.Read(w.wake, buf[:])
		}
		w.mu.Lock()
		for i, a := range watched {
			t, ok := w.targets[a]
			if i == 0 || !ok || int32(t.fd) != fds[i].Fd {
				continue // replaced while we waited
			}
			ready := fds[i].Revents != 0
			if (ready || t.fd < 0) && t.over(ready) {
				t.close()
				delete(w.targets, a)
				w.fire(a)
			}
		}
		w.mu.Unlock()
	}
}

// fire calls fired once at a time for an attempt. w.mu is held.
func (w *watcher) fire(a sdk.Attempt) {
	if w.resolving[a] {
		return
	}
	w.resolving[a] = true
	go func() {
		w.fired(a)
		w.mu.Lock()
		delete(w.resolving, a)
		w.mu.Unlock()
	}()
}

// subscriber is one Events call: the attempts it has not been told about.
type subscriber struct {
	mu      sync.Mutex
	changed map[sdk.Attempt]struct{}
	ready   chan struct{} // holds one token while changed is not empty
}

func (w *watcher) publish(a sdk.Attempt) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for s := range w.subscribers {
		s.mu.Lock()
		s.changed[a] = struct{}{}
		s.mu.Unlock()
		select {
		case s.ready <- struct{}{}:
		default:
		}
	}
}

// Events calls f with attempts that ended, until ctx does.
func (r *Runtime) Events(ctx context.Context, f func(sdk.Attempt)) error {
	s := &subscriber{changed: map[sdk.Attempt]struct{}{}, ready: make(chan struct{}, 1)}
	r.watch.mu.Lock()
	r.watch.subscribers[s] = struct{}{}
	r.watch.mu.Unlock()
	defer func() {
		r.watch.mu.Lock()
		delete(r.watch.subscribers, s)
		r.watch.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ready:
		}
		s.mu.Lock()
		changed := s.changed
		s.changed = map[sdk.Attempt]struct{}{}
		s.mu.Unlock()
		for a := range changed {
			f(a)
		}
	}
}

// watchFor keeps an eye on an attempt that runs, or that has just ended and
// whose exit is not on record yet.
func (r *Runtime) watchFor(a *attempt, o observation) {
	switch {
	case o.phase != phaseRunning:
	case o.watch != 0:
		r.watch.add(a.Attempt, o.watch)
	default:
		r.watch.mu.Lock()
		r.watch.fire(a.Attempt)
		r.watch.mu.Unlock()
	}
}

// watchAll takes up what an earlier process of this plugin started. What
// cannot be read now is reported by List.
func (r *Runtime) watchAll(ctx context.Context) {
	if _, err := r.List(ctx); err != nil {
		r.log.Warn("could not look at what runs already", "error", err)
	}
}

// exited is called when a watched process has ended. systemd, and the plugin
// itself for an orphan, need a moment until the exit is on record.
func (r *Runtime) exited(id sdk.Attempt) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	defer r.watch.publish(id)
	a, err := r.attemptOf("watch", id)
	if err != nil {
		return
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		known, err := a.known()
		if err != nil || !known {
			return
		}
		o, err := r.observe(ctx, a)
		if err == nil && o.phase != phaseRunning {
			return
		}
		if err == nil && o.watch != 0 {
			if p, perr := record.ReadProcess(o.watch); perr == nil && p.Alive() {
				r.watch.add(id, o.watch) // an orphan now, or still being cleaned up after
				return
			}
		}
		if pause(ctx, wait) != nil {
			return
		}
	}
}
