package bridge

import (
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// ToInventoryOfDevices carries what a device plugin found.
func ToInventoryOfDevices(devices []sdk.Device) *pluginv2.DeviceInventory {
	return &pluginv2.DeviceInventory{Devices: mapSlice(devices, func(d sdk.Device) *pluginv2.DeviceInfo {
		return &pluginv2.DeviceInfo{
			Id: text(d.ID), Kind: text(d.Kind), Ready: d.Ready, Health: text(string(d.Health)), Reason: text(d.Reason),
			Shares: u32(d.Shares), Attributes: textMap(d.Attributes),
		}
	})}
}

// FromInventoryOfDevices reads what ToInventoryOfDevices wrote.
func FromInventoryOfDevices(p *pluginv2.DeviceInventory) []sdk.Device {
	return mapSlice(p.GetDevices(), func(d *pluginv2.DeviceInfo) sdk.Device {
		return sdk.Device{
			ID: d.GetId(), Kind: d.GetKind(), Ready: d.GetReady(), Health: sdk.Health(d.GetHealth()), Reason: d.GetReason(),
			Shares: integer(d.GetShares()), Attributes: d.GetAttributes(),
		}
	})
}

// ToEdits carries what a container is given with its devices.
func ToEdits(e sdk.Edits) *pluginv2.EditsResponse {
	return &pluginv2.EditsResponse{
		Devices: mapSlice(e.Devices, toDevice), Mounts: mapSlice(e.Mounts, toMount), Env: e.Env,
		CdiDevices: e.CDIDevices, Hooks: mapSlice(e.Hooks, toHook), AdditionalGids: e.AdditionalGIDs,
		DeviceRules: mapSlice(e.DeviceRules, toDeviceRule),
	}
}

// FromEdits reads what ToEdits wrote.
func FromEdits(p *pluginv2.EditsResponse) sdk.Edits {
	return sdk.Edits{
		Devices: mapSlice(p.GetDevices(), fromDevice), Mounts: mapSlice(p.GetMounts(), fromMount), Env: p.GetEnv(),
		CDIDevices: p.GetCdiDevices(), Hooks: mapSlice(p.GetHooks(), fromHook), AdditionalGIDs: p.GetAdditionalGids(),
		DeviceRules: mapSlice(p.GetDeviceRules(), fromDeviceRule),
	}
}

// ToDeviceStats carries measurements.
func ToDeviceStats(stats []sdk.DeviceStats) *pluginv2.DeviceStatsResponse {
	return &pluginv2.DeviceStatsResponse{Stats: mapSlice(stats, func(s sdk.DeviceStats) *pluginv2.DeviceStats {
		return &pluginv2.DeviceStats{
			Id: text(s.ID), UtilizationPercent: clone(s.UtilizationPercent),
			MemoryUsedBytes: clone(s.MemoryUsedBytes), MemoryTotalBytes: clone(s.MemoryTotalBytes),
			TemperatureCelsius: clone(s.TemperatureCelsius), PowerWatts: clone(s.PowerWatts),
		}
	})}
}

// FromDeviceStats reads what ToDeviceStats wrote.
func FromDeviceStats(p *pluginv2.DeviceStatsResponse) []sdk.DeviceStats {
	return mapSlice(p.GetStats(), func(s *pluginv2.DeviceStats) sdk.DeviceStats {
		if s == nil {
			return sdk.DeviceStats{}
		}
		return sdk.DeviceStats{
			ID: s.Id, UtilizationPercent: clone(s.UtilizationPercent),
			MemoryUsedBytes: clone(s.MemoryUsedBytes), MemoryTotalBytes: clone(s.MemoryTotalBytes),
			TemperatureCelsius: clone(s.TemperatureCelsius), PowerWatts: clone(s.PowerWatts),
		}
	})
}

func toDeviceRule(r sdk.DeviceRule) *pluginv2.DeviceRule {
	return &pluginv2.DeviceRule{Type: r.Type, Major: r.Major, Permissions: r.Permissions}
}

func fromDeviceRule(p *pluginv2.DeviceRule) sdk.DeviceRule {
	return sdk.DeviceRule{Type: p.GetType(), Major: p.GetMajor(), Permissions: p.GetPermissions()}
}

func toHook(h sdk.Hook) *pluginv2.Hook {
	return &pluginv2.Hook{Point: h.Point, Path: h.Path, Args: h.Args, Env: h.Env, TimeoutNanos: int64(h.Timeout)}
}

func fromHook(p *pluginv2.Hook) sdk.Hook {
	return sdk.Hook{Point: p.GetPoint(), Path: p.GetPath(), Args: p.GetArgs(), Env: p.GetEnv(), Timeout: time.Duration(p.GetTimeoutNanos())}
}

func toMount(m sdk.Mount) *pluginpb.Mount {
	return &pluginpb.Mount{Type: m.Type, Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly, Options: m.Options}
}

func fromMount(m *pluginpb.Mount) sdk.Mount {
	return sdk.Mount{Type: m.GetType(), Source: m.GetSource(), Target: m.GetTarget(), ReadOnly: m.GetReadOnly(), Options: m.GetOptions()}
}

func toDevice(d sdk.HostDevice) *pluginpb.HostDevice {
	return &pluginpb.HostDevice{HostPath: d.HostPath, ContainerPath: d.ContainerPath, Permissions: d.Permissions}
}

func fromDevice(d *pluginpb.HostDevice) sdk.HostDevice {
	return sdk.HostDevice{HostPath: d.GetHostPath(), ContainerPath: d.GetContainerPath(), Permissions: d.GetPermissions()}
}

func toUlimit(u sdk.Ulimit) *pluginpb.Ulimit {
	return &pluginpb.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard}
}

func fromUlimit(u *pluginpb.Ulimit) sdk.Ulimit {
	return sdk.Ulimit{Name: u.GetName(), Soft: u.GetSoft(), Hard: u.GetHard()}
}
