package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Docker is a Docker daemon of our own: data, containerd and socket in one
// directory, a bridge of its own, and no firewall rules.
type Docker struct {
	Address string // socket path, for clients

	dir    string
	sock   string // directory of the socket
	bridge string
	opts   DockerOptions

	mu sync.Mutex
	p  *Process
}

// DockerOptions choose how a daemon behaves.
type DockerOptions struct {
	LiveRestore bool              // containers outlive the daemon
	Runtimes    map[string]string // further OCI runtimes: a program by name
}

// StartDocker starts a Docker daemon under dir, which is made when missing. It
// needs root. The error is a *Missing when the machine lacks a program.
func StartDocker(ctx context.Context, dir string, o DockerOptions) (*Docker, error) {
	if err := lookUp("dockerd", "containerd", "containerd-shim-runc-v2", "runc", "ip"); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a Docker daemon needs root")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// A socket path holds 107 bytes at most: test directories are often longer.
	sock, err := os.MkdirTemp("", "dkd")
	if err != nil {
		return nil, err
	}
	d := &Docker{Address: filepath.Join(sock, "d.sock"), dir: dir, sock: sock, opts: o}
	if err := errors.Join(d.makeBridge(), os.WriteFile(filepath.Join(dir, "daemon.json"), []byte("{}\n"), 0o600)); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if err := d.Restart(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// makeBridge takes the first name and network that nobody has.
func (d *Docker) makeBridge() error {
	var last error
	for n := range 250 {
		name := fmt.Sprintf("blydk%d", n)
		if out, err := exec.Command("ip", "link", "add", name, "type", "bridge").CombinedOutput(); err != nil {
			last = fmt.Errorf("make bridge %s: %w: %s", name, err, out)
			continue
		}
		d.bridge = name
		for _, args := range [][]string{{"addr", "add", fmt.Sprintf("10.232.%d.1/24", n), "dev", name}, {"link", "set", name, "up"}} {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
			}
		}
		return nil
	}
	return last
}

// Restart starts the daemon again after Kill or Stop.
func (d *Docker) Restart(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	// One that was killed leaves it, and the number may be somebody's by now.
	// The daemon takes its containerd of before for alive while the dead one
	// is a zombie, which it stays in a container whose first process reaps none.
	for _, f := range []string{filepath.Join(d.dir, "pid"), filepath.Join(d.sock, "x", "containerd", "containerd.pid")} {
		if err := os.RemoveAll(f); err != nil {
			return err
		}
	}
	args := []string{"--data-root", filepath.Join(d.dir, "root"), "--exec-root", filepath.Join(d.sock, "x"),
		"--pidfile", filepath.Join(d.dir, "pid"), "--config-file", filepath.Join(d.dir, "daemon.json"),
		"--host", "unix://" + d.Address, "--bridge", d.bridge, "--insecure-registry", "127.0.0.0/8",
		"--iptables=false", "--ip-masq=false", "--ip-forward=false"}
	if d.opts.LiveRestore {
		args = append(args, "--live-restore")
	}
	for name, path := range d.opts.Runtimes {
		args = append(args, "--add-runtime", name+"="+path)
	}
	p, err := start(d.dir, "dockerd", nil, "dockerd", args...)
	if err != nil {
		return err
	}
	d.p = p
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return Until(ctx, p, "the Docker daemon to listen", func() error {
		conn, err := net.Dial("unix", d.Address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// Kill ends the daemon as a crash would, and the containerd it has started.
func (d *Docker) Kill() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.p != nil {
		d.p.Kill()
	}
}

// Stop ends the daemon as its service would.
func (d *Docker) Stop() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.p.Stop(30 * time.Second)
	return err
}

// Signal sends a signal to the daemon alone.
func (d *Docker) Signal(s syscall.Signal) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.p.Signal(s)
}

// Log is the path of the daemon's log.
func (d *Docker) Log() string { return filepath.Join(d.dir, "dockerd.log") }

// Close ends the daemon with its containers, unmounts what they left and
// deletes everything. The machine is never left with processes of this rig.
func (d *Docker) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs error
	if d.p != nil {
		select {
		case <-d.p.Done():
		default:
			_, errs = d.p.Stop(30 * time.Second)
		}
	}
	for pid, args := range processes() {
		if line := strings.Join(args, " "); pid != os.Getpid() && len(args) > 0 && strings.Contains(line, d.sock) {
			if strings.HasPrefix(filepath.Base(args[0]), "containerd") {
				killTree(pid)
			}
		}
	}
	errs = errors.Join(errs, unmountUnder(d.dir), unmountUnder(d.sock), os.RemoveAll(d.dir), os.RemoveAll(d.sock))
	if d.bridge != "" {
		if out, err := exec.Command("ip", "link", "del", d.bridge).CombinedOutput(); err != nil {
			errs = errors.Join(errs, fmt.Errorf("delete bridge %s: %w: %s", d.bridge, err, out))
		}
	}
	return errs
}
