package controlplane

import (
	"strconv"
	"strings"

	"maps"
	"slices"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/query"
)

// RuntimeName is the plugin that runs the task.
func (td *TaskDefinition) RuntimeName() string {
	if td.Belay != nil && td.Belay.Runtime != "" {
		return td.Belay.Runtime
	}
	return RuntimeDefault
}

// Network is the task's network mode. A bare process is on the host's.
func (td *TaskDefinition) Network() string {
	switch {
	case td.NetworkMode != "":
		return td.NetworkMode
	case td.RuntimeName() == RuntimeProcess:
		return "host"
	}
	return "bridge"
}

// stopAfter is how many seconds the task's device may be away before the task
// stops; 0: it never stops for that.
func (td *TaskDefinition) stopAfter() int {
	if td.Belay == nil || td.Belay.Disconnect == nil {
		return 0
	}
	return value(td.Belay.Disconnect.StopAfter)
}

// Architecture is what the task needs, as GOARCH; empty: any.
func (td *TaskDefinition) Architecture() string {
	if p := td.RuntimePlatform; p != nil {
		switch p.CPUArchitecture {
		case "X86_64":
			return "amd64"
		case "ARM64":
			return "arm64"
		}
	}
	return ""
}

// Constraints are the expressions that must hold for an instance the task is
// placed on.
func (td *TaskDefinition) Constraints() (es []query.Expr, err error) {
	for _, p := range td.PlacementConstraints {
		e, err := query.Parse(p.Expression, ConstraintSubjects()...)
		if err != nil {
			return nil, Errorf(InvalidArgument, "placement constraint: %w", err)
		}
		es = append(es, e)
	}
	return es, nil
}

// IsEssential tells whether the container's end is the task's.
func (c *ContainerDefinition) IsEssential() bool { return c.Essential == nil || *c.Essential }

// memoryDemand is what placement counts: the reservation where there is one.
func (c *ContainerDefinition) memoryDemand() int {
	if c.MemoryReservation != nil {
		return *c.MemoryReservation
	}
	return value(c.Memory)
}

// deviceRequests are what the container asks for: ECS's GPUs first, then what
// its belay object says.
func (c *ContainerDefinition) deviceRequests() (out []DeviceRequest) {
	for _, r := range c.ResourceRequirements {
		if r.Type != "GPU" {
			continue
		}
		n, err := strconv.Atoi(r.Value)
		if err != nil {
			n = 1 // a share of one, by ECS's sharing strategy
		}
		out = append(out, DeviceRequest{Kind: "gpu", Count: n})
	}
	if c.Belay != nil {
		for _, r := range c.Belay.Devices {
			r.Count = max(1, r.Count)
			out = append(out, r)
		}
	}
	return out
}

// hostPort is the port of the host that a mapping takes for certain: the one
// it names, or on the host's network the container's own.
func (td *TaskDefinition) hostPort(m PortMapping) (PortKey, bool) {
	port := value(m.HostPort)
	if td.Network() == "host" {
		port = value(m.ContainerPort)
	}
	return PortKey{Protocol: m.protocol(), Port: port}, port != 0
}

func (m PortMapping) protocol() string {
	if m.Protocol == "" {
		return "tcp"
	}
	return m.Protocol
}

// Demand is the room that one task takes, as ECS counts it: the task's own
// size where it has one, else the sum of its containers.
func (td *TaskDefinition) Demand() Demand {
	d := Demand{Runtime: td.RuntimeName(), Network: td.Network(), Arch: td.Architecture()}
	for _, c := range td.ContainerDefinitions {
		d.CPU += value(c.CPU)
		d.MemoryMiB += c.memoryDemand()
		if requests := c.deviceRequests(); len(requests) > 0 {
			d.Devices = append(d.Devices, DeviceDemand{Container: c.Name, Requests: requests})
		}
		for _, m := range c.PortMappings {
			if key, fixed := td.hostPort(m); fixed {
				d.Ports = append(d.Ports, key)
			}
		}
	}
	d.StopsAway = td.stopAfter() > 0
	if td.CPU != 0 {
		d.CPU = int(td.CPU)
	}
	if td.Memory != 0 {
		d.MemoryMiB = int(td.Memory)
	}
	return d
}

// Spec is the definition resolved for a device: defaults applied, nothing left
// to look up. The revision, cluster and group are the caller's to fill in.
func (td *TaskDefinition) Spec() *wire.TaskSpec {
	s := &wire.TaskSpec{
		Family:    td.Family,
		Runtime:   td.RuntimeName(),
		Network:   td.Network(),
		PidMode:   strings.TrimPrefix(td.PIDMode, "task"), // warned about: see check
		IpcMode:   td.IPCMode,
		Cpu:       uint64(td.CPU),
		MemoryMib: uint64(td.Memory),
		Platform:  &wire.Platform{Os: "linux", Architecture: td.Architecture()},

		DisconnectStopAfterS: uint32(td.stopAfter()),
	}
	for _, v := range td.Volumes {
		out := &wire.Volume{Name: v.Name}
		if v.Host != nil {
			out.HostPath = v.Host.SourcePath
		}
		if d := v.DockerVolumeConfiguration; d != nil {
			out.Shared = d.Scope == "shared"
		}
		s.Volumes = append(s.Volumes, out)
	}
	for _, t := range td.Tags {
		if s.Tags == nil {
			s.Tags = map[string]string{}
		}
		s.Tags[t.Key] = t.Value
	}
	for i := range td.ContainerDefinitions {
		s.Containers = append(s.Containers, td.containerSpec(&td.ContainerDefinitions[i]))
	}
	return s
}

func (td *TaskDefinition) containerSpec(c *ContainerDefinition) *wire.Container {
	out := &wire.Container{
		Name:                 c.Name,
		Image:                c.Image,
		Essential:            c.IsEssential(),
		EntryPoint:           c.EntryPoint,
		EntryPointSet:        c.EntryPoint != nil,
		Command:              c.Command,
		CommandSet:           c.Command != nil,
		WorkingDirectory:     c.WorkingDirectory,
		User:                 c.User,
		Hostname:             c.Hostname,
		Cpu:                  uint64(value(c.CPU)),
		MemoryMib:            uint64(value(c.Memory)),
		MemoryReservationMib: uint64(value(c.MemoryReservation)),
		StartTimeoutS:        uint32(value(c.StartTimeout)),
		StopTimeoutS:         uint32(value(c.StopTimeout)),
		Privileged:           isTrue(c.Privileged),
		ReadOnlyRoot:         isTrue(c.ReadonlyRootFilesystem),
		DisableNetworking:    isTrue(c.DisableNetworking),
		DnsServers:           c.DNSServers,
		DnsSearch:            c.DNSSearchDomains,
		SecurityOptions:      c.DockerSecurityOptions,
		Terminal:             isTrue(c.PseudoTerminal),
		Interactive:          isTrue(c.Interactive),
	}
	if td.RuntimeName() == RuntimeProcess {
		out.Image = "" // kept in the document; there is nothing to pull
	}
	for _, e := range c.Environment {
		out.Environment = append(out.Environment, &wire.KeyValue{Name: e.Name, Value: e.Value})
	}
	for _, m := range c.PortMappings {
		if m.ContainerPort == nil {
			continue // a range, which is not published
		}
		host, _ := td.hostPort(m)
		out.Ports = append(out.Ports, &wire.PortMapping{
			Name: m.Name, Protocol: m.protocol(), ContainerPort: uint32(*m.ContainerPort), HostPort: uint32(host.Port),
		})
	}
	for _, r := range c.deviceRequests() {
		out.DeviceRequests = append(out.DeviceRequests, &wire.DeviceRequest{Kind: r.Kind, Count: uint32(r.Count), Where: r.Where})
	}
	for _, m := range c.MountPoints {
		out.Mounts = append(out.Mounts, &wire.Mount{Volume: m.SourceVolume, Target: m.ContainerPath, ReadOnly: isTrue(m.ReadOnly)})
	}
	for _, v := range c.VolumesFrom {
		out.VolumesFrom = append(out.VolumesFrom, &wire.VolumeFrom{Container: v.SourceContainer, ReadOnly: isTrue(v.ReadOnly)})
	}
	for _, d := range c.DependsOn {
		out.DependsOn = append(out.DependsOn, &wire.Dependency{Container: d.ContainerName, Condition: d.Condition})
	}
	for _, h := range c.ExtraHosts {
		out.ExtraHosts = append(out.ExtraHosts, &wire.Host{Name: h.Hostname, Address: h.IPAddress})
	}
	for _, s := range c.SystemControls {
		out.Sysctls = append(out.Sysctls, &wire.KeyValue{Name: s.Namespace, Value: s.Value})
	}
	for _, name := range slices.Sorted(maps.Keys(c.DockerLabels)) {
		out.Labels = append(out.Labels, &wire.KeyValue{Name: name, Value: c.DockerLabels[name]})
	}
	for _, u := range c.Ulimits {
		out.Ulimits = append(out.Ulimits, &wire.Ulimit{Name: u.Name, Soft: int64(value(u.SoftLimit)), Hard: int64(value(u.HardLimit))})
	}
	out.HealthCheck = c.HealthCheck.spec()
	out.RestartPolicy = c.RestartPolicy.spec()
	c.LinuxParameters.into(out)
	return out
}

// or is the value given, or ECS's default.
func or(p *int, otherwise uint32) uint32 {
	if p == nil {
		return otherwise
	}
	return uint32(*p)
}

func (h *HealthCheck) spec() *wire.HealthCheck {
	if h == nil {
		return nil
	}
	return &wire.HealthCheck{
		Command:      h.Command,
		IntervalS:    or(h.Interval, 30),
		TimeoutS:     or(h.Timeout, 5),
		Retries:      or(h.Retries, 3),
		StartPeriodS: or(h.StartPeriod, 0),
	}
}

func (r *RestartPolicy) spec() *wire.RestartPolicy {
	if r == nil {
		return nil
	}
	out := &wire.RestartPolicy{Enabled: isTrue(r.Enabled), AttemptPeriodS: or(r.RestartAttemptPeriod, 300)}
	for _, code := range r.IgnoredExitCodes {
		out.IgnoredExitCodes = append(out.IgnoredExitCodes, int32(code))
	}
	return out
}

func (l *LinuxParameters) into(out *wire.Container) {
	if l == nil {
		return
	}
	if l.Capabilities != nil {
		out.CapabilitiesAdd, out.CapabilitiesDrop = l.Capabilities.Add, l.Capabilities.Drop
	}
	for _, d := range l.Devices {
		out.Devices = append(out.Devices, &wire.Device{HostPath: d.HostPath, ContainerPath: d.ContainerPath, Permissions: d.Permissions})
	}
	for _, t := range l.Tmpfs {
		out.Tmpfs = append(out.Tmpfs, &wire.Tmpfs{Target: t.ContainerPath, SizeMib: uint64(value(t.Size)), Options: t.MountOptions})
	}
	out.Init = isTrue(l.InitProcessEnabled)
	out.ShmMib = uint64(value(l.SharedMemorySize))
	if l.MaxSwap != nil {
		swap := int64(*l.MaxSwap)
		out.MaxSwapMib = &swap
	}
	if l.Swappiness != nil {
		swappiness := uint32(*l.Swappiness)
		out.Swappiness = &swappiness
	}
}
