package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/agent/internal/identity"
	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/agent/internal/system"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

func newPatient(ctx context.Context, cfg config.Config) (patient, error) {
	facts, err := system.Read(ctx, "/", factOptions(cfg))
	if err != nil {
		return patient{}, err
	}
	return patient{cfg: cfg, root: "/", euid: os.Geteuid(), facts: facts}, nil
}

func (p patient) path(name string) string { return filepath.Join(p.root, name) }

func one(f finding) []finding { return []finding{f} }

func checkUser(_ context.Context, p patient) []finding {
	if p.euid == 0 {
		return one(ok("root"))
	}
	return one(warn("run it as root, unless only programs without limits are to run",
		"user %d: no containers, and no limits on CPU and memory", p.euid))
}

func checkCgroups(_ context.Context, p patient) []finding {
	version := p.facts.Attributes["belay.cgroup"]
	// Version 1 has a mount per controller, in a tmpfs that systemd keeps
	// read-only; its tasks' cgroups are made below the controllers.
	base := "sys/fs/cgroup"
	if version != "v2" {
		base += "/memory"
	}
	switch {
	case version == "":
		return one(fail("mount cgroup2 on /sys/fs/cgroup", "not mounted"))
	case p.euid == 0 && errors.Is(unix.Access(p.path(base), unix.W_OK), unix.EROFS):
		return one(fail("the agent must not run in a container without the host's cgroups", "%s, but /%s is read-only", version, base))
	case p.facts.Attributes["belay.cgroup.memory"] != "on":
		advice := "boot with cgroup_enable=memory on the kernel's command line"
		if p.facts.Attributes["belay.board.family"] == "raspberry-pi" {
			// HARDWARE 7: firmware and DTB add cgroup_disable=memory.
			advice = "add cgroup_enable=memory to the line in /boot/firmware/cmdline.txt and reboot"
		}
		return one(fail(advice, "%s, but its memory controller is off: tasks with a memory limit cannot start", version))
	}
	return one(ok("%s, memory controller on", version))
}

func checkState(_ context.Context, p patient) []finding {
	st, err := os.Stat(p.cfg.StateDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return one(ok("%s does not exist yet: enrolling makes it", p.cfg.StateDir))
	case err != nil:
		return one(fail("run it as root, or name a --state-dir of your own", "%v", err))
	case !st.IsDir():
		return one(fail("remove it, or name another --state-dir", "%s is not a directory", p.cfg.StateDir))
	case unix.Access(p.cfg.StateDir, unix.W_OK) != nil:
		return one(fail("remount it for writing, run it as root, or name a --state-dir of your own", "%s cannot be written", p.cfg.StateDir))
	case st.Mode().Perm()&0o077 != 0:
		return one(warn("chmod 700 "+p.cfg.StateDir, "%s can be read by others (mode %04o)", p.cfg.StateDir, st.Mode().Perm()))
	}
	found := one(ok("%s", p.cfg.StateDir))
	aside := filepath.Join(p.cfg.StateDir, "damaged")
	if copies, err := os.ReadDir(aside); err == nil && len(copies) > 0 {
		found = append(found, warn("see what the kernel says of the disk (dmesg), and remove them once you have looked at them",
			"%d damaged records were set aside in %s, the last on %s", len(copies), aside, lastChange(copies)))
	}
	if id, err := identity.Load(p.cfg.StateDir); err == nil && id.Damage != "" {
		found = append(found, warn("restart the agent: it makes them good from their copy", "the identity's files are damaged: %s", id.Damage))
	}
	return found
}

// lastChange is the day of the newest of some files.
func lastChange(files []fs.DirEntry) string {
	var last time.Time
	for _, f := range files {
		if info, err := f.Info(); err == nil && info.ModTime().After(last) {
			last = info.ModTime()
		}
	}
	return last.Format(time.DateOnly)
}

// Below these the agent cannot keep its records, or tasks soon cannot start.
const (
	diskFail = 64 << 20
	diskWarn = 1 << 30
)

func checkDisk(_ context.Context, p patient) []finding {
	dir := p.cfg.StateDir
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	for errors.Is(err, unix.ENOENT) && dir != "/" {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &st)
	}
	if err != nil {
		return one(warn("look at the file system of "+dir, "free space of %s is not known: %v", dir, err))
	}
	free := st.Bavail * uint64(st.Bsize)
	text := fmt.Sprintf("%d MiB free at %s", free>>20, dir)
	switch {
	case free < diskFail:
		return one(fail("free some space: the agent cannot keep its records", "%s", text))
	case free < diskWarn:
		return one(warn("free some space: images may not fit", "%s", text))
	case st.Files > 0 && st.Ffree < 1000:
		return one(warn("remove files: there are almost no inodes left", "%s, %d inodes", text, st.Ffree))
	}
	return one(ok("%s", text))
}

// released is before any release of this program: a clock before it is wrong.
var released = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func checkClock(_ context.Context, _ patient) []finding {
	now := time.Now()
	const advice = "set it by NTP (systemctl enable --now systemd-timesyncd); the agent works without, registries' certificates may not"
	switch {
	case now.Before(released):
		return one(warn(advice, "%s cannot be", now.UTC().Format(time.RFC3339)))
	case !system.Synchronized():
		return one(warn(advice, "%s, not synchronized", now.UTC().Format(time.RFC3339)))
	}
	return one(ok("%s, synchronized", now.UTC().Format(time.RFC3339)))
}

func checkPlugins(_ context.Context, p patient) []finding {
	dir := p.cfg.PluginDir
	entries, err := os.ReadDir(dir)
	if err != nil {
		return one(fail("install the plugins, or name where they are with --plugin-dir", "%v", err))
	}
	var found []finding
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		st, err := os.Stat(path)
		switch {
		case err != nil:
			found = append(found, fail("reinstall it or remove it", "%s: %v", e.Name(), err))
		case st.IsDir():
		case !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0:
			found = append(found, fail("chmod 755 "+path+", or remove it", "%s is not executable", e.Name()))
		case st.Mode().Perm()&0o022 != 0:
			found = append(found, fail("chmod go-w "+path, "%s can be changed by others (mode %04o)", e.Name(), st.Mode().Perm()))
		default:
			names = append(names, e.Name())
		}
	}
	if len(names) == 0 {
		return append(found, fail("install at least one runtime plugin: containerd or process", "none in %s", dir))
	}
	for _, name := range p.cfg.PluginNames() {
		if !p.hasPlugin(name) {
			found = append(found, warn("install it, or remove its configuration", "%s is configured but not in %s", name, dir))
		}
		if _, err := p.cfg.Plugin(name); err != nil {
			found = append(found, fail("correct it: the agent takes it over at once", "%v", err))
		}
	}
	return append([]finding{ok("%s in %s", strings.Join(names, ", "), dir)}, found...)
}

func (p patient) hasPlugin(name string) bool {
	_, err := os.Stat(filepath.Join(p.cfg.PluginDir, name))
	return err == nil
}

// containerd tells whether the plugin of that name is here; without it nothing
// of what it needs matters.
func (p patient) containerd() bool { return p.hasPlugin("containerd") }

var notNeeded = one(ok("not needed: no containerd plugin"))

type containerdTable struct {
	Address    string   `json:"address"`
	CNIBinDirs []string `json:"cni_bin_dirs"`
}

// containerdTable is what is configured for that plugin, as far as it makes sense.
func (p patient) containerdTable() containerdTable {
	var t containerdTable
	if c, err := p.cfg.Plugin("containerd"); err == nil {
		_ = json.Unmarshal(c.JSON, &t)
	}
	return t
}

func (p patient) containerdAddress() string {
	if a := p.containerdTable().Address; a != "" {
		return a
	}
	return p.path("run/containerd/containerd.sock")
}

func checkContainerd(ctx context.Context, p patient) []finding {
	if !p.containerd() {
		return notNeeded
	}
	address := p.containerdAddress()
	const start = "install and start it: apt-get install containerd runc && systemctl enable --now containerd"
	d := net.Dialer{Timeout: 3 * time.Second}
	c, err := d.DialContext(ctx, "unix", address)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return one(fail(start+"; or name its socket with --containerd-address", "no socket at %s", address))
	case errors.Is(err, fs.ErrPermission):
		return one(fail("run it as root", "no permission to use %s", address))
	case err != nil:
		return one(fail(start, "nothing answers on %s: %v", address, err))
	}
	_ = c.Close()
	if _, err := exec.LookPath("runc"); err != nil {
		return one(warn("install runc, unless containerd is set up with another runtime", "answers on %s, but there is no runc", address))
	}
	return one(ok("answers on %s", address))
}

// cniDirs are where distributions and upstream put the CNI plugins.
var cniDirs = []string{"opt/cni/bin", "usr/lib/cni", "usr/libexec/cni"}

func (p patient) cniDirs() []string {
	if given := p.containerdTable().CNIBinDirs; given != nil {
		return given
	}
	var dirs []string
	for _, d := range cniDirs {
		dirs = append(dirs, p.path(d))
	}
	return dirs
}

func checkCNI(_ context.Context, p patient) []finding {
	if !p.containerd() {
		return notNeeded
	}
	var missing []string
	dirs := p.cniDirs()
	for _, name := range []string{"bridge", "host-local", "loopback", "portmap"} {
		here := false
		for _, dir := range dirs {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				here = true
				break
			}
		}
		if !here {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return one(warn("apt-get install containernetworking-plugins, or use network mode host",
			"%s missing in %s: no bridge network", strings.Join(missing, ", "), strings.Join(dirs, ", ")))
	}
	return one(ok("bridge, host-local, loopback, portmap"))
}

func checkIptables(ctx context.Context, p patient) []finding {
	if !p.containerd() {
		return notNeeded
	}
	path, err := exec.LookPath("iptables")
	if err != nil {
		return one(warn("apt-get install iptables", "not installed: no bridge network"))
	}
	if p.euid != 0 {
		return one(ok("%s (not tried: needs root)", path))
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "-w", "2", "-t", "nat", "-S").CombinedOutput()
	if err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return one(warn("the kernel may lack the modules iptable_nat or nft_chain_nat: use network mode host, or install them",
			"%s does not work: %v: %s", path, err, first))
	}
	return one(ok("%s", path))
}

func checkControlPlane(ctx context.Context, p patient) []finding {
	id, err := identity.Load(p.cfg.StateDir)
	if errors.Is(err, identity.ErrNotEnrolled) {
		return one(warn("belay-agent enroll --activation CODE", "not enrolled"))
	}
	if err != nil {
		return one(fail("belay-agent enroll --force --activation CODE", "%v", err))
	}
	key, err := carrier.ParseKey(id.Key)
	if err != nil {
		return one(fail("belay-agent enroll --force --activation CODE", "the device's key is damaged: %v", err))
	}
	cert, err := carrier.SelfSigned(key)
	if err != nil {
		return one(fail("", "%v", err))
	}
	pin, err := wire.ParsePin(id.Pin)
	if err != nil {
		return one(fail("belay-agent enroll --force --activation CODE", "%v", err))
	}
	proxy, err := proxyOf(p.cfg)
	if err != nil {
		return one(fail("correct it in the configuration or the environment", "%v", err))
	}
	var reached []string
	var failed []error
	for _, transport := range transports(p.cfg.Transport) {
		for _, address := range id.Addresses {
			s, err := dial(ctx, address, transport, wire.ProtocolTunnel, cert, pin, proxy)
			if err == nil {
				s.Close("", "")
				way := transport + " to " + address
				if through := proxy.Describe(address); through != "" && transport == wire.TransportTCP {
					way += " through the proxy " + through
				}
				reached = append(reached, way)
				break
			}
			failed = append(failed, err)
		}
	}
	switch {
	case len(reached) == 0:
		return one(fail("check that it runs, its address, and that this network lets UDP or TCP to it through", "not reached: %v", errors.Join(failed...)))
	case len(reached) < len(transports(p.cfg.Transport)):
		return one(warn("let UDP and TCP to it through; one of them is enough to work", "reached over %s only: %v", strings.Join(reached, ", "), errors.Join(failed...)))
	}
	return one(ok("reached over %s", strings.Join(reached, " and ")))
}

// Times of one dial.
const (
	quicTime = 5 * time.Second // then it is taken to be blocked
	tcpTime  = 10 * time.Second
)

func transports(choice string) []string {
	if choice == link.TransportAuto {
		return []string{wire.TransportQUIC, wire.TransportTCP}
	}
	return []string{choice}
}

func dial(ctx context.Context, address, transport, protocol string, cert tls.Certificate, pin wire.Pin, proxy *carrier.Proxy) (wire.Session, error) {
	limit := tcpTime
	if transport == wire.TransportQUIC {
		limit = quicTime
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return carrier.Dial(ctx, carrier.DialConfig{
		Address: address, Transport: transport, Protocol: protocol,
		Certificate: cert, Pins: []wire.Pin{pin}, Proxy: proxy,
	})
}
