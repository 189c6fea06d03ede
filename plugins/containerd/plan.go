package containerd

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/cap"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/belay-edge/belay/plugins/sdk"
)

// plan is one attempt, checked and ready to be made.
type plan struct {
	id          string
	q           sdk.StartRequest
	task        sdk.TaskSpec
	network     string
	netns       string // path, bridge only
	image       images.Image
	about       known // the image
	snapshotter string
	args        []string
	init        string // host path of the init to bind, or empty
	stdin       string // host path of a FIFO, or empty
	hostname    string
	dir         string // host directory of resolv.conf, hosts, hostname
	shm         string // host path bound to /dev/shm, or empty
	ipcNS       string // path of the task's IPC namespace, or empty
	cgroup      string
	unified     bool
	security    security
	cdiDirs     []string
}

// security is what SecurityOptions say.
type security struct {
	noNewPrivileges bool
	unconfined      bool // no seccomp filter
	apparmor        string
}

// plan checks everything that can be checked before anything is made.
func (r *Runtime) plan(ctx context.Context, q sdk.StartRequest) (*plan, error) {
	t, err := r.taskSpec(q.Attempt.Task)
	if err != nil {
		return nil, err
	}
	s := q.Spec
	p := &plan{
		id: containerID(q.Attempt), q: q, task: t, network: q.Network, unified: r.cgroups.unified,
		cdiDirs: r.cfg.CDISpecDirs,
		dir:     r.containerDir(containerID(q.Attempt)), cgroup: r.cgroupOf(q.Attempt.Task) + "/" + leafName(q.Attempt),
	}
	if p.network == "" {
		p.network = t.Network
	}
	switch p.network {
	case sdk.NetworkHost, sdk.NetworkNone:
	case sdk.NetworkBridge:
		if err := r.bridge.usable(); err != nil {
			return nil, err
		}
	default:
		return nil, sdk.Errorf(sdk.Unsupported, "", "there is no network mode %q", p.network)
	}
	for name, path := range map[string]string{"stdout": q.Stdout, "stderr": q.Stderr} {
		if !filepath.IsAbs(path) {
			return nil, sdk.Errorf(sdk.Invalid, "", "%s %q is not an absolute path", name, path)
		}
		if _, err := os.Stat(path); err != nil {
			return nil, sdk.Errorf(sdk.Invalid, "", "%s: %w", name, err)
		}
	}
	for _, check := range []func() error{
		func() error { return checkPorts(p.network, s.Ports) },
		func() error { return r.cgroups.check(s.Limits) },
		func() error { return checkMounts(s.Mounts) },
		func() error { return checkNames(s) },
		func() (err error) { p.security, err = parseSecurity(s.SecurityOptions); return },
		func() (err error) { p.image, err = r.image(ctx, s); return },
		func() (err error) { p.about, err = r.know(ctx, p.image.Target); return },
		func() (err error) { p.snapshotter, err = r.chooseSnapshotter(ctx); return },
		func() (err error) { p.args, err = command(s, p.about.config); return },
	} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	if s.Init {
		if p.init, err = findInit(r.cfg.InitPath); err != nil {
			return nil, err
		}
	}
	if s.StdinOpen {
		p.stdin = filepath.Join(p.dir, "stdin")
	}
	if p.hostname = s.Hostname; p.hostname == "" {
		p.hostname = q.Attempt.Task[:12]
		if p.network == sdk.NetworkHost {
			if h, err := os.Hostname(); err == nil {
				p.hostname = h
			}
		}
	}
	switch t.IPCMode {
	case "host":
		p.shm = "/dev/shm"
	case "task":
		p.shm, p.ipcNS = filepath.Join(r.ipcDir(t.ID), "shm"), filepath.Join(r.ipcDir(t.ID), "ns")
		if !isMount(p.ipcNS) {
			return nil, sdk.Errorf(sdk.Invalid, "", "task %s is not prepared since the device restarted", t.ID)
		}
	}
	return p, nil
}

// stderr is where the shim is to write it: nowhere with a terminal, which has
// one stream.
func (p *plan) stderr() string {
	if p.q.Spec.Terminal {
		return ""
	}
	return p.q.Stderr
}

// command is what to run: an entry point of one's own drops the image's
// command too.
func command(s sdk.ContainerSpec, image ocispec.ImageConfig) ([]string, error) {
	entry, cmd := s.EntryPoint, s.Command
	if len(entry) == 0 {
		entry = image.Entrypoint
		if len(cmd) == 0 {
			cmd = image.Cmd
		}
	}
	args := slices.Concat(entry, cmd)
	if len(args) == 0 || args[0] == "" {
		return nil, sdk.Errorf(sdk.Invalid, "", "the image names no program to run").WithHint("set command or entryPoint")
	}
	return args, nil
}

func checkMounts(mounts []sdk.Mount) error {
	for _, m := range mounts {
		if !filepath.IsAbs(m.Target) || filepath.Clean(m.Target) == "/" {
			return sdk.Errorf(sdk.Invalid, "", "mount target %q is not an absolute path below /", m.Target)
		}
		switch m.Type {
		case "tmpfs":
		case "bind":
			if !filepath.IsAbs(m.Source) {
				return sdk.Errorf(sdk.Invalid, "", "mount source %q is not an absolute path", m.Source)
			}
			if _, err := os.Stat(m.Source); err != nil {
				return sdk.Errorf(sdk.Invalid, "", "mount %s: %w", m.Target, err).WithHint("make the directory on the device first")
			}
		default:
			return sdk.Errorf(sdk.Unsupported, "", "there is no mount type %q", m.Type)
		}
	}
	return nil
}

var ulimits = []string{"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"}

func isPermissions(s string) bool { return len(s) <= 3 && strings.Trim(s, "rwm") == "" }

// checkNames refuses names that runc would refuse later in worse words, or
// ignore.
func checkNames(s sdk.ContainerSpec) error {
	for _, u := range s.Ulimits {
		if !slices.Contains(ulimits, u.Name) {
			return sdk.Errorf(sdk.Invalid, "", "there is no ulimit %q", u.Name)
		}
		if u.Soft > u.Hard {
			return sdk.Errorf(sdk.Invalid, "", "ulimit %s: soft limit %d is above the hard limit %d", u.Name, u.Soft, u.Hard)
		}
	}
	for _, c := range slices.Concat(s.CapabilitiesAdd, s.CapabilitiesDrop) {
		if strings.ToUpper(c) != "ALL" && !slices.Contains(cap.Known(), capability(c)) {
			return sdk.Errorf(sdk.Invalid, "", "there is no capability %q", c)
		}
	}
	for _, d := range s.Devices {
		if !filepath.IsAbs(d.HostPath) || d.ContainerPath != "" && !filepath.IsAbs(d.ContainerPath) {
			return sdk.Errorf(sdk.Invalid, "", "device %q: not an absolute path", d.HostPath)
		}
		if !isPermissions(d.Permissions) {
			return sdk.Errorf(sdk.Invalid, "", "device %s: permissions %q are not of r, w and m", d.HostPath, d.Permissions)
		}
		if _, err := os.Stat(d.HostPath); err != nil {
			return sdk.Errorf(sdk.NotFound, "", "device %s: %w", d.HostPath, err).WithHint("is it plugged in, and its driver loaded?")
		}
	}
	for _, r := range s.DeviceRules {
		if r.Type != "c" && r.Type != "b" || !isPermissions(r.Permissions) {
			return sdk.Errorf(sdk.Invalid, "", "device rule %q %d %q: want type c or b and permissions of r, w and m", r.Type, r.Major, r.Permissions)
		}
	}
	for k, v := range s.Labels {
		if strings.HasPrefix(k, labelPrefix) {
			return sdk.Errorf(sdk.Invalid, "", "label %q: names with %q are kept for the runtime", k, labelPrefix)
		}
		if len(k)+len(v) > 4096 {
			return sdk.Errorf(sdk.Invalid, "", "label %.40q is longer than 4096 bytes", k)
		}
	}
	return nil
}

func capability(name string) string {
	return "CAP_" + strings.TrimPrefix(strings.ToUpper(name), "CAP_")
}

func parseSecurity(options []string) (security, error) {
	var s security
	for _, o := range options {
		key, value, _ := strings.Cut(strings.Replace(o, "=", ":", 1), ":")
		switch {
		case key == "no-new-privileges" && (value == "" || value == "true"):
			s.noNewPrivileges = true
		case key == "no-new-privileges" && value == "false":
			s.noNewPrivileges = false
		case key == "seccomp" && value == "unconfined":
			s.unconfined = true
		case key == "apparmor" && value != "":
			s.apparmor = value
		case key == "label" && value == "disable":
		default:
			return s, sdk.Errorf(sdk.Unsupported, "", "security option %q is not supported", o).
				WithHint("there are no-new-privileges, apparmor:PROFILE, seccomp:unconfined and label:disable")
		}
	}
	if s.apparmor != "" && s.apparmor != "unconfined" {
		if _, err := os.Stat("/sys/kernel/security/apparmor"); err != nil {
			return s, sdk.Errorf(sdk.Unsupported, "", "apparmor profile %q: AppArmor is not enabled on this device", s.apparmor)
		}
	}
	return s, nil
}

// findInit finds a static init: it is bound into images of any C library.
func findInit(configured string) (string, error) {
	candidates := []string{configured}
	if configured == "" {
		candidates = []string{
			"/usr/bin/tini-static", "/usr/libexec/podman/catatonit", "/usr/libexec/catatonit/catatonit", "/usr/bin/catatonit",
			"/usr/bin/docker-init", "/usr/libexec/docker/docker-init", "/usr/bin/tini", "/usr/bin/dumb-init",
		}
	}
	for _, c := range candidates {
		if static(c) {
			return c, nil
		}
	}
	return "", sdk.Errorf(sdk.Unsupported, "", "initProcessEnabled needs a static init and none was found at %s", strings.Join(candidates, ", ")).
		WithHint("install tini, catatonit or dumb-init, or set init_path")
}

// static tells whether a program needs no loader.
func static(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// writeFiles makes the container's directory with what is mounted from it.
func (r *Runtime) writeFiles(id string, p *plan) error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	if p.stdin != "" {
		if err := makeFIFO(p.stdin); err != nil {
			return err
		}
	}
	resolv, err := r.resolvConf(p)
	if err != nil {
		return err
	}
	for name, text := range map[string]string{"resolv.conf": resolv, "hostname": p.hostname + "\n", "hosts": hosts(p, "")} {
		if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// writeAddress completes /etc/hosts once the address is known. The file is
// written in place: it is mounted already.
func (r *Runtime) writeAddress(id string, p *plan, ip string) error {
	if err := os.WriteFile(filepath.Join(p.dir, "hosts"), []byte(hosts(p, ip)), 0o644); err != nil {
		return err
	}
	return os.WriteFile(r.file(id, "ip"), []byte(ip), 0o600)
}

// hosts is the container's /etc/hosts.
func hosts(p *plan, ip string) string {
	var b strings.Builder
	if p.network == sdk.NetworkHost {
		if h, err := os.ReadFile("/etc/hosts"); err == nil {
			b.Write(h)
			if len(h) > 0 && h[len(h)-1] != '\n' {
				b.WriteByte('\n')
			}
		}
	} else {
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
		if ip == "" {
			ip = "127.0.1.1"
		}
		fmt.Fprintf(&b, "%s\t%s\n", ip, p.hostname)
	}
	for _, h := range p.q.Spec.ExtraHosts {
		fmt.Fprintf(&b, "%s\t%s\n", h.Address, h.Name)
	}
	return b.String()
}

// resolvConf is the container's /etc/resolv.conf: the host's, less servers
// out of the container's reach.
func (r *Runtime) resolvConf(p *plan) (string, error) {
	s := p.q.Spec
	var host string
	for _, f := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if host = string(b); p.network == sdk.NetworkHost || slices.ContainsFunc(nameservers(host), reachable) {
			break
		}
	}
	servers, search := s.DNSServers, s.DNSSearch
	if len(servers) == 0 {
		servers = nameservers(host)
		if p.network != sdk.NetworkHost {
			if servers = slices.DeleteFunc(servers, func(a string) bool { return !reachable(a) }); len(servers) == 0 {
				servers = r.cfg.DNS
			}
		}
	}
	var b strings.Builder
	for _, a := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	for line := range strings.Lines(host) {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == "options" || len(search) == 0 && (f[0] == "search" || f[0] == "domain")) {
			b.WriteString(strings.Join(f, " ") + "\n")
		}
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	return b.String(), nil
}

func nameservers(conf string) []string {
	var all []string
	for line := range strings.Lines(conf) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			all = append(all, f[1])
		}
	}
	return all
}

// reachable: a resolver on the host's loopback is none of the container's.
func reachable(addr string) bool { return !strings.HasPrefix(addr, "127.") && addr != "::1" }
