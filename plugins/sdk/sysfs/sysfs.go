// Package sysfs reads what the kernel tells of hardware, in /sys, /proc, /dev
// and the files beside them, below a root path: "/" on a device, a directory of
// recorded files in tests. It is for detectors of devices.
//
// Hardware that cannot answer right now says EAGAIN, ENODATA or EINVAL, a file
// may be empty, another user's may be forbidden: all of that is "absent", the
// second result false. No value is made up, 0 least of all.
//
// Names are absolute paths as the device has them, "/sys/class/apex", whatever
// the root is. Symbolic links are followed inside the root: below a recorded
// tree a link to "/sys/devices/x" is a link to that tree's file, and no chain of
// links and ".." leads out of it. The tree must not be changed meanwhile by
// somebody who wants to get out.
package sysfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// MaxRead is how much of a file is read. Attributes in sysfs have at most a
// page; tables in /proc are longer.
const MaxRead = 64 << 10

const maxLinks = 40 // as the kernel

// FS reads below a root. The zero value reads the machine itself.
type FS struct {
	root string // "" is "/"
}

// New returns the FS below root; "" and "/" are the machine itself.
func New(root string) FS {
	root = strings.TrimRight(root, "/")
	return FS{root: root}
}

// Recorded tells a tree of recorded files from the machine itself.
func (f FS) Recorded() bool { return f.root != "" }

// Bytes reads a file, at most MaxRead of it. An empty one is absent.
func (f FS) Bytes(name string) ([]byte, bool) { return f.BytesUpTo(name, MaxRead) }

// BytesUpTo reads a file that may be longer than MaxRead; one longer than
// limit is cut there.
func (f FS) BytesUpTo(name string, limit int64) ([]byte, bool) {
	file, err := f.open(name)
	if err != nil {
		return nil, false
	}
	defer file.Close()
	if st, err := file.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, false
	}
	b, err := io.ReadAll(io.LimitReader(file, limit))
	if err != nil || len(b) == 0 {
		return nil, false
	}
	return b, true
}

// open never waits: a FIFO without a writer would.
func (f FS) open(name string) (*os.File, error) {
	p, err := f.physical(name)
	if err != nil {
		return nil, err
	}
	return os.OpenFile(p, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// String reads a file of one value: without the newline, the blanks around it
// and the NUL that ends strings of the device tree. Nothing left is absent.
func (f FS) String(name string) (string, bool) {
	b, ok := f.Bytes(name)
	if !ok {
		return "", false
	}
	s := string(bytes.Trim(b, " \t\r\n\x00"))
	return s, s != ""
}

// Strings reads a NUL-separated list, as "compatible" of the device tree is.
func (f FS) Strings(name string) []string {
	b, _ := f.Bytes(name)
	var list []string
	for s := range bytes.SplitSeq(b, []byte{0}) {
		if s := strings.TrimSpace(string(s)); s != "" {
			list = append(list, s)
		}
	}
	return list
}

// Lines reads a file of lines, without their ends.
func (f FS) Lines(name string) []string {
	b, ok := f.Bytes(name)
	if !ok {
		return nil
	}
	return strings.Split(strings.TrimRight(strings.ReplaceAll(string(b), "\r\n", "\n"), "\n"), "\n")
}

// Int reads a decimal number.
func (f FS) Int(name string) (int64, bool) {
	s, ok := f.String(name)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// Hex reads a number in hexadecimal, with or without 0x before it: ids are
// compared as numbers, for they are written in more than one way.
func (f FS) Hex(name string) (uint64, bool) {
	s, ok := f.String(name)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0x"), 16, 64)
	return n, err == nil
}

// Field finds the value of a key in lines of the form "key: value" or
// "key=value", as uevent and much of /proc have them.
func (f FS) Field(name, key string) (string, bool) {
	for _, line := range f.Lines(name) {
		i := strings.IndexAny(line, ":=")
		if i >= 0 && strings.TrimSpace(line[:i]) == key {
			v := strings.TrimSpace(line[i+1:])
			return v, v != ""
		}
	}
	return "", false
}

// Exists says whether there is a file, directory or device node of that name.
func (f FS) Exists(name string) bool {
	if f.Recorded() && under(name, "/dev") {
		if _, ok := f.Node(name); ok {
			return true
		}
	}
	p, err := f.physical(name)
	if err != nil {
		return false
	}
	_, err = os.Stat(p)
	return err == nil
}

// IsFile says whether name is a regular file.
func (f FS) IsFile(name string) bool {
	p, err := f.physical(name)
	if err != nil {
		return false
	}
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular()
}

// IsDir says whether name is a directory.
func (f FS) IsDir(name string) bool {
	p, err := f.physical(name)
	if err != nil {
		return false
	}
	st, err := os.Stat(p)
	return err == nil && st.IsDir()
}

// List returns the names in a directory, sorted.
func (f FS) List(dir string) []string {
	file, err := f.open(dir)
	if err != nil {
		return nil
	}
	defer file.Close()
	names, err := file.Readdirnames(-1)
	if err != nil {
		return nil
	}
	slices.Sort(names)
	return names
}

// Readlink returns what a link says, as it says it.
func (f FS) Readlink(name string) (string, bool) {
	dir, err := f.Real(path.Dir(name))
	if err != nil {
		return "", false
	}
	target, err := os.Readlink(f.root + path.Join(dir, path.Base(name)))
	return target, err == nil
}

// LinkBase returns the last part of where a link leads: the name of the driver
// for ".../driver".
func (f FS) LinkBase(name string) (string, bool) {
	target, ok := f.Readlink(name)
	if !ok {
		return "", false
	}
	return path.Base(target), true
}

// Glob returns the names that match a pattern of package path, sorted. Of a
// pattern that is malformed nothing matches.
func (f FS) Glob(pattern string) []string {
	if f.Recorded() && under(pattern, "/dev") {
		return f.globNodes(pattern)
	}
	return f.glob("/", strings.Split(strings.Trim(pattern, "/"), "/"))
}

func (f FS) glob(dir string, parts []string) []string {
	for i, part := range parts {
		if !strings.ContainsAny(part, `*?[\`) {
			dir = path.Join(dir, part)
			continue
		}
		var all []string
		for _, name := range f.List(dir) {
			if ok, err := path.Match(part, name); err != nil || !ok {
				continue
			}
			all = append(all, f.glob(path.Join(dir, name), parts[i+1:])...)
		}
		return all
	}
	if !f.Exists(dir) {
		return nil
	}
	return []string{dir}
}

// Real returns name with every link in it followed: the one name a device has
// however it was found.
func (f FS) Real(name string) (string, error) {
	rest := strings.Split(name, "/")
	done := "/"
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			done = path.Dir(done)
			continue
		}
		next := path.Join(done, part)
		st, err := os.Lstat(f.root + next)
		if err != nil {
			return "", err
		}
		if st.Mode()&fs.ModeSymlink == 0 {
			if len(rest) > 0 && !st.IsDir() {
				return "", &fs.PathError{Op: "resolve", Path: next, Err: syscall.ENOTDIR}
			}
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "resolve", Path: name, Err: syscall.ELOOP}
		}
		target, err := os.Readlink(f.root + next)
		if err != nil {
			return "", err
		}
		if path.IsAbs(target) {
			done = "/"
		}
		rest = slices.Concat(strings.Split(target, "/"), rest)
	}
	return done, nil
}

// physical is where name is on this machine.
func (f FS) physical(name string) (string, error) {
	if !path.IsAbs(name) {
		return "", &fs.PathError{Op: "read", Path: name, Err: errors.New("not an absolute path")}
	}
	if !f.Recorded() {
		return name, nil
	}
	real, err := f.Real(name)
	return f.root + real, err
}

func under(name, dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") }
