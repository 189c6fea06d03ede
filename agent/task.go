package agent

import (
	"slices"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/allot"
	"github.com/belay-edge/belay/plugins/sdk"
)

// defaultRuntime is the plugin a task runs on when its spec names none.
const defaultRuntime = "containerd"

// Task is one task as the loop knows it: the wish, what is persisted of it and
// what was observed.
type Task struct {
	ID         string
	Assignment *wire.Assignment
	Spec       *wire.TaskSpec // never nil, never changed
	Origin     string         // incarnation that last named it
	Desired    *Desired       // nil: RUNNING

	Status string    // only advances
	Stop   *stopping // decided to stop, by whoever
	Acked  bool      // the control plane has the terminal status

	Containers []*Container // in the spec's order

	prepared  bool   // PrepareTask succeeded in this life of the agent
	inRuntime bool   // the runtime holds something for the task
	busy      bool   // a call about the task itself is under way
	changed   uint64 // tick of the last such call's begin or end
	retry     retry  // of PrepareTask, RemoveTask and forgetting
	failure   string // definitive: it can never start

	stoppedAt    time.Duration // of this life: when it was seen stopped
	stopDeadline time.Duration // clean-up after exit may delay STOPPED until then
	forgotten    bool          // outputs and volumes are gone
	unsure       bool          // damage may hide that it ran already: see doubt

	saved struct {
		status  StatusRecord
		desired *Desired
		origin  string
	}
	report  report
	awaited damped // devices it waits for, as told
}

// stopping is why a task stops.
type stopping struct{ code, reason string }

// phase of a container's current attempt.
type phase string

const (
	phaseNone     phase = ""         // no attempt yet
	phaseRecorded phase = "recorded" // on record, proven not to run: Start it
	phaseUnknown  phase = "unknown"  // only List can tell
	phaseRunning  phase = "running"
	phaseExited   phase = "exited"
)

// Container is one container of a task and its current attempt.
type Container struct {
	Spec *wire.Container

	// The image, resolved once per task.
	Image, Digest string
	pulled        bool // since the last start that went well: not finding it is final
	refetch       bool // the runtime lost it: pull it again, by digest
	pulling       bool
	canceled      bool // the pull under way was told to end
	progress      *wire.PullProgress

	// The current attempt.
	Number    int
	floor     int // numbers up to here were used by attempts that are not ours
	Phase     phase
	BootID    string
	HostPorts []int
	Devices   []DeviceRef
	StartedAt time.Duration
	slept     time.Duration // of the device, since then, as far as this life saw it
	Started   bool
	RuntimeID string
	PID       int
	IP        string
	Ports     []sdk.PortMapping
	ExitCode  *int
	Reason    string
	RanFor    time.Duration
	Rebooted  bool
	Removed   bool
	HaltedAt  time.Duration // when it was told to stop; 0: it was not

	busy      verb   // the call about the attempt under way
	changed   uint64 // tick of the last such call's begin or end
	retry     retry  // of the attempt's calls
	pullRetry retry
	pullSince time.Duration // how long there had been a session at the first failure
	conflicts int           // chosen ports that were taken
	failure   string        // definitive: the task cannot start
	crashes   int           // short runs in a row
	notBefore time.Duration // of the next attempt

	health probe

	requests    []allot.Request // of devices
	deviceRetry retry           // of asking the plugins what its devices need

	saved AttemptRecord
}

// probe is a container's health check.
type probe struct {
	status string
	why    string // of the check that made it unhealthy: later ones may differ each time
	fails  int
	next   time.Duration
	busy   bool
}

// runtimeName is the plugin the task runs on.
func (t *Task) runtimeName() string {
	if r := t.Spec.GetRuntime(); r != "" {
		return r
	}
	return defaultRuntime
}

func (t *Task) container(name string) *Container {
	for _, c := range t.Containers {
		if c.Spec.GetName() == name {
			return c
		}
	}
	return nil
}

func (t *Task) attempt(c *Container) sdk.Attempt {
	return sdk.Attempt{Task: t.ID, Container: c.Spec.GetName(), Number: c.Number}
}

func (t *Task) unwanted() bool { return t.Desired != nil }
func (t *Task) removed() bool  { return t.Desired != nil && t.Desired.Removed }

// inPlace says whether the task's essential containers are restarted for ever.
func (t *Task) inPlace() bool { return t.Spec.GetRestartInPlace() }

// needed says whether some container that has not started yet waits for c to
// succeed or be healthy.
func (t *Task) needed(c *Container) bool {
	for _, d := range t.Containers {
		if d.Started || d.Phase == phaseRunning {
			continue
		}
		for _, dep := range d.Spec.GetDependsOn() {
			if dep.GetContainer() == c.Spec.GetName() &&
				(dep.GetCondition() == "SUCCESS" || dep.GetCondition() == "HEALTHY") {
				return true
			}
		}
	}
	return false
}

// again says whether an exited container gets another attempt.
func (t *Task) again(c *Container) bool {
	if t.Stop != nil || t.unwanted() {
		return false
	}
	if c.Rebooted {
		return true
	}
	if p := c.Spec.GetRestartPolicy(); p.GetEnabled() {
		period := seconds(p.GetAttemptPeriodS(), 300)
		ignored := c.ExitCode != nil && slices.Contains(p.GetIgnoredExitCodes(), int32(*c.ExitCode))
		if !ignored && c.RanFor >= period {
			return true
		}
	}
	if !t.inPlace() {
		return false
	}
	failed := c.ExitCode == nil || *c.ExitCode != 0
	return c.Spec.GetEssential() || failed && t.needed(c)
}

// final says that the container has ended and stays so.
func (t *Task) final(c *Container) bool { return c.Phase == phaseExited && !t.again(c) }

// idle says that no process of the container can be running and no call about
// it is under way.
func (c *Container) idle() bool {
	return c.busy == "" && !c.pulling && c.Phase != phaseRunning && c.Phase != phaseUnknown
}

// gone says that the runtime holds nothing of the container.
func (c *Container) gone() bool {
	return c.busy == "" && (c.Number == 0 || c.Removed)
}

func (c *Container) grace() time.Duration { return seconds(c.Spec.GetStopTimeoutS(), 30) }

// leastGrace is what one gets whose grace ran out while the agent was away:
// its signal may have been lost.
const leastGrace = 2 * time.Second

// graceLeft is how long the container may still take to end. The time it was
// granted runs on while the agent is restarted.
func (c *Container) graceLeft(boot string, now time.Duration) time.Duration {
	grace := c.grace()
	if c.HaltedAt == 0 || c.BootID != boot {
		return grace
	}
	return min(grace, max(leastGrace, c.HaltedAt+grace-now))
}

// record is what must be on disk about the current attempt.
func (c *Container) record() AttemptRecord {
	notBefore := c.notBefore
	if c.Phase != phaseExited {
		notBefore = 0 // has passed
	}
	return AttemptRecord{
		Container: c.Spec.GetName(), Number: c.Number, BootID: c.BootID,
		Image: c.Image, Digest: c.Digest, HostPorts: c.HostPorts, Devices: c.Devices,
		StartedAt: c.StartedAt, Started: c.Started, RuntimeID: c.RuntimeID,
		Exited: c.Phase == phaseExited && !bug("exit-forgotten"), ExitCode: c.ExitCode, Reason: c.Reason,
		RanFor: c.RanFor, Rebooted: c.Rebooted, Removed: c.Removed, HaltedAt: c.HaltedAt,
		Crashes: c.crashes, NotBefore: notBefore,
	}
}

// dirty says that the record must be written before anything relies on it.
// Removed alone is worth no write: removing again is harmless.
func (c *Container) dirty() bool {
	if c.Number == 0 {
		return false
	}
	now, saved := c.record(), c.saved
	now.Removed, saved.Removed = false, false
	return !sameAttempt(now, saved)
}

func sameAttempt(a, b AttemptRecord) bool {
	if (a.ExitCode == nil) != (b.ExitCode == nil) || a.ExitCode != nil && *a.ExitCode != *b.ExitCode {
		return false
	}
	return slices.Equal(a.HostPorts, b.HostPorts) && slices.Equal(a.Devices, b.Devices) &&
		a.Container == b.Container && a.Number == b.Number && a.BootID == b.BootID &&
		a.Image == b.Image && a.Digest == b.Digest && a.StartedAt == b.StartedAt &&
		a.Started == b.Started && a.RuntimeID == b.RuntimeID && a.Exited == b.Exited &&
		a.Reason == b.Reason && a.RanFor == b.RanFor && a.Rebooted == b.Rebooted && a.Removed == b.Removed && a.HaltedAt == b.HaltedAt &&
		a.Crashes == b.Crashes && a.NotBefore == b.NotBefore
}

// statusRecord is what must be on disk about the task. PENDING is where every
// task begins and is not worth a write.
func (t *Task) statusRecord() StatusRecord {
	if rank(t.Status) < rank(Running) && t.Stop == nil {
		return StatusRecord{}
	}
	r := StatusRecord{LastStatus: t.Status, Acked: t.Acked}
	if t.Stop != nil {
		r.StopCode, r.Reason = t.Stop.code, t.Stop.reason
	}
	return r
}

// retry is the backoff of something that failed.
type retry struct {
	failures  int
	since, at time.Duration // first failure; next try
	err       string
}

const (
	retryBase = time.Second
	retryCap  = 60 * time.Second
)

// fail notes a failure; jitter is in [0,1).
func (r *retry) fail(now time.Duration, jitter float64, err error) {
	if r.failures == 0 {
		r.since = now
	}
	r.failures++
	r.at = now + backoff(r.failures, jitter)
	r.err = err.Error()
}

// backoff is full jitter below a ceiling that doubles from 1 s to 60 s, and
// never less than a tenth of a second.
func backoff(failures int, jitter float64) time.Duration {
	ceiling := retryCap
	if failures < 7 {
		ceiling = min(retryCap, retryBase<<(failures-1))
	}
	return max(100*time.Millisecond, time.Duration(jitter*float64(ceiling)))
}

func seconds(s, fallback uint32) time.Duration {
	if s == 0 {
		return time.Duration(fallback) * time.Second
	}
	return time.Duration(s) * time.Second
}
