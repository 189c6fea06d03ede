package faults

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageKey says which of its three lives this program is in: "" is what was
// started, stageHarness the same again in namespaces of its own, stageInit the
// first process of a device.
const (
	stageKey     = "BELAY_FAULTS_STAGE"
	stageHarness = "harness"
	stageInit    = "init"
)

// Isolated runs the caller's program again, with the same arguments, in a PID,
// mount, network and IPC namespace of its own, and returns its exit code; in
// there it returns false and the caller goes on. So nothing a run does reaches
// the machine's network or mounts, and all its processes end with it, however
// it ends. Call it first in main.
func Isolated() (code int, done bool, err error) {
	switch os.Getenv(stageKey) {
	case stageInit:
		runInit()
		return 0, true, nil
	case stageHarness:
		return 0, false, settle()
	}
	runtime.LockOSThread() // the child dies with this thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageKey+"="+stageHarness)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	// The inner one is to end by itself, and to clean up.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if err := cmd.Start(); err != nil {
		return 0, true, err
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), true, nil
	}
	return 0, true, err
}

// settle makes the new namespaces usable.
func settle() error {
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", 0},
		{"tmpfs", "/run", "tmpfs", 0}, // network namespaces by name, and their like
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return command("ip", "link", "set", "lo", "up")
}

// command runs a short command of the system.
func command(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// commands runs lines of words, one after the other.
func commands(lines ...string) error {
	for _, l := range lines {
		f := strings.Fields(l)
		if err := command(f[0], f[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// within runs f with this goroutine's thread in another network namespace. The
// thread is thrown away after it.
func within(netns string, f func() error) error {
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: it ends with the goroutine
		fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err != nil {
			failed <- fmt.Errorf("enter network namespace %s: %w", netns, err)
			return
		}
		failed <- f()
	}()
	return <-failed
}
