package agent

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	mib = 1 << 20
	// cpuPeriod is the window that sdk.Limits.CPUQuota counts in.
	cpuPeriod = 100_000
	// minShares is what a container without cpu units gets, as in ECS: the
	// least weight the kernel knows.
	minShares = 2
)

// taskSpec puts a task into the runtime's words.
func taskSpec(id string, t *wire.TaskSpec) sdk.TaskSpec {
	s := sdk.TaskSpec{
		ID: id, Family: t.GetFamily(), Network: network(t), PIDMode: t.GetPidMode(), IPCMode: t.GetIpcMode(),
		Limits: sdk.Limits{MemoryBytes: t.GetMemoryMib() * mib},
	}
	if cpu := t.GetCpu(); cpu > 0 {
		s.Limits.CPUShares = max(cpu, minShares)
		s.Limits.CPUQuota = max(1000, cpu*cpuPeriod/1024)
	}
	for _, c := range t.GetContainers() {
		s.Containers = append(s.Containers, c.GetName())
	}
	return s
}

func network(t *wire.TaskSpec) string {
	if n := t.GetNetwork(); n != "" {
		return n
	}
	return sdk.NetworkBridge
}

// platform is the one the task asks for, in OCI's words; zero: the device's.
func platform(p *wire.Platform) sdk.Platform {
	arch := strings.ToLower(p.GetArchitecture())
	switch arch {
	case "x86_64":
		arch = "amd64"
	case "aarch64":
		arch = "arm64"
	}
	return sdk.Platform{OS: strings.ToLower(p.GetOs()), Architecture: arch}
}

// environment is what the agent adds to every container; the definition's
// own values come after it and win.
func environment(a sdk.Attempt, instance string, t *wire.TaskSpec, c *wire.Container) []string {
	env := []string{
		"BELAY_TASK_ID=" + a.Task,
		"BELAY_TASK_FAMILY=" + t.GetFamily(),
		"BELAY_TASK_REVISION=" + strconv.FormatUint(uint64(t.GetRevision()), 10),
		"BELAY_CONTAINER_NAME=" + a.Container,
		"BELAY_ATTEMPT=" + strconv.Itoa(a.Number),
		"BELAY_CLUSTER=" + t.GetCluster(),
		"BELAY_INSTANCE_ID=" + instance,
	}
	for _, e := range c.GetEnvironment() {
		env = append(env, e.GetName()+"="+e.GetValue())
	}
	return env
}

// startRequest puts one attempt into the runtime's words. mounts are the
// container's volumes, resolved.
func startRequest(j job, instance string, mounts []sdk.Mount) sdk.StartRequest {
	c := j.container
	r := sdk.StartRequest{Attempt: j.Attempt, Network: network(j.task)}
	if c.GetDisableNetworking() {
		r.Network = sdk.NetworkNone
	}
	r.Spec = sdk.ContainerSpec{
		Image: j.image, Digest: j.digest,
		Env:        environment(j.Attempt, instance, j.task, c),
		WorkingDir: c.GetWorkingDirectory(), User: c.GetUser(), Hostname: c.GetHostname(),
		Limits:          containerLimits(c),
		Mounts:          append(mounts, tmpfs(c)...),
		CapabilitiesAdd: c.GetCapabilitiesAdd(), CapabilitiesDrop: c.GetCapabilitiesDrop(),
		Privileged: c.GetPrivileged(), ReadOnlyRoot: c.GetReadOnlyRoot(),
		DNSServers: c.GetDnsServers(), DNSSearch: c.GetDnsSearch(),
		Init: c.GetInit(), Terminal: c.GetTerminal(), StdinOpen: c.GetInteractive(),
		ShmBytes: c.GetShmMib() * mib, SecurityOptions: c.GetSecurityOptions(),
		Sysctls: pairs(c.GetSysctls()), Labels: pairs(c.GetLabels()),
	}
	if c.GetEntryPointSet() {
		r.Spec.EntryPoint = append([]string{}, c.GetEntryPoint()...)
	}
	if c.GetCommandSet() || len(c.GetCommand()) > 0 {
		r.Spec.Command = append([]string{}, c.GetCommand()...)
	}
	if r.Network == sdk.NetworkBridge {
		r.Spec.Ports = ports(c, j.hostPorts)
	}
	for _, u := range c.GetUlimits() {
		r.Spec.Ulimits = append(r.Spec.Ulimits, sdk.Ulimit{Name: u.GetName(), Soft: rlimit(u.GetSoft()), Hard: rlimit(u.GetHard())})
	}
	for _, d := range c.GetDevices() {
		r.Spec.Devices = append(r.Spec.Devices, sdk.HostDevice{
			HostPath: d.GetHostPath(), ContainerPath: d.GetContainerPath(), Permissions: permissions(d.GetPermissions()),
		})
	}
	for _, h := range c.GetExtraHosts() {
		r.Spec.ExtraHosts = append(r.Spec.ExtraHosts, sdk.HostEntry{Name: h.GetName(), Address: h.GetAddress()})
	}
	return r
}

func containerLimits(c *wire.Container) sdk.Limits {
	l := sdk.Limits{
		CPUShares:         max(c.GetCpu(), minShares),
		MemoryBytes:       c.GetMemoryMib() * mib,
		MemoryReservation: c.GetMemoryReservationMib() * mib,
	}
	if c.MaxSwapMib != nil {
		swap := c.GetMaxSwapMib()
		if swap > 0 {
			swap *= mib
		}
		l.MemorySwap = &swap
	}
	if c.Swappiness != nil {
		s := uint64(c.GetSwappiness())
		l.Swappiness = &s
	}
	return l
}

// ports joins a container's mappings with the host ports chosen for them.
func ports(c *wire.Container, chosen []int) []sdk.PortMapping {
	var out []sdk.PortMapping
	for i, m := range c.GetPorts() {
		p := sdk.PortMapping{
			Name: m.GetName(), Protocol: m.GetProtocol(),
			ContainerPort: int(m.GetContainerPort()), HostPort: int(m.GetHostPort()),
		}
		if p.Protocol == "" {
			p.Protocol = "tcp"
		}
		if i < len(chosen) {
			p.HostPort = chosen[i]
		}
		out = append(out, p)
	}
	return out
}

func pairs(kvs []*wire.KeyValue) map[string]string {
	if len(kvs) == 0 {
		return nil
	}
	m := make(map[string]string, len(kvs))
	for _, kv := range kvs {
		m[kv.GetName()] = kv.GetValue()
	}
	return m
}

// rlimit turns ECS's -1 into the kernel's RLIM_INFINITY.
func rlimit(v int64) uint64 {
	if v < 0 {
		return math.MaxUint64
	}
	return uint64(v)
}

func permissions(words []string) string {
	var b strings.Builder
	for _, w := range [...]struct{ word, letter string }{{"read", "r"}, {"write", "w"}, {"mknod", "m"}} {
		if slices.Contains(words, w.word) {
			b.WriteString(w.letter)
		}
	}
	return b.String()
}

func tmpfs(c *wire.Container) []sdk.Mount {
	var out []sdk.Mount
	for _, t := range c.GetTmpfs() {
		m := sdk.Mount{Type: "tmpfs", Target: t.GetTarget(), Options: slices.Clone(t.GetOptions())}
		if t.GetSizeMib() > 0 {
			m.Options = append(m.Options, fmt.Sprintf("size=%dm", t.GetSizeMib()))
		}
		out = append(out, m)
	}
	return out
}

// mountPoint is a volume at a path of a container, volumesFrom followed.
type mountPoint struct {
	volume, target string
	readOnly       bool
}

// mountPoints lists a container's own mounts, then those it takes from
// others; of two on one path the first counts.
func mountPoints(t *wire.TaskSpec, c *wire.Container) []mountPoint {
	var out []mountPoint
	taken := map[string]bool{}
	seen := map[string]bool{}
	var from func(c *wire.Container, readOnly bool)
	from = func(c *wire.Container, readOnly bool) {
		if seen[c.GetName()] {
			return
		}
		seen[c.GetName()] = true
		for _, m := range c.GetMounts() {
			if !taken[m.GetTarget()] {
				taken[m.GetTarget()] = true
				out = append(out, mountPoint{m.GetVolume(), m.GetTarget(), readOnly || m.GetReadOnly()})
			}
		}
		for _, v := range c.GetVolumesFrom() {
			for _, other := range t.GetContainers() {
				if other.GetName() == v.GetContainer() {
					from(other, readOnly || v.GetReadOnly())
				}
			}
		}
	}
	from(c, false)
	return out
}

// healthCommand turns ECS's CMD and CMD-SHELL forms into an argument vector.
func healthCommand(h *wire.HealthCheck) []string {
	cmd := h.GetCommand()
	if len(cmd) == 0 {
		return nil
	}
	switch cmd[0] {
	case "CMD":
		return cmd[1:]
	case "CMD-SHELL":
		return []string{"/bin/sh", "-c", strings.Join(cmd[1:], " ")}
	}
	return cmd
}
