package sysfs

import (
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// NodeList is the file that stands for device nodes in a recorded tree: git
// keeps none. A line is what "ls -l" tells of one:
//
//	c 120 0 0660 root apex /dev/apex_0
//
// type (c or b), major, minor, mode in octal, user, group, path; names of users
// and groups are looked up in the tree's /etc/passwd and /etc/group, numbers
// stand for themselves. Empty lines and lines that begin with # are skipped. On
// the machine itself the file means nothing.
const NodeList = "/dev.list"

// Node is a device node.
type Node struct {
	Path         string
	Type         byte // 'c' or 'b'
	Major, Minor uint32
	Perm         fs.FileMode // permission bits
	UID, GID     uint32
}

// Group returns the group a process that is not root must be in to read and
// write the node; false when it needs none, or when none would help.
func (n Node) Group() (gid uint32, ok bool) {
	if n.GID == 0 || n.Perm&0o006 == 0o006 || n.Perm&0o060 != 0o060 {
		return 0, false
	}
	return n.GID, true
}

// Node returns the device node of that path, links followed.
func (f FS) Node(name string) (Node, bool) {
	if f.Recorded() {
		nodes := f.recordedNodes()
		i := slices.IndexFunc(nodes, func(n Node) bool { return n.Path == path.Clean(name) })
		if i < 0 {
			return Node{}, false
		}
		return nodes[i], true
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return Node{}, false
	}
	n := Node{Path: name, Major: unix.Major(uint64(st.Rdev)), Minor: unix.Minor(uint64(st.Rdev)), Perm: fs.FileMode(st.Mode & 0o777), UID: st.Uid, GID: st.Gid}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		n.Type = 'c'
	case unix.S_IFBLK:
		n.Type = 'b'
	default:
		return Node{}, false
	}
	return n, true
}

// NodeOf returns the node of the device with these numbers; typ is 'c' or 'b'.
// The kernel names it, so it is found wherever in /dev it is, and only if what
// is there has these numbers.
func (f FS) NodeOf(typ byte, major, minor uint32) (Node, bool) {
	same := func(n Node) bool { return n.Type == typ && n.Major == major && n.Minor == minor }
	if f.Recorded() {
		nodes := f.recordedNodes()
		i := slices.IndexFunc(nodes, same)
		if i < 0 {
			return Node{}, false
		}
		return nodes[i], true
	}
	class := "char"
	if typ == 'b' {
		class = "block"
	}
	number := strconv.FormatUint(uint64(major), 10) + ":" + strconv.FormatUint(uint64(minor), 10)
	name, ok := f.Field("/sys/dev/"+class+"/"+number+"/uevent", "DEVNAME")
	if !ok {
		return Node{}, false
	}
	n, ok := f.Node(path.Join("/dev", name))
	return n, ok && same(n)
}

// Numbers reads a file that holds "major:minor", as "dev" of a device does.
func (f FS) Numbers(name string) (major, minor uint32, ok bool) {
	s, _ := f.String(name)
	a, b, found := strings.Cut(s, ":")
	x, err1 := strconv.ParseUint(a, 10, 32)
	y, err2 := strconv.ParseUint(b, 10, 32)
	return uint32(x), uint32(y), found && err1 == nil && err2 == nil
}

func (f FS) globNodes(pattern string) []string {
	var all []string
	for _, n := range f.recordedNodes() {
		if ok, err := path.Match(pattern, n.Path); err == nil && ok {
			all = append(all, n.Path)
		}
	}
	slices.Sort(all)
	return all
}

// recordedNodes skips lines it cannot read: the fixtures' own test finds them.
func (f FS) recordedNodes() []Node {
	var nodes []Node
	for _, line := range f.Lines(NodeList) {
		if n, ok := f.parseNode(line); ok {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

func (f FS) parseNode(line string) (Node, bool) {
	w := strings.Fields(line)
	if len(w) != 7 || strings.HasPrefix(w[0], "#") || w[0] != "c" && w[0] != "b" || !path.IsAbs(w[6]) {
		return Node{}, false
	}
	major, err1 := strconv.ParseUint(w[1], 10, 32)
	minor, err2 := strconv.ParseUint(w[2], 10, 32)
	mode, err3 := strconv.ParseUint(w[3], 8, 9)
	uid, ok1 := f.id("/etc/passwd", w[4])
	gid, ok2 := f.id("/etc/group", w[5])
	if err1 != nil || err2 != nil || err3 != nil || !ok1 || !ok2 {
		return Node{}, false
	}
	return Node{Path: w[6], Type: w[0][0], Major: uint32(major), Minor: uint32(minor), Perm: fs.FileMode(mode), UID: uid, GID: gid}, true
}

// id looks a user or group up; root is 0 everywhere.
func (f FS) id(file, name string) (uint32, bool) {
	if name == "root" {
		return 0, true
	}
	number := name
	for _, line := range f.Lines(file) {
		if w := strings.Split(line, ":"); len(w) > 2 && w[0] == name {
			number = w[2]
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 32)
	return uint32(n), err == nil
}
