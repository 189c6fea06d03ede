package containerd

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/oci"
	kernelseccomp "github.com/containerd/containerd/v2/pkg/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/belay-edge/belay/plugins/sdk"
)

// edit is a change of the spec that needs nothing else.
func edit(f func(*oci.Spec)) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		f(s)
		return nil
	}
}

// specOpts turns the plan into the runtime's words. Their order matters:
// environment and user before what reads them, seccomp after capabilities.
func (r *Runtime) specOpts(p *plan, root []mount.Mount) []oci.SpecOpts {
	s := p.q.Spec
	opts := []oci.SpecOpts{
		oci.WithoutRunMount, // images keep files in /run
		edit(p.process),
		oci.WithEnv(p.about.config.Env),
		oci.WithEnv(s.Env),
		r.user(p, root),
		edit(p.mounts),
		edit(p.namespaces),
		edit(p.limits),
		oci.WithCgroup(p.cgroup),
		oci.WithHostname(p.hostname),
	}
	if s.Terminal {
		opts = append(opts, oci.WithTTY)
	}
	if s.ReadOnlyRoot {
		opts = append(opts, oci.WithRootFSReadonly())
	}
	opts = append(opts, p.capabilities()...)
	if s.Privileged {
		opts = append(opts, oci.WithPrivileged, oci.WithAllDevicesAllowed, oci.WithHostDevices, oci.WithNewPrivileges)
	}
	for _, d := range s.Devices {
		target, access := d.ContainerPath, d.Permissions
		if target == "" {
			target = d.HostPath
		}
		if access == "" {
			access = "rwm"
		}
		opts = append(opts, oci.WithDevices(d.HostPath, target, access))
	}
	opts = append(opts, edit(p.deviceRules))
	if p.security.apparmor != "" {
		opts = append(opts, oci.WithApparmorProfile(p.security.apparmor))
	}
	if !s.Privileged && !p.security.unconfined && kernelseccomp.IsEnabled() {
		opts = append(opts, seccomp.WithDefaultProfile())
	}
	return append(opts, p.granted()...)
}

// process is what runs, but for its user and environment.
func (p *plan) process(s *oci.Spec) {
	s.Process.Args = p.args
	if p.init != "" {
		s.Process.Args = slices.Concat([]string{"/dev/init", "--"}, p.args)
	}
	switch {
	case p.q.Spec.WorkingDir != "":
		s.Process.Cwd = p.q.Spec.WorkingDir
	case p.about.config.WorkingDir != "":
		s.Process.Cwd = p.about.config.WorkingDir
	}
	if len(p.about.config.Env) == 0 {
		s.Process.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	if p.q.Spec.Terminal {
		s.Process.Env = append(s.Process.Env, "TERM=xterm")
	}
	s.Process.NoNewPrivileges = p.security.noNewPrivileges
	s.Process.Rlimits = nil // containerd's own, as set for its service
	for _, u := range p.q.Spec.Ulimits {
		s.Process.Rlimits = append(s.Process.Rlimits, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: u.Soft, Hard: u.Hard})
	}
	if len(p.q.Spec.Sysctls) > 0 {
		s.Linux.Sysctl = p.q.Spec.Sysctls
	}
}

func (p *plan) capabilities() []oci.SpecOpts {
	s := p.q.Spec
	all := func(names []string) bool {
		return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, "ALL") })
	}
	full := func(names []string) []string {
		var out []string
		for _, n := range names {
			if !strings.EqualFold(n, "ALL") {
				out = append(out, capability(n))
			}
		}
		return out
	}
	var opts []oci.SpecOpts
	if all(s.CapabilitiesDrop) {
		opts = append(opts, oci.WithCapabilities(nil))
	}
	if all(s.CapabilitiesAdd) {
		opts = append(opts, oci.WithAllCurrentCapabilities)
	}
	opts = append(opts, oci.WithAddedCapabilities(full(s.CapabilitiesAdd)))
	return append(opts, oci.WithDroppedCapabilities(full(s.CapabilitiesDrop)))
}

func (p *plan) mounts(s *oci.Spec) {
	const shm = "/dev/shm"
	ms := slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == shm })
	switch size := p.q.Spec.ShmBytes; {
	case p.task.IPCMode == "none":
	case p.shm != "":
		ms = append(ms, specs.Mount{Destination: shm, Type: "bind", Source: p.shm, Options: []string{"rbind", "rprivate", "nosuid", "nodev", "noexec"}})
	default:
		if size == 0 {
			size = 64 << 20
		}
		ms = append(ms, specs.Mount{Destination: shm, Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", size)}})
	}
	// Language runtimes read their limits there.
	ms = append(ms, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev", "relatime"}})
	for _, f := range []string{"resolv.conf", "hosts", "hostname"} {
		ms = append(ms, specs.Mount{Destination: "/etc/" + f, Type: "bind", Source: filepath.Join(p.dir, f), Options: []string{"rbind", "rprivate", p.rootMode()}})
	}
	if p.init != "" {
		ms = append(ms, specs.Mount{Destination: "/dev/init", Type: "bind", Source: p.init, Options: []string{"bind", "rprivate", "ro"}})
	}
	for _, m := range p.q.Spec.Mounts {
		ms = slices.DeleteFunc(ms, func(o specs.Mount) bool { return o.Destination == filepath.Clean(m.Target) })
		mode := "rw"
		if m.ReadOnly {
			mode = "ro"
		}
		out := specs.Mount{Destination: filepath.Clean(m.Target), Type: m.Type, Source: m.Source}
		if m.Type == "tmpfs" {
			out.Source, out.Options = "tmpfs", slices.Concat([]string{"nosuid", "nodev", mode}, m.Options)
		} else {
			out.Options = slices.Concat([]string{"rbind", "rprivate", mode}, m.Options)
		}
		ms = append(ms, out)
	}
	s.Mounts = ms
}

// rootMode keeps files we mount over the root file system as writable as it.
func (p *plan) rootMode() string {
	if p.q.Spec.ReadOnlyRoot {
		return "ro"
	}
	return "rw"
}

func (p *plan) namespaces(s *oci.Spec) {
	set := func(kind specs.LinuxNamespaceType, path string) {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind })
		if path != "host" {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: path})
		}
	}
	switch p.network {
	case sdk.NetworkHost:
		set(specs.NetworkNamespace, "host")
	case sdk.NetworkBridge:
		set(specs.NetworkNamespace, p.netns)
	}
	if p.task.PIDMode == "host" {
		set(specs.PIDNamespace, "host")
	}
	switch p.task.IPCMode {
	case "host":
		set(specs.IPCNamespace, "host")
	case "task":
		set(specs.IPCNamespace, p.ipcNS)
	}
	if p.unified {
		set(specs.CgroupNamespace, "")
	}
}

func (p *plan) limits(s *oci.Spec) {
	l := p.q.Spec.Limits
	res := s.Linux.Resources
	if l.CPUShares > 0 || l.CPUQuota > 0 {
		res.CPU = &specs.LinuxCPU{}
		if l.CPUShares > 0 {
			shares := max(l.CPUShares, 2)
			res.CPU.Shares = &shares
		}
		if l.CPUQuota > 0 {
			quota, period := int64(l.CPUQuota), uint64(100000)
			res.CPU.Quota, res.CPU.Period = &quota, &period
		}
	}
	if l.MemoryBytes > 0 || l.MemoryReservation > 0 || l.Swappiness != nil || l.MemorySwap != nil {
		res.Memory = &specs.LinuxMemory{}
		if l.MemoryBytes > 0 {
			limit := int64(l.MemoryBytes)
			res.Memory.Limit = &limit
			if l.MemorySwap != nil && hostSwap() > 0 {
				// The runtime's word is for memory and swap together.
				swap := int64(-1)
				if *l.MemorySwap >= 0 {
					swap = limit + *l.MemorySwap
				}
				res.Memory.Swap = &swap
			}
		}
		if l.MemoryReservation > 0 {
			low := int64(l.MemoryReservation)
			res.Memory.Reservation = &low
		}
		res.Memory.Swappiness = l.Swappiness
	}
	if l.Pids != 0 {
		n := l.Pids
		res.Pids = &specs.LinuxPids{Limit: &n}
	}
}

// deviceRules come after the nodes: they allow more, and take nothing back.
func (p *plan) deviceRules(s *oci.Spec) {
	for _, r := range p.q.Spec.DeviceRules {
		major, access := int64(r.Major), r.Permissions
		if access == "" {
			access = "rwm"
		}
		if s.Linux.Resources == nil {
			s.Linux.Resources = &specs.LinuxResources{}
		}
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: r.Type, Major: &major, Access: access})
	}
}
