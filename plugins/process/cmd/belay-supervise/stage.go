package main

import (
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/belay-edge/belay/plugins/process/internal/record"
)

// rlimit is what prlimit64 takes on every architecture.
type rlimit struct{ soft, hard uint64 }

// image is a launch file turned into what system calls take, so that nothing
// is allocated between joining the cgroup and execve: a pids limit of one or a
// small address space must hit the program, not this runtime.
type image struct {
	path     *byte
	argv     []*byte
	envv     []*byte
	dir      *byte
	joins    []int
	rlimits  map[int]rlimit
	order    []int // of rlimits
	switchID bool
	uid, gid int
	groups   []uint32
	nnp      bool
	out, err string
}

// failure is the content of a failed file: the step and the errno.
func failure(step string, e syscall.Errno) string { return step + " " + strconv.Itoa(int(e)) }

// stage becomes the attempt in dir, or says in its failed file why not.
func stage(dir string) int {
	raw, err := record.ReadFile(dir + "/" + record.LaunchFile)
	fields, ok := record.DecodeLaunch(raw)
	if err != nil || !ok {
		return exitSetup
	}
	failed, err := syscall.Open(dir+"/"+record.FailedFile, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_TRUNC|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return exitSetup
	}
	// Held until execve closes it: how the plugin knows that point is passed.
	if err := syscall.Flock(failed, syscall.LOCK_EX); err != nil {
		return exitSetup
	}
	fail := func(step string, e syscall.Errno) int {
		_, _ = syscall.Write(failed, []byte(failure(step, e)))
		if e == syscall.ENOENT {
			return exitNotFound
		}
		return exitSetup
	}
	m, step, e := prepare(fields)
	if e != 0 {
		return fail(step, e)
	}
	if step, e := openOutput(m); e != 0 {
		return fail(step, e)
	}
	self, err := record.ReadProcess(syscall.Getpid())
	if err != nil {
		return fail("read /proc/self/stat", errno(err))
	}
	boot := record.BootID()
	if boot == "" {
		return fail("read boot_id", syscall.ENOENT)
	}
	s := record.Started{PID: syscall.Getpid(), Start: self.Start, Boot: boot}
	if err := record.WriteFile(dir, record.StartedFile, s.Encode()); err != nil {
		return fail("record the start", errno(err))
	}
	step, e = become(m)
	return fail(step, e)
}

// killable undoes what the agent's unit does to protect the agent: inherited by
// a program that takes all memory, it would make the kernel kill others.
func killable() {
	const file = "/proc/self/oom_score_adj"
	if b, err := record.ReadFile(file); err != nil || len(b) == 0 || b[0] != '-' {
		return
	}
	if fd, err := syscall.Open(file, syscall.O_WRONLY|syscall.O_CLOEXEC, 0); err == nil {
		_, _ = syscall.Write(fd, []byte("0"))
		_ = syscall.Close(fd)
	}
}

// execCommand becomes a command of Exec: its output is where this process's is.
func execCommand() int {
	raw, err := record.ReadAll(3)
	fields, ok := record.DecodeLaunch(raw)
	if err != nil || !ok {
		complain("descriptor 3 holds no command")
		return exitSetup
	}
	m, step, e := prepare(fields)
	if e == 0 {
		step, e = become(m)
	}
	complain(step + ": " + e.Error())
	if e == syscall.ENOENT && step == "execve" {
		return exitNotFound
	}
	return exitSetup
}

func prepare(fields []record.Field) (*image, string, syscall.Errno) {
	m := &image{rlimits: map[int]rlimit{}}
	var argv, envv []string
	dir := "/"
	for _, f := range fields {
		switch f.Key {
		case record.Arg:
			argv = append(argv, f.Value)
		case record.Env:
			envv = append(envv, f.Value)
		case record.Dir:
			dir = f.Value
		case record.UID:
			m.switchID = true
			m.uid, _ = strconv.Atoi(f.Value)
		case record.GID:
			m.gid, _ = strconv.Atoi(f.Value)
		case record.Groups:
			for _, g := range strings.Fields(f.Value) {
				n, _ := strconv.ParseUint(g, 10, 32)
				m.groups = append(m.groups, uint32(n))
			}
		case record.Rlimit:
			p := strings.Split(f.Value, ":")
			if len(p) != 3 {
				return nil, "rlimit", syscall.EINVAL
			}
			n, _ := strconv.Atoi(p[0])
			soft, _ := strconv.ParseUint(p[1], 10, 64)
			hard, _ := strconv.ParseUint(p[2], 10, 64)
			m.rlimits[n] = rlimit{soft, hard}
			m.order = append(m.order, n)
		case record.Out:
			m.out = f.Value
		case record.Err:
			m.err = f.Value
		case record.NoNewPriv:
			m.nnp = true
		case record.Join:
			fd, err := syscall.Open(f.Value, syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
			if err != nil {
				return nil, "open " + f.Value, errno(err)
			}
			m.joins = append(m.joins, fd)
		}
	}
	if len(argv) == 0 {
		return nil, "execve", syscall.EINVAL
	}
	var err error
	if m.argv, err = syscall.SlicePtrFromStrings(argv); err != nil {
		return nil, "execve", syscall.EINVAL
	}
	if m.envv, err = syscall.SlicePtrFromStrings(envv); err != nil {
		return nil, "execve", syscall.EINVAL
	}
	m.path = m.argv[0]
	if m.dir, err = syscall.BytePtrFromString(dir); err != nil {
		return nil, "chdir", syscall.EINVAL
	}
	return m, "", 0
}

// openOutput puts the two files on descriptors 1 and 2. A FIFO is opened for
// reading too: then its reader may die without the program getting SIGPIPE,
// and opening it never waits for one.
func openOutput(m *image) (string, syscall.Errno) {
	for i, path := range []string{m.out, m.err} {
		fd, e := openAppend(path)
		if e != 0 {
			return "open " + path, e
		}
		if m.switchID {
			// Programs reopen /dev/stdout by its path, as their own user.
			_ = syscall.Fchown(fd, m.uid, m.gid)
		}
		if err := syscall.Dup3(fd, i+1, 0); err != nil {
			return "dup", errno(err)
		}
		_ = syscall.Close(fd)
	}
	return "", 0
}

func openAppend(path string) (int, syscall.Errno) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return -1, errno(err)
	}
	flags := syscall.O_WRONLY | syscall.O_APPEND
	if st.Mode&syscall.S_IFMT == syscall.S_IFIFO {
		flags = syscall.O_RDWR
	}
	fd, err := syscall.Open(path, flags|syscall.O_CLOEXEC|syscall.O_NOCTTY, 0)
	if err != nil {
		return -1, errno(err)
	}
	return fd, 0
}

// become joins, limits, switches and executes; it returns only on failure.
// Raw system calls on this locked thread only, and no allocation on the way.
func become(m *image) (string, syscall.Errno) {
	killable()
	// Its pages are the program's own business again, see smallPages.
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRCTL, prSetTHPDisable, 0, 0, 0, 0, 0)
	for _, fd := range openDescriptors() {
		if fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	syscall.Umask(0o022)
	zero := []byte("0")
	for _, fd := range m.joins {
		if _, _, e := syscall.RawSyscall(syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&zero[0])), 1); e != 0 {
			return "join the cgroup", e
		}
	}
	for _, n := range m.order {
		l := m.rlimits[n]
		if _, _, e := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 0, uintptr(n), uintptr(unsafe.Pointer(&l)), 0, 0, 0); e != 0 {
			return "setrlimit", e
		}
	}
	if m.nnp {
		if _, _, e := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetNoNewPrivs, 1, 0, 0, 0, 0); e != 0 {
			return "no-new-privileges", e
		}
	}
	if m.switchID {
		var list unsafe.Pointer
		if len(m.groups) > 0 {
			list = unsafe.Pointer(&m.groups[0])
		}
		if _, _, e := syscall.RawSyscall(sysSetgroups, uintptr(len(m.groups)), uintptr(list), 0); e != 0 {
			return "setgroups", e
		}
		if _, _, e := syscall.RawSyscall(sysSetresgid, uintptr(m.gid), uintptr(m.gid), uintptr(m.gid)); e != 0 {
			return "setgid", e
		}
		if _, _, e := syscall.RawSyscall(sysSetresuid, uintptr(m.uid), uintptr(m.uid), uintptr(m.uid)); e != 0 {
			return "setuid", e
		}
	}
	if _, _, e := syscall.RawSyscall(syscall.SYS_CHDIR, uintptr(unsafe.Pointer(m.dir)), 0, 0); e != 0 {
		return "chdir", e
	}
	for s := syscall.Signal(1); s <= lastSignal; s++ {
		setSignal(s, 0) // fails for SIGKILL and SIGSTOP, which cannot be changed
	}
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, prSetPdeathsig, 0, 0)
	var none [2]uintptr
	const sigSetMask = 2
	_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, sigSetMask, uintptr(unsafe.Pointer(&none)), 0, sigSetBytes, 0, 0)
	_, _, e := syscall.RawSyscall(syscall.SYS_EXECVE, uintptr(unsafe.Pointer(m.path)),
		uintptr(unsafe.Pointer(&m.argv[0])), uintptr(unsafe.Pointer(&m.envv[0])))
	runtime.KeepAlive(m)
	return "execve", e
}
