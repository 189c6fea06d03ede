package state

import (
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

var errCut = errors.New("the power is off")

// fakeFS is a disk with a cache: what was not synced may be lost, in part, by
// a power cut. At operation failAt it fails in the way of mode.
type fakeFS struct {
	names   map[string]*inode // as the system sees them
	durable map[string]*inode // as the disk has them
	ops     int
	failAt  int // 0: never
	mode    string
	off     bool
	rng     *rand.Rand
}

type inode struct{ data, synced []byte }

func newFakeFS() *fakeFS {
	return &fakeFS{names: map[string]*inode{}, durable: map[string]*inode{}, rng: rand.New(rand.NewPCG(1, 1))}
}

// fail counts an operation and says how it goes wrong, if it does.
func (f *fakeFS) fail() error {
	if f.off {
		return errCut
	}
	f.ops++
	if f.ops != f.failAt {
		return nil
	}
	switch f.mode {
	case "cut":
		f.off = true
		return errCut
	case "full":
		return syscall.ENOSPC
	}
	return syscall.EIO
}

func (f *fakeFS) create(name string) (file, error) {
	if err := f.fail(); err != nil {
		return nil, err
	}
	n := &inode{}
	f.names[name] = n
	return &fakeFile{f, n}, nil
}

func (f *fakeFS) open(name string) (file, error) {
	if err := f.fail(); err != nil {
		return nil, err
	}
	n := f.names[name]
	if n == nil {
		return nil, fs.ErrNotExist
	}
	return &fakeFile{f, n}, nil
}

func (f *fakeFS) read(name string) ([]byte, error) {
	if f.off {
		return nil, errCut
	}
	n := f.names[name]
	if n == nil {
		return nil, fs.ErrNotExist
	}
	return slices.Clone(n.data), nil
}

func (f *fakeFS) rename(from, to string) error {
	if err := f.fail(); err != nil {
		return err
	}
	f.names[to] = f.names[from]
	delete(f.names, from)
	return nil
}

func (f *fakeFS) remove(name string) error {
	if err := f.fail(); err != nil {
		return err
	}
	delete(f.names, name)
	return nil
}

func (f *fakeFS) mkdir(string) error { return f.fail() }

func (f *fakeFS) list(dir string) ([]string, error) {
	if f.off {
		return nil, errCut
	}
	seen := map[string]bool{}
	for name := range f.names {
		if rest, ok := strings.CutPrefix(name, dir+"/"); ok {
			seen[strings.Split(rest, "/")[0]] = true
		}
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

func (f *fakeFS) syncDir(dir string) error {
	if err := f.fail(); err != nil {
		return err
	}
	for name := range f.durable {
		if filepath.Dir(name) == dir && f.names[name] == nil {
			delete(f.durable, name)
		}
	}
	for name, n := range f.names {
		if filepath.Dir(name) == dir {
			f.durable[name] = n
		}
	}
	return nil
}

// reboot is the disk after a power cut: every name and every unsynced byte
// may have made it or not.
func (f *fakeFS) reboot() *fakeFS {
	out := newFakeFS()
	after := map[*inode]*inode{}
	survive := func(n *inode) *inode {
		if after[n] == nil {
			data := slices.Clone(n.synced)
			if tail := n.data; len(tail) > len(n.synced) && slices.Equal(tail[:len(n.synced)], n.synced) {
				whole := len(tail) - len(n.synced)
				grown := f.rng.IntN(whole + 1)
				part := slices.Clone(tail[len(n.synced) : len(n.synced)+grown])
				if f.rng.IntN(3) == 0 {
					clear(part[len(part)/2:]) // the size was written, the block was not
				}
				data = append(data, part...)
			} else if f.rng.IntN(2) == 0 {
				data = slices.Clone(n.data)
			}
			after[n] = &inode{data: data, synced: slices.Clone(data)}
		}
		return after[n]
	}
	all := map[string]bool{}
	for name := range f.names {
		all[name] = true
	}
	for name := range f.durable {
		all[name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		n := f.durable[name]
		if f.rng.IntN(2) == 0 {
			n = f.names[name]
		}
		if n != nil {
			out.names[name] = survive(n)
			out.durable[name] = out.names[name]
		}
	}
	return out
}

type fakeFile struct {
	fs *fakeFS
	n  *inode
}

func (f *fakeFile) Write(b []byte) (int, error) {
	if err := f.fs.fail(); err != nil {
		part := f.fs.rng.IntN(len(b) + 1)
		f.n.data = append(f.n.data, b[:part]...)
		return part, err
	}
	f.n.data = append(f.n.data, b...)
	return len(b), nil
}

func (f *fakeFile) Sync() error {
	if err := f.fs.fail(); err != nil {
		return err
	}
	f.n.synced = slices.Clone(f.n.data)
	return nil
}

func (f *fakeFile) Truncate(size int64) error {
	if err := f.fs.fail(); err != nil {
		return err
	}
	f.n.data = f.n.data[:size]
	return nil
}

func (f *fakeFile) Close() error { return nil }
