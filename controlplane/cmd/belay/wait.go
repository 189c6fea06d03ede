package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
)

// wait shows what becomes of tasks until all have stopped. A control plane
// that goes away is waited for: the tasks do not depend on it.
func (c *cli) wait(ctx context.Context, tasks []*apiv1.Task) ([]*apiv1.Task, error) {
	w := &watched{byID: map[string]*apiv1.Task{}, progress: newProgress(c)}
	var ids []string
	for _, t := range tasks {
		ids = append(ids, t.GetId())
		w.see(t)
	}
	defer w.progress.done()
	pauseFor := time.Duration(0)
	for !w.allStopped() {
		before := w.seen
		err := c.watch(ctx, ids, w.see)
		switch {
		case w.allStopped():
		case ctx.Err() != nil:
			w.progress.done()
			return nil, exitError{exitInterrupted, goesOn(ids)}
		case err != nil && !momentary(err):
			return nil, err
		default:
			if w.seen != before {
				pauseFor = 0
			}
			pauseFor = min(max(2*pauseFor, 200*time.Millisecond), 5*time.Second)
			if err != nil && pauseFor > time.Second {
				w.progress.say("waiting for the control plane: " + strings.SplitN(c.explain(err), "\n", 2)[0])
			}
			if !pause(ctx, pauseFor) {
				w.progress.done()
				return nil, exitError{exitInterrupted, goesOn(ids)}
			}
		}
	}
	out := make([]*apiv1.Task, len(ids))
	for i, id := range ids {
		out[i] = w.byID[id]
	}
	return out, nil
}

func goesOn(ids []string) string {
	if len(ids) == 1 {
		id := shortID(ids[0])
		return fmt.Sprintf("stopped waiting; the task goes on. See: belay task describe %s; end it: belay task stop %s", id, id)
	}
	return "stopped waiting; the tasks go on. See: belay task list"
}

// watch is one stream of changes; it ends when the stream does.
func (c *cli) watch(ctx context.Context, ids []string, see func(*apiv1.Task)) error {
	conn, err := c.connect()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.api.WatchTasks(ctx, connect.NewRequest(&apiv1.WatchTasksRequest{Ids: ids}))
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		see(stream.Msg().GetTask())
	}
	return stream.Err()
}

type watched struct {
	byID     map[string]*apiv1.Task
	seen     int
	progress *progress
}

func (w *watched) see(t *apiv1.Task) {
	w.seen++
	w.byID[t.GetId()] = t
	line, passing := taskLine(t)
	prefix := ""
	if len(w.byID) > 1 {
		prefix = "task " + shortID(t.GetId()) + ": "
	}
	if passing {
		w.progress.update(prefix + line)
	} else {
		w.progress.say(prefix + line)
	}
}

func (w *watched) allStopped() bool {
	for _, t := range w.byID {
		if t.GetLastStatus() != "STOPPED" {
			return false
		}
	}
	return true
}

// taskLine says where a task is; passing tells that the next line of the same
// kind may take its place.
func taskLine(t *apiv1.Task) (line string, passing bool) {
	status := t.GetLastStatus()
	for _, ct := range t.GetContainers() {
		if p := pulling(ct); p != "" && (status == "PENDING" || status == "PROVISIONING" || status == "ACTIVATING") {
			return fmt.Sprintf("%s: %s: %s", status, ct.GetName(), p), true
		}
	}
	switch {
	case status == "STOPPED":
		why := t.GetStoppedReason()
		for _, ct := range t.GetContainers() {
			if ct.ExitCode != nil {
				why = strings.TrimPrefix(why+fmt.Sprintf("; %s exited %d", ct.GetName(), ct.GetExitCode()), "; ")
			}
		}
		return strings.TrimSuffix("STOPPED: "+why, ": "), false
	case t.GetNote() != "":
		return status + ": " + t.GetNote(), false
	}
	return status, false
}

// pulling says how far a pull has come, "" when there is none under way.
func pulling(ct *apiv1.Container) string {
	p := ct.GetPull()
	if p == nil || p.GetLayers() == 0 || p.GetLayersDone() >= p.GetLayers() {
		return ""
	}
	return fmt.Sprintf("pulling %s, layer %d of %d, %s of %s", ct.GetImage(), p.GetLayersDone()+1, p.GetLayers(), kib(p.GetKibDone()), kib(p.GetKib()))
}

// outcome is the exit code of tasks that have stopped: of the first essential
// container that did not exit 0, and exitNotRun where there is no code.
func outcome(tasks []*apiv1.Task) (code int, why string) {
	for _, t := range tasks {
		name := "task " + shortID(t.GetId())
		known := false
		lost := ""
		for _, ct := range t.GetContainers() {
			switch {
			case !ct.GetEssential():
			case ct.ExitCode == nil:
				lost = strings.TrimSuffix(fmt.Sprintf("%s: container %s has no exit code: %s", name, ct.GetName(), ct.GetReason()), ": ")
			case ct.GetExitCode() != 0:
				return exitStatus(ct.GetExitCode()), fmt.Sprintf("%s: container %s exited %d", name, ct.GetName(), ct.GetExitCode())
			default:
				known = true
			}
		}
		if code != exitOK {
			continue // a code of a later task may still be a container's
		}
		if lost != "" && t.GetStartedAt() != "" {
			code, why = exitNotRun, lost
		} else if !known || lost != "" {
			code, why = exitNotRun, strings.TrimSuffix(name+" did not start: "+reason(t), ": ")
		}
	}
	return code, why
}

// reason is the most telling of what a task says of its end.
func reason(t *apiv1.Task) string {
	parts := []string{}
	if t.GetStoppedReason() != "" {
		parts = append(parts, t.GetStoppedReason())
	}
	for _, ct := range t.GetContainers() {
		if ct.GetReason() != "" && !strings.Contains(t.GetStoppedReason(), ct.GetReason()) {
			parts = append(parts, ct.GetName()+": "+ct.GetReason())
		}
	}
	return strings.Join(parts, "; ")
}

// exitStatus fits a container's code into what a process can exit with; what
// is not 0 stays so.
func exitStatus(code int32) int {
	if code < 1 || code > 255 {
		return exitFailure
	}
	return int(code)
}

// progress writes to standard error: on a terminal passing lines take each
// other's place, elsewhere each is a line of its own, at most one in a while.
type progress struct {
	c        *cli
	terminal bool
	open     bool // a passing line is on the screen
	last     string
	lastAt   time.Time
}

const plainEvery = 2 * time.Second

func newProgress(c *cli) *progress {
	f, ok := c.stderr.(*os.File)
	if !ok {
		return &progress{c: c}
	}
	info, err := f.Stat()
	return &progress{c: c, terminal: err == nil && info.Mode()&fs.ModeCharDevice != 0}
}

// say writes a line that stays.
func (p *progress) say(line string) {
	if line == p.last {
		return
	}
	p.done()
	p.last = line
	fmt.Fprintln(p.c.stderr, line)
}

// update writes a passing line.
func (p *progress) update(line string) {
	switch {
	case line == p.last:
		return
	case p.terminal:
		if r := []rune(line); len(r) > 79 {
			line = string(r[:78]) + "…"
		}
		fmt.Fprintf(p.c.stderr, "\r\x1b[K%s", line)
		p.open = true
	case p.c.now().Sub(p.lastAt) < plainEvery:
		return
	default:
		fmt.Fprintln(p.c.stderr, line)
	}
	p.last, p.lastAt = line, p.c.now()
}

// done ends a passing line.
func (p *progress) done() {
	if p.open {
		fmt.Fprint(p.c.stderr, "\r\x1b[K")
		p.open = false
	}
}
