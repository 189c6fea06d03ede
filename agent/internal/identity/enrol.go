package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Enrolment is an attempt to become an instance. While it lasts no other one
// can be made on the same state directory. It ends with Commit, Keep or Discard.
type Enrolment struct {
	Key []byte // PEM, on stable storage

	dir     string
	pending string   // the key's file
	fresh   bool     // the key was made by this attempt
	made    []string // directories this attempt made, outermost first
	lock    *os.File
}

// Begin makes what enrolling needs on disk: the state directory and a key,
// the same key as last time if an earlier attempt with this control plane
// never learned its answer. An existing identity stays valid until Commit.
func Begin(stateDir, pin string, newKey func() ([]byte, error)) (*Enrolment, error) {
	if len(pin) < 16 {
		return nil, fmt.Errorf("prepare enrolment: %q is not a pin", pin)
	}
	e := &Enrolment{dir: filepath.Join(stateDir, dirName)}
	if err := e.makeDirs(e.dir); err != nil {
		e.removeDirs()
		return nil, fmt.Errorf("prepare enrolment: %w", err)
	}
	if err := e.acquire(); err != nil {
		return nil, err
	}
	e.pending = filepath.Join(e.dir, "pending-"+pin[:16]+".pem")
	key, err := e.earlier()
	if err == nil && key == nil {
		e.fresh = true
		if key, err = newKey(); err == nil {
			err = write(e.pending, key)
		}
	}
	if err != nil {
		e.Discard()
		return nil, fmt.Errorf("prepare enrolment: keep the device's key: %w", err)
	}
	e.Key = key
	return e, nil
}

// earlier returns the key an earlier attempt left, nil without one.
func (e *Enrolment) earlier() ([]byte, error) {
	key, err := os.ReadFile(e.pending)
	if err == nil && len(key) > 0 {
		return key, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// A crash in the middle of Commit leaves a key without an instance.
	if _, err := os.Stat(filepath.Join(e.dir, instanceName)); !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key, err = os.ReadFile(filepath.Join(e.dir, keyName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return key, write(e.pending, key)
}

// Commit makes the device that instance, in place of any it was before.
// After an error the key is kept, and the same enrolment can be made again.
func (e *Enrolment) Commit(i Instance) error {
	defer e.release()
	text, err := encode(i)
	if err != nil {
		return err
	}
	final, key := filepath.Join(e.dir, instanceName), filepath.Join(e.dir, keyName)
	// All that needs space comes first; what follows only renames.
	temp, err := writeTemp(final, text)
	if err != nil {
		return fmt.Errorf("record identity: %w", err)
	}
	steps := []func() error{
		func() error { return syncParents(e.dir) },
		func() error { return removeIfThere(filepath.Join(e.dir, copyName)) }, // of the one before
		func() error { return syncDir(e.dir) },
		func() error { return removeIfThere(final) }, // never a new key beside an old instance
		func() error { return os.Rename(e.pending, key) },
		func() error { return syncDir(e.dir) },
		func() error { return os.Rename(temp, final) },
		func() error { return syncDir(e.dir) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("record identity: %w", err)
		}
	}
	// Failing, the agent makes it at its next start.
	_ = writeCopy(e.dir, Identity{Instance: i, Key: e.Key})
	// Keys of attempts with other control planes are of no use any more.
	stale, _ := filepath.Glob(filepath.Join(e.dir, "pending-*"))
	for _, p := range stale {
		_ = os.Remove(p)
	}
	return nil
}

// Keep leaves the key for a later attempt: the control plane may have taken it.
func (e *Enrolment) Keep() { e.release() }

// Discard is for an enrolment that certainly did not happen: it removes what
// this attempt made. A key left by an earlier attempt, whose answer was lost,
// stays.
func (e *Enrolment) Discard() {
	if e.fresh {
		e.remove()
	}
	e.release()
	e.removeDirs()
}

// Reject is Discard for a key the control plane will never take again.
func (e *Enrolment) Reject() {
	e.remove()
	e.release()
	e.removeDirs()
}

func (e *Enrolment) remove() {
	_ = os.Remove(e.pending)
	// Without an instance, key.pem is the same abandoned key.
	if _, err := os.Stat(filepath.Join(e.dir, instanceName)); errors.Is(err, fs.ErrNotExist) {
		_ = os.Remove(filepath.Join(e.dir, keyName))
	}
}

// makeDirs is MkdirAll with mode 0700 that remembers what it made.
func (e *Enrolment) makeDirs(dir string) error {
	if st, err := os.Stat(dir); err == nil {
		if !st.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(dir); parent != dir {
		if err := e.makeDirs(parent); err != nil {
			return err
		}
	}
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		e.made = append(e.made, dir)
	}
	return err
}

// removeDirs removes what makeDirs made, where it is still empty.
func (e *Enrolment) removeDirs() {
	for i := len(e.made) - 1; i >= 0; i-- {
		_ = os.Remove(e.made[i])
	}
}

// acquire locks the directory itself: no lock file to leave behind.
func (e *Enrolment) acquire() error {
	d, err := os.Open(e.dir)
	if err != nil {
		return fmt.Errorf("prepare enrolment: %w", err)
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = d.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("another enrolment is under way in %s: wait for it to end", e.dir)
		}
		return fmt.Errorf("prepare enrolment: lock %s: %w", e.dir, err)
	}
	e.lock = d
	return nil
}

func (e *Enrolment) release() {
	if e.lock != nil {
		_ = e.lock.Close() // gives the lock up
		e.lock = nil
	}
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
