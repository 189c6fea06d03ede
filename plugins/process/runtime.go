package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// taskFile marks a prepared task.
const taskFile = "task"

// PrepareTask makes the task's cgroup or slice with its limits.
func (r *Runtime) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	op := "prepare task " + t.ID
	if err := checkTask(op, t.ID); err != nil {
		return err
	}
	for _, f := range []struct{ what, mode string }{{"PID mode ", t.PIDMode}, {"IPC mode ", t.IPCMode}} {
		if f.mode != "" && f.mode != "host" {
			return sdk.Errorf(sdk.Unsupported, op, "the process runtime has no %s%s", f.what, f.mode)
		}
	}
	if t.Network != "" && t.Network != sdk.NetworkHost {
		return sdk.Errorf(sdk.Unsupported, op, "the process runtime has no network mode %s", t.Network).
			WithHint("use network mode host")
	}
	unlock, err := r.lock(ctx, t.ID)
	if err != nil {
		return sortOut(op, err)
	}
	defer unlock()
	var sup supervisor = r.own
	if r.mode == ModeSystemd {
		sup = r.systemd
	}
	if err := sup.prepareTask(ctx, t.ID, t.Limits); err != nil {
		_ = sup.removeTask(ctx, t.ID)
		return sortOut(op, err)
	}
	if _, err := os.Stat(filepath.Join(r.taskDir(t.ID), taskFile)); err == nil {
		return nil // said before: do not wear the flash
	}
	raw, err := json.Marshal(map[string]string{"family": t.Family, "mode": r.mode})
	if err == nil {
		err = record.WriteFile(r.taskDir(t.ID), taskFile, raw)
	}
	return sortOut(op, err)
}

// RemoveTask undoes PrepareTask.
func (r *Runtime) RemoveTask(ctx context.Context, task string) error {
	op := "remove task " + task
	if err := checkTask(op, task); err != nil {
		return err
	}
	if !isDir(r.taskDir(task)) {
		return nil
	}
	unlock, err := r.lock(ctx, task)
	if err != nil {
		return sortOut(op, err)
	}
	defer unlock()
	held, err := r.attempts(task)
	if err != nil {
		return sortOut(op, err)
	}
	if len(held) > 0 {
		return sdk.Errorf(sdk.Conflict, op, "%s is not removed yet", held[0])
	}
	if err := r.own.removeTask(ctx, task); err != nil {
		return sortOut(op, err)
	}
	if r.mode == ModeSystemd {
		if err := r.systemd.removeTask(ctx, task); err != nil {
			return sortOut(op, err)
		}
	}
	return sortOut(op, os.RemoveAll(r.taskDir(task)))
}

// Pull is never called for a runtime without images.
func (r *Runtime) Pull(_ context.Context, req sdk.PullRequest, _ func(sdk.PullProgress)) (sdk.Image, error) {
	return sdk.Image{}, sdk.Errorf(sdk.Unsupported, "pull "+req.Image, "the process runtime runs programs of the host, not images")
}

// Start starts an attempt, or adopts what an earlier call made.
func (r *Runtime) Start(ctx context.Context, req sdk.StartRequest) (sdk.Container, error) {
	op := "start " + req.Attempt.String()
	a, err := r.attemptOf(op, req.Attempt)
	if err != nil {
		return sdk.Container{}, err
	}
	unlock, err := r.lock(ctx, a.Task)
	if err != nil {
		return sdk.Container{}, sortOut(op, err)
	}
	defer unlock()
	c, err := r.start(ctx, op, a, req)
	return c, sortOut(op, err)
}

// launchTime is how long a program may take from its supervisor's start to
// its own, on a device that swaps.
const launchTime = 30 * time.Second

func (r *Runtime) start(ctx context.Context, op string, a *attempt, req sdk.StartRequest) (sdk.Container, error) {
	known, err := a.known()
	if err != nil {
		return sdk.Container{}, err
	}
	if known {
		o, err := r.arrive(ctx, a)
		if err != nil {
			return sdk.Container{}, err
		}
		if o.phase != phaseIdle {
			r.watchFor(a, o)
			return r.container(a, o), nil
		}
		if err := r.discard(ctx, a); err != nil {
			return sdk.Container{}, err
		}
	}
	fields, ports, err := plan(op, req)
	if err != nil {
		return sdk.Container{}, err
	}
	a.meta = meta{Mode: r.mode, Boot: r.boot, Ports: ports}
	a.limits = req.Spec.Limits
	if r.mode == ModeSystemd {
		a.meta.Unit = r.systemd.unitName(a.Attempt)
	} else {
		fields = append(fields, r.own.fields(a.Attempt)...)
	}
	if err := a.save(fields); err != nil {
		return sdk.Container{}, errors.Join(err, a.forget())
	}
	if err := ctx.Err(); err != nil {
		return sdk.Container{}, errors.Join(err, a.forget()) // the last moment to give up
	}
	// From here on the program may run. If the caller goes away now it stays:
	// the next one to ask finds it, where undoing it would run it twice.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), launchTime)
	defer cancel()
	o, err := r.launch(ctx, a)
	if err == nil {
		if step, errno, failed := a.failed(); failed {
			err = startError(op, fields[0].Value, req.Spec.WorkingDir, step, errno)
		} else if o.phase == phaseIdle {
			err = r.unexplained(op, a)
		}
	}
	if err != nil {
		r.undo(ctx, a)
		return sdk.Container{}, err
	}
	r.watchFor(a, o)
	if o.phase == phaseExited {
		r.watch.publish(a.Attempt)
	}
	return r.container(a, o), nil
}

// unexplained is why nothing came of a launch that left no word: most likely
// there was no room for one.
func (r *Runtime) unexplained(op string, a *attempt) error {
	if err := record.WriteFile(a.dir, "probe", []byte("is there room?")); err != nil {
		return fmt.Errorf("record the start in %s: %w", a.dir, err)
	}
	return sdk.Errorf(sdk.Internal, op, "its supervisor ended before it started the program")
}

// launch starts the attempt and waits until the program runs or cannot.
func (r *Runtime) launch(ctx context.Context, a *attempt) (observation, error) {
	if a.meta.Mode == ModeOwn {
		if err := r.own.limit(a.Attempt, a.limits); err != nil {
			return observation{}, err
		}
	}
	sup, err := r.of(a)
	if err != nil {
		return observation{}, err
	}
	pid, err := sup.launch(ctx, a)
	if err != nil {
		return observation{}, err
	}
	if pid != 0 {
		r.watch.add(a.Attempt, pid)
	}
	// The supervisor takes its lock a few milliseconds after it was made:
	// until then, or until it is gone again, idle does not mean idle yet.
	for {
		o, err := r.settle(ctx, a)
		if err != nil {
			return o, err
		}
		if _, _, failed := a.failed(); failed || o.phase != phaseIdle || pid == 0 {
			return o, nil
		}
		if p, err := record.ReadProcess(pid); err != nil || !p.Alive() {
			return r.settle(ctx, a)
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return o, err
		}
	}
}

// arrive is settle for an attempt that another process of this plugin may have
// begun: a supervisor it made must not find its cgroup and files taken away.
func (r *Runtime) arrive(ctx context.Context, a *attempt) (observation, error) {
	for {
		// Looked for first: one that came and went before settle looks has left
		// its records.
		coming := a.meta.Mode == ModeOwn && r.own.coming(a)
		o, err := r.settle(ctx, a)
		if err != nil || o.phase != phaseIdle || !coming {
			return o, err
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return o, err
		}
	}
}

// settle observes until no supervisor is on its way to execve: a started
// record is only half of it while the stage still holds its file.
func (r *Runtime) settle(ctx context.Context, a *attempt) (observation, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		o, err := r.observe(ctx, a)
		switch {
		case err != nil || o.phase == phaseIdle:
			return o, err
		case o.phase != phaseStarting && !a.staging():
			return r.observe(ctx, a) // execve may have failed between the looks
		}
		if err := pause(ctx, wait); err != nil {
			return o, err
		}
	}
}

// undo leaves nothing of an attempt that could not be started, even when the
// caller has given up meanwhile.
func (r *Runtime) undo(ctx context.Context, a *attempt) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := r.discard(ctx, a); err != nil {
		r.log.Warn("could not clean up after a failed start", "attempt", a.String(), "error", err)
	}
}

// discard ends and forgets whatever is left of an attempt.
func (r *Runtime) discard(ctx context.Context, a *attempt) error {
	sup, err := r.of(a)
	if err != nil {
		return err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		o, err := r.observe(ctx, a)
		if err != nil {
			return err
		}
		if o.phase == phaseIdle || o.phase == phaseExited {
			break
		}
		if err := sup.kill(ctx, a); err != nil {
			return err
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
	if err := sup.discard(ctx, a); err != nil {
		return err
	}
	return a.forget()
}

// Stop ends an attempt: SIGTERM to the program, and after grace SIGKILL to all
// of it.
func (r *Runtime) Stop(ctx context.Context, id sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	op := "stop " + id.String()
	a, o, err := r.find(ctx, op, id)
	if errors.Is(err, sdk.NotFound) && isDir(r.taskDir(id.Task)) {
		// A Start whose caller has gone away may be about to make it: who is
		// told that there is no such attempt does not ask again.
		unlock, lerr := r.lock(ctx, id.Task)
		if lerr != nil {
			return sdk.Container{}, sortOut(op, lerr)
		}
		a, o, err = r.find(ctx, op, id)
		unlock()
	}
	if err != nil {
		return sdk.Container{}, err
	}
	if o.phase == phaseIdle {
		// An earlier failure to start, which a crash kept from being cleaned
		// up, would make it startable again.
		_ = os.Remove(filepath.Join(a.dir, record.FailedFile))
		e, err := a.saveExit(record.Exit{Code: -1, Reason: "stopped before it was started"})
		return r.container(a, observation{phase: phaseExited, exit: e}), sortOut(op, err)
	}
	sup, err := r.of(a)
	if err != nil {
		return sdk.Container{}, err
	}
	killAt := time.NewTimer(max(grace, 0))
	defer killAt.Stop()
	asked, kill := false, grace <= 0
	for wait := 2 * time.Millisecond; o.phase != phaseExited; wait = min(2*wait, 50*time.Millisecond) {
		var err error
		switch {
		case kill: // again and again: a process may fork meanwhile
			err = sup.kill(ctx, a)
		case !asked && o.phase == phaseRunning:
			asked, err = true, sup.terminate(ctx, a)
		}
		if err != nil {
			return sdk.Container{}, sortOut(op, err)
		}
		again := time.NewTimer(wait)
		select {
		case <-again.C:
		case <-killAt.C:
			kill = true
		case <-ctx.Done():
			again.Stop()
			return sdk.Container{}, sortOut(op, ctx.Err())
		}
		again.Stop()
		if o, err = r.observe(ctx, a); err != nil {
			return sdk.Container{}, sortOut(op, err)
		}
	}
	return r.container(a, o), nil
}

// Remove forgets an exited attempt.
func (r *Runtime) Remove(ctx context.Context, id sdk.Attempt) error {
	op := "remove " + id.String()
	a, err := r.attemptOf(op, id)
	if err != nil {
		return err
	}
	if !isDir(a.dir) {
		return nil
	}
	unlock, err := r.lock(ctx, a.Task)
	if err != nil {
		return sortOut(op, err)
	}
	defer unlock()
	known, err := a.known()
	if err != nil {
		// Damaged, listed as exited: whatever it was, it is told to go.
		r.log.Warn("removing an attempt whose record is damaged", "attempt", a.String(), "error", err)
		if err := r.endUnreadable(ctx, a); err != nil {
			return sortOut(op, err)
		}
		return sortOut(op, a.forget())
	}
	if !known {
		return sortOut(op, a.forget())
	}
	o, err := r.observe(ctx, a)
	if err != nil {
		return sortOut(op, err)
	}
	if o.phase == phaseRunning || o.phase == phaseStarting {
		return sdk.Errorf(sdk.Conflict, op, "it is running, pid %d", o.pid).WithHint("stop it first")
	}
	return sortOut(op, r.discard(ctx, a))
}

// List returns every attempt and every prepared task.
func (r *Runtime) List(ctx context.Context) (sdk.Inventory, error) {
	const op = "list"
	var inv sdk.Inventory
	tasks, err := os.ReadDir(r.tasksDir())
	if err != nil {
		return inv, sdk.Errorf(sdk.Unavailable, op, "%w", err)
	}
	for _, t := range tasks {
		if !isTaskID(t.Name()) {
			continue
		}
		if _, err := os.Stat(filepath.Join(r.taskDir(t.Name()), taskFile)); err == nil {
			inv.Tasks = append(inv.Tasks, t.Name())
		}
		held, err := r.attempts(t.Name())
		if err != nil {
			return sdk.Inventory{}, sdk.Errorf(sdk.Unavailable, op, "%w", err)
		}
		for _, a := range held {
			c, err := r.describe(ctx, a)
			if err != nil {
				return sdk.Inventory{}, sdk.Errorf(sdk.Unavailable, op, "%s: %w", a, err)
			}
			inv.Containers = append(inv.Containers, c)
		}
	}
	return inv, nil
}

// describe is one entry of List. A record that cannot be read must not hide
// the others: the attempt is made to be over, and listed so with what is wrong.
func (r *Runtime) describe(ctx context.Context, a *attempt) (sdk.Container, error) {
	if _, err := a.known(); err != nil {
		if e := r.endUnreadable(ctx, a); e != nil {
			r.log.Error("an attempt whose record is damaged may still run", "attempt", a.String(), "error", e)
		}
		return sdk.Container{Attempt: a.Attempt, RuntimeID: a.String(), State: sdk.StateExited, Reason: err.Error()}, nil
	}
	o, err := r.observe(ctx, a)
	if err != nil {
		return sdk.Container{}, err
	}
	r.watchFor(a, o)
	return r.container(a, o), nil
}

// endUnreadable ends an attempt of which not even the supervisor is known: the
// agent takes what is listed as exited for gone, and would start it again
// beside itself.
func (r *Runtime) endUnreadable(ctx context.Context, a *attempt) error {
	err := r.own.kill(ctx, a)
	if err == nil {
		err = r.own.discard(ctx, a)
	}
	if r.systemd == nil {
		return err
	}
	a.meta.Unit = r.systemd.unitName(a.Attempt) // as every start names it
	return errors.Join(err, r.systemd.discard(ctx, a))
}

// attempts lists the directories of a task's attempts that were made whole.
func (r *Runtime) attempts(task string) ([]*attempt, error) {
	base := filepath.Join(r.taskDir(task), attemptsDir)
	containers, err := os.ReadDir(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []*attempt
	for _, c := range containers {
		numbers, err := os.ReadDir(filepath.Join(base, c.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		for _, n := range numbers {
			number, _ := strconv.Atoi(n.Name())
			a, err := r.attemptOf("list", sdk.Attempt{Task: task, Container: c.Name(), Number: number})
			if err != nil {
				continue // not ours
			}
			if _, err := os.Stat(filepath.Join(a.dir, record.MetaFile)); err == nil {
				all = append(all, a)
			}
		}
	}
	return all, nil
}

// find is an attempt and what is known of it; NotFound when nothing is.
func (r *Runtime) find(ctx context.Context, op string, id sdk.Attempt) (*attempt, observation, error) {
	a, err := r.attemptOf(op, id)
	if err != nil {
		return nil, observation{}, err
	}
	known, err := a.known()
	if err != nil {
		return nil, observation{}, sortOut(op, err)
	}
	if !known {
		return nil, observation{}, sdk.Errorf(sdk.NotFound, op, "no such attempt")
	}
	o, err := r.observe(ctx, a)
	return a, o, sortOut(op, err)
}

// container is an attempt in the contract's words.
func (r *Runtime) container(a *attempt, o observation) sdk.Container {
	c := sdk.Container{Attempt: a.Attempt, RuntimeID: a.meta.Unit, State: sdk.StateCreated, Ports: a.meta.Ports}
	if c.RuntimeID == "" {
		c.RuntimeID = "process-" + r.tag + "/" + a.String()
	}
	switch o.phase {
	case phaseRunning:
		c.State, c.PID = sdk.StateRunning, o.pid
	case phaseExited:
		c.State, c.Reason, c.OOMKilled = sdk.StateExited, o.exit.Reason, o.exit.OOM
		c.RanFor = time.Duration(max(o.exit.RanFor, 0))
		if o.exit.Code >= 0 {
			c.ExitCode = &o.exit.Code
		}
	}
	return c
}
