package bridge

import (
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// ToStart carries one attempt to start.
func ToStart(r sdk.StartRequest) *pluginv2.StartRequest {
	return &pluginv2.StartRequest{
		Attempt: ToAttempt(r.Attempt), Network: r.Network, Spec: toSpec(r.Spec),
		Stdout: r.Stdout, Stderr: r.Stderr,
	}
}

// FromStart reads what ToStart wrote.
func FromStart(p *pluginv2.StartRequest) sdk.StartRequest {
	return sdk.StartRequest{
		Attempt: FromAttempt(p.GetAttempt()), Network: p.GetNetwork(), Spec: fromSpec(p.GetSpec()),
		Stdout: p.GetStdout(), Stderr: p.GetStderr(),
	}
}

func toSpec(s sdk.ContainerSpec) *pluginv2.ContainerSpec {
	p := &pluginv2.ContainerSpec{
		Image: s.Image, Digest: s.Digest,
		Command: s.Command, Env: s.Env, WorkingDir: s.WorkingDir, User: s.User, Hostname: s.Hostname,
		Limits:     toLimits(s.Limits),
		Mounts:     mapSlice(s.Mounts, toMount),
		Ports:      mapSlice(s.Ports, toPort),
		Ulimits:    mapSlice(s.Ulimits, toUlimit),
		Devices:    mapSlice(s.Devices, toDevice),
		CdiDevices: s.CDIDevices, Hooks: mapSlice(s.Hooks, toHook), AdditionalGids: s.AdditionalGIDs,
		DeviceRules:     mapSlice(s.DeviceRules, toDeviceRule),
		CapabilitiesAdd: s.CapabilitiesAdd, CapabilitiesDrop: s.CapabilitiesDrop,
		Privileged: s.Privileged, ReadOnlyRoot: s.ReadOnlyRoot,
		DnsServers: s.DNSServers, DnsSearch: s.DNSSearch,
		ExtraHosts: mapSlice(s.ExtraHosts, func(h sdk.HostEntry) *pluginv2.HostEntry {
			return &pluginv2.HostEntry{Name: h.Name, Address: h.Address}
		}),
		Init: s.Init, Terminal: s.Terminal, StdinOpen: s.StdinOpen, ShmBytes: s.ShmBytes,
		Sysctls: s.Sysctls, Labels: s.Labels, SecurityOptions: s.SecurityOptions,
	}
	// An entry point of no words clears the image's; none leaves it.
	if s.EntryPoint != nil {
		p.EntryPoint = &pluginv2.Words{Words: s.EntryPoint}
	}
	return p
}

func fromSpec(p *pluginv2.ContainerSpec) sdk.ContainerSpec {
	s := sdk.ContainerSpec{
		Image: p.GetImage(), Digest: p.GetDigest(),
		Command: p.GetCommand(), Env: p.GetEnv(),
		WorkingDir: p.GetWorkingDir(), User: p.GetUser(), Hostname: p.GetHostname(),
		Limits:     fromLimits(p.GetLimits()),
		Mounts:     mapSlice(p.GetMounts(), fromMount),
		Ports:      mapSlice(p.GetPorts(), fromPort),
		Ulimits:    mapSlice(p.GetUlimits(), fromUlimit),
		Devices:    mapSlice(p.GetDevices(), fromDevice),
		CDIDevices: p.GetCdiDevices(), Hooks: mapSlice(p.GetHooks(), fromHook), AdditionalGIDs: p.GetAdditionalGids(),
		DeviceRules:     mapSlice(p.GetDeviceRules(), fromDeviceRule),
		CapabilitiesAdd: p.GetCapabilitiesAdd(), CapabilitiesDrop: p.GetCapabilitiesDrop(),
		Privileged: p.GetPrivileged(), ReadOnlyRoot: p.GetReadOnlyRoot(),
		DNSServers: p.GetDnsServers(), DNSSearch: p.GetDnsSearch(),
		ExtraHosts: mapSlice(p.GetExtraHosts(), func(h *pluginv2.HostEntry) sdk.HostEntry {
			return sdk.HostEntry{Name: h.GetName(), Address: h.GetAddress()}
		}),
		Init: p.GetInit(), Terminal: p.GetTerminal(), StdinOpen: p.GetStdinOpen(), ShmBytes: p.GetShmBytes(),
		Sysctls: p.GetSysctls(), Labels: p.GetLabels(), SecurityOptions: p.GetSecurityOptions(),
	}
	if p.GetEntryPoint() != nil {
		if s.EntryPoint = p.GetEntryPoint().GetWords(); s.EntryPoint == nil {
			s.EntryPoint = []string{}
		}
	}
	return s
}

func toPort(m sdk.PortMapping) *pluginpb.PortMapping {
	return &pluginpb.PortMapping{
		Name: m.Name, Protocol: m.Protocol,
		ContainerPort: u32(m.ContainerPort), HostPort: u32(m.HostPort), HostIp: m.HostIP,
	}
}

func fromPort(p *pluginpb.PortMapping) sdk.PortMapping {
	return sdk.PortMapping{
		Name: p.GetName(), Protocol: p.GetProtocol(),
		ContainerPort: integer(p.GetContainerPort()), HostPort: integer(p.GetHostPort()), HostIP: p.GetHostIp(),
	}
}

// ToContainer carries an attempt as its runtime sees it. How long it ran is in
// ToInventory alone: version 1 had no word for it.
func ToContainer(c sdk.Container) *pluginpb.Container {
	p := &pluginpb.Container{
		Attempt: ToAttempt(c.Attempt), RuntimeId: text(c.RuntimeID), State: text(string(c.State)), Pid: u32(c.PID),
		Reason: text(c.Reason), OomKilled: c.OOMKilled, ImageDigest: text(c.ImageDigest),
		Ports: mapSlice(c.Ports, toPort), Ip: text(c.IP),
	}
	if c.ExitCode != nil {
		code := i32(*c.ExitCode)
		p.ExitCode = &code
	}
	return p
}

// FromContainer reads what ToContainer wrote.
func FromContainer(p *pluginpb.Container) sdk.Container {
	c := sdk.Container{
		Attempt: FromAttempt(p.GetAttempt()), RuntimeID: p.GetRuntimeId(), State: sdk.State(p.GetState()), PID: integer(p.GetPid()),
		Reason: p.GetReason(), OOMKilled: p.GetOomKilled(), ImageDigest: p.GetImageDigest(),
		Ports: mapSlice(p.GetPorts(), fromPort), IP: p.GetIp(),
	}
	if p != nil && p.ExitCode != nil {
		code := int(*p.ExitCode)
		c.ExitCode = &code
	}
	return c
}

// ToInventory carries everything a runtime holds.
func ToInventory(i sdk.Inventory) *pluginv2.ListResponse {
	return &pluginv2.ListResponse{
		Containers: mapSlice(i.Containers, ToContainer), Tasks: mapSlice(i.Tasks, text),
		RanForNs: mapSlice(i.Containers, func(c sdk.Container) int64 { return int64(c.RanFor) }),
	}
}

// FromInventory reads what ToInventory wrote.
func FromInventory(p *pluginv2.ListResponse) sdk.Inventory {
	i := sdk.Inventory{Containers: mapSlice(p.GetContainers(), FromContainer), Tasks: p.GetTasks()}
	if ran := p.GetRanForNs(); len(ran) == len(i.Containers) {
		for n := range ran {
			i.Containers[n].RanFor = time.Duration(ran[n])
		}
	}
	return i
}

// ToStats carries a measurement.
func ToStats(s sdk.Stats) *pluginpb.StatsResponse {
	return &pluginpb.StatsResponse{CpuNanos: s.CPUNanos, MemoryBytes: s.MemoryBytes, MemoryLimitBytes: s.MemoryLimitBytes, Pids: s.Pids}
}

// FromStats reads what ToStats wrote.
func FromStats(p *pluginpb.StatsResponse) sdk.Stats {
	return sdk.Stats{CPUNanos: p.GetCpuNanos(), MemoryBytes: p.GetMemoryBytes(), MemoryLimitBytes: p.GetMemoryLimitBytes(), Pids: p.GetPids()}
}

// ToExec carries a command to run in an attempt.
func ToExec(r sdk.ExecRequest) *pluginpb.ExecRequest {
	return &pluginpb.ExecRequest{
		Attempt: ToAttempt(r.Attempt), Command: r.Command, Env: r.Env,
		TimeoutNanos: int64(r.Timeout), MaxOutputBytes: uint64(max(r.MaxOutput, 0)),
	}
}

// FromExec reads what ToExec wrote.
func FromExec(p *pluginpb.ExecRequest) sdk.ExecRequest {
	return sdk.ExecRequest{
		Attempt: FromAttempt(p.GetAttempt()), Command: p.GetCommand(), Env: p.GetEnv(),
		Timeout:   time.Duration(p.GetTimeoutNanos()),
		MaxOutput: integer(uint32(min(p.GetMaxOutputBytes(), 1<<30))),
	}
}

// ToExecResult carries how a command ended.
func ToExecResult(r sdk.ExecResult) *pluginpb.ExecResponse {
	return &pluginpb.ExecResponse{ExitCode: i32(r.ExitCode), Output: r.Output}
}

// FromExecResult reads what ToExecResult wrote.
func FromExecResult(p *pluginpb.ExecResponse) sdk.ExecResult {
	return sdk.ExecResult{ExitCode: int(p.GetExitCode()), Output: p.GetOutput()}
}
