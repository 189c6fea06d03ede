package state

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
)

// live is what the log and the assignments add up to.
type live struct {
	applied *agent.Applied
	away    *agent.Away
	unused  *agent.Unused
	tasks   map[string]*liveTask
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

func (l *live) apply(e entry) {
	switch {
	case e.Applied != nil:
		a := *e.Applied
		l.applied = &a
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
	add := func(r agent.Record) { out = append(out, entry{Record: r}) }
	if l.applied != nil {
		add(agent.Record{Applied: l.applied})
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
	return out
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
		for _, c := range slices.Sorted(maps.Keys(t.attempts)) {
			st.Attempts = append(st.Attempts, t.attempts[c])
		}
		s.Tasks = append(s.Tasks, st)
	}
	return s
}

// open reads a state directory and makes it ready to be written.
func open(fsys fileSystem) (*Journal, agent.Saved, error) {
	j := &Journal{fs: fsys, live: &live{tasks: map[string]*liveTask{}}, forgotten: map[string]bool{}}
	if err := fsys.mkdir(tasksDir); err != nil {
		return nil, agent.Saved{}, err
	}
	var problems []string
	raw, err := fsys.read(logName)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, agent.Saved{}, fmt.Errorf("read the log: %w", err)
	}
	log, err := replay(raw)
	if err != nil {
		return nil, agent.Saved{}, fmt.Errorf("the log was %w: use that agent, or an empty state directory", err)
	}
	for _, e := range log.entries {
		j.live.apply(e)
		switch {
		case e.Forget:
			j.forgotten[e.Task] = true
		case e.Task != "":
			delete(j.forgotten, e.Task)
		}
	}
	if len(log.damage) > 0 {
		where := j.setAside(logName, raw)
		for _, d := range log.damage {
			problems = append(problems, fmt.Sprintf("the log of the agent's state: %s; a copy is in %s", d, where))
		}
	}
	bad, err := j.loadAssignments()
	if err != nil {
		return nil, agent.Saved{}, err
	}
	problems = append(problems, bad...)

	// A log with history, a torn tail or damage is written anew; one that
	// holds just what counts is left as it is, to spare the flash.
	if err := j.settle(raw, log); err != nil {
		return nil, agent.Saved{}, err
	}
	saved := j.live.saved()
	saved.Problems = problems
	return j, saved, nil
}

// settle makes the log writable. On a full disk a whole log is used as it is.
func (j *Journal) settle(raw []byte, log replayed) error {
	whole := len(raw) > 0 && log.good == len(raw) && len(log.damage) == 0
	if whole && len(j.forgotten) == 0 && len(log.entries) <= compactRatio*len(j.live.entries()) {
		f, err := j.fs.open(logName)
		if err != nil {
			return fmt.Errorf("open the log: %w", err)
		}
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
			if oerr = f.Truncate(int64(log.good)); oerr == nil {
				j.log, j.size, j.liveSize, j.rewrite = f, int64(log.good), int64(log.good), false
				return nil
			}
			_ = f.Close()
		}
	}
	return fmt.Errorf("write the log: %w", err)
}

// loadAssignments reads every task's assignment and sets bad ones aside.
func (j *Journal) loadAssignments() (problems []string, err error) {
	ids, err := j.fs.list(tasksDir)
	if err != nil {
		return nil, fmt.Errorf("list the tasks: %w", err)
	}
	slices.Sort(ids)
	for _, id := range ids {
		if j.forgotten[id] {
			continue // compact removes it
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
		var a *wire.Assignment
		if err == nil {
			a, err = decodeAssignment(b)
		}
		if errors.Is(err, errNewer) {
			return nil, fmt.Errorf("the assignment of task %s was %w: use that agent, or an empty state directory", id, err)
		}
		if err == nil && a.GetTaskId() != id {
			err = fmt.Errorf("it is that of task %s", a.GetTaskId())
		}
		if err != nil {
			where := j.setAside(filepath.Join(tasksDir, id, assignment), b)
			problems = append(problems, fmt.Sprintf("the assignment of task %s is damaged (%s); a copy is in %s", id, err, where))
			delete(j.live.tasks, id)
			j.forgotten[id] = true
			continue
		}
		j.live.task(id).assignment = a
	}
	for _, id := range slices.Sorted(maps.Keys(j.live.tasks)) {
		if j.live.tasks[id].assignment == nil {
			problems = append(problems, fmt.Sprintf("the assignment of task %s is missing", id))
			delete(j.live.tasks, id)
			j.forgotten[id] = true
		}
	}
	for id := range j.forgotten {
		if !validName(id) {
			delete(j.forgotten, id) // a stray file of someone else
		}
	}
	return problems, nil
}

// setAside keeps a copy of damaged content for a person to look at, and says
// where. It is best effort: a full disk must not stop the agent.
func (j *Journal) setAside(name string, content []byte) string {
	if err := j.fs.mkdir(damagedDir); err != nil {
		return "no place: " + err.Error()
	}
	flat := ""
	for _, r := range filepath.ToSlash(name) {
		if r == '/' {
			r = '-'
		}
		flat += string(r)
	}
	taken, err := j.fs.list(damagedDir)
	if err != nil {
		return "no place: " + err.Error()
	}
	// A device that damages its disk again and again must not fill it so.
	const most = 20
	for n := 1; n <= most; n++ {
		to := fmt.Sprintf("%s.%d", flat, n)
		if slices.Contains(taken, to) {
			continue
		}
		if err := j.write(filepath.Join(damagedDir, to), content); err != nil {
			return "no place: " + err.Error()
		}
		return filepath.Join(damagedDir, to)
	}
	return fmt.Sprintf("no place: %s holds %d copies already", damagedDir, most)
}
