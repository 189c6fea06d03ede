// Package record is the files in an attempt's directory and their formats,
// shared by the process plugin and belay-supervise. One supervisor runs per
// task for as long as the task does, so this package keeps to syscall and
// strconv: package os alone would add to the memory of each of them.
//
//	<attempt>/meta     how it was asked for: JSON, the plugin's own
//	<attempt>/launch   what to execute: written before anything is started
//	<attempt>/lock     locked by the supervisor for as long as it lives
//	<attempt>/started  pid, start time and boot, written before execve
//	<attempt>/failed   why execve was not reached; empty: it was
//	<attempt>/exit     how the program ended
package record

import (
	"strconv"
	"strings"
	"syscall"
)

// Names of the files in an attempt's directory.
const (
	MetaFile    = "meta"
	LaunchFile  = "launch"
	LockFile    = "lock"
	StartedFile = "started"
	FailedFile  = "failed"
	ExitFile    = "exit"
	OOMFile     = "oom" // there: the kernel killed a process of the attempt for memory
)

// Keys of a launch file.
const (
	Arg       = "arg"       // argv, in order; the first is an absolute path
	Env       = "env"       // NAME=value
	Dir       = "dir"       // working directory
	UID       = "uid"       // given: switch user, with GID and Groups
	GID       = "gid"       //
	Groups    = "groups"    // supplementary, separated by spaces
	Rlimit    = "rlimit"    // "resource:soft:hard", numbers
	Out       = "out"       // path stdout is appended to
	Err       = "err"       // path stderr is appended to
	Join      = "join"      // cgroup.procs file the program joins
	Kill      = "kill"      // cgroup directory emptied after the program's exit
	Scope     = "scope"     // cgroup.procs file the supervisor joins
	OOM       = "oom"       // file whose oom_kill line counts OOM kills
	NoNewPriv = "nonewpriv" // "1"
	end       = "end"       // last: tells a whole file from a cut one
)

// Field is one entry of a launch file; keys repeat.
type Field struct{ Key, Value string }

// EncodeLaunch frames fields as key=value ended by NUL. Values hold no NUL.
func EncodeLaunch(fields []Field) []byte {
	var b []byte
	for _, f := range fields {
		b = append(b, f.Key...)
		b = append(b, '=')
		b = append(b, f.Value...)
		b = append(b, 0)
	}
	return append(b, end+"=\x00"...)
}

// DecodeLaunch reads what EncodeLaunch wrote; ok is false when it was cut.
func DecodeLaunch(b []byte) (fields []Field, ok bool) {
	s := string(b)
	for s != "" {
		entry, rest, found := strings.Cut(s, "\x00")
		key, value, eq := strings.Cut(entry, "=")
		if !found || !eq {
			return nil, false
		}
		if key == end {
			return fields, rest == ""
		}
		fields = append(fields, Field{key, value})
		s = rest
	}
	return nil, false
}

// Started identifies a process beyond its pid, which the kernel reuses.
type Started struct {
	PID   int
	Start uint64 // clock ticks since boot, field 22 of /proc/PID/stat
	Boot  string // boot id
}

// Encode is the file's content.
func (s Started) Encode() []byte {
	return []byte("pid=" + strconv.Itoa(s.PID) + "\nstart=" + strconv.FormatUint(s.Start, 10) + "\nboot=" + s.Boot + "\n")
}

// DecodeStarted reads what Encode wrote.
func DecodeStarted(b []byte) (s Started, ok bool) {
	var err1, err2 error
	s.PID, err1 = strconv.Atoi(lineValue(b, "pid"))
	s.Start, err2 = strconv.ParseUint(lineValue(b, "start"), 10, 64)
	s.Boot = lineValue(b, "boot")
	return s, err1 == nil && err2 == nil && s.PID > 0 && s.Boot != ""
}

// Exit is how a program ended. Code is -1 when nobody saw it.
type Exit struct {
	Code   int
	OOM    bool
	Reason string // one line
	RanFor int64  // nanoseconds; 0: not known
}

// Encode is the file's content.
func (e Exit) Encode() []byte {
	s := "code=" + strconv.Itoa(e.Code) + "\n"
	if e.OOM {
		s += "oom=1\n"
	}
	if e.RanFor > 0 {
		s += "ran=" + strconv.FormatInt(e.RanFor, 10) + "\n"
	}
	return []byte(s + "reason=" + strings.ReplaceAll(e.Reason, "\n", " ") + "\n")
}

// DecodeExit reads what Encode wrote.
func DecodeExit(b []byte) (e Exit, ok bool) {
	var err error
	e.Code, err = strconv.Atoi(lineValue(b, "code"))
	e.OOM = lineValue(b, "oom") == "1"
	e.Reason = lineValue(b, "reason")
	e.RanFor, _ = strconv.ParseInt(lineValue(b, "ran"), 10, 64) // earlier versions wrote none
	return e, err == nil && strings.HasSuffix(string(b), "\n")
}

func lineValue(b []byte, key string) string {
	for line := range strings.SplitSeq(string(b), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok && k == key {
			return v
		}
	}
	return ""
}

// WriteFile replaces dir/name so that after a power cut the file is either
// whole or not there at all.
func WriteFile(dir, name string, data []byte) error {
	var tmp string
	fd, err := -1, error(syscall.EEXIST)
	for n := 0; err == syscall.EEXIST; n++ { // others may write the same name now
		tmp = dir + "/." + name + "." + strconv.Itoa(syscall.Getpid()) + "." + strconv.Itoa(n)
		fd, err = open(tmp, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL)
	}
	if err != nil {
		return err
	}
	err = writeAll(fd, data)
	if err == nil {
		err = syscall.Fsync(fd)
	}
	if cerr := syscall.Close(fd); err == nil {
		err = cerr
	}
	if err == nil {
		err = syscall.Rename(tmp, dir+"/"+name)
	}
	if err != nil {
		_ = syscall.Unlink(tmp)
		return err
	}
	return SyncDir(dir)
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	fd, err := open(dir, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	err = syscall.Fsync(fd)
	_ = syscall.Close(fd)
	return err
}

func writeAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := syscall.Write(fd, data)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// ReadFile reads a small file, or a descriptor's rest through /proc/self/fd.
func ReadFile(path string) ([]byte, error) {
	fd, err := open(path, syscall.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd)
	return ReadAll(fd)
}

// ReadAll reads a descriptor to its end.
func ReadAll(fd int) ([]byte, error) {
	b := make([]byte, 0, 1024)
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := syscall.Read(fd, b[len(b):cap(b)])
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return b, nil
		}
		b = b[:len(b)+n]
	}
}

// open retries EINTR, which slow filesystems give.
func open(path string, flags int) (int, error) {
	for {
		fd, err := syscall.Open(path, flags|syscall.O_CLOEXEC, 0o600)
		if err != syscall.EINTR {
			return fd, err
		}
	}
}
