// Package state keeps what the agent must not forget on plain files that
// survive power cuts and tell damage apart from truth:
//
//	S/lock                    flock: one agent per state directory; holds its pid
//	S/tasks/<id>/assignment   magic, version, CRC32C, length, protobuf; written once
//	S/log                     magic, version, then frames: length, CRC32C, JSON record
//	S/damaged/                what did not check out, set aside for a person
//	S/outputs/<task>/<container>/<attempt>.{stdout,stderr}
//	S/volumes/{tasks/<task>,shared}/<volume>
package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
)

const (
	logName    = "log"
	tasksDir   = "tasks"
	damagedDir = "damaged"
	assignment = "assignment"
	lockName   = "lock"
	tmpSuffix  = ".tmp"

	// The log is rewritten once it is this large and mostly history.
	compactPast  = 64 << 10
	compactRatio = 4
	// Room that the log has whatever else fills the disk: what stops, ends and
	// starts again on a full one is on record all the same.
	reserved = 128 << 10
)

// Journal implements agent.Journal on files. It is not safe for concurrent use.
type Journal struct {
	fs   fileSystem
	lock io.Closer
	live *live

	log       file  // nil until it could be opened
	size      int64 // of the log, all of it acknowledged
	liveSize  int64 // as of the last rewrite
	rewrite   bool  // the log's end is in doubt: write a new one first
	forgotten map[string]bool
	rooted    bool // the names in the state directory are on stable storage
	// lost: the task is on record and its assignment cannot be had from what
	// is in its place. That is left as it is until it is replaced or the task
	// forgotten, so that the next start knows of it, too.
	lost map[string]bool
}

var _ agent.Journal = (*Journal)(nil)

// Open takes the state directory, made if missing, and reads what it holds.
// Damage is no error: it is set aside and told in Saved.Problems. Nor is a disk
// that cannot be written, told in Saved.Unwritable: what is held is there all
// the same, and each later call tries the disk again.
func Open(dir string) (*Journal, agent.Saved, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, agent.Saved{}, fmt.Errorf("make the state directory: %w", err)
	}
	l, err := lock(dir)
	if err != nil {
		return nil, agent.Saved{}, err
	}
	j, saved, err := open(disk{dir})
	if err != nil {
		return nil, agent.Saved{}, errors.Join(fmt.Errorf("open state directory %s: %w", dir, err), l.Close())
	}
	j.lock = l
	return j, saved, nil
}

// Close lets go of the state directory.
func (j *Journal) Close() error {
	var errs []error
	if j.log != nil {
		errs = append(errs, j.log.Close())
	}
	if j.lock != nil {
		errs = append(errs, j.lock.Close())
	}
	return errors.Join(errs...)
}

// SaveAssignment writes a task's assignment so that it is there whole or not
// at all.
func (j *Journal) SaveAssignment(a *wire.Assignment) error {
	id := a.GetTaskId()
	if !validName(id) {
		return fmt.Errorf("task id %q cannot name a directory", id)
	}
	b, err := encodeAssignment(a)
	if err != nil {
		return fmt.Errorf("save assignment of task %s: %w", id, err)
	}
	if j.forgotten[id] {
		// Else the note that it was forgotten would remove it: at the next
		// start, or when the log is rewritten.
		if err := j.append(entry{Record: agent.Record{Task: id}, Kept: true}); err != nil {
			return fmt.Errorf("save assignment of task %s: %w", id, err)
		}
	}
	err = j.putAssignment(id, b)
	if err != nil && j.lost[id] && !full(err) {
		// What is in its place may be no file, or below no directory.
		if j.moveAside(filepath.Join(tasksDir, id)) == nil {
			err = j.putAssignment(id, b)
		}
	}
	if err != nil {
		return fmt.Errorf("save assignment of task %s: %w", id, err)
	}
	j.live.task(id).assignment = a
	delete(j.lost, id)
	return nil
}

func (j *Journal) putAssignment(id string, content []byte) error {
	if err := j.makeTasks(); err != nil {
		return err
	}
	dir := filepath.Join(tasksDir, id)
	if err := j.fs.mkdir(dir); err != nil {
		return err
	}
	if err := j.replace(filepath.Join(dir, assignment), content); err != nil {
		return err
	}
	return j.fs.syncDir(tasksDir)
}

// makeTasks makes sure that the directory of tasks is there, and stays.
func (j *Journal) makeTasks() error {
	if j.rooted {
		return nil
	}
	if err := j.fs.mkdir(tasksDir); err != nil {
		return err
	}
	return j.syncRoot()
}

func (j *Journal) syncRoot() error {
	err := j.fs.syncDir(".")
	j.rooted = j.rooted || err == nil
	return err
}

// full says that the disk does not take anything now: no matter what.
func full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EROFS)
}

// replace puts content under a name: temporary file, sync, rename, sync of
// the directory.
func (j *Journal) replace(name string, content []byte) error {
	tmp := name + tmpSuffix
	err := j.write(tmp, content)
	if err == nil {
		err = j.fs.rename(tmp, name)
	}
	if err != nil {
		// Best effort: on a full disk the half file is space lost.
		_ = j.fs.remove(tmp)
		return err
	}
	return j.fs.syncDir(filepath.Dir(name))
}

func (j *Journal) write(name string, content []byte) error {
	f, err := j.fs.create(name)
	if err != nil {
		return err
	}
	if _, err := f.Write(content); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(err, f.Close())
	}
	return f.Close()
}

// Append writes records, all of them with one fsync: after a power cut all of
// them are there or none. Without any it only makes sure that the log can be
// written.
func (j *Journal) Append(records ...agent.Record) error {
	if len(records) == 0 {
		return j.compact()
	}
	entries := make([]entry, 0, len(records))
	for i, r := range records {
		entries = append(entries, entry{Record: r, At: i, More: i < len(records)-1})
	}
	if err := j.append(entries...); err != nil {
		return err
	}
	if j.size > compactPast && j.size > compactRatio*j.liveSize {
		// The log is whole with or without this; failing, it is tried again.
		_ = j.compact()
	}
	return nil
}

func (j *Journal) append(entries ...entry) error {
	if j.rewrite {
		if err := j.compact(); err != nil {
			return fmt.Errorf("rewrite the log: %w", err)
		}
	}
	var b []byte
	for _, e := range entries {
		var err error
		if b, err = appendFrame(b, e); err != nil {
			return fmt.Errorf("append to the log: %w", err)
		}
	}
	if _, err := j.log.Write(b); err != nil {
		// What was half written must not come before the next record.
		if terr := j.log.Truncate(j.size); terr != nil {
			j.rewrite = true
		}
		j.log.reserve(j.size + reserved)
		return fmt.Errorf("append to the log: %w", err)
	}
	if err := j.log.Sync(); err != nil {
		// After a failed fsync nobody knows what is on disk, a second one may
		// lie, and reading shows what is only in memory: begin a new file. Should
		// the agent end before, its next life must not see this as written.
		_ = j.log.Truncate(j.size)
		j.rewrite = true
		return fmt.Errorf("sync the log: %w", err)
	}
	j.size += int64(len(b))
	for _, e := range entries {
		j.live.apply(e)
		if e.Forget {
			j.forgotten[e.Task] = true
			delete(j.lost, e.Task)
		} else if e.Kept {
			delete(j.forgotten, e.Task)
		}
	}
	return nil
}

// ForgetTask removes everything about a task. The note in the log comes first
// and is what counts: what cannot be removed now, because of a power cut or of
// something in the way, is tried again whenever the log is rewritten.
func (j *Journal) ForgetTask(id string) error {
	if !validName(id) {
		return fmt.Errorf("task id %q cannot name a directory", id)
	}
	if err := j.append(entry{Record: agent.Record{Task: id}, Forget: true}); err != nil {
		return err
	}
	_ = j.removeTask(id)
	return nil
}

func (j *Journal) removeTask(id string) error {
	dir := filepath.Join(tasksDir, id)
	// In the place of the directory there may be anything, after damage.
	below := func(err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			return nil
		}
		return err
	}
	for _, step := range []func() error{
		func() error { return below(j.fs.remove(filepath.Join(dir, assignment+tmpSuffix))) },
		func() error { return below(j.fs.remove(filepath.Join(dir, assignment))) },
		func() error { return below(j.fs.syncDir(dir)) },
		func() error { return j.fs.remove(dir) },
		func() error { return j.fs.syncDir(tasksDir) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("remove the assignment of task %s: %w", id, err)
		}
	}
	return nil
}

// compact writes a new log of what still counts and puts it in the old one's
// place.
func (j *Journal) compact() error {
	// A note that a task was forgotten goes only with its assignment.
	var entries []entry
	kept := map[string]bool{}
	for _, id := range slices.Sorted(maps.Keys(j.forgotten)) {
		if err := j.removeTask(id); err != nil {
			kept[id] = true
			entries = append(entries, entry{Record: agent.Record{Task: id}, Forget: true})
		}
	}
	b := newLog()
	for _, e := range append(entries, j.live.entries()...) {
		var err error
		if b, err = appendFrame(b, e); err != nil {
			return err
		}
	}
	if err := j.replace(logName, b); err != nil {
		j.rewrite = true // the open file may be one without a name by now
		return err
	}
	f, err := j.fs.open(logName)
	if err != nil {
		j.rewrite = true
		return err
	}
	if j.log != nil {
		_ = j.log.Close() // of a file that is gone
	}
	f.reserve(int64(len(b)) + reserved)
	j.log, j.size, j.liveSize, j.rewrite = f, int64(len(b)), int64(len(b)), false
	j.forgotten = kept
	return nil
}
