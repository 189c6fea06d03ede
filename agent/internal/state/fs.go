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

	"golang.org/x/sys/unix"
)

// fileSystem is what the journal needs of a disk; small, so that tests can
// break it at every write, sync and rename. Paths are below one root.
type fileSystem interface {
	// read gives what can be read of a file: on an error that is not its
	// absence the content may be nil, or have zeros where it cannot be read.
	read(name string) ([]byte, error)
	// create makes an empty file open for writing; one that exists is emptied.
	create(name string) (file, error)
	// open opens an existing file for writing at its end.
	open(name string) (file, error)
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
	// reserve sets space aside for the file to grow to that size, where the
	// file system can.
	reserve(size int64)
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

func (d disk) read(name string) ([]byte, error) {
	b, err := os.ReadFile(d.path(name))
	if !errors.Is(err, syscall.EIO) {
		return b, err
	}
	saved, serr := salvage(d.path(name))
	if serr != nil {
		return b, err
	}
	return saved, err
}

// salvage reads around the blocks that the medium no longer gives: what is in
// the others still checks out by itself.
func salvage(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	const block, most = 4096, 64 << 20
	b := make([]byte, min(st.Size(), most))
	for at := 0; at < len(b); at += block {
		part := b[at:min(at+block, len(b))]
		if _, err := f.ReadAt(part, int64(at)); err != nil {
			clear(part)
		}
	}
	return b, nil
}

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

func (f diskFile) reserve(size int64) {
	_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
}

func (f diskFile) Truncate(size int64) error {
	if err := f.File.Truncate(size); err != nil {
		return err
	}
	_, err := f.Seek(size, io.SeekStart)
	return err
}

// lock takes the state directory for this process alone, until what it returns
// is closed or the process ends. The directory itself is locked, which needs
// neither space nor a disk that can be written; the file tells who has it, and
// agents of before locked only that.
func lock(dir string) (io.Closer, error) {
	path := filepath.Join(dir, lockName)
	var held locks
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the state directory: %w", err)
	}
	held = append(held, d)
	if err := exclusive(d, path); err != nil {
		return nil, errors.Join(err, held.Close())
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		if f, err = os.OpenFile(path, os.O_RDONLY|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0); err != nil {
			return held, nil // there is none, nor room for one: the directory's must do
		}
	}
	held = append(held, f)
	if err := exclusive(f, path); err != nil {
		return nil, errors.Join(err, held.Close())
	}
	// Who holds it is for people only.
	if f.Truncate(0) == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return held, nil
}

// locks are files whose locks end when they are closed.
type locks []*os.File

func (l locks) Close() error {
	var errs []error
	for _, f := range l {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// exclusive locks an open file or says who has it; path tells the holder.
func exclusive(f *os.File, path string) error {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return nil
	}
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	holder := "another process"
	if b, err := os.ReadFile(path); err == nil {
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b[:min(len(b), 32)]))); err == nil {
			holder = fmt.Sprintf("the agent with process id %d", pid)
		}
	}
	return fmt.Errorf("state directory %s is in use by %s: stop it first, or give this one another --state-dir",
		filepath.Dir(path), holder)
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
