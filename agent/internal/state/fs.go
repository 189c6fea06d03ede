package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// fileSystem is what the journal needs of a disk; small, so that tests can
// break it at every write, sync and rename. Paths are below one root.
type fileSystem interface {
	// create makes an empty file open for writing; one that exists is emptied.
	create(name string) (file, error)
	// open opens an existing file for writing at its end.
	open(name string) (file, error)
	read(name string) ([]byte, error)
	rename(from, to string) error
	remove(name string) error // a file or an empty directory; absence is no error
	mkdir(name string) error  // with its parents
	list(dir string) ([]string, error)
	syncDir(name string) error
}

// file is one file being written.
type file interface {
	io.WriteCloser
	Sync() error
	Truncate(size int64) error // and write from there on
}

// disk is the real file system below a directory.
type disk struct{ root string }

func (d disk) path(name string) string { return filepath.Join(d.root, name) }

func (d disk) create(name string) (file, error) {
	f, err := os.OpenFile(d.path(name), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

func (d disk) open(name string) (file, error) {
	f, err := os.OpenFile(d.path(name), os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return diskFile{f}, nil
}

func (d disk) read(name string) ([]byte, error) { return os.ReadFile(d.path(name)) }

func (d disk) rename(from, to string) error { return os.Rename(d.path(from), d.path(to)) }

func (d disk) remove(name string) error {
	if err := os.Remove(d.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (d disk) mkdir(name string) error { return os.MkdirAll(d.path(name), 0o700) }

func (d disk) list(dir string) ([]string, error) {
	entries, err := os.ReadDir(d.path(dir))
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

func (d disk) syncDir(name string) error {
	f, err := os.Open(d.path(name))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

type diskFile struct{ *os.File }

func (f diskFile) Truncate(size int64) error {
	if err := f.File.Truncate(size); err != nil {
		return err
	}
	_, err := f.Seek(size, io.SeekStart)
	return err
}

// lock takes the state directory for this process alone, until the file is
// closed or the process ends.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		holder := "another process"
		b := make([]byte, 32)
		if n, _ := f.ReadAt(b, 0); n > 0 {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n]))); err == nil {
				holder = fmt.Sprintf("the agent with process id %d", pid)
			}
		}
		return nil, errors.Join(fmt.Errorf("state directory %s is in use by %s: stop it first, or give this one another --state-dir",
			filepath.Dir(path), holder), f.Close())
	}
	// Who holds it is for people only: a full disk must not stop the agent.
	if f.Truncate(0) == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

// validName keeps names that came over the wire inside their directory.
func validName(name string) bool {
	if name == "" || len(name) > 255 {
		return false
	}
	for i, r := range name {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '-', r == '.' && i > 0:
		default:
			return false
		}
	}
	return true
}
