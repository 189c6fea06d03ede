package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/plugins/sdk"
)

// keepAttempts is how many attempts of one container keep their output: a
// crash loop must not fill the disk with files.
const keepAttempts = 5

// Outputs implements agent.Outputs on plain files below a state directory.
type Outputs struct{ dir string }

var _ agent.Outputs = Outputs{}

// NewOutputs keeps outputs below the state directory.
func NewOutputs(stateDir string) Outputs { return Outputs{filepath.Join(stateDir, "outputs")} }

func (o Outputs) path(a sdk.Attempt, stream string) (string, error) {
	if !validName(a.Task) || !validName(a.Container) || a.Number < 1 || stream != "stdout" && stream != "stderr" {
		return "", sdk.Errorf(sdk.Invalid, "name the output of "+a.String(), "%q of it cannot be a file", stream)
	}
	return filepath.Join(o.dir, a.Task, a.Container, strconv.Itoa(a.Number)+"."+stream), nil
}

// Open makes the two files of an attempt, or finds those it has, and lets go
// of those of attempts long past.
func (o Outputs) Open(a sdk.Attempt) (stdout, stderr string, err error) {
	paths := [2]string{}
	for i, stream := range []string{"stdout", "stderr"} {
		if paths[i], err = o.path(a, stream); err != nil {
			return "", "", err
		}
		if err := os.MkdirAll(filepath.Dir(paths[i]), 0o750); err != nil {
			return "", "", fmt.Errorf("make the directory of outputs: %w", err)
		}
		f, err := os.OpenFile(paths[i], os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NOFOLLOW, 0o640)
		if err != nil {
			return "", "", fmt.Errorf("make an output file: %w", err)
		}
		if err := f.Close(); err != nil {
			return "", "", fmt.Errorf("make an output file: %w", err)
		}
	}
	for n := a.Number - keepAttempts; n > 0; n-- {
		gone := 0
		for _, stream := range []string{"stdout", "stderr"} {
			old := a
			old.Number = n
			p, err := o.path(old, stream)
			if err != nil {
				return "", "", err
			}
			if errors.Is(os.Remove(p), fs.ErrNotExist) {
				gone++
			}
		}
		if gone == 2 {
			break // those before went when this one did
		}
	}
	return paths[0], paths[1], nil
}

// Read opens what an attempt wrote.
func (o Outputs) Read(a sdk.Attempt, stream string) (io.ReadCloser, error) {
	p, err := o.path(a, stream)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(p, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sdk.Errorf(sdk.NotFound, "read "+stream+" of "+a.String(), "no output of it is kept")
	}
	if err != nil {
		return nil, fmt.Errorf("open an output file: %w", err)
	}
	return f, nil
}

// Forget deletes what the task's attempts wrote.
func (o Outputs) Forget(task string) error {
	if !validName(task) {
		return nil // it never had any
	}
	if err := os.RemoveAll(filepath.Join(o.dir, task)); err != nil {
		return fmt.Errorf("delete the outputs of task %s: %w", task, err)
	}
	return nil
}

// Volumes implements agent.Volumes on directories below a state directory.
type Volumes struct{ dir string }

var _ agent.Volumes = Volumes{}

// NewVolumes keeps volumes below the state directory.
func NewVolumes(stateDir string) Volumes { return Volumes{filepath.Join(stateDir, "volumes")} }

// Dir makes and returns the directory of a volume.
func (v Volumes) Dir(task, volume string, shared bool) (string, error) {
	if !validName(task) || !validName(volume) {
		return "", sdk.Errorf(sdk.Invalid, "make a volume", "%q is no name for one", volume)
	}
	dir := filepath.Join(v.dir, "tasks", task, volume)
	if shared {
		dir = filepath.Join(v.dir, "shared", volume)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", fmt.Errorf("make the directory of volume %s: %w", volume, err)
	}
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return dir, nil // with whatever owner and mode its containers gave it
	}
	if err == nil {
		// Containers run as any user. The directory above lets nobody else in.
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		return "", fmt.Errorf("make the directory of volume %s: %w", volume, err)
	}
	return dir, nil
}

// Host makes sure that a host path exists.
func (v Volumes) Host(path string) error {
	if !filepath.IsAbs(path) {
		return sdk.Errorf(sdk.Invalid, "mount a host path", "%q is not absolute", path)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return fmt.Errorf("look at host path %s: %w", path, err)
		}
		return nil
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("make host path %s: %w", path, err)
	}
	return nil
}

// Forget deletes the task's own volumes.
func (v Volumes) Forget(task string) error {
	if !validName(task) {
		return nil
	}
	if err := os.RemoveAll(filepath.Join(v.dir, "tasks", task)); err != nil {
		return fmt.Errorf("delete the volumes of task %s: %w", task, err)
	}
	return nil
}
