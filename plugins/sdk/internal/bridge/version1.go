package bridge

import (
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
)

// ToStartV1 carries one attempt to start to a plugin of version 1. What that
// version has no words for is an error of kind Unsupported: left out, it would
// start a container without its devices.
func ToStartV1(r sdk.StartRequest) (*pluginpb.StartRequest, error) {
	for what, n := range map[string]int{
		"CDI devices": len(r.Spec.CDIDevices), "hooks": len(r.Spec.Hooks), "additional groups": len(r.Spec.AdditionalGIDs),
		"device rules": len(r.Spec.DeviceRules),
	} {
		if n > 0 {
			return nil, sdk.Errorf(sdk.Unsupported, "start "+r.Attempt.String(), "the runtime's plugin speaks plugin protocol 1, which has no %s", what).
				WithHint("install a newer version of the plugin")
		}
	}
	return &pluginpb.StartRequest{
		Attempt: ToAttempt(r.Attempt), Network: r.Network, Spec: toSpecV1(r.Spec),
		Stdout: r.Stdout, Stderr: r.Stderr,
	}, nil
}

// FromStartV1 reads what ToStartV1 wrote.
func FromStartV1(p *pluginpb.StartRequest) sdk.StartRequest {
	return sdk.StartRequest{
		Attempt: FromAttempt(p.GetAttempt()), Network: p.GetNetwork(), Spec: fromSpecV1(p.GetSpec()),
		Stdout: p.GetStdout(), Stderr: p.GetStderr(),
	}
}

func toSpecV1(s sdk.ContainerSpec) *pluginpb.ContainerSpec {
	return &pluginpb.ContainerSpec{
		Image: s.Image, Digest: s.Digest,
		// An entry point of no words clears the image's; none leaves it.
		EntryPoint: s.EntryPoint, EntryPointSet: s.EntryPoint != nil,
		Command: s.Command, Env: s.Env, WorkingDir: s.WorkingDir, User: s.User, Hostname: s.Hostname,
		Limits:          toLimits(s.Limits),
		Mounts:          mapSlice(s.Mounts, toMount),
		Ports:           mapSlice(s.Ports, toPort),
		Ulimits:         mapSlice(s.Ulimits, toUlimit),
		Devices:         mapSlice(s.Devices, toDevice),
		CapabilitiesAdd: s.CapabilitiesAdd, CapabilitiesDrop: s.CapabilitiesDrop,
		Privileged: s.Privileged, ReadOnlyRoot: s.ReadOnlyRoot,
		DnsServers: s.DNSServers, DnsSearch: s.DNSSearch,
		ExtraHosts: mapSlice(s.ExtraHosts, func(h sdk.HostEntry) string { return h.Address + " " + h.Name }),
		Init:       s.Init, Terminal: s.Terminal, StdinOpen: s.StdinOpen, ShmBytes: s.ShmBytes,
		Sysctls: s.Sysctls, Labels: s.Labels, SecurityOptions: s.SecurityOptions,
	}
}

func fromSpecV1(p *pluginpb.ContainerSpec) sdk.ContainerSpec {
	s := sdk.ContainerSpec{
		Image: p.GetImage(), Digest: p.GetDigest(),
		EntryPoint: p.GetEntryPoint(), Command: p.GetCommand(), Env: p.GetEnv(),
		WorkingDir: p.GetWorkingDir(), User: p.GetUser(), Hostname: p.GetHostname(),
		Limits:          fromLimits(p.GetLimits()),
		Mounts:          mapSlice(p.GetMounts(), fromMount),
		Ports:           mapSlice(p.GetPorts(), fromPort),
		Ulimits:         mapSlice(p.GetUlimits(), fromUlimit),
		Devices:         mapSlice(p.GetDevices(), fromDevice),
		CapabilitiesAdd: p.GetCapabilitiesAdd(), CapabilitiesDrop: p.GetCapabilitiesDrop(),
		Privileged: p.GetPrivileged(), ReadOnlyRoot: p.GetReadOnlyRoot(),
		DNSServers: p.GetDnsServers(), DNSSearch: p.GetDnsSearch(),
		ExtraHosts: mapSlice(p.GetExtraHosts(), func(line string) sdk.HostEntry {
			address, name, _ := strings.Cut(line, " ")
			return sdk.HostEntry{Name: name, Address: address}
		}),
		Init: p.GetInit(), Terminal: p.GetTerminal(), StdinOpen: p.GetStdinOpen(), ShmBytes: p.GetShmBytes(),
		Sysctls: p.GetSysctls(), Labels: p.GetLabels(), SecurityOptions: p.GetSecurityOptions(),
	}
	if p.GetEntryPointSet() && s.EntryPoint == nil {
		s.EntryPoint = []string{}
	}
	return s
}

// ToInventoryV1 is ToInventory as version 1 says it.
func ToInventoryV1(i sdk.Inventory) *pluginpb.ListResponse {
	return &pluginpb.ListResponse{Containers: mapSlice(i.Containers, ToContainer), Tasks: mapSlice(i.Tasks, text)}
}

// FromInventoryV1 reads what ToInventoryV1 wrote.
func FromInventoryV1(p *pluginpb.ListResponse) sdk.Inventory {
	return sdk.Inventory{Containers: mapSlice(p.GetContainers(), FromContainer), Tasks: p.GetTasks()}
}
