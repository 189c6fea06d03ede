package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// Config is what an Agent is made of. All ports but Devices are needed; the rest
// has defaults.
type Config struct {
	Runtimes Runtimes
	Devices  Devices // nil: containers that ask for devices wait
	Journal  Journal
	Saved    Saved // what the Journal held
	Uplink   Uplink
	Outputs  Outputs
	Volumes  Volumes
	Clock    Clock
	Logger   *slog.Logger

	InstanceID string // told to containers as BELAY_INSTANCE_ID

	// PullGiveUp is how long a task that is not of a service retries what
	// may yet succeed: 5 min.
	PullGiveUp time.Duration
	// KeepStopped is how long a stopped task's output is kept: 1 h.
	KeepStopped time.Duration
	// KeepStoppedTasks is how many stopped tasks are kept at most: 100.
	KeepStoppedTasks int
	// Images says which unused images are removed; zero: those unused for a
	// week, and from 85 % to 80 % of the disk those unused for 2 min.
	Images *ImagePolicy
	// MaxPulls and MaxCalls bound what runs at the same time: 3 pulls, 16
	// calls of each other sort.
	MaxPulls, MaxCalls int
	// ShutdownWait is how long Run waits for calls under way: 10 s.
	ShutdownWait time.Duration
	// Jitter gives numbers in [0,1); nil: random ones.
	Jitter func() float64
	// Watch has a loop watched until done is called: it receives from pulse
	// whenever it waits, and is stuck when it has not for deadline. Nil: none is.
	Watch func(name string, deadline time.Duration) (pulse <-chan struct{}, done func())
	// Mind has a loop watched that waits in calls: it says when it is busy, and
	// is stuck when one piece of work takes longer than deadline. Nil: none is.
	Mind func(name string, deadline time.Duration) (busy func(bool), done func())
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.PullGiveUp, 5*time.Minute)
	set(&c.KeepStopped, time.Hour)
	set(&c.ShutdownWait, 10*time.Second)
	for _, n := range []struct {
		at *int
		v  int
	}{{&c.KeepStoppedTasks, 100}, {&c.MaxPulls, 3}, {&c.MaxCalls, 16}} {
		if *n.at == 0 {
			*n.at = n.v
		}
	}
	if c.Images == nil {
		p := DefaultImagePolicy()
		c.Images = &p
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Agent keeps the assigned tasks running. It implements Downlink.
type Agent struct {
	cfg   Config
	hands *hands
	inbox inbox
	done  chan struct{} // closed when Run has returned

	held struct {
		sync.Mutex
		applied Applied
		mark    Mark
		life    string // of the control plane that welcomed last; "": it knows none
	}

	// Owned by the goroutine of Run.
	state    *State
	started  time.Duration
	slept    time.Duration // of the device since its boot, as last looked at
	sequence uint64
	calls    map[string]context.CancelFunc // pulls under way, by task and container
	running  map[string]int                // calls under way, by sort
	names    map[string]bool               // calls under way, for shutdown
	up       bool
	broken   string              // the journal's last logged error
	refused  string              // the same of an assignment
	unlisted map[string]unlisted // by runtime
}

// New makes an agent of what was saved; Run starts it.
func New(cfg Config) (*Agent, error) {
	for name, missing := range map[string]bool{
		"Runtimes": cfg.Runtimes == nil, "Journal": cfg.Journal == nil, "Uplink": cfg.Uplink == nil,
		"Outputs": cfg.Outputs == nil, "Volumes": cfg.Volumes == nil, "Clock": cfg.Clock == nil,
	} {
		if missing {
			return nil, fmt.Errorf("agent: Config.%s is missing", name)
		}
	}
	cfg = cfg.withDefaults()
	a := &Agent{
		cfg: cfg, done: make(chan struct{}), inbox: newInbox(),
		calls: map[string]context.CancelFunc{}, running: map[string]int{}, names: map[string]bool{},
		unlisted: map[string]unlisted{},
	}
	a.hands = &hands{
		runtimes: cfg.Runtimes, outputs: cfg.Outputs, volumes: cfg.Volumes, devices: cfg.Devices,
		clock: cfg.Clock, instance: cfg.InstanceID, progress: a.inbox.progress,
	}
	a.started = cfg.Clock.Now()
	a.state = newState(Limits{
		PullGiveUp: cfg.PullGiveUp, KeepStopped: cfg.KeepStopped, KeepStoppedTasks: cfg.KeepStoppedTasks,
		Images: *cfg.Images,
	}, cfg.Clock.BootID(), cfg.Saved, a.started, cfg.Jitter)
	a.held.mark = a.state.mark
	a.hold()
	if clock, ok := cfg.Clock.(Sleeper); ok {
		a.slept = a.started - clock.Awake()
	}
	return a, nil
}

// Run keeps the tasks running until ctx ends, which is no error. The tasks'
// containers outlive it.
func (a *Agent) Run(ctx context.Context) error {
	defer close(a.done)
	for _, p := range a.state.Problems {
		a.cfg.Logger.Error("saved state was damaged", "problem", p)
	}
	calls, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var under sync.WaitGroup
	a.watchRuntimes(calls, &under)
	a.watchDevices(calls, &under)
	pulse, unwatch := a.watch("task loop", loopDeadline)
	defer unwatch()
	for ctx.Err() == nil {
		a.turn(calls, &under)
		if bug("stuck-loop") && a.cfg.Clock.Now()-a.started > 3*time.Second {
			select {}
		}
		if !a.wait(ctx, pulse) {
			break
		}
	}
	cancel()
	return a.shutdown(&under)
}

// turn is one pass of the loop: take in what came, decide, write, call, tell.
func (a *Agent) turn(ctx context.Context, under *sync.WaitGroup) {
	now := a.noticeSleep()
	a.absorb(now)
	a.state.told(a.cfg.Clock.When(), now)
	acts, wake, err := a.state.step(a.cfg.Journal, now)
	a.logJournal(err)
	halts := false
	for _, act := range acts {
		a.launch(ctx, under, act)
		halts = halts || act.Verb == callHalt
	}
	if halts { // how long they may take runs on while the agent does not
		if err := a.state.flush(a.cfg.Journal, now, false); err != nil {
			a.logJournal(err)
		}
	}
	for _, id := range a.state.unreported {
		if f, ok := a.cfg.Uplink.(Forgetter); ok {
			f.ForgetTask(id)
		}
	}
	a.state.unreported = nil
	statuses, later := a.state.reports(now, a.started, a.cfg.Clock.When, func() uint64 {
		a.sequence++
		return a.sequence
	})
	for _, st := range statuses {
		a.cfg.Uplink.TaskStatus(st)
	}
	if later != never && (wake == never || later < wake) {
		wake = later
	}
	a.inbox.wakeAt = wake
}

// Deadlines of the loops. A turn of the task loop writes to a disk that may
// take its time; the others only pass something on.
const (
	loopDeadline  = 2 * time.Minute
	watchDeadline = time.Minute
)

func (a *Agent) watch(name string, deadline time.Duration) (pulse <-chan struct{}, done func()) {
	if a.cfg.Watch == nil {
		return nil, func() {}
	}
	return a.cfg.Watch(name, deadline)
}

func (a *Agent) mind(name string, deadline time.Duration) (busy func(bool), done func()) {
	if a.cfg.Mind == nil {
		return func(bool) {}, func() {}
	}
	return a.cfg.Mind(name, deadline)
}

// wait blocks until something came in or it is time to look again.
func (a *Agent) wait(ctx context.Context, pulse <-chan struct{}) bool {
	var timer <-chan time.Time
	if at := a.inbox.wakeAt; at != never {
		timer = a.cfg.Clock.After(max(0, at-a.cfg.Clock.Now()))
	}
	for {
		select {
		case <-ctx.Done():
			return false
		case <-pulse:
		case <-a.inbox.wake:
			return true
		case <-timer:
			return true
		}
	}
}

// sort is what a call is bounded with: one sort that hangs does not hold up
// another.
func (v verb) sort() string {
	switch v {
	case callPull:
		return "pulls"
	case callStart, callPrepare:
		return "starts"
	case callHalt:
		return "stops"
	case callProbe:
		return "probes"
	case callList:
		return "lists"
	case callImages, callDiscard:
		return "images"
	}
	return "removals"
}

// launch makes a call beside the loop, if there is room for one more of its
// sort; if not, plan says it again at the next turn, which a finished call
// brings about.
func (a *Agent) launch(ctx context.Context, under *sync.WaitGroup, act action) {
	pull := act.Attempt.Task + "/" + act.Attempt.Container
	if act.Verb == callCancel {
		a.state.begin(act)
		if cancel := a.calls[pull]; cancel != nil {
			cancel()
		}
		return
	}
	most := a.cfg.MaxCalls
	if act.Verb == callPull {
		most = a.cfg.MaxPulls
	}
	if a.running[act.Verb.sort()] >= most {
		return
	}
	j := a.state.begin(act)
	ctx, cancel := context.WithCancel(ctx)
	if act.Verb == callPull {
		a.calls[pull] = cancel
	}
	name := string(act.Verb) + " " + act.Runtime + " " + act.Attempt.String()
	a.running[act.Verb.sort()]++
	a.names[name] = true
	if act.Stray {
		a.cfg.Logger.Warn("ending what belongs to no known task", "do", string(act.Verb), "runtime", act.Runtime, "attempt", act.Attempt.String())
	}
	under.Go(func() {
		defer cancel()
		a.inbox.result(a.hands.perform(ctx, j), name)
	})
}

// absorb takes in everything that came since the last turn.
func (a *Agent) absorb(now time.Duration) {
	in := a.inbox.take()
	s := a.state
	s.mark = a.Mark() // after take: marks come before what they vouch for
	s.tellAll = s.tellAll || in.reconcile
	for _, d := range in.results {
		a.running[d.r.Verb.sort()]--
		delete(a.names, d.name)
		if d.r.Verb == callPull {
			delete(a.calls, d.r.Attempt.Task+"/"+d.r.Attempt.Container)
		}
		a.logResult(d.r)
		s.finish(d.r, now)
	}
	for at, p := range in.pulls {
		s.progressed(at, p)
	}
	for _, name := range in.hints {
		s.relist(name, now)
	}
	if in.changed {
		for _, name := range a.cfg.Runtimes.RuntimeNames() {
			s.runtime(name)
		}
		for _, rt := range s.Runtimes {
			rt.want(now)
			rt.images.none, rt.images.known = false, false // it may be another version of it now
			rt.images.at = min(rt.images.at, now+imagesSoon)
		}
	}
	if (in.refound || in.changed) && a.cfg.Devices != nil {
		s.refound(a.cfg.Devices.Inventory(), now)
	}
	for id, seq := range in.acks {
		s.acked(id, seq)
	}
	if in.up != nil && *in.up != a.up {
		a.up = *in.up
		s.connected(a.up, now)
		a.cfg.Logger.Info("control plane", "connected", a.up)
	}
	for _, q := range in.asks {
		q.f(s)
		close(q.done)
	}
}

// shutdown waits for the calls under way, and names those that do not end.
func (a *Agent) shutdown(under *sync.WaitGroup) error {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		under.Wait()
	}()
	select {
	case <-ended:
		// What was cut short now says nothing about its task: it is not
		// taken in, and the next start learns the truth from List.
		return nil
	case <-a.cfg.Clock.After(a.cfg.ShutdownWait):
	}
	for _, d := range a.inbox.take().results {
		delete(a.names, d.name)
	}
	stuck := slices.Collect(maps.Keys(a.names))
	slices.Sort(stuck)
	return fmt.Errorf("agent: calls still under way after %s: %s", a.cfg.ShutdownWait, strings.Join(stuck, ", "))
}

// hold publishes what Held answers.
func (a *Agent) hold() {
	a.held.Lock()
	defer a.held.Unlock()
	a.held.applied = a.state.Applied
	if a.state.resync {
		a.held.applied = Applied{}
	}
}

// Held is what Hello says the agent holds. After damage to its state it holds
// nothing, so that it is sent everything.
func (a *Agent) Held() (incarnation string, sequence uint64) {
	a.held.Lock()
	defer a.held.Unlock()
	return a.held.applied.Incarnation, a.held.applied.Sequence
}

// Assign takes over a received set; nil means that it is persisted.
func (a *Agent) Assign(ctx context.Context, incarnation string, full bool, set []*wire.Assignment, sequence uint64) error {
	return a.takeOver(ctx, incarnation, set, sequence, func(s *State, now time.Duration) error {
		return s.assign(a.cfg.Journal, incarnation, full, set, sequence, now)
	})
}

func (a *Agent) takeOver(ctx context.Context, incarnation string, set []*wire.Assignment, sequence uint64, assign func(*State, time.Duration) error) error {
	var err error
	asked := a.ask(ctx, func(s *State) {
		doubted := !s.trusted
		err = assign(s, a.cfg.Clock.Now())
		if err != nil && err.Error() != a.refused {
			a.tellRefused(set, err)
		}
		a.logAssign(err)
		if doubted && s.trusted {
			a.cfg.Logger.Info("the control plane has sent everything again: nothing of what was damaged is missing any more")
		}
		if err == nil {
			a.hold()
			a.cfg.Uplink.AckAssignments(incarnation, sequence)
			a.reconcile(s)
		}
	})
	if asked != nil {
		return asked
	}
	return err
}

// Acked says the control plane has this status.
func (a *Agent) Acked(taskID string, sequence uint64) { a.inbox.ack(taskID, sequence) }

// Connected says a session was registered or ended.
func (a *Agent) Connected(up bool) { a.inbox.connected(up) }

// Snapshot copies what the agent knows.
func (a *Agent) Snapshot(ctx context.Context) (Snapshot, error) {
	var out Snapshot
	err := a.ask(ctx, func(s *State) {
		out = s.snapshot()
		out.Connected = a.up
		if a.refused != "" {
			out.Problems = append(out.Problems, "what the control plane assigned cannot be taken over: "+a.refused)
		}
	})
	return out, err
}

var errStopped = errors.New("agent: it is not running any more")

// ask runs f in the loop.
func (a *Agent) ask(ctx context.Context, f func(*State)) error {
	q := &question{f: f, done: make(chan struct{})}
	a.inbox.ask(q)
	select {
	case <-q.done:
		return nil
	case <-ctx.Done():
		if a.inbox.withdraw(q) {
			return ctx.Err()
		}
	case <-a.done:
		if a.inbox.withdraw(q) {
			return errStopped
		}
	}
	<-q.done // it was taken: f is running or has run
	return nil
}

// tellRefused tells of tasks that could not be taken over, for whoever waits
// for them to start. It is said once for each error.
func (a *Agent) tellRefused(set []*wire.Assignment, err error) {
	const most = 100 // a level each is kept until it is acknowledged
	told := 0
	for _, as := range set {
		if as.GetRemoved() || as.GetDesired() == Stopped || as.GetTaskId() == "" || a.state.task(as.GetTaskId()) != nil || told == most {
			continue
		}
		told++
		a.sequence++
		a.cfg.Uplink.TaskStatus(&wire.TaskStatus{
			TaskId: as.GetTaskId(), LastStatus: Pending, Health: HealthUnknown, Sequence: a.sequence, At: a.cfg.Clock.When(),
			Note: "the device cannot take it over: " + err.Error(),
		})
	}
}

// logAssign is apart from logJournal: on a full disk there may be room for a
// record and none for an assignment.
func (a *Agent) logAssign(err error) {
	msg := ""
	if err != nil {
		msg = err.Error()
	}
	switch {
	case msg == a.refused:
	case msg != "":
		a.cfg.Logger.Error("assignments cannot be taken over: what is new in them is not started until they can", "error", msg)
	default:
		a.cfg.Logger.Info("assignments are taken over again")
	}
	a.refused = msg
}

func (a *Agent) logJournal(err error) {
	msg := ""
	if err != nil {
		msg = err.Error()
	}
	if msg == a.broken {
		return
	}
	if a.broken = msg; msg != "" {
		a.cfg.Logger.Error("state cannot be written: nothing new is started until it can", "error", msg)
	} else if a.state.journal.failures == 0 {
		a.cfg.Logger.Info("state can be written")
	}
}

func (a *Agent) logResult(r result) {
	attrs := []any{"do", string(r.Verb), "runtime", r.Runtime, "task", r.Attempt.Task}
	if r.Attempt.Container != "" {
		attrs = append(attrs, "container", r.Attempt.Container, "attempt", r.Attempt.Number)
	}
	if r.Verb == callList && !a.worthSaying(r) {
		return
	}
	if r.Verb == callImages || r.Verb == callDiscard {
		a.logImages(r)
		return
	}
	switch {
	case r.err != nil && sdk.KindOf(r.err) != sdk.Canceled:
		a.cfg.Logger.Warn("call failed", append(attrs, "kind", string(sdk.KindOf(r.err)), "error", r.err.Error())...)
	case r.err != nil, r.Verb == callProbe:
	default:
		a.cfg.Logger.Debug("call done", attrs...)
	}
}

// logImages says what was removed and why; a runtime that cannot say what it
// has is shown in its snapshot.
func (a *Agent) logImages(r result) {
	attrs := []any{"runtime", r.Runtime, "image", r.Image, "why", r.Reason}
	for _, img := range a.state.runtime(r.Runtime).images.inv.Images {
		if img.Digest == r.Image {
			attrs = append(attrs, "references", strings.Join(img.References, " "), "bytes", img.Bytes)
		}
	}
	switch {
	case r.Verb == callImages:
	case r.err != nil:
		a.cfg.Logger.Warn("an unused image cannot be removed", append(attrs, "kind", string(sdk.KindOf(r.err)), "error", r.err.Error())...)
	default:
		a.cfg.Logger.Info("removed an unused image", attrs...)
	}
}

// silence is how long a runtime may be away before that is worth a line: a
// plugin that starts or is relaunched takes less.
const silence = 3 * time.Second

// unlisted is a runtime that cannot be listed.
type unlisted struct {
	since time.Duration
	said  string // the last error logged
}

// worthSaying keeps the log short while a runtime is away and asked again and
// again: each error once, and none that passes by itself.
func (a *Agent) worthSaying(r result) bool {
	if r.err == nil {
		delete(a.unlisted, r.Runtime)
		return false
	}
	now := a.cfg.Clock.Now()
	u, known := a.unlisted[r.Runtime]
	if !known {
		u.since = now
	}
	say := now-u.since >= silence && u.said != r.err.Error()
	if say {
		u.said = r.err.Error()
	}
	a.unlisted[r.Runtime] = u
	return say
}
