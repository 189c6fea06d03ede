// Command belay-supervise keeps the exit code of one program when everything
// above it dies. The process plugin starts it; it is not meant for people.
//
//	belay-supervise run DIR    be the parent of the attempt in DIR: start it,
//	                           wait, record how it ended, kill what it left
//	belay-supervise stage DIR  become the program: record pid and start time,
//	                           set up limits, user and output, then execve
//	belay-supervise ended DIR  note, in the cgroup of the attempt in DIR, whether
//	                           the kernel killed a process of it for memory
//	belay-supervise exec       become the command whose launch file is on
//	                           descriptor 3
//
// The program's pid is on stable storage before its first instruction runs, so
// "no record" proves that nothing was started and Start may try again.
package main

import (
	"runtime"
	"strings"
	"syscall"

	"github.com/belay-edge/belay/plugins/process/internal/record"
)

// Exit codes of this program itself, as a shell's for a command.
const (
	exitUsage      = 2
	exitHeld       = 3 // another supervisor has the attempt, or it ran already
	exitSetup      = 126
	exitNotFound   = 127
	signalExitBase = 128
)

func init() {
	// Credentials set by raw system calls belong to one thread; execve from it
	// makes them the program's.
	runtime.LockOSThread()
}

func main() {
	syscall.Exit(run(arguments()))
}

// arguments reads argv from /proc: os.Args would link package os.
func arguments() []string {
	b, err := record.ReadFile("/proc/self/cmdline")
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

func run(args []string) int {
	switch {
	case len(args) == 3 && args[1] == "run":
		return supervise(args[2])
	case len(args) == 3 && args[1] == "stage":
		return stage(args[2])
	case len(args) == 3 && args[1] == "ended":
		return ended(args[2])
	case len(args) == 2 && args[1] == "exec":
		return execCommand()
	}
	complain("usage: belay-supervise run DIR | stage DIR | ended DIR | exec; started by belay's process plugin")
	return exitUsage
}

func complain(s string) {
	_, _ = syscall.Write(2, []byte("belay-supervise: "+s+"\n"))
}

// errno finds the number behind an error of package syscall.
func errno(err error) syscall.Errno {
	if e, ok := err.(syscall.Errno); ok {
		return e
	}
	return syscall.EIO
}
