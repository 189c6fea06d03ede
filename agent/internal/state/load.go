package state

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
)

// live is what the log and the assignments add up to.
type live struct {
	applied *agent.Applied
	doubt   *agent.Doubt
	away    *agent.Away
	unused  *agent.Unused
	tasks   map[string]*liveTask
	newer   newer
}

type liveTask struct {
	assignment *wire.Assignment
	origin     string
	desired    *agent.Desired
	status     *agent.StatusRecord
	attempts   map[string]agent.AttemptRecord // by container: the latest
}

func (l *live) task(id string) *liveTask {
	t := l.tasks[id]
	if t == nil {
		t = &liveTask{attempts: map[string]agent.AttemptRecord{}}
		l.tasks[id] = t
	}
	return t
}

func newLive() *live { return &live{tasks: map[string]*liveTask{}} }

func (l *live) apply(e entry) {
	l.newer.apply(e)
	switch {
	case e.Applied != nil:
		a := *e.Applied
		l.applied = &a
	case e.Doubt != nil:
		l.doubt = e.Doubt
		if e.Doubt.Cleared {
			l.doubt = nil
		}
	case e.Away != nil:
		l.away = e.Away
	case e.Unused != nil:
		l.unused = e.Unused
	case e.Task == "":
	case e.Forget:
		delete(l.tasks, e.Task)
	case e.Desired != nil:
		l.task(e.Task).desired = e.Desired
	case e.Status != nil:
		l.task(e.Task).status = e.Status
	case e.Origin != "":
		l.task(e.Task).origin = e.Origin
	case e.Attempt != nil:
		t := l.task(e.Task)
		if t.attempts[e.Attempt.Container].Number <= e.Attempt.Number {
			t.attempts[e.Attempt.Container] = *e.Attempt
		}
	}
}

// entries say the same again in as few records as possible.
func (l *live) entries() []entry {
	var out []entry
	add := func(r agent.Record) {
		e := entry{Record: r}
		e.raw = l.newer.extended[sortOf(e)]
		out = append(out, e)
	}
	if l.applied != nil {
		add(agent.Record{Applied: l.applied})
	}
	if l.doubt != nil {
		add(agent.Record{Doubt: l.doubt})
	}
	if l.away != nil && l.away.For > 0 {
		add(agent.Record{Away: l.away})
	}
	if l.unused != nil && len(l.unused.Images) > 0 {
		add(agent.Record{Unused: l.unused})
	}
	for _, id := range slices.Sorted(maps.Keys(l.tasks)) {
		t := l.tasks[id]
		if t.origin != "" {
			add(agent.Record{Task: id, Origin: t.origin})
		}
		if t.desired != nil {
			add(agent.Record{Task: id, Desired: t.desired})
		}
		if t.status != nil {
			add(agent.Record{Task: id, Status: t.status})
		}
		for _, c := range slices.Sorted(maps.Keys(t.attempts)) {
			a := t.attempts[c]
			add(agent.Record{Task: id, Attempt: &a})
		}
	}
	return append(out, l.newer.unknown...)
}

func (l *live) saved() agent.Saved {
	var s agent.Saved
	if l.applied != nil {
		s.Applied = *l.applied
	}
	s.Away, s.Unused = l.away, l.unused
	for _, id := range slices.Sorted(maps.Keys(l.tasks)) {
		t := l.tasks[id]
		st := agent.SavedTask{Assignment: t.assignment, Origin: t.origin, Desired: t.desired, Status: t.status}
		if t.assignment == nil {
			st.ID = id
		}
		for _, c := range slices.Sorted(maps.Keys(t.attempts)) {
			st.Attempts = append(st.Attempts, t.attempts[c])
		}
		s.Tasks = append(s.Tasks, st)
	}
	return s
}

// open reads a state directory and makes it ready to be written, if it can.
func open(fsys fileSystem) (*Journal, agent.Saved, error) {
	j := &Journal{fs: fsys, live: newLive(), forgotten: map[string]bool{}, lost: map[string]bool{}}
	raw, err := fsys.read(logName)
	log, replayErr := replay(raw)
	if replayErr != nil {
		return nil, agent.Saved{}, fmt.Errorf("the log was %w: use that agent, or an empty state directory", replayErr)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.damage = append([]string{"it cannot be read: " + err.Error()}, log.damage...)
		if errors.Is(err, syscall.EISDIR) {
			_ = j.moveAside(logName) // it would be in the way of a new one
		}
	}
	for _, e := range log.entries {
		j.live.apply(e)
		switch {
		case e.Forget:
			if validName(e.Task) {
				j.forgotten[e.Task] = true
			}
		case e.Task != "":
			delete(j.forgotten, e.Task)
		}
	}
	var problems []string
	if len(log.damage) > 0 {
		where := j.setAside(logName, raw)
		for _, d := range log.damage {
			problems = append(problems, fmt.Sprintf("the log of the agent's state: %s; a copy is in %s", d, where))
		}
	}
	// What is damaged stays in its place; only of the log, which is written
	// anew, nothing would be left to tell the next start.
	if len(problems) > 0 {
		j.live.doubt = doubt(j.live.doubt, problems)
	}
	if j.live.doubt != nil {
		problems = slices.Clone(j.live.doubt.Problems)
	}
	problems = append(problems, j.loadAssignments()...)

	// A log with history, a torn tail or damage is written anew; one that
	// holds just what counts is left as it is, to spare the flash.
	unwritable := j.settle(raw, log)
	saved := j.live.saved()
	saved.Problems = problems
	if unwritable != nil {
		j.rewrite = true
		saved.Unwritable = unwritable.Error()
	}
	return j, saved, nil
}

// mostProblems is how many sentences a doubt keeps: the first tell the most.
const mostProblems = 10

func doubt(before *agent.Doubt, problems []string) *agent.Doubt {
	d := &agent.Doubt{}
	if before != nil {
		d.Problems = slices.Clone(before.Problems)
	}
	for _, p := range problems {
		if len(d.Problems) < mostProblems && !slices.Contains(d.Problems, p) {
			d.Problems = append(d.Problems, p)
		}
	}
	return d
}

// settle makes the log writable. On a full disk a whole log is used as it is.
func (j *Journal) settle(raw []byte, log replayed) error {
	if err := j.makeTasks(); err != nil {
		return fmt.Errorf("make the directory of tasks: %w", err)
	}
	whole := len(raw) > 0 && log.good == len(raw) && len(log.damage) == 0
	if whole && len(j.forgotten) == 0 && len(log.entries) <= compactRatio*len(j.live.entries())+1 {
		f, err := j.fs.open(logName)
		if err != nil {
			return fmt.Errorf("open the log: %w", err)
		}
		// A life that was killed may have written what it never synced.
		if err := f.Sync(); err != nil {
			return errors.Join(fmt.Errorf("sync the log: %w", err), f.Close())
		}
		f.reserve(int64(len(raw)) + reserved)
		j.log, j.size, j.liveSize = f, int64(len(raw)), int64(len(raw))
		return nil
	}
	err := j.compact()
	if err == nil {
		return nil
	}
	now, rerr := j.fs.read(logName)
	if rerr == nil && bytes.Equal(now, raw) && len(raw) >= logHeader && len(log.damage) == 0 {
		// No room for a new one: go on with the old, its torn tail cut off.
		f, oerr := j.fs.open(logName)
		if oerr == nil {
			if log.good < len(raw) {
				oerr = f.Truncate(int64(log.good))
			}
			oerr = errors.Join(oerr, f.Sync())
			if oerr == nil {
				f.reserve(int64(log.good) + reserved)
				j.log, j.size, j.liveSize, j.rewrite = f, int64(log.good), int64(log.good), false
				return nil
			}
			_ = f.Close()
		}
	}
	return fmt.Errorf("write the log: %w", err)
}

// loadAssignments reads every task's assignment. What is bad is copied aside
// and left as it is: the task is one of those held, though nobody can tell
// what it is.
func (j *Journal) loadAssignments() (problems []string) {
	ids, err := j.fs.list(tasksDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		problems = append(problems, fmt.Sprintf("the tasks cannot be listed: %v", err))
	}
	slices.Sort(ids)
	for _, id := range ids {
		if j.forgotten[id] || !validName(id) {
			continue // compact removes it; or it is someone else's
		}
		name := filepath.Join(tasksDir, id, assignment)
		b, err := j.fs.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			// Power went before it was written: nobody was told it was.
			if j.live.tasks[id] == nil {
				j.forgotten[id] = true
			}
			continue
		}
		unread := err
		a, err := decodeAssignment(b)
		if a != nil && a.GetTaskId() != id {
			a, err = nil, fmt.Errorf("it is that of task %q", a.GetTaskId())
		}
		if unread != nil {
			err = unread
		}
		if err != nil {
			problems = append(problems, fmt.Sprintf("the assignment of task %s is damaged (%s); a copy is in %s", id, err, j.setAside(name, b)))
		}
		if a == nil {
			j.lost[id] = true
			j.live.task(id)
			continue
		}
		j.live.task(id).assignment = a
		if err != nil {
			// Only what stands before it is damaged. Failing, it is tried again.
			if whole, err := encodeAssignment(a); err == nil {
				_ = j.putAssignment(id, whole)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(j.live.tasks)) {
		if j.live.tasks[id].assignment == nil && !j.lost[id] {
			problems = append(problems, fmt.Sprintf("the assignment of task %s is missing", id))
			j.lost[id] = true
		}
	}
	return problems
}
