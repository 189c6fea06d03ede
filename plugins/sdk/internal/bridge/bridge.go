// Package bridge translates between the contract's Go types and the protobuf
// messages that carry them. Both sides of the process boundary use it, so
// what one writes the other reads back the same.
//
// Numbers out of a message's range are clamped and text that is not UTF-8,
// which protobuf refuses to carry, is repaired where it comes from outside
// (reasons, versions, errors): one odd byte must not make a List fail.
package bridge

import (
	"math"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
)

// u32 clamps: no count, port or pid of ours is negative or that large.
func u32(n int) uint32 {
	switch {
	case n < 0:
		return 0
	case uint64(n) > math.MaxUint32:
		return math.MaxUint32
	}
	return uint32(n)
}

// integer clamps where int has 32 bits.
func integer(n uint32) int {
	if uint64(n) > math.MaxInt {
		return math.MaxInt
	}
	return int(n)
}

func i32(n int) int32 {
	return int32(min(max(n, math.MinInt32), math.MaxInt32))
}

func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func textMap(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[text(k)] = text(v)
	}
	return out
}

func mapSlice[A, B any](in []A, f func(A) B) []B {
	if len(in) == 0 {
		return nil
	}
	out := make([]B, len(in))
	for i := range in {
		out[i] = f(in[i])
	}
	return out
}

// ToInfo carries a plugin's name, version and kinds.
func ToInfo(i sdk.Info) *pluginpb.DescribeResponse {
	return &pluginpb.DescribeResponse{
		Name:    text(i.Name),
		Version: text(i.Version),
		Kinds:   mapSlice(i.Kinds, func(k sdk.Kind) string { return text(string(k)) }),
	}
}

// FromInfo reads what ToInfo wrote.
func FromInfo(p *pluginpb.DescribeResponse) sdk.Info {
	return sdk.Info{
		Name:    p.GetName(),
		Version: p.GetVersion(),
		Kinds:   mapSlice(p.GetKinds(), func(k string) sdk.Kind { return sdk.Kind(k) }),
	}
}

// ToConfig carries a plugin's configuration.
func ToConfig(c sdk.Config) *pluginpb.ConfigureRequest {
	return &pluginpb.ConfigureRequest{StateDir: c.StateDir, RunDir: c.RunDir, ConfigJson: c.JSON}
}

// FromConfig reads what ToConfig wrote.
func FromConfig(p *pluginpb.ConfigureRequest) sdk.Config {
	c := sdk.Config{StateDir: p.GetStateDir(), RunDir: p.GetRunDir()}
	if len(p.GetConfigJson()) > 0 {
		c.JSON = p.GetConfigJson()
	}
	return c
}
