package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Containerd is a containerd of our own: root, state and socket in one
// directory, without CRI, sharing nothing with the host's.
type Containerd struct {
	Address string // socket path, for clients

	dir    string
	sock   string // directory of the socket
	config string

	mu sync.Mutex
	p  *Process
}

// StartContainerd starts a containerd under dir, which is made when missing.
// It needs root. The error is a *Missing when the machine lacks a program.
func StartContainerd(ctx context.Context, dir string) (*Containerd, error) {
	if err := lookUp("containerd", "containerd-shim-runc-v2", "runc", "ctr"); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("containerd needs root")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// A socket path holds 107 bytes at most: test directories are often longer.
	sock, err := os.MkdirTemp("", "ctd")
	if err != nil {
		return nil, err
	}
	c := &Containerd{
		Address: filepath.Join(sock, "c.sock"),
		dir:     dir,
		sock:    sock,
		config:  filepath.Join(dir, "config.toml"),
	}
	if err := os.WriteFile(c.config, []byte(c.toml()), 0o600); err != nil {
		return nil, errors.Join(err, os.RemoveAll(sock))
	}
	if err := c.Restart(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// toml leaves out what only costs start-up time here: CRI and snapshotters
// that need block devices.
func (c *Containerd) toml() string {
	q := strconv.Quote
	return fmt.Sprintf(`version = 2
root = %s
state = %s
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
address = %s
[plugins."io.containerd.internal.v1.opt"]
path = %s
`, q(filepath.Join(c.dir, "root")), q(filepath.Join(c.dir, "state")), q(c.Address), q(filepath.Join(c.dir, "opt")))
}

// Restart starts the daemon again after Kill. Containers are not touched.
func (c *Containerd) Restart(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, err := start(c.dir, "containerd", nil, "containerd", "--config", c.config, "--log-level", "info")
	if err != nil {
		return err
	}
	c.p = p
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return Until(ctx, p, "containerd to listen", func() error {
		conn, err := net.Dial("unix", c.Address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// Kill ends the daemon as a crash would. Its containers keep running.
func (c *Containerd) Kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.p != nil {
		c.p.Kill()
	}
}

// Hang stops the daemon without ending it, until Kill.
func (c *Containerd) Hang() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.p.Signal(syscall.SIGSTOP)
}

// Log is the path of the daemon's log.
func (c *Containerd) Log() string { return filepath.Join(c.dir, "containerd.log") }

// Close kills every container of this containerd, ends the daemon, unmounts
// what they left under the directory and deletes it. What it cannot clean it
// reports; the machine is never left with processes of this rig.
func (c *Containerd) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var stuck error
	if c.p != nil {
		select {
		case <-c.p.Done():
		default:
			c.removeTasks()
			_, stuck = c.p.Stop(10 * time.Second)
		}
	}
	for _, pid := range c.shims() {
		killTree(pid)
	}
	return errors.Join(stuck, unmountUnder(c.dir), os.RemoveAll(c.dir), os.RemoveAll(c.sock))
}

// removeTasks asks the daemon to delete its tasks, so that their cgroups and
// mounts go the way containerd knows.
func (c *Containerd) removeTasks() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, ns := range c.ctr(ctx, "namespaces", "ls", "-q") {
		for _, id := range c.ctr(ctx, "-n", ns, "tasks", "ls", "-q") {
			c.ctr(ctx, "-n", ns, "tasks", "rm", "-f", id)
		}
	}
}

func (c *Containerd) ctr(ctx context.Context, args ...string) []string {
	out, err := exec.CommandContext(ctx, "ctr", append([]string{"-a", c.Address}, args...)...).Output()
	if err != nil {
		return nil
	}
	return strings.Fields(string(out))
}

// shims finds the shim processes started for this daemon: they outlive it.
func (c *Containerd) shims() []int {
	var pids []int
	for pid, args := range processes() {
		if len(args) > 0 && strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") && slices.Contains(args, c.Address) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// processes maps every pid to its command line.
func processes() map[int][]string {
	all := map[int][]string{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return all
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue
		}
		all[pid] = strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
	}
	return all
}

// killTree kills a shim and its children: the containers it reaps.
func killTree(shim int) {
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", shim, shim))
	for _, f := range strings.Fields(string(children)) {
		if pid, err := strconv.Atoi(f); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	_ = syscall.Kill(shim, syscall.SIGKILL)
}

// unmountUnder detaches every mount below dir, innermost first.
func unmountUnder(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) < 5 {
			continue
		}
		if p := strings.ReplaceAll(f[4], `\040`, " "); strings.HasPrefix(p, dir+"/") {
			points = append(points, p)
		}
	}
	slices.Reverse(points)
	for _, p := range points {
		if e := syscall.Unmount(p, syscall.MNT_DETACH); e != nil && e != syscall.EINVAL && e != syscall.ENOENT {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", p, e))
		}
	}
	return err
}
