package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

// programs runs what changes the network: CNI plugins and iptables. It is the
// invoke.Exec of libcni.
//
// Such a program outlives this process when this process is killed, and then
// finishes what nobody asks for any more. So each inherits an open file with
// the network's lock on it, and hands it on to what it starts itself: the
// lock is free when the last of them has ended, and not before.
type programs struct {
	version.PluginDecoder
	lock *os.File
}

var _ invoke.Exec = (*programs)(nil)

// lastWord is how long a program may go on after it is no longer wanted. One
// that is killed halfway leaves what no later DEL finds.
const lastWord = 10 * time.Second

func (p *programs) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, name, args...)
	c.ExtraFiles = []*os.File{p.lock}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}   // not killed with what else this plugin leaves
	c.Cancel = func() error { return os.ErrProcessDone } // that is: wait on
	c.WaitDelay = lastWord
	return c
}

// run returns what a program wrote, or an error that quotes its complaint.
func (p *programs) run(ctx context.Context, stdin string, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	c := p.command(ctx, name, args...)
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := c.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, clip(stderr.String()))
	}
	return stdout.String(), nil
}

// ExecPlugin implements invoke.Exec.
func (p *programs) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	c := p.command(ctx, path)
	c.Env, c.Stdin, c.Stdout, c.Stderr = env, bytes.NewReader(stdin), &stdout, &stderr
	err := c.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}
	var said types.Error // how a plugin says what is wrong
	if json.Unmarshal(stdout.Bytes(), &said) == nil && said.Msg != "" {
		return nil, &said
	}
	return nil, fmt.Errorf("%w: %s", err, clip(stderr.String()+stdout.String()))
}

// FindInPath implements invoke.Exec.
func (p *programs) FindInPath(plugin string, dirs []string) (string, error) {
	return invoke.FindInPath(plugin, dirs)
}

func (b *bridge) cni(p *programs) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(b.binDirs, b.results, p)
}

// change runs f while nothing else changes this bridge's network: no other
// goroutine, no other agent on this device, and nothing that a killed process
// of this plugin has started. CNI plugins race in setting up the bridge, and
// a clean-up is final only when nothing can be added after it.
func (b *bridge) change(ctx context.Context, f func(*programs) error) error {
	unlock, err := b.turn.lock(ctx, b.name)
	if err != nil {
		return err
	}
	defer unlock()
	lock, err := lockFile(ctx, filepath.Join(addressDir, b.name+".lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	return f(&programs{lock: lock})
}

// lockFile opens a file and locks it, once everybody who has it is done.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err {
		case nil:
			return f, nil
		case unix.EWOULDBLOCK, unix.EINTR:
		default:
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("the network is still being changed by processes that have %s open: %w", path, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
