package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
)

// site is a cloud, a router and one device, all on this machine:
//
//	cloud: this process's network namespace. belay-control, the registry and
//	       a proxy before it, which can hold a pull open
//	  |    veth 203.0.113.0/24
//	router: translates addresses (nftables), answers for names
//	  |    192.168.77.0/24: two TUN interfaces with the wire between them
//	device: belay-agent, its plugins, containerd, containers
type site struct {
	dir      string
	bin      rig.Binaries
	bug      string // planted in them
	control  *rig.Control
	cli      *rig.CLI
	api      *rig.API
	registry *rig.Registry
	proxy    *proxy
	router   *router
	device   *device
	instance string
	rnd      *rand.Rand           // of the present run
	damaged  func(id string)      // is told whose record is damaged
	fresh    int                  // images pushed so far
	witness  string               // directory where containers tell of themselves
	young    map[string]time.Time // when a task's record was damaged
	aged     map[string]bool      // attempts the agent believes to be old, by task and process
}

const (
	cluster     = "faults"
	controlName = "control." + domain
	// agentSocket and containerdSocket are paths on the device.
	agentSocket      = "/run/belay/agent.sock"
	containerdSocket = "/run/containerd/containerd.sock"
	// patience is how long anything may take that has nothing in its way.
	patience = 60 * time.Second
)

// open starts everything and waits until the device is connected.
func open(ctx context.Context, bin rig.Binaries, bug, dir, group string) (s *site, err error) {
	s = &site{dir: dir, bin: bin, bug: bug, aged: map[string]bool{}, young: map[string]time.Time{}, witness: filepath.Join(dir, "witness")}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := os.MkdirAll(s.witness, 0o777); err != nil {
		return s, err
	}
	if err := s.makePlugins(); err != nil {
		return s, err
	}
	if s.router, err = newRouter(); err != nil {
		return s, err
	}
	if s.control, err = rig.StartControlAt(ctx, bin, dir, cloudAddr+":"+controlTCP, "--advertise", controlName+":"+controlTCP); err != nil {
		return s, err
	}
	s.cli = s.control.CLI()
	if s.api, err = s.control.API(); err != nil {
		return s, err
	}
	if s.registry, err = rig.StartRegistry(ctx, filepath.Join(dir, "registry"), rig.RegistryOptions{}); err != nil {
		return s, err
	}
	if s.proxy, err = newProxy(cloudAddr+":5000", s.registry.Address); err != nil {
		return s, err
	}
	if _, err := images.Push(ctx, images.Target{Registry: s.registry.Address, PlainHTTP: true}, images.Options{Root: "../..", HostOnly: true}, images.Shell); err != nil {
		return s, err
	}
	if s.device, err = newDevice(dir, group); err != nil {
		return s, err
	}
	if err := s.power(); err != nil {
		return s, err
	}
	code, err := s.cli.Activate(ctx, cluster, 1)
	if err != nil {
		return s, err
	}
	if out, err := s.device.inside(bin.Path("belay-agent"), "enroll", "--state-dir", s.state(), "--activation", code).CombinedOutput(); err != nil {
		return s, fmt.Errorf("enrol the device: %w\n%s", err, out)
	}
	config := fmt.Sprintf(`pull_give_up = "0s"
keep_stopped = "1s"
[plugins.containerd.registries.%q]
plain_http = true
`, registryName)
	if err := os.WriteFile(filepath.Join(dir, "agent.toml"), []byte(config), 0o644); err != nil {
		return s, err
	}
	if err := s.startAgent(); err != nil {
		return s, err
	}
	ids, err := s.cli.Connected(ctx, cluster, 1, "containerd", "process")
	if err != nil {
		return s, err
	}
	s.instance = ids[0]
	return s, nil
}

// state is the agent's state directory, on the disk that survives.
func (s *site) state() string { return filepath.Join(s.device.disk, "belay") }

// power boots the device as far as containerd, and connects it.
func (s *site) power() error {
	if err := s.device.boot(); err != nil {
		return err
	}
	if err := s.router.attach(s.device); err != nil {
		return err
	}
	if s.bug != "" {
		if err := os.WriteFile(s.device.root("/run/belay-bug"), []byte(s.bug), 0o644); err != nil {
			return err
		}
	}
	return s.startContainerd()
}

func (s *site) startContainerd() error {
	config := filepath.Join(s.dir, "containerd.toml")
	text := fmt.Sprintf(`version = 2
root = %q
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
address = %q
[plugins."io.containerd.internal.v1.opt"]
path = "/run/containerd-opt"
`, filepath.Join(s.device.disk, "containerd"), containerdSocket)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	return s.device.start("containerd", nil, "containerd", "--config", config, "--log-level", "info")
}

func (s *site) startAgent() error {
	return s.device.start("agent", nil, s.bin.Path("belay-agent"), "run", "--state-dir", s.state(), "--run-dir", "/run/belay",
		"--plugin-dir", filepath.Join(s.dir, "plugins"), "--config", filepath.Join(s.dir, "agent.toml"), "--log-level", "debug")
}

// stopAgent ends the agent as its service would.
func (s *site) stopAgent() error {
	if err := s.device.signal("agent", syscall.SIGTERM); err != nil {
		return err
	}
	return s.device.gone("agent", 30*time.Second)
}

// reboot cuts the power, without a warning, and boots again.
func (s *site) reboot() error {
	if err := s.device.cut(); err != nil {
		return err
	}
	if err := s.power(); err != nil {
		return err
	}
	return s.startAgent()
}

// ctr asks the device's containerd.
func (s *site) ctr(args ...string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "ctr", append([]string{"-a", s.device.root(containerdSocket), "-n", "belay"}, args...)...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n"), nil
}

// close takes everything down.
func (s *site) close() error {
	var errs error
	if s.device != nil {
		errs = errors.Join(errs, s.device.close())
	}
	if s.proxy != nil {
		s.proxy.close()
	}
	if s.registry != nil {
		errs = errors.Join(errs, s.registry.Close())
	}
	if s.control != nil && s.control.Process != nil {
		select {
		case <-s.control.Done():
		default:
			_, err := s.control.Stop(20 * time.Second)
			errs = errors.Join(errs, err)
		}
	}
	if s.router != nil {
		errs = errors.Join(errs, s.router.close())
	}
	return errs
}

// makePlugins makes the plugin directory. An agent whose clocks are later than
// the device's has plugins whose clocks are not: the kernel tells of the time a
// process was started by the reader's clocks, and a suspend changes no such
// time.
func (s *site) makePlugins() error {
	real := filepath.Join(s.dir, "programs")
	if err := errors.Join(os.MkdirAll(real, 0o755), os.MkdirAll(filepath.Join(s.dir, "plugins"), 0o755)); err != nil {
		return err
	}
	for _, p := range []string{"containerd", "process"} {
		program := filepath.Join(real, p)
		// The host asks a plugin that it does not know yet without any right.
		text := "#!/bin/sh\nt=/run/device-time\nnsenter --time=$t true 2>/dev/null && exec nsenter --time=$t -- " + program + " \"$@\"\nexec " + program + " \"$@\"\n"
		if err := errors.Join(os.Symlink(s.bin.Path("belay-plugins"), program),
			os.WriteFile(filepath.Join(s.dir, "plugins", p), []byte(text), 0o755)); err != nil {
			return err
		}
	}
	return os.Chmod(s.dir, 0o755)
}
