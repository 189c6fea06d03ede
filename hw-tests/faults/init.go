package faults

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// The first process of a device takes orders on its standard input, one JSON
// object a line, and answers each on its standard output. It reaps what others
// leave, as an init does.

type order struct {
	Do     string // "start", "signal" or "end"
	Name   string
	Args   []string
	Env    []string
	Log    string
	Signal int
	// Boottime is how much later than the device's boot clock the process's
	// shall be, in seconds: as if the device had been suspended for so long.
	Boottime int64
}

type answer struct {
	PID   int
	Error string
}

func runInit() {
	for _, fd := range []int{3, 4} { // of how it was started
		unix.CloseOnExec(fd)
	}
	var mu sync.Mutex // starting and reaping exclude each other
	children := map[string]int{}
	out := json.NewEncoder(os.Stdout)
	go func() {
		for {
			var info unix.Siginfo
			// Look first: a child must not be reaped before it is on record.
			if err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				if errors.Is(err, unix.ECHILD) {
					unix.Nanosleep(&unix.Timespec{Nsec: 10e6}, nil) // none there yet
				}
				continue
			}
			mu.Lock()
			var status unix.WaitStatus
			pid, _ := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			for name, p := range children {
				if p == pid {
					delete(children, name)
				}
			}
			mu.Unlock()
		}
	}()
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			os.Exit(0) // the harness is gone, and with this process everything here
		}
		var o order
		var a answer
		if err == nil {
			err = json.Unmarshal(line, &o)
		}
		if err == nil {
			mu.Lock()
			a.PID, err = obey(o, children)
			mu.Unlock()
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := out.Encode(a); err != nil {
			os.Exit(1)
		}
	}
}

func obey(o order, children map[string]int) (int, error) {
	switch o.Do {
	case "start":
		if pid := children[o.Name]; pid != 0 {
			return 0, fmt.Errorf("%s runs already", o.Name)
		}
		log, err := os.OpenFile(o.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return 0, err
		}
		defer log.Close()
		args := o.Args
		if o.Boottime != 0 {
			args = append([]string{"unshare", "--time", fmt.Sprintf("--boottime=%d", o.Boottime), fmt.Sprintf("--monotonic=%d", o.Boottime), "--"}, args...)
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), o.Env...)
		cmd.Env = clean(cmd.Env)
		cmd.Stdout, cmd.Stderr = log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		pid := cmd.Process.Pid
		_ = cmd.Process.Release() // reaped by the loop
		children[o.Name] = pid
		return pid, nil
	case "signal":
		pid := children[o.Name]
		if pid == 0 {
			return 0, fmt.Errorf("%s does not run", o.Name)
		}
		return pid, syscall.Kill(pid, syscall.Signal(o.Signal))
	case "running":
		return children[o.Name], nil
	}
	return 0, fmt.Errorf("no such order: %q", o.Do)
}

func clean(env []string) []string {
	var out []string
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if name != stageKey && !strings.HasSuffix(strings.ToLower(name), "_proxy") {
			out = append(out, kv)
		}
	}
	return out
}
