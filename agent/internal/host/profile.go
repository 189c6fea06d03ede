package host

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"

	"github.com/belay-edge/belay/plugins/sdk"
	sdkhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// Profiles of confinement.
const (
	ProfileAuto   = "auto"   // device for plugins that are only that, otherwise none
	ProfileDevice = "device" // what Stage does
	ProfileNone   = "none"
)

// confine chooses the profile for a launch. What an executable is shows when
// it is asked; until then it has no right that a detector has not. The answer
// is remembered by checksum, where plugins cannot write.
func (p *plugin) confine(ctx context.Context, o *sdkhost.Options, s Settings, sum string) error {
	if p.host.config.Stage == nil || s.Profile == ProfileNone {
		return nil
	}
	confined := *o
	c, err := json.Marshal(confinement{Writable: []string{o.Config.StateDir, o.Config.RunDir}})
	if err != nil {
		return err
	}
	confined.Wrap = append(slices.Clone(p.host.config.Stage), string(c))
	if s.Profile != ProfileDevice {
		kinds, known := p.recall(sum)
		if !known {
			d, err := sdkhost.Describe(ctx, confined)
			if err != nil {
				return err
			}
			kinds = d.Info.Kinds
			p.remember(sum, kinds)
		}
		if len(kinds) == 0 || slices.ContainsFunc(kinds, func(k sdk.Kind) bool { return k != sdk.KindDevice }) {
			return nil // root-equivalent, as it must be
		}
	}
	*o = confined
	return nil
}

type described struct {
	SHA256 string     `json:"sha256"`
	Kinds  []sdk.Kind `json:"kinds"`
}

func (p *plugin) memo() string {
	return filepath.Join(p.host.config.StateDir, ".described", p.name)
}

func (p *plugin) recall(sum string) ([]sdk.Kind, bool) {
	var d described
	b, err := os.ReadFile(p.memo())
	if err != nil || sum == "" || json.Unmarshal(b, &d) != nil || d.SHA256 != sum || len(d.Kinds) == 0 {
		return nil, false
	}
	return d.Kinds, true
}

// remember need not succeed, nor outlive a crash: the executable is asked again.
func (p *plugin) remember(sum string, kinds []sdk.Kind) {
	b, err := json.Marshal(described{sum, kinds})
	if err != nil {
		return
	}
	temp := p.memo() + "~"
	if os.MkdirAll(filepath.Dir(temp), 0o700) == nil && os.WriteFile(temp, b, 0o600) == nil {
		_ = os.Rename(temp, p.memo())
	}
}
