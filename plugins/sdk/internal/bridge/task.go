package bridge

import (
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
)

// ToRuntimeInfo carries what a runtime can do.
func ToRuntimeInfo(i sdk.RuntimeInfo) *pluginpb.InfoResponse {
	return &pluginpb.InfoResponse{
		Version: text(i.Version), Images: i.Images, Exec: i.Exec, Stats: i.Stats,
		Networks:   mapSlice(i.Networks, text),
		Attributes: textMap(i.Attributes),
	}
}

// FromRuntimeInfo reads what ToRuntimeInfo wrote.
func FromRuntimeInfo(p *pluginpb.InfoResponse) sdk.RuntimeInfo {
	return sdk.RuntimeInfo{
		Version: p.GetVersion(), Images: p.GetImages(), Exec: p.GetExec(), Stats: p.GetStats(),
		Networks: p.GetNetworks(), Attributes: p.GetAttributes(),
	}
}

// ToAttempt carries an attempt's identity.
func ToAttempt(a sdk.Attempt) *pluginpb.Attempt {
	return &pluginpb.Attempt{Task: a.Task, Container: a.Container, Number: u32(a.Number)}
}

// FromAttempt reads what ToAttempt wrote.
func FromAttempt(p *pluginpb.Attempt) sdk.Attempt {
	return sdk.Attempt{Task: p.GetTask(), Container: p.GetContainer(), Number: integer(p.GetNumber())}
}

// ToTaskSpec carries what a task's containers share.
func ToTaskSpec(t sdk.TaskSpec) *pluginpb.TaskSpec {
	return &pluginpb.TaskSpec{
		Id: t.ID, Family: t.Family, Network: t.Network, PidMode: t.PIDMode, IpcMode: t.IPCMode,
		Limits: toLimits(t.Limits), Containers: t.Containers,
	}
}

// FromTaskSpec reads what ToTaskSpec wrote.
func FromTaskSpec(p *pluginpb.TaskSpec) sdk.TaskSpec {
	return sdk.TaskSpec{
		ID: p.GetId(), Family: p.GetFamily(), Network: p.GetNetwork(), PIDMode: p.GetPidMode(), IPCMode: p.GetIpcMode(),
		Limits: fromLimits(p.GetLimits()), Containers: p.GetContainers(),
	}
}

func toLimits(l sdk.Limits) *pluginpb.Limits {
	return &pluginpb.Limits{
		CpuShares: l.CPUShares, CpuQuotaMicros: l.CPUQuota,
		MemoryBytes: l.MemoryBytes, MemoryReservationBytes: l.MemoryReservation,
		MemorySwapBytes: clone(l.MemorySwap), Swappiness: clone(l.Swappiness), Pids: l.Pids,
	}
}

func fromLimits(p *pluginpb.Limits) sdk.Limits {
	if p == nil {
		return sdk.Limits{}
	}
	return sdk.Limits{
		CPUShares: p.CpuShares, CPUQuota: p.CpuQuotaMicros,
		MemoryBytes: p.MemoryBytes, MemoryReservation: p.MemoryReservationBytes,
		MemorySwap: clone(p.MemorySwapBytes), Swappiness: clone(p.Swappiness), Pids: p.Pids,
	}
}

// clone keeps presence without sharing memory.
func clone[T any](p *T) *T {
	if p == nil {
		return nil
	}
	v := *p
	return &v
}

// ToPull carries an image to fetch.
func ToPull(r sdk.PullRequest) *pluginpb.PullRequest {
	p := &pluginpb.PullRequest{Task: r.Task, Image: r.Image}
	if c := r.Credentials; c != nil {
		p.Credentials = &pluginpb.Credentials{Username: c.Username, Password: c.Password}
	}
	if r.Platform != (sdk.Platform{}) {
		p.Platform = &pluginpb.Platform{Os: r.Platform.OS, Architecture: r.Platform.Architecture, Variant: r.Platform.Variant}
	}
	return p
}

// FromPull reads what ToPull wrote.
func FromPull(p *pluginpb.PullRequest) sdk.PullRequest {
	r := sdk.PullRequest{Task: p.GetTask(), Image: p.GetImage()}
	if c := p.GetCredentials(); c != nil {
		r.Credentials = &sdk.Credentials{Username: c.GetUsername(), Password: c.GetPassword()}
	}
	if m := p.GetPlatform(); m != nil {
		r.Platform = sdk.Platform{OS: m.GetOs(), Architecture: m.GetArchitecture(), Variant: m.GetVariant()}
	}
	return r
}

// ToProgress carries a pull's progress.
func ToProgress(g sdk.PullProgress) *pluginpb.PullProgress {
	return &pluginpb.PullProgress{Layers: g.Layers, LayersDone: g.LayersDone, Bytes: g.Bytes, BytesDone: g.BytesDone}
}

// FromProgress reads what ToProgress wrote.
func FromProgress(p *pluginpb.PullProgress) sdk.PullProgress {
	return sdk.PullProgress{Layers: p.GetLayers(), LayersDone: p.GetLayersDone(), Bytes: p.GetBytes(), BytesDone: p.GetBytesDone()}
}

// ToImage carries a pulled image.
func ToImage(i sdk.Image) *pluginpb.Image {
	return &pluginpb.Image{Reference: text(i.Reference), Digest: text(i.Digest), Bytes: i.Bytes}
}

// FromImage reads what ToImage wrote.
func FromImage(p *pluginpb.Image) sdk.Image {
	return sdk.Image{Reference: p.GetReference(), Digest: p.GetDigest(), Bytes: p.GetBytes()}
}
