package process

import (
	"context"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// phase is how far an attempt has come.
type phase int

const (
	phaseIdle     phase = iota // nothing was started, Start may do it
	phaseStarting              // a supervisor is at it, no record yet
	phaseRunning
	phaseExited
)

// observation is an attempt as its records, the kernel and its supervisor
// show it now.
type observation struct {
	phase phase
	pid   int // of the program, when running
	watch int // process whose end means "look again"; 0: none
	exit  record.Exit
}

// supervisor is what stands between a program and the loss of its exit code.
// Both kinds make the program by belay-supervise's stage, which writes the
// started record before execve; they differ in who waits for it.
type supervisor interface {
	// launch hands the attempt over. It returns a process to watch, or 0.
	launch(ctx context.Context, a *attempt) (watch int, err error)
	// pending says whether something may still start the program although
	// there is no started record yet.
	pending(ctx context.Context, a *attempt) (bool, error)
	// ended finds out about a program that no longer runs and has no exit
	// record. done is false while its supervisor still works on it.
	ended(ctx context.Context, a *attempt) (e record.Exit, done bool, err error)
	// settled says whether the supervisor is through with an attempt whose
	// exit is recorded, leftovers killed.
	settled(ctx context.Context, a *attempt) (done bool, watch int, err error)
	// watched is the process to wait for while the program runs.
	watched(a *attempt, program int) int
	// terminate asks the program to end: SIGTERM to it alone, as to the first
	// process of a container. To all would hit what its handler has begun.
	terminate(ctx context.Context, a *attempt) error
	// kill ends every process of the attempt.
	kill(ctx context.Context, a *attempt) error
	// joins are the cgroup.procs files for a process beside the program.
	joins(a *attempt, program int) []string
	// discard forgets what was made for an attempt, which has exited.
	discard(ctx context.Context, a *attempt) error

	prepareTask(ctx context.Context, id string, l sdk.Limits) error
	removeTask(ctx context.Context, id string) error
}

// of is the supervisor an attempt was started by, whatever the mode is now.
func (r *Runtime) of(a *attempt) (supervisor, error) {
	if a.meta.Mode != ModeSystemd {
		return r.own, nil
	}
	if r.systemd == nil {
		return nil, sdk.Errorf(sdk.Unavailable, "find "+a.String(), "it was started by systemd, which cannot be reached")
	}
	return r.systemd, nil
}

// observe finds the truth about a known attempt, and writes down an exit that
// it found out by looking.
func (r *Runtime) observe(ctx context.Context, a *attempt) (observation, error) {
	sup, err := r.of(a)
	if err != nil {
		return observation{}, err
	}
	for {
		o, again, err := r.look(ctx, a, sup)
		if err != nil || !again {
			return o, err
		}
	}
}

// look is one try of observe; again means that something changed meanwhile.
func (r *Runtime) look(ctx context.Context, a *attempt, sup supervisor) (o observation, again bool, err error) {
	sameBoot := a.meta.Boot == r.boot
	if e, ok := a.exit(); ok {
		if _, _, failed := a.failed(); failed {
			return observation{phase: phaseIdle}, false, nil
		}
		o := observation{phase: phaseExited, exit: e}
		if sameBoot {
			done, watch, err := sup.settled(ctx, a)
			if err != nil {
				return o, false, err
			}
			if !done {
				s, _ := a.started()
				o.phase, o.pid, o.watch = phaseRunning, s.PID, watch
			}
		}
		return o, false, nil
	}
	if _, _, failed := a.failed(); failed {
		return observation{phase: phaseIdle}, false, nil
	}
	s, ok := a.started()
	if !ok {
		if !sameBoot {
			return observation{phase: phaseIdle}, false, nil
		}
		pending, err := sup.pending(ctx, a)
		if err != nil {
			return o, false, err
		}
		if _, started := a.started(); started {
			return o, true, nil
		}
		if pending {
			return observation{phase: phaseStarting}, false, nil
		}
		return observation{phase: phaseIdle}, false, nil
	}
	if s.Boot != r.boot {
		e, err := a.noteExit(record.Exit{Code: -1, Reason: "the device restarted while it ran: nobody saw its exit code"})
		return observation{phase: phaseExited, exit: e}, false, err
	}
	if p, err := record.ReadProcess(s.PID); err == nil && p.Start == s.Start && p.Alive() {
		return observation{phase: phaseRunning, pid: s.PID, watch: sup.watched(a, s.PID)}, false, nil
	}
	e, done, err := sup.ended(ctx, a)
	if err != nil {
		return o, false, err
	}
	if _, recorded := a.exit(); recorded {
		return o, true, nil
	}
	if !done {
		return observation{phase: phaseRunning, pid: s.PID, watch: sup.watched(a, 0)}, false, nil
	}
	e, err = a.noteExit(e)
	return observation{phase: phaseExited, exit: e}, false, err
}
