package agent

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// verb is what an action does.
type verb string

// Decisions change the State at once; everything after them is a call that
// runs beside the loop and reports back.
const (
	decideStop    verb = "stop"    // the task is to end: Code, Reason
	decideAttempt verb = "attempt" // the container gets its next attempt
	decideStatus  verb = "status"  // the task reached Status
	decideDevices verb = "devices" // the attempt, which never ran, gets other devices

	callList      verb = "list"
	callPrepare   verb = "prepare"
	callUnprepare verb = "unprepare"
	callPull      verb = "pull"
	callCancel    verb = "cancel" // end the pull under way
	callStart     verb = "start"
	callHalt      verb = "halt" // Stop, in the runtime's words
	callRemove    verb = "remove"
	callProbe     verb = "probe"
	callForget    verb = "forget" // the task's outputs and volumes
	callImages    verb = "list images"
	callDiscard   verb = "remove image"
)

func (v verb) decision() bool {
	return v == decideStop || v == decideAttempt || v == decideStatus || v == decideDevices
}

// action is one thing to do now.
type action struct {
	Verb    verb
	Runtime string
	Attempt sdk.Attempt // Task alone, or with Container, or whole
	Stray   bool        // the attempt or task belongs to nobody
	Grace   time.Duration
	Code    string
	Reason  string
	Status  string
	Devices []DeviceRef // of an attempt
	Image   string      // digest, of an image to remove
}

// never is a time that no timer waits for.
const never = time.Duration(-1)

// plan says what to do now, and when to ask again if nothing happens before;
// never when only an event can change anything. It is pure: the same state at
// the same time gives the same answer, and nothing is changed.
func plan(s *State, now time.Duration) ([]action, time.Duration) {
	p := &planner{s: s, now: now, wake: never}
	for _, name := range slices.Sorted(maps.Keys(s.Runtimes)) {
		p.runtime(s.Runtimes[name])
		p.images(s.Runtimes[name])
	}
	excess := p.excess()
	for _, t := range s.Tasks {
		switch {
		case t.Status == Stopped:
			p.stopped(t, excess[t.ID])
		case t.Stop != nil:
			p.stop(t)
		default:
			p.run(t)
		}
	}
	for _, at := range []time.Duration{s.nextAway(), s.nextUnused()} {
		if at != never {
			p.due(at) // write looks at every step
		}
	}
	return p.acts, p.wake
}

type planner struct {
	s    *State
	now  time.Duration
	acts []action
	wake time.Duration

	chosen map[*Container][]DeviceRef // see choice
}

func (p *planner) do(a action) { p.acts = append(p.acts, a) }

// due says whether a moment has come, and asks to be woken at it if not.
func (p *planner) due(at time.Duration) bool {
	if p.now >= at {
		return true
	}
	if p.wake == never || at < p.wake {
		p.wake = at
	}
	return false
}

// after is t + d, for durations that may mean "for ever".
func after(t, d time.Duration) time.Duration {
	if t > 0 && d > math.MaxInt64-t {
		return math.MaxInt64
	}
	return t + d
}

// runtime plans the List of a runtime and the end of what belongs to nobody.
func (p *planner) runtime(rt *runtimeState) {
	if !rt.listing && p.due(rt.listAt) {
		p.do(action{Verb: callList, Runtime: rt.name})
	}
	if !rt.known {
		return
	}
	held := map[string]bool{}
	for _, a := range strayAttempts(rt) {
		st := rt.strays[a]
		held[a.Task] = true
		if !p.s.trusted && p.s.task(a.Task) == nil && !bug("orphan-kill") {
			continue // damage may have lost its task: leave it alone
		}
		if st.busy != "" || !p.due(st.retry.at) {
			continue
		}
		if st.seen.State == sdk.StateRunning {
			p.do(action{Verb: callHalt, Runtime: rt.name, Attempt: a, Stray: true, Grace: seconds(0, 30)})
		} else {
			p.do(action{Verb: callRemove, Runtime: rt.name, Attempt: a, Stray: true})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(rt.tasks)) {
		st := rt.tasks[id]
		if p.s.trusted && !held[id] && st.busy == "" && p.due(st.retry.at) {
			p.do(action{Verb: callUnprepare, Runtime: rt.name, Attempt: sdk.Attempt{Task: id}, Stray: true})
		}
	}
}

// run plans for a task that should run.
func (p *planner) run(t *Task) {
	if t.unwanted() {
		p.end(t, CodeUserInitiated, t.Desired.Reason)
		return
	}
	if p.abandoned(t) {
		p.end(t, CodeDisconnected, reasonDisconnected(t))
		return
	}
	rt := p.s.runtime(t.runtimeName())
	if code, reason := p.verdict(t, rt); code != "" {
		p.end(t, code, reason)
		return
	}
	if t.Status != Running && t.begun() {
		p.do(action{Verb: decideStatus, Attempt: sdk.Attempt{Task: t.ID}, Status: Running})
	}
	if !rt.known || t.busy {
		return
	}
	if !t.prepared {
		if t.wantsStart() && p.due(t.retry.at) {
			p.do(action{Verb: callPrepare, Runtime: rt.name, Attempt: sdk.Attempt{Task: t.ID}})
		}
	} else {
		p.pulls(t, rt)
	}
	for _, c := range t.Containers {
		p.container(t, rt, c)
	}
}

func (p *planner) end(t *Task, code, reason string) {
	p.do(action{Verb: decideStop, Attempt: sdk.Attempt{Task: t.ID}, Code: code, Reason: reason})
}

// begun says that every container has started, which makes the task RUNNING.
func (t *Task) begun() bool {
	for _, c := range t.Containers {
		if !c.Started {
			return false
		}
	}
	return len(t.Containers) > 0
}

// wantsStart says that some container is to be started, now or later.
func (t *Task) wantsStart() bool {
	return slices.ContainsFunc(t.Containers, func(c *Container) bool {
		return c.Phase == phaseNone || c.Phase == phaseRecorded || c.Phase == phaseExited && t.again(c)
	})
}

// verdict finds what ends a task that should run; no code when nothing does.
func (p *planner) verdict(t *Task, rt *runtimeState) (code, reason string) {
	if t.failure != "" {
		return CodeFailedToStart, t.failure
	}
	if len(t.Containers) == 0 {
		return CodeFailedToStart, "The task has no containers"
	}
	fresh := !slices.ContainsFunc(t.Containers, func(c *Container) bool { return c.Number > 0 })
	if rt.missing && fresh && p.due(rt.since+missingGrace) {
		return CodeFailedToStart, fmt.Sprintf("This device has no runtime plugin %q", rt.name)
	}
	if p.gaveUp(t, t.retry) {
		return CodeFailedToStart, "CannotPrepareTaskError: " + t.retry.err
	}
	ended := 0
	for _, c := range t.Containers {
		if c.failure != "" {
			return CodeFailedToStart, c.failure
		}
		if p.gaveUpPulling(t, c) {
			return CodeFailedToStart, "CannotPullContainerError: " + c.pullRetry.err
		}
		if c.Phase == phaseRecorded && p.gaveUp(t, c.retry) {
			return CodeFailedToStart, "CannotStartContainerError: " + c.retry.err
		}
		if !t.final(c) {
			continue
		}
		ended++
		if c.Spec.GetEssential() {
			return CodeEssentialExited, "Essential container in task exited"
		}
	}
	if ended == len(t.Containers) {
		return CodeEssentialExited, "All containers in task exited"
	}
	for _, c := range t.Containers {
		if c.Phase != phaseNone && c.Phase != phaseRecorded {
			continue
		}
		for _, d := range c.Spec.GetDependsOn() {
			if reason := p.hopeless(t, c, d); reason != "" {
				return CodeFailedToStart, reason
			}
		}
	}
	return "", ""
}

// gaveUp says that a task which is not of a service has retried long enough.
func (p *planner) gaveUp(t *Task, r retry) bool {
	return r.failures > 0 && !t.inPlace() && p.due(after(r.since, p.s.Limits.PullGiveUp))
}

// met says whether a dependency allows its dependent to start.
func (t *Task) met(d *wire.Dependency) bool {
	c := t.container(d.GetContainer())
	if c == nil {
		return false
	}
	switch d.GetCondition() {
	case "COMPLETE":
		return t.final(c)
	case "SUCCESS":
		return t.final(c) && c.ExitCode != nil && *c.ExitCode == 0
	case "HEALTHY":
		return c.Phase == phaseRunning && c.health.status == HealthHealthy
	default: // START
		return c.Started && (c.Phase == phaseRunning || c.Phase == phaseExited)
	}
}

func (t *Task) ready(c *Container) bool {
	return !slices.ContainsFunc(c.Spec.GetDependsOn(), func(d *wire.Dependency) bool { return !t.met(d) })
}

// hopeless says why a dependency of c can no longer be met; "" while it can.
func (p *planner) hopeless(t *Task, c *Container, d *wire.Dependency) string {
	if t.met(d) {
		return ""
	}
	on := t.container(d.GetContainer())
	if on == nil {
		return fmt.Sprintf("Container %s depends on %s, which the task does not have", c.Spec.GetName(), d.GetContainer())
	}
	cond := d.GetCondition()
	if t.final(on) && cond != "START" {
		how := "with nobody seeing its exit code"
		if on.ExitCode != nil {
			how = fmt.Sprintf("with code %d", *on.ExitCode)
		}
		return fmt.Sprintf("Container %s depends on %s being %s, but it exited %s", c.Spec.GetName(), d.GetContainer(), cond, how)
	}
	limit := on.Spec.GetStartTimeoutS()
	if limit > 0 && cond != "START" && on.Started && on.BootID == p.s.BootID &&
		p.due(on.awakeSince()+seconds(limit, 0)) {
		return fmt.Sprintf("Container %s did not become %s within its startTimeout of %d s, and %s depends on it",
			d.GetContainer(), cond, limit, c.Spec.GetName())
	}
	return ""
}

// pulls plans one pull for each image still to be resolved.
func (p *planner) pulls(t *Task, rt *runtimeState) {
	if rt.images.busy == callDiscard {
		return // what is being removed may be what is to be pulled
	}
	under := map[string]bool{}
	for _, c := range t.Containers {
		if c.pulling {
			under[c.Spec.GetImage()] = true
		}
	}
	for _, c := range t.Containers {
		image := c.Spec.GetImage()
		if !c.wantsImage(rt) || under[image] || c.Phase == phaseRunning {
			continue
		}
		under[image] = true
		if p.due(c.pullRetry.at) {
			p.do(action{Verb: callPull, Runtime: rt.name, Attempt: sdk.Attempt{Task: t.ID, Container: c.Spec.GetName()}})
		}
	}
}

// haunted says that an attempt other than the current one may still run.
func (rt *runtimeState) haunted(t *Task, c *Container) bool {
	for a := range rt.strays {
		if a.Task == t.ID && a.Container == c.Spec.GetName() {
			return true
		}
	}
	return false
}

// wantsImage says that the image must be pulled before the container starts.
// A digest on record needs no pull, so that a cold boot needs no network.
func (c *Container) wantsImage(rt *runtimeState) bool {
	return rt.info.Images && (c.Digest == "" || c.refetch)
}

// container plans the next step of one container of a task that should run.
func (p *planner) container(t *Task, rt *runtimeState, c *Container) {
	if c.busy != "" {
		return
	}
	a := action{Runtime: rt.name, Attempt: t.attempt(c)}
	switch c.Phase {
	case phaseRunning:
		if c.health.status == HealthUnhealthy && c.Spec.GetEssential() && t.inPlace() {
			if p.due(c.retry.at) {
				a.Verb, a.Grace = callHalt, c.graceLeft(p.s.BootID, p.now)
				p.do(a)
			}
			return
		}
		if c.Spec.GetHealthCheck() != nil && rt.info.Exec && !c.health.busy && p.due(c.health.next) {
			a.Verb = callProbe
			p.do(a)
		}
	case phaseNone, phaseRecorded:
		if !t.prepared || c.pulling || c.wantsImage(rt) || !t.ready(c) || rt.haunted(t, c) || !p.due(c.retry.at) {
			return
		}
		if c.Phase == phaseNone {
			if !t.unsure {
				p.attempt(t, c)
			}
			return
		}
		devices, ready := p.devices(c)
		switch {
		case !ready:
		case !slices.Equal(devices, c.Devices):
			a.Verb, a.Devices = decideDevices, devices
			p.do(a)
		case !c.dirty() && p.due(c.deviceRetry.at):
			a.Verb = callStart
			p.do(a)
		}
	case phaseExited:
		if c.dirty() {
			return // its exit code would be lost with it
		}
		if !c.Removed {
			if p.due(c.retry.at) {
				a.Verb = callRemove
				p.do(a)
			}
			return
		}
		if t.again(c) && t.prepared && t.ready(c) && !rt.haunted(t, c) && p.due(c.notBefore) {
			p.attempt(t, c)
		}
	}
}

func (p *planner) attempt(t *Task, c *Container) {
	devices, ok := p.devices(c)
	if !ok {
		return // an inventory that changes or a container that goes brings them
	}
	p.do(action{Verb: decideAttempt, Devices: devices,
		Attempt: sdk.Attempt{Task: t.ID, Container: c.Spec.GetName(), Number: max(c.Number, c.floor) + 1}})
}

// stop plans for a task that is to end: its containers stop, dependents
// first, then what the runtime holds is removed, then it is STOPPED.
func (p *planner) stop(t *Task) {
	rt := p.s.runtime(t.runtimeName())
	idle := !t.busy
	for _, c := range t.Containers {
		if c.pulling && !c.canceled {
			p.do(action{Verb: callCancel, Attempt: sdk.Attempt{Task: t.ID, Container: c.Spec.GetName()}})
		}
		if c.idle() {
			continue
		}
		idle = false
		if c.Phase == phaseRunning && c.busy == "" && rt.known && t.released(c) && p.due(c.retry.at) {
			p.do(action{Verb: callHalt, Runtime: rt.name, Attempt: t.attempt(c), Grace: c.graceLeft(p.s.BootID, p.now)})
		}
	}
	if !idle {
		return
	}
	p.clean(t, rt)
	if t.clean() || t.stopDeadline > 0 && p.due(t.stopDeadline) {
		p.do(action{Verb: decideStatus, Attempt: sdk.Attempt{Task: t.ID}, Status: Stopped})
	} else if t.stopDeadline == 0 {
		// Entered once: from here on clean-up has a limited time.
		p.do(action{Verb: decideStatus, Attempt: sdk.Attempt{Task: t.ID}, Status: Deprovisioning})
	}
}

// released says that nothing which depends on c is still running.
func (t *Task) released(c *Container) bool {
	return !slices.ContainsFunc(t.Containers, func(d *Container) bool {
		return d != c && !d.idle() && slices.ContainsFunc(d.Spec.GetDependsOn(), func(dep *wire.Dependency) bool {
			return dep.GetContainer() == c.Spec.GetName()
		})
	})
}

// clean says that the runtime holds nothing of the task.
func (t *Task) clean() bool {
	return !t.busy && !t.inRuntime && !slices.ContainsFunc(t.Containers, func(c *Container) bool { return !c.gone() })
}

// clean plans the removal of an ended task's traces in its runtime.
func (p *planner) clean(t *Task, rt *runtimeState) {
	if !rt.known || t.busy {
		return
	}
	gone := true
	for _, c := range t.Containers {
		if c.gone() {
			continue
		}
		gone = false
		if c.busy == "" && !c.dirty() && c.idle() && p.due(c.retry.at) {
			p.do(action{Verb: callRemove, Runtime: rt.name, Attempt: t.attempt(c)})
		}
	}
	if gone && t.inRuntime && p.due(t.retry.at) {
		p.do(action{Verb: callUnprepare, Runtime: rt.name, Attempt: sdk.Attempt{Task: t.ID}})
	}
}

// stopped plans for a task that has ended: what clean-up was left, and in
// time to forget it.
func (p *planner) stopped(t *Task, excess bool) {
	if !t.clean() {
		p.clean(t, p.s.runtime(t.runtimeName()))
		return
	}
	if t.busy || t.forgotten {
		return
	}
	if t.removed() || t.Acked && (excess || p.due(after(t.stoppedAt, p.s.Limits.KeepStopped))) {
		if p.due(t.retry.at) {
			p.do(action{Verb: callForget, Attempt: sdk.Attempt{Task: t.ID}})
		}
	}
}

// excess are the tasks that stopped first, past the number to be kept.
func (p *planner) excess() map[string]bool {
	var ended []*Task
	for _, t := range p.s.Tasks {
		if t.Status == Stopped {
			ended = append(ended, t)
		}
	}
	over := len(ended) - p.s.Limits.KeepStoppedTasks
	if over <= 0 {
		return nil
	}
	slices.SortFunc(ended, func(a, b *Task) int {
		if a.stoppedAt != b.stoppedAt {
			return int(min(max(a.stoppedAt-b.stoppedAt, -1), 1))
		}
		return strings.Compare(a.ID, b.ID)
	})
	out := make(map[string]bool, over)
	for _, t := range ended[:over] {
		out[t.ID] = true
	}
	return out
}
