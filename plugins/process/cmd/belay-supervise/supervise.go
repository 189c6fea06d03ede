package main

import (
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/belay-edge/belay/plugins/process/internal/record"
)

const (
	prSetPdeathsig      = 1
	prSetChildSubreaper = 36
	prSetNoNewPrivs     = 38
	prSetTHPDisable     = 41
	prGetTHPDisable     = 42
	sigSetBytes         = 8
	sigIgnore           = 1
	lastSignal          = 64
	fullDiskRetries     = 24 * 3600 // one a second
)

// leanRuntime keeps the Go runtime of a process that only waits small.
var leanRuntime = []string{"GOMAXPROCS=1", "GOGC=off"}

// supervise is the parent of one attempt. The exit is recorded before what the
// program left behind is killed; the plugin calls the attempt exited only when
// this process, and so its lock, is gone as well.
func supervise(dir string) int {
	closeFrom(3)
	_ = syscall.Chdir("/")
	smallPages()
	lock, err := syscall.Open(dir+"/"+record.LockFile, syscall.O_RDWR|syscall.O_CREAT|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return exitSetup
	}
	// A classic record lock: not inherited by the program, gone with this
	// process however it dies, and the kernel tells who holds it.
	whole := syscall.Flock_t{Type: syscall.F_WRLCK}
	if syscall.FcntlFlock(uintptr(lock), syscall.F_SETLK, &whole) != nil {
		return exitHeld
	}
	for _, name := range []string{record.StartedFile, record.ExitFile} {
		if exists(dir + "/" + name) {
			return exitHeld
		}
	}
	raw, err := record.ReadFile(dir + "/" + record.LaunchFile)
	fields, ok := record.DecodeLaunch(raw)
	if err != nil || !ok {
		return exitSetup
	}
	for _, f := range fields {
		if f.Key == record.Scope {
			joinCgroup(f.Value)
		}
	}
	// A shutdown sends SIGTERM to everything: whoever stays to see the program
	// end can still write down how.
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
		syscall.SIGPIPE, syscall.SIGALRM, syscall.SIGUSR1, syscall.SIGUSR2} {
		setSignal(s, sigIgnore)
	}
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)

	begun := awake()
	// The stage dies with us until it has recorded itself: nobody would find
	// it, and the next Start would make a second one.
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"belay-supervise", "stage", dir}, &syscall.ProcAttr{
		Dir: "/", Env: leanRuntime, Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		_ = record.WriteFile(dir, record.FailedFile, []byte(failure("fork", errno(err))))
		return exitSetup
	}
	raw, fields = nil, keep(fields, record.Kill, record.OOM)
	status := waitFor(pid)
	e := exitOf(status, fields)
	e.RanFor = awake() - begun
	recorded := writeExit(dir, e)
	killLeftovers(fields)
	// On a full disk, space may come back: until then the attempt counts as
	// running, which is better than a lost code. A program that never ran has
	// none to lose.
	for n := 0; !recorded && n < fullDiskRetries && exists(dir+"/"+record.StartedFile); n++ {
		sleep(1000)
		recorded = writeExit(dir, e)
	}
	return 0
}

// smallPages keeps this process in small pages: where the kernel gives huge ones
// to everybody, Go's heap of some 100 KiB would be one of 2 MiB. It must be said
// before the heap is made, so this image is executed anew; those the plugin
// starts itself have it from there.
func smallPages() {
	if off, _, e := syscall.RawSyscall6(syscall.SYS_PRCTL, prGetTHPDisable, 0, 0, 0, 0, 0); e != 0 || off != 0 {
		return
	}
	const file = "/sys/kernel/mm/transparent_hugepage/enabled"
	if b, err := record.ReadFile(file); err != nil || !strings.Contains(string(b), "[always]") {
		return
	}
	if _, _, e := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetTHPDisable, 1, 0, 0, 0, 0); e == 0 {
		_ = syscall.Exec("/proc/self/exe", arguments(), leanRuntime)
	}
}

// awake is the time on a clock that nobody sets, in nanoseconds. What the device
// sleeps does not count.
func awake() int64 {
	const clockMonotonic = 1
	var ts syscall.Timespec
	_, _, _ = syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&ts)), 0)
	return ts.Nano()
}

func keep(fields []record.Field, keys ...string) []record.Field {
	var kept []record.Field
	for _, f := range fields {
		for _, k := range keys {
			if f.Key == k {
				kept = append(kept, f)
			}
		}
	}
	return kept
}

// waitFor reaps until the program is done; orphans of the program come here
// because this process is a subreaper.
func waitFor(pid int) syscall.WaitStatus {
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		if got == pid && (ws.Exited() || ws.Signaled()) {
			return ws
		}
		if err != nil && err != syscall.EINTR {
			return 0xff00 // cannot be: the program is our child until we reap it
		}
	}
}

func exitOf(ws syscall.WaitStatus, fields []record.Field) record.Exit {
	if !ws.Signaled() {
		return record.Exit{Code: ws.ExitStatus()}
	}
	e := record.Exit{Code: signalExitBase + int(ws.Signal()), Reason: "killed by signal " + strconv.Itoa(int(ws.Signal()))}
	for _, f := range fields {
		if f.Key == record.OOM && ws.Signal() == syscall.SIGKILL && record.OOMKills(f.Value) > 0 {
			e.OOM, e.Reason = true, "killed by the kernel: out of memory"
		}
	}
	return e
}

// ended leaves a file when memory ran out in the cgroup that this process
// shares with the attempt in dir.
func ended(dir string) int {
	b, err := record.ReadFile("/proc/self/cgroup")
	if err != nil {
		return exitSetup
	}
	var kills uint64
	for line := range strings.SplitSeq(string(b), "\n") { // id:controllers:path
		f := strings.SplitN(line, ":", 3)
		switch {
		case len(f) < 3:
		case f[1] == "memory":
			kills += record.OOMKills("/sys/fs/cgroup/memory" + f[2] + "/memory.oom_control")
		case f[1] == "":
			kills += record.OOMKills("/sys/fs/cgroup" + f[2] + "/memory.events")
		}
	}
	if kills == 0 {
		return 0
	}
	if err := record.WriteFile(dir, record.OOMFile, nil); err != nil {
		return exitSetup
	}
	return 0
}

// writeExit says whether the exit is on record or there is no place for it.
func writeExit(dir string, e record.Exit) bool {
	err := record.WriteFile(dir, record.ExitFile, e.Encode())
	return err == nil || err == syscall.ENOENT
}

// killLeftovers ends what the program left in its cgroup, and every orphan of
// it, which are children of this subreaper by now. Uninterruptible ones are
// given up after five seconds.
func killLeftovers(fields []record.Field) {
	self := syscall.Getpid()
	for range 500 {
		for _, f := range fields {
			if f.Key == record.Kill {
				for _, pid := range record.CgroupPIDs(f.Value) {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		}
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		switch {
		case err == syscall.ECHILD && empty(fields):
			return
		case err == nil && pid > 0:
			continue
		}
		if all, err := record.Processes(); err == nil {
			for _, p := range all {
				if p.PPID == self {
					_ = syscall.Kill(p.PID, syscall.SIGKILL)
				}
			}
		}
		sleep(10)
	}
}

func empty(fields []record.Field) bool {
	for _, f := range fields {
		if f.Key == record.Kill && len(record.CgroupPIDs(f.Value)) > 0 {
			return false
		}
	}
	return true
}

func exists(path string) bool {
	var st syscall.Stat_t
	return syscall.Stat(path, &st) == nil
}

func joinCgroup(procs string) {
	if fd, err := syscall.Open(procs, syscall.O_WRONLY|syscall.O_CLOEXEC, 0); err == nil {
		_, _ = syscall.Write(fd, []byte("0"))
		_ = syscall.Close(fd)
	}
}

func sleep(milliseconds int) {
	t := syscall.NsecToTimespec(int64(milliseconds) * 1e6)
	_ = syscall.Nanosleep(&t, nil)
}

// setSignal installs SIG_DFL (0) or SIG_IGN (1). The kernel's sigaction is at
// most 40 bytes with the handler first on every Linux port of Go but MIPS.
func setSignal(s syscall.Signal, handler uintptr) {
	var action [8]uintptr
	action[0] = handler
	_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&action)), 0, sigSetBytes, 0, 0)
}

// closeFrom closes descriptors inherited by accident: they could keep a
// socket of the agent, or a disk, busy for the life of the task.
func closeFrom(first int) {
	for _, fd := range openDescriptors() {
		if fd >= first {
			_ = syscall.Close(fd)
		}
	}
}

func openDescriptors() []int {
	dir, err := syscall.Open("/proc/self/fd", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer syscall.Close(dir)
	var fds []int
	buf := make([]byte, 4096)
	for {
		n, err := syscall.ReadDirent(dir, buf)
		if err != nil || n <= 0 {
			return fds
		}
		_, _, names := syscall.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			if fd, err := strconv.Atoi(name); err == nil && fd != dir {
				fds = append(fds, fd)
			}
		}
	}
}
