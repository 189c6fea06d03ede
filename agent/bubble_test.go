package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// bubble is an agent in a synctest bubble, on time that is not real.
type bubble struct {
	*Agent
	t        *testing.T
	clock    *bubbleClock
	runtime  *fakeRuntime
	journal  *simJournal
	outputs  *fakeOutputs
	log      logged
	mu       sync.Mutex
	statuses map[string][]*wire.TaskStatus
	stop     func() error
}

type bubbleClock struct {
	began  time.Time
	stalls atomic.Int32 // timers set that wait for a pull to stall
}

func (c *bubbleClock) Now() time.Duration { return time.Since(c.began) + time.Minute }
func (c *bubbleClock) When() *wire.When   { return &wire.When{} }
func (c *bubbleClock) BootID() string     { return "boot" }
func (c *bubbleClock) After(d time.Duration) <-chan time.Time {
	if d == pullStall {
		c.stalls.Add(1)
	}
	return time.After(d)
}

// logged is what the agent has logged.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

// fakeRuntime scripts what calls answer; what is not scripted goes well.
type fakeRuntime struct {
	*simRuntime
	mu      sync.Mutex
	log     []string // calls, with their time
	since   func() time.Duration
	pull    func(context.Context, func(sdk.PullProgress)) error
	start   func(sdk.StartRequest) error
	exec    func() (sdk.ExecResult, error)
	halt    func() // before a Stop
	events  chan sdk.Attempt
	started []sdk.StartRequest
}

func (r *fakeRuntime) note(format string, args ...any) {
	r.log = append(r.log, fmt.Sprintf("%v ", r.since().Round(time.Millisecond))+fmt.Sprintf(format, args...))
}

func (r *fakeRuntime) Runtime(string) (sdk.Runtime, error) { return r, nil }

func (r *fakeRuntime) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.simRuntime.PrepareTask(ctx, t)
}

func (r *fakeRuntime) RemoveTask(ctx context.Context, t string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.simRuntime.RemoveTask(ctx, t)
}

func (r *fakeRuntime) List(ctx context.Context) (sdk.Inventory, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.simRuntime.List(ctx)
}

func (r *fakeRuntime) Remove(ctx context.Context, a sdk.Attempt) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.simRuntime.Remove(ctx, a)
}

func (r *fakeRuntime) Pull(ctx context.Context, q sdk.PullRequest, p func(sdk.PullProgress)) (sdk.Image, error) {
	r.mu.Lock()
	r.note("pull %s", q.Image)
	r.mu.Unlock()
	if r.pull != nil {
		if err := r.pull(ctx, p); err != nil {
			return sdk.Image{}, err
		}
	}
	return sdk.Image{Reference: q.Image, Digest: "sha256:1"}, nil
}

func (r *fakeRuntime) Start(ctx context.Context, q sdk.StartRequest) (sdk.Container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.note("start %s/%d", q.Attempt.Container, q.Attempt.Number)
	r.started = append(r.started, q)
	if r.start != nil {
		if err := r.start(q); err != nil {
			return sdk.Container{}, err
		}
	}
	return r.simRuntime.Start(ctx, q)
}

func (r *fakeRuntime) Stop(ctx context.Context, a sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	if r.halt != nil {
		r.halt()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.note("stop %s/%d %v", a.Container, a.Number, grace)
	return r.simRuntime.Stop(ctx, a, grace)
}

func (r *fakeRuntime) Exec(context.Context, sdk.ExecRequest) (sdk.ExecResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.note("exec")
	if r.exec != nil {
		return r.exec()
	}
	return sdk.ExecResult{}, nil
}

func (r *fakeRuntime) Events(ctx context.Context, f func(sdk.Attempt)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case a := <-r.events:
			f(a)
		}
	}
}

// dies ends a container as a process ends, with an event.
func (r *fakeRuntime) dies(container string, code int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for a, c := range r.containers {
		if a.Container == container && c.state == sdk.StateRunning {
			r.exit(a, &code)
			r.events <- a
		}
	}
}

type fakeOutputs struct {
	nowhere
	content map[string]string
}

func (o *fakeOutputs) Read(a sdk.Attempt, stream string) (io.ReadCloser, error) {
	s, ok := o.content[a.String()+" "+stream]
	if !ok {
		return nil, sdk.NotFound
	}
	return io.NopCloser(strings.NewReader(s)), nil
}

func (b *bubble) TaskStatus(s *wire.TaskStatus) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.statuses[s.GetTaskId()] = append(b.statuses[s.GetTaskId()], s)
}

func (b *bubble) AckAssignments(string, uint64) {}

// last is what was last said about the only task.
func (b *bubble) last() *wire.TaskStatus {
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.statuses[id(1)]
	if len(all) == 0 {
		return &wire.TaskStatus{}
	}
	return all[len(all)-1]
}

func (b *bubble) calls() []string {
	b.runtime.mu.Lock()
	defer b.runtime.mu.Unlock()
	return append([]string{}, b.runtime.log...)
}

func newBubble(t *testing.T, jitter float64, set ...func(*Config)) *bubble {
	j := newSimJournal()
	began := time.Now()
	b := &bubble{
		t: t, clock: &bubbleClock{began: began}, journal: j, statuses: map[string][]*wire.TaskStatus{},
		outputs: &fakeOutputs{content: map[string]string{}},
		runtime: &fakeRuntime{
			simRuntime: newSimRuntime(j), events: make(chan sdk.Attempt, 10),
			since: func() time.Duration { return time.Since(began) },
		},
	}
	cfg := Config{
		Runtimes: b.runtime, Journal: j, Uplink: b, Outputs: b.outputs, Volumes: nowhere{}, Clock: b.clock,
		InstanceID: "device", Jitter: func() float64 { return jitter }, Logger: slog.New(slog.NewTextHandler(&b.log, nil)),
	}
	for _, f := range set {
		f(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.Agent = a
	a.Connected(true)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	b.stop = func() error { cancel(); return <-ended }
	t.Cleanup(func() {
		if err := b.stop(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *bubble) stopsOnce() { b.stop = func() error { return nil } }

func (b *bubble) assign(a *wire.Assignment) {
	b.t.Helper()
	if err := b.Assign(context.Background(), "one", false, []*wire.Assignment{a}, a.GetSequence()); err != nil {
		b.t.Fatal(err)
	}
}

func running(spec *wire.TaskSpec) *wire.Assignment {
	return &wire.Assignment{Sequence: 1, TaskId: id(1), Desired: "RUNNING", Spec: spec}
}

func essential(name string) *wire.Container {
	return &wire.Container{Name: name, Image: name + ":1", Essential: true}
}
