package faults

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// class says what a fault touches; two of one class do not overlap.
type class string

const (
	ofLink    class = "link"
	ofDevice  class = "device"
	ofControl class = "control"
	ofAll     class = "all" // overlaps with nothing
)

// excludes says that two faults cannot be at the same time.
func (c class) excludes(d class) bool { return c == d || c == ofAll || d == ofAll }

// kind is a sort of fault. Begin brings it about, heal ends it; one that is
// over at once heals by itself.
type kind struct {
	name  string
	class class
	// longest is how long it lasts at most, but for one in ten.
	longest time.Duration
	begin   func(s *site) error
	heal    func(s *site) error
}

var kinds = []kind{
	line("cut", func(up, down *shape) { up.cut, down.cut = true, true }),
	line("cut-up", func(up, _ *shape) { up.cut = true }),
	line("cut-down", func(_, down *shape) { down.cut = true }),
	line("loss", func(up, down *shape) { up.loss, down.loss = 0.3, 0.3 }),
	line("delay", func(up, down *shape) { up.delay, down.delay = 250*time.Millisecond, 250*time.Millisecond }),
	line("reorder", func(up, down *shape) { up.reorder, down.reorder = 0.5, 0.5 }),
	line("duplicate", func(up, down *shape) { up.duplicate, down.duplicate = 0.5, 0.5 }),
	line("udp-blocked", func(up, down *shape) { up.udp, down.udp = true, true }),
	line("tcp-blocked", func(up, down *shape) { up.tcp, down.tcp = true, true }),
	{"nat-rebind", ofLink, 500 * time.Millisecond, func(s *site) error { return s.router.rebind() }, nothing},
	{"dns-gone", ofLink, 2 * time.Second,
		func(s *site) error { s.router.mute.Store(true); return nil },
		func(s *site) error { s.router.mute.Store(false); return nil }},

	{"agent-kill", ofDevice, 2 * time.Second, func(s *site) error { return s.killed("agent") }, (*site).startAgent},
	stopped("agent-stop", func(s *site) (int, error) { return s.pid("agent") }),
	{"containerd-plugin-kill", ofDevice, 500 * time.Millisecond, func(s *site) error { return s.signalPlugin("containerd", unix.SIGKILL) }, nothing},
	stopped("containerd-plugin-stop", func(s *site) (int, error) { return s.plugin("containerd") }),
	{"process-plugin-kill", ofDevice, 500 * time.Millisecond, func(s *site) error { return s.signalPlugin("process", unix.SIGKILL) }, nothing},
	stopped("process-plugin-stop", func(s *site) (int, error) { return s.plugin("process") }),
	{"containerd-kill", ofDevice, 2 * time.Second, func(s *site) error { return s.killed("containerd") }, (*site).startContainerd},
	stopped("containerd-stop", func(s *site) (int, error) { return s.pid("containerd") }),
	{"reboot", ofDevice, 500 * time.Millisecond, (*site).reboot, nothing},
	{"disk-full", ofDevice, 2 * time.Second, (*site).fill, func(s *site) error { return os.Remove(s.filler()) }},
	{"state-damaged", ofAll, 2 * time.Second, (*site).damage, func(s *site) error {
		s.router.wire.shape(func(up, down *shape) { *up, *down = shape{}, shape{} })
		return nil
	}},
	{"clock", ofDevice, time.Second, func(s *site) error { return s.killed("agent") }, func(s *site) error {
		// The agent comes back to clocks that went on without it, as after
		// a suspend.
		s.device.awake += 30 + s.rnd.Int64N(10_000)
		return s.startAgent()
	}},

	{"control-kill", ofControl, 2 * time.Second, func(s *site) error { s.control.Kill(); return nil }, func(s *site) error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return s.control.Restart(ctx)
	}},
	{"control-stop", ofControl, 2 * time.Second,
		func(s *site) error { return s.control.Signal(unix.SIGSTOP) },
		func(s *site) error { return s.control.Signal(unix.SIGCONT) }},
}

func nothing(*site) error { return nil }

func line(name string, f func(up, down *shape)) kind {
	return kind{name, ofLink, 2 * time.Second,
		func(s *site) error { s.router.wire.shape(f); return nil },
		func(s *site) error {
			s.router.wire.shape(func(up, down *shape) { *up, *down = shape{}, shape{} })
			return nil
		}}
}

// stopped is a process that hangs: SIGSTOP, and SIGCONT to the same process.
func stopped(name string, find func(s *site) (int, error)) kind {
	var pid int
	return kind{name, ofDevice, 2 * time.Second,
		func(s *site) (err error) {
			if pid, err = find(s); err != nil {
				return err
			}
			return unix.Kill(pid, unix.SIGSTOP)
		},
		func(*site) error {
			if err := unix.Kill(pid, unix.SIGCONT); !errors.Is(err, unix.ESRCH) {
				return err
			}
			return nil // who waited for it had enough
		}}
}

// pid of a program on the device, in the harness's own counting.
func (s *site) pid(name string) (int, error) {
	if inner := s.device.running(name); inner != 0 {
		if pid := s.outer(inner); pid != 0 {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("%s does not run", name)
}

func (s *site) plugin(name string) (found int, err error) {
	return found, until(10*time.Second, "plugin "+name+" to run", func() error {
		agent, err := s.pid("agent")
		if err != nil {
			return err
		}
		for pid, program := range children(agent) {
			if program == name {
				found = pid
				return nil
			}
		}
		return errors.New("the agent has no such child")
	})
}

func (s *site) signalPlugin(name string, signal syscall.Signal) error {
	pid, err := s.plugin(name)
	if err != nil {
		return err
	}
	return unix.Kill(pid, signal)
}

func (s *site) killed(name string) error {
	if err := s.device.signal(name, unix.SIGKILL); err != nil {
		return err
	}
	return s.device.gone(name, 10*time.Second)
}

func (s *site) filler() string { return filepath.Join(s.device.disk, "filler") }

// fill takes all that is left of the device's disk.
func (s *site) fill() error {
	f, err := os.Create(s.filler())
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, 64<<10)
	for {
		if _, err := f.Write(block); err != nil {
			if errors.Is(err, unix.ENOSPC) {
				return nil
			}
			return err
		}
	}
}

// damage makes one task's assignment unreadable while the agent is dead and
// nobody is there to send it again: its containers must be left alone.
func (s *site) damage() error {
	if err := s.killed("agent"); err != nil {
		return err
	}
	s.router.wire.shape(func(up, down *shape) { up.cut, down.cut = true, true })
	var running []string
	for w := range alive() {
		running = append(running, w.task)
	}
	if len(running) > 0 {
		slices.Sort(running)
		id := running[s.rnd.IntN(len(running))]
		s.damaged(id)
		s.young[id] = time.Now()
		maps.DeleteFunc(s.aged, func(key string, _ bool) bool { return strings.HasPrefix(key, id) })
		at := filepath.Join(s.state(), "tasks", id, "assignment")
		b, err := os.ReadFile(at)
		if err != nil {
			return err
		}
		for i := len(b) / 2; i < len(b); i++ {
			b[i] ^= 0x55
		}
		if err := os.WriteFile(at, b, 0o600); err != nil {
			return err
		}
	}
	return s.startAgent()
}
