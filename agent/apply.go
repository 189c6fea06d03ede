package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// decide carries out a decision of plan.
func (s *State) decide(a action, now time.Duration) {
	t := s.task(a.Attempt.Task)
	if t == nil {
		return
	}
	switch a.Verb {
	case decideStop:
		t.Stop = &stopping{a.Code, a.Reason}
		t.Status = advance(t.Status, Stopping)
		t.retry = retry{}
		for _, c := range t.Containers {
			c.retry = retry{} // do not wait to stop because starting failed
		}
	case decideStatus:
		if a.Status == Deprovisioning {
			// An inner step: saying it would cost a write and a message.
			t.stopDeadline = now + cleanupWait
			return
		}
		t.Status = advance(t.Status, a.Status)
		if t.Status == Stopped {
			t.stoppedAt = now
			im := &s.runtime(t.runtimeName()).images
			im.at = min(im.at, now+imagesSoon) // its images may be unused from now on
		}
	case decideAttempt:
		c := t.container(a.Attempt.Container)
		if c == nil || c.Number >= a.Attempt.Number {
			return
		}
		s.nextAttempt(t, c, a.Attempt.Number, now)
		c.Devices, c.deviceRetry = a.Devices, retry{}
	case decideDevices:
		c := t.container(a.Attempt.Container)
		if c == nil || c.Number != a.Attempt.Number || c.Phase != phaseRecorded {
			return
		}
		c.Devices, c.deviceRetry = a.Devices, retry{}
	}
}

func (s *State) nextAttempt(t *Task, c *Container, number int, now time.Duration) {
	c.Number, c.Phase, c.BootID, c.StartedAt = number, phaseRecorded, s.BootID, now
	c.clearRun()
	c.Removed = false
	c.retry = retry{}
	if t.Spec.GetNetwork() == "" || t.Spec.GetNetwork() == sdk.NetworkBridge {
		s.choosePorts(c)
	}
}

// clearRun forgets what the last run left on the container.
func (c *Container) clearRun() {
	c.Started, c.RuntimeID, c.PID, c.IP, c.Ports = false, "", 0, "", nil
	c.ExitCode, c.Reason, c.RanFor, c.Rebooted, c.slept, c.HaltedAt = nil, "", 0, false, 0, 0
	c.health = probe{}
}

// job is a call to make beside the loop: nothing in it is the loop's.
type job struct {
	action
	tick       uint64
	task       *wire.TaskSpec
	container  *wire.Container
	image      string
	digest     string
	hostPorts  []int
	devices    []DeviceRef
	withinTask sdk.TaskSpec
}

// result is what became of a job.
type result struct {
	job
	err       error
	found     sdk.Container
	image     sdk.Image
	info      sdk.RuntimeInfo
	inventory sdk.Inventory
	images    sdk.ImageInventory
	exec      sdk.ExecResult
	// withheld: the runtime was not asked, because a plugin did not say what
	// the container's devices need.
	withheld bool
}

// begin marks a call as under way and copies out what it needs.
func (s *State) begin(a action) job {
	s.tick++
	j := job{action: a, tick: s.tick}
	if a.Verb == callList {
		s.runtime(a.Runtime).listing = true
		return j
	}
	if a.Verb == callImages || a.Verb == callDiscard {
		s.beginImages(a)
		return j
	}
	if a.Stray {
		if st := s.stray(a); st != nil {
			st.busy = a.Verb
		}
		return j
	}
	t := s.task(a.Attempt.Task)
	if t == nil {
		return j
	}
	j.task = t.Spec
	c := t.container(a.Attempt.Container)
	if c != nil {
		j.container, j.image, j.digest = c.Spec, c.Image, c.Digest
		j.hostPorts, j.devices = slices.Clone(c.HostPorts), slices.Clone(c.Devices)
	}
	switch a.Verb {
	case callPrepare, callUnprepare, callForget:
		t.busy, t.changed = true, s.tick
		j.withinTask = taskSpec(t.ID, t.Spec)
	case callPull:
		c.pulling, c.canceled = true, false
		if j.image = c.Spec.GetImage(); c.Digest != "" {
			j.image = pinned(c.Image, c.Digest)
		}
	case callCancel:
		c.canceled = true
	case callProbe:
		c.health.busy = true
	case callHalt:
		c.busy, c.changed = a.Verb, s.tick
		if c.HaltedAt == 0 {
			c.HaltedAt = max(s.at, 1)
		}
	default:
		c.busy, c.changed = a.Verb, s.tick
	}
	return j
}

func (s *State) stray(a action) *stray {
	rt := s.runtime(a.Runtime)
	if a.Verb == callUnprepare {
		return rt.tasks[a.Attempt.Task]
	}
	return rt.strays[a.Attempt]
}

// finish takes in what became of a call.
func (s *State) finish(r result, now time.Duration) {
	s.tick++
	if r.Verb == callList {
		s.listed(r, now)
		return
	}
	if r.Verb == callImages || r.Verb == callDiscard {
		s.finishImages(r, now)
		return
	}
	if r.err != nil && sdk.KindOf(r.err) == sdk.Unavailable && !r.withheld && r.Verb != callPull && r.Verb != callForget {
		// The plugin or its daemon may be gone: nothing is known until it lists.
		rt := s.runtime(r.Runtime)
		rt.known = false
		s.relist(r.Runtime, now)
	}
	if r.Stray {
		s.finishStray(r, now)
		return
	}
	t := s.task(r.Attempt.Task)
	if t == nil {
		return
	}
	c := t.container(r.Attempt.Container)
	switch r.Verb {
	case callPrepare, callUnprepare, callForget:
		t.busy, t.changed = false, s.tick
		s.finishTask(t, r, now)
	case callPull:
		c.pulling, c.canceled, c.progress = false, false, nil
		s.finishPull(t, c, r, now)
	case callProbe:
		c.health.busy = false
		if c.Number == r.Attempt.Number {
			c.probed(r, now)
		}
	case callStart, callHalt, callRemove:
		c.busy, c.changed = "", s.tick
		if c.Number != r.Attempt.Number {
			return
		}
		switch r.Verb {
		case callStart:
			s.finishStart(t, c, r, now)
		case callHalt:
			s.finishHalt(t, c, r, now)
		default:
			s.finishRemove(t, c, r, now)
		}
	}
}

func (s *State) finishTask(t *Task, r result, now time.Duration) {
	if r.Verb == callPrepare {
		t.inRuntime = true // even when it failed: half of it may be there
	}
	if r.err != nil {
		if r.Verb == callPrepare && definitive(r.err) {
			t.failure = "CannotPrepareTaskError: " + r.err.Error()
		}
		t.retry.fail(now, s.jitter(), r.err)
		return
	}
	t.retry = retry{}
	switch r.Verb {
	case callPrepare:
		t.prepared = true
	case callUnprepare:
		t.prepared, t.inRuntime = false, false
	case callForget:
		t.forgotten = true
	}
}

// definitive says that trying again cannot help.
func definitive(err error) bool {
	switch sdk.KindOf(err) {
	case sdk.NotFound, sdk.Unauthorized, sdk.Invalid, sdk.Unsupported:
		return true
	}
	return false
}

func (s *State) finishPull(t *Task, c *Container, r result, now time.Duration) {
	if r.err == nil {
		for _, d := range t.Containers {
			if d.Spec.GetImage() == c.Spec.GetImage() && (d == c || d.Digest == "") {
				if d.Digest == "" {
					d.Image, d.Digest = r.image.Reference, r.image.Digest
				} else if r.image.Reference != "" && d.refetch {
					d.Image = r.image.Reference
				}
				d.pulled, d.refetch, d.pullRetry = true, false, retry{}
			}
		}
		return
	}
	if t.Stop != nil || sdk.KindOf(r.err) == sdk.Canceled && t.unwanted() {
		return
	}
	if sdk.KindOf(r.err) == sdk.Exhausted {
		s.noRoom(r.Runtime, now)
	}
	if c.pullRetry.failures == 0 {
		c.pullSince = s.onlineFor(now)
	}
	c.pullRetry.fail(now, s.jitter(), r.err)
	// An internal error says nothing about the next try; three of them do,
	// unless it may be the network's.
	internal := sdk.KindOf(r.err) == sdk.Internal && c.pullRetry.failures >= 3 && !t.inPlace() && s.away.up
	if definitive(r.err) || internal {
		c.failure = "CannotPullContainerError: " + r.err.Error()
	}
}

func (s *State) finishStart(t *Task, c *Container, r result, now time.Duration) {
	if r.withheld {
		// Nothing was started. The task waits: what keeps a device away is
		// no fault of its own.
		c.deviceRetry.fail(now, s.jitter(), r.err)
		return
	}
	c.deviceRetry = retry{}
	if r.err == nil {
		c.retry, c.conflicts = retry{}, 0
		c.pulled = false // what is there now may be gone by the next attempt
		c.StartedAt, c.slept = now, 0
		s.observe(t, c, r.found, now, false)
		return
	}
	c.retry.fail(now, s.jitter(), r.err)
	kind := sdk.KindOf(r.err)
	switch {
	case kind == sdk.NotFound && s.runtime(r.Runtime).info.Images && c.Digest != "" && !c.pulled:
		// On record from an earlier life, gone from the runtime since.
		c.refetch, c.retry = true, retry{}
	case kind == sdk.Conflict:
		s.conflict(t, c, r.err)
	case definitive(r.err):
		c.failure = "CannotStartContainerError: " + r.err.Error()
	case kind == sdk.Exhausted:
	case kind == sdk.Internal && !t.inPlace():
		c.failure = "CannotStartContainerError: " + r.err.Error()
		c.Phase = phaseUnknown // to be removed if it is there after all
		s.relist(r.Runtime, now)
	default:
		c.Phase = phaseUnknown
		s.relist(r.Runtime, now)
	}
}

// conflict is a host port or a name that something else has: another port is
// chosen where the choice is ours; else it is retried, for ever for a service.
func (s *State) conflict(t *Task, c *Container, err error) {
	c.conflicts++
	chosen := slices.ContainsFunc(c.Spec.GetPorts(), func(m *wire.PortMapping) bool { return m.GetHostPort() == 0 })
	tries := 3
	if chosen && len(c.HostPorts) > 0 {
		tries = 10
		used := c.HostPorts
		c.HostPorts = nil
		s.choosePorts(c)
		for i, p := range c.HostPorts { // never the same again
			if i < len(used) && p == used[i] && c.Spec.GetPorts()[i].GetHostPort() == 0 {
				c.HostPorts[i] = firstPort + (p-firstPort+1)%(lastPort-firstPort)
			}
		}
	}
	if c.conflicts >= tries && !t.inPlace() {
		c.failure = "CannotStartContainerError: " + err.Error()
	}
}

func (s *State) finishHalt(t *Task, c *Container, r result, now time.Duration) {
	switch {
	case r.err == nil:
		c.retry = retry{}
		s.observe(t, c, r.found, now, false)
	case sdk.KindOf(r.err) == sdk.NotFound:
		s.lost(t, c, now)
		c.Removed = true
	default:
		if sdk.KindOf(r.err) != sdk.Deadline {
			c.HaltedAt = 0 // nobody knows whether it was told
		}
		c.retry.fail(now, s.jitter(), r.err)
		c.Phase = phaseUnknown
		s.relist(r.Runtime, now)
	}
}

func (s *State) finishRemove(t *Task, c *Container, r result, now time.Duration) {
	if r.err == nil {
		c.Removed, c.retry = true, retry{}
		return
	}
	c.retry.fail(now, s.jitter(), r.err)
	s.relist(r.Runtime, now)
}

func (s *State) finishStray(r result, now time.Duration) {
	st := s.stray(r.action)
	if st == nil {
		return
	}
	st.busy = ""
	rt := s.runtime(r.Runtime)
	switch {
	case r.err == nil && r.Verb == callHalt:
		st.seen, st.retry = r.found, retry{}
	case r.err == nil || r.Verb == callHalt && sdk.KindOf(r.err) == sdk.NotFound:
		delete(rt.strays, r.Attempt)
		delete(rt.tasks, r.Attempt.Task)
	default:
		st.retry.fail(now, s.jitter(), r.err)
	}
}

// relist asks for a List soon; several asks are one.
func (s *State) relist(name string, now time.Duration) {
	rt := s.runtime(name)
	at := now + listDebounce
	if rt.retry.failures > 0 {
		at = max(at, min(rt.retry.at, now+listRetryCap))
	}
	rt.want(at)
}

// observe takes in what the runtime says about the current attempt. adopted:
// it was found, not started just now.
func (s *State) observe(t *Task, c *Container, seen sdk.Container, now time.Duration, adopted bool) {
	switch seen.State {
	case sdk.StateCreated:
		if c.Phase == phaseUnknown || c.Phase == phaseNone {
			c.Phase, c.Removed = phaseRecorded, false
		}
	case sdk.StateRunning:
		if c.Phase != phaseRunning {
			c.Phase, c.Removed = phaseRunning, false
			c.health = probe{status: HealthUnknown, next: now}
			if !adopted {
				c.health.next += seconds(c.Spec.GetHealthCheck().GetIntervalS(), 30)
			}
		}
		c.Started, c.PID, c.IP, c.Ports = true, seen.PID, seen.IP, seen.Ports
		c.identify(seen)
	case sdk.StateExited:
		if c.Phase == phaseExited {
			return
		}
		c.identify(seen)
		c.Started = true
		reason := seen.Reason
		if seen.OOMKilled {
			reason = "OutOfMemoryError: Container killed due to memory usage"
		}
		s.exit(c, seen.ExitCode, reason, seen.RanFor, now)
	}
}

func (c *Container) identify(seen sdk.Container) {
	if seen.RuntimeID != "" {
		c.RuntimeID = seen.RuntimeID
	}
	if c.Digest == "" && seen.ImageDigest != "" {
		// Its record was lost. What it runs is what its next attempt must
		// run, once the runtime has made a whole reference of it.
		c.Image, c.Digest, c.refetch = c.Spec.GetImage(), seen.ImageDigest, true
	}
}

const reasonRebooted = "The device rebooted while it ran: nobody saw its exit"

// lost is an attempt the runtime knows nothing of. One that never ran may be
// started; one that ran has ended and nobody saw how.
func (s *State) lost(t *Task, c *Container, now time.Duration) {
	if c.BootID == s.BootID && !c.Started {
		c.Phase = phaseRecorded
		return
	}
	reason := "The runtime no longer knows the container: its exit code is lost"
	if c.BootID != s.BootID {
		reason = reasonRebooted
	}
	s.exit(c, nil, reason, 0, now)
	// A start that was cut short may have made something that is not listed.
	c.Removed = c.Started
}

// exit notes that the current attempt has ended. The runtime knows how long it
// ran, where that is not 0, even when nobody looked for long after its end. But
// it may have that from a wall clock that was set meanwhile: it lengthens the
// back-off and decides nothing else, above all not whether a restart policy
// applies.
func (s *State) exit(c *Container, code *int, reason string, ran, now time.Duration) {
	c.Phase, c.ExitCode, c.Reason, c.PID, c.IP = phaseExited, code, reason, 0, ""
	c.Removed = false
	c.Rebooted = code == nil && c.BootID != s.BootID && !bug("reboot-unseen")
	if c.BootID == s.BootID && c.Started {
		c.RanFor = max(0, now-c.awakeSince())
	}
	steady := c.RanFor >= steadyRun && (ran <= 0 || ran >= steadyRun)
	c.retry = retry{}
	if c.Rebooted || steady {
		c.crashes, c.notBefore = 0, now
		return
	}
	c.crashes++
	c.notBefore = now + backoff(c.crashes, s.jitter())
}

// probed takes in one run of the health check.
func (c *Container) probed(r result, now time.Duration) {
	check := c.Spec.GetHealthCheck()
	c.health.next = now + seconds(check.GetIntervalS(), 30)
	if c.Phase != phaseRunning {
		return
	}
	ok := r.err == nil && r.exec.ExitCode == 0
	switch {
	case ok:
		c.health.status, c.health.fails, c.health.why = HealthHealthy, 0, ""
	case r.err != nil && sdk.KindOf(r.err) != sdk.Deadline:
		// The check did not run: it says nothing about the container.
	case now < c.awakeSince()+seconds(check.GetStartPeriodS(), 0) && c.health.status != HealthHealthy:
	default:
		c.health.fails++
		if c.health.fails >= int(max(1, orElse(check.GetRetries(), 3))) && c.health.status != HealthUnhealthy {
			c.health.status, c.health.why = HealthUnhealthy, sickness(r)
		}
	}
}

// sickness is what a failed health check said, in one short line.
func sickness(r result) string {
	if r.err != nil {
		return r.err.Error()
	}
	text := strings.Map(func(c rune) rune {
		if c != '\n' && !unicode.IsPrint(c) {
			return ' '
		}
		return c
	}, strings.TrimSpace(string(r.exec.Output)))
	last := []rune(strings.TrimSpace(text[strings.LastIndexByte(text, '\n')+1:]))
	if len(last) == 0 {
		return fmt.Sprintf("it ended with %d and said nothing", r.exec.ExitCode)
	}
	return fmt.Sprintf("it ended with %d: %s", r.exec.ExitCode, string(last[:min(len(last), 200)]))
}

func orElse(v, fallback uint32) uint32 {
	if v == 0 {
		return fallback
	}
	return v
}

// progressed takes in how far a pull has come.
func (s *State) progressed(a sdk.Attempt, p sdk.PullProgress) {
	if t := s.task(a.Task); t != nil {
		if c := t.container(a.Container); c != nil && c.pulling {
			c.progress = &wire.PullProgress{Layers: p.Layers, LayersDone: p.LayersDone, Bytes: p.Bytes, BytesDone: p.BytesDone}
		}
	}
}

// acked says the control plane has a status of the task.
func (s *State) acked(id string, sequence uint64) {
	if t := s.task(id); t != nil && t.Status == Stopped && t.report.last.GetLastStatus() == Stopped && sequence >= t.report.last.GetSequence() && !t.Acked {
		// From now on the task may be forgotten here. A control plane that
		// later knows nothing of its end must not have it run again.
		t.Acked, s.Applied.Mark = true, s.mark
	}
}

// pinned is a reference that can only mean one image.
func pinned(image, digest string) string {
	image, _, _ = strings.Cut(image, "@") // of an index, perhaps: the manifest counts
	return image + "@" + digest
}
