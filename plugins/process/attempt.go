package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// The state directory. Everything about a task is below its own directory, so
// nothing has to be cleaned up anywhere else.
//
//	<state>/tasks/<task>/task                 the prepared task: its spec, JSON
//	<state>/tasks/<task>/a/<container>/<n>/   one attempt, see internal/record
const attemptsDir = "a"

var (
	taskID        = regexp.MustCompile(`^[0-9a-f]{32}$`)
	containerName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
)

// meta is what the plugin itself must know of an attempt later.
type meta struct {
	Mode  string            `json:"mode"`           // ModeOwn or ModeSystemd
	Unit  string            `json:"unit,omitempty"` // systemd's name for it
	Boot  string            `json:"boot"`
	Ports []sdk.PortMapping `json:"ports,omitempty"`
}

// attempt is one attempt's directory.
type attempt struct {
	sdk.Attempt
	dir    string
	meta   meta
	limits sdk.Limits // of the request, while it is being started
}

func (r *Runtime) taskDir(task string) string { return filepath.Join(r.tasksDir(), task) }

func checkTask(op, task string) error {
	if !taskID.MatchString(task) {
		return sdk.Errorf(sdk.Invalid, op, "task %q is not 32 lower-case hex digits", task)
	}
	return nil
}

// attemptOf checks the names, which become parts of paths.
func (r *Runtime) attemptOf(op string, a sdk.Attempt) (*attempt, error) {
	if err := checkTask(op, a.Task); err != nil {
		return nil, err
	}
	if !containerName.MatchString(a.Container) {
		return nil, sdk.Errorf(sdk.Invalid, op, "container %q is not 1 to 255 letters, digits, - or _", a.Container)
	}
	if a.Number < 1 {
		return nil, sdk.Errorf(sdk.Invalid, op, "attempt number %d is not 1 or more", a.Number)
	}
	return &attempt{Attempt: a, dir: filepath.Join(r.taskDir(a.Task), attemptsDir, a.Container, strconv.Itoa(a.Number))}, nil
}

// known reads what was asked for; false: the attempt was never made, or a
// crash came before it was written down, so nothing was ever started.
func (a *attempt) known() (bool, error) {
	raw, err := os.ReadFile(filepath.Join(a.dir, record.MetaFile))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the record of %s: %w", a, err)
	}
	if err := json.Unmarshal(raw, &a.meta); err != nil {
		return false, fmt.Errorf("the record of %s is damaged: %w", a, err)
	}
	return true, nil
}

// save writes what is about to be started, the meta last: with it the attempt
// is known, and everything it needs is there.
func (a *attempt) save(launch []record.Field) error {
	if err := makeDirs(a.dir); err != nil {
		return err
	}
	if err := record.WriteFile(a.dir, record.LaunchFile, record.EncodeLaunch(launch)); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Join(a.dir, record.LaunchFile), err)
	}
	raw, err := json.Marshal(a.meta)
	if err != nil {
		return err
	}
	if err := record.WriteFile(a.dir, record.MetaFile, raw); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Join(a.dir, record.MetaFile), err)
	}
	return nil
}

// makeDirs makes a directory and makes each new name durable.
func makeDirs(dir string) error {
	if isDir(dir) {
		return nil
	}
	if err := makeDirs(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return record.SyncDir(filepath.Dir(dir))
}

// forget deletes the directory, the meta first: a crash in the middle leaves
// an attempt that was never made, not one that was never started.
func (a *attempt) forget() error {
	if err := os.Remove(filepath.Join(a.dir, record.MetaFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Somebody may still be writing down how it ended, the next moment not.
	err := os.RemoveAll(a.dir)
	for n := 0; n < 5 && errors.Is(err, syscall.ENOTEMPTY); n++ {
		err = os.RemoveAll(a.dir)
	}
	if err != nil {
		return err
	}
	_ = os.Remove(filepath.Dir(a.dir)) // the container's, when this was its last
	return nil
}

func (a *attempt) started() (record.Started, bool) {
	raw, err := record.ReadFile(filepath.Join(a.dir, record.StartedFile))
	if err != nil {
		return record.Started{}, false
	}
	return record.DecodeStarted(raw)
}

func (a *attempt) exit() (record.Exit, bool) {
	raw, err := record.ReadFile(filepath.Join(a.dir, record.ExitFile))
	if err != nil {
		return record.Exit{}, false
	}
	return record.DecodeExit(raw)
}

// outOfMemory says whether the stage noted that memory ran out.
func (a *attempt) outOfMemory() bool {
	_, err := os.Stat(filepath.Join(a.dir, record.OOMFile))
	return err == nil
}

func (a *attempt) launch() ([]record.Field, error) {
	raw, err := record.ReadFile(filepath.Join(a.dir, record.LaunchFile))
	if err != nil {
		return nil, err
	}
	fields, ok := record.DecodeLaunch(raw)
	if !ok {
		return nil, errors.New("the launch file is damaged")
	}
	return fields, nil
}

// saveExit records an exit that the plugin itself found out.
func (a *attempt) saveExit(e record.Exit) (record.Exit, error) {
	if err := record.WriteFile(a.dir, record.ExitFile, e.Encode()); err != nil {
		return e, fmt.Errorf("record the exit of %s: %w", a, err)
	}
	return e, nil
}

// noteExit is saveExit for the end of a program that ran. A code that nobody saw
// need not be on record: the next look finds out the same. On a full disk one
// such attempt must not hide all the others from List.
func (a *attempt) noteExit(e record.Exit) (record.Exit, error) {
	e, err := a.saveExit(e)
	if e.Code < 0 {
		err = nil
	}
	return e, err
}

// staging says whether a stage is between its first step and execve.
func (a *attempt) staging() bool {
	f, err := os.Open(filepath.Join(a.dir, record.FailedFile))
	if err != nil {
		return false
	}
	defer f.Close()
	return syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == syscall.EWOULDBLOCK
}

// failed is why execve was not reached: the step and its error.
func (a *attempt) failed() (step string, errno syscall.Errno, failed bool) {
	raw, err := record.ReadFile(filepath.Join(a.dir, record.FailedFile))
	if err != nil || len(raw) == 0 {
		return "", 0, false
	}
	s := string(raw)
	for i := len(s) - 1; i > 0; i-- {
		if s[i] == ' ' {
			n, _ := strconv.Atoi(s[i+1:])
			return s[:i], syscall.Errno(n), true
		}
	}
	return s, syscall.EIO, true
}

// lock keeps a second plugin process, which a relaunch may overlap for a
// moment, out of the Start and Remove of the same task.
func (r *Runtime) lock(ctx context.Context, task string) (unlock func(), err error) {
	if err := makeDirs(r.taskDir(task)); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(r.taskDir(task), "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			_ = f.Close()
			return nil, fmt.Errorf("lock task %s: %w", task, err)
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("another process of this plugin is busy with task %s: %w", task, err)
		}
	}
}

// pause waits for d or the end of ctx, whose error it returns.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
