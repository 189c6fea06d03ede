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

const sector = 512

// simDisk is a disk behind a cache, as hard on its user as the rules allow. What
// is written to a file lasts only once the file was synced, what happens to
// names only once their directory was; until then a power cut keeps any sectors
// of any version, any size the file had, and any of the changes of names. A
// sync that fails keeps nothing and is not made up for by the next one.
type simDisk struct {
	root *dirNode
	rng  *rand.Rand
	// garbage: sectors never written hold anything, not zeros.
	garbage bool

	ops    int
	cutAt  int                   // the operation during which power goes; 0: never
	faults map[int]syscall.Errno // by operation
	// stuck is what every operation that changes anything answers, and unread
	// what reading a name does.
	stuck  syscall.Errno
	unread map[string]syscall.Errno
	off    bool
}

type dirNode struct {
	seen, durable map[string]any // *fileNode or *dirNode
	pending       []map[string]any
}

func newDir() *dirNode { return &dirNode{seen: map[string]any{}, durable: map[string]any{}} }

// change notes names that change together; nil: gone.
func (d *dirNode) change(c map[string]any) {
	for name, n := range c {
		if n == nil {
			delete(d.seen, name)
		} else {
			d.seen[name] = n
		}
	}
	d.pending = append(d.pending, c)
}

type fileNode struct {
	data    []byte
	history [][]byte     // what may be on disk, oldest first; the last is data
	dirty   map[int]bool // sectors written since the last sync
	lost    map[int]bool // sectors a failed sync took for written
}

func newFile(data []byte) *fileNode {
	return &fileNode{data: data, history: [][]byte{data}, dirty: map[int]bool{}, lost: map[int]bool{}}
}

func (f *fileNode) put(data []byte, from int) {
	f.data = data
	f.history = append(f.history, data)
	for s := from / sector; s*sector < len(data); s++ {
		f.dirty[s] = true
		delete(f.lost, s)
	}
}

func (f *fileNode) sync(fails bool) {
	if fails {
		maps.Copy(f.lost, f.dirty)
		clear(f.dirty)
		return
	}
	old := f.history[0]
	clear(f.dirty)
	base := slices.Clone(f.data)
	for s := range f.lost {
		for i := s * sector; i < min((s+1)*sector, len(base)); i++ {
			base[i] = 0
			if i < len(old) {
				base[i] = old[i]
			}
		}
	}
	f.history = [][]byte{base, f.data}
}

func newSimDisk() *simDisk {
	return &simDisk{root: newDir(), rng: rand.New(rand.NewPCG(1, 1)), faults: map[int]syscall.Errno{}, unread: map[string]syscall.Errno{}}
}

// begin counts an operation. cut: it is the last one, of which something may
// yet happen.
func (d *simDisk) begin() (cut bool, err error) {
	if d.off {
		return false, errCut
	}
	if d.ops++; d.ops == d.cutAt {
		d.off = true
		return true, nil
	}
	if d.stuck != 0 {
		return false, d.stuck
	}
	if e := d.faults[d.ops]; e != 0 {
		return false, e
	}
	return false, nil
}

func (d *simDisk) dir(name string) (*dirNode, error) {
	at := d.root
	for _, part := range strings.Split(filepath.Clean(name), "/") {
		if part == "." {
			continue
		}
		switch n := at.seen[part].(type) {
		case nil:
			return nil, fs.ErrNotExist
		case *dirNode:
			at = n
		default:
			return nil, syscall.ENOTDIR
		}
	}
	return at, nil
}

func (d *simDisk) find(name string) (parent *dirNode, base string, n any, err error) {
	parent, err = d.dir(filepath.Dir(name))
	if err != nil {
		return nil, "", nil, err
	}
	base = filepath.Base(name)
	return parent, base, parent.seen[base], nil
}

// after is what an operation returns that took effect in the cache.
func after(cut bool) error {
	if cut {
		return errCut
	}
	return nil
}

func (d *simDisk) create(name string) (file, error) {
	cut, err := d.begin()
	if err != nil {
		return nil, err
	}
	parent, base, n, err := d.find(name)
	if err != nil {
		return nil, err
	}
	f, isFile := n.(*fileNode)
	switch {
	case n == nil:
		f = newFile(nil)
		parent.change(map[string]any{base: f})
	case isFile:
		f.put(nil, 0)
	default:
		return nil, syscall.EISDIR
	}
	return &simFile{d, f}, after(cut)
}

func (d *simDisk) open(name string) (file, error) {
	if _, err := d.begin(); err != nil {
		return nil, err
	}
	_, _, n, err := d.find(name)
	if err != nil {
		return nil, err
	}
	f, ok := n.(*fileNode)
	if !ok {
		return nil, fs.ErrNotExist
	}
	return &simFile{d, f}, nil
}

func (d *simDisk) read(name string) ([]byte, error) {
	if d.off {
		return nil, errCut
	}
	if e := d.unread[name]; e != 0 {
		return nil, e
	}
	_, _, n, err := d.find(name)
	if err != nil {
		return nil, err
	}
	switch f := n.(type) {
	case *fileNode:
		return slices.Clone(f.data), nil
	case *dirNode:
		return nil, syscall.EISDIR
	}
	return nil, fs.ErrNotExist
}

func (d *simDisk) rename(from, to string) error {
	cut, err := d.begin()
	if err != nil {
		return err
	}
	fromDir, a, n, err := d.find(from)
	if err != nil {
		return err
	}
	toDir, b, over, err := d.find(to)
	if err != nil {
		return err
	}
	if _, isDir := over.(*dirNode); n == nil || isDir {
		return syscall.EISDIR
	}
	if fromDir == toDir {
		toDir.change(map[string]any{a: nil, b: n})
	} else {
		toDir.change(map[string]any{b: n})
		fromDir.change(map[string]any{a: nil})
	}
	return after(cut)
}

func (d *simDisk) remove(name string) error {
	cut, err := d.begin()
	if err != nil {
		return err
	}
	parent, base, n, err := d.find(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && n == nil:
		return after(cut)
	case err != nil:
		return err
	}
	if sub, ok := n.(*dirNode); ok && len(sub.seen) > 0 {
		return syscall.ENOTEMPTY
	}
	parent.change(map[string]any{base: nil})
	return after(cut)
}

func (d *simDisk) mkdir(name string) error {
	cut, err := d.begin()
	if err != nil {
		return err
	}
	at := d.root
	for _, part := range strings.Split(filepath.Clean(name), "/") {
		switch n := at.seen[part].(type) {
		case *dirNode:
			at = n
		case nil:
			sub := newDir()
			at.change(map[string]any{part: sub})
			at = sub
		default:
			return syscall.ENOTDIR
		}
	}
	return after(cut)
}

func (d *simDisk) list(dir string) ([]string, error) {
	if d.off {
		return nil, errCut
	}
	if e := d.unread[dir]; e != 0 {
		return nil, e
	}
	n, err := d.dir(dir)
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(n.seen)), nil
}

func (d *simDisk) syncDir(dir string) error {
	cut, err := d.begin()
	if err != nil {
		return err
	}
	n, err := d.dir(dir)
	if err != nil || cut {
		return errors.Join(err, after(cut))
	}
	n.durable, n.pending = maps.Clone(n.seen), nil
	return nil
}

// reboot is the disk as the next boot may find it.
func (d *simDisk) reboot(seed uint64) *simDisk {
	out := newSimDisk()
	out.rng = rand.New(rand.NewPCG(seed, 7))
	out.garbage = d.garbage
	out.root = survive(d.root, out.rng, d.garbage, map[any]any{}).(*dirNode)
	return out
}

func survive(n any, rng *rand.Rand, garbage bool, done map[any]any) any {
	if done[n] != nil {
		return done[n]
	}
	switch n := n.(type) {
	case *fileNode:
		f := newFile(n.survive(rng, garbage))
		done[n] = f
		return f
	case *dirNode:
		names := maps.Clone(n.durable)
		inOrder, upTo := rng.IntN(2) == 0, rng.IntN(len(n.pending)+1)
		for i, c := range n.pending {
			if inOrder && i >= upTo || !inOrder && rng.IntN(2) == 0 {
				continue
			}
			for name, to := range c {
				if to == nil {
					delete(names, name)
				} else {
					names[name] = to
				}
			}
		}
		d := newDir()
		done[n] = d
		for _, name := range slices.Sorted(maps.Keys(names)) {
			d.seen[name] = survive(names[name], rng, garbage, done)
		}
		d.durable = maps.Clone(d.seen)
		return d
	}
	panic("neither a file nor a directory")
}

func (f *fileNode) survive(rng *rand.Rand, garbage bool) []byte {
	size := len(f.history[rng.IntN(len(f.history))])
	out := make([]byte, size)
	for at := 0; at < size; at += sector {
		part := out[at:min(at+sector, size)]
		from := f.history[rng.IntN(len(f.history))]
		if at < len(from) {
			copy(part, from[at:])
		} else if garbage {
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
		}
	}
	return out
}

type simFile struct {
	d *simDisk
	n *fileNode
}

func (f *simFile) Write(b []byte) (int, error) {
	before := len(f.n.data)
	cut, err := f.d.begin()
	if err != nil && !errors.Is(err, errCut) {
		part := f.d.rng.IntN(len(b) + 1)
		f.n.put(append(slices.Clone(f.n.data), b[:part]...), before)
		return part, err
	}
	if err != nil {
		return 0, err
	}
	f.n.put(append(slices.Clone(f.n.data), b...), before)
	return len(b), after(cut)
}

func (f *simFile) Sync() error {
	cut, err := f.d.begin()
	if err != nil {
		if !errors.Is(err, errCut) {
			f.n.sync(true)
		}
		return err
	}
	if cut {
		return errCut
	}
	f.n.sync(false)
	return nil
}

func (f *simFile) Truncate(size int64) error {
	cut, err := f.d.begin()
	if err != nil {
		return err
	}
	f.n.put(slices.Clone(f.n.data[:size]), int(size))
	return after(cut)
}

func (f *simFile) Close() error { return nil }

func (f *simFile) reserve(int64) {}
