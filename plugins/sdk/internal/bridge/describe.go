package bridge

import (
	"github.com/belay-edge/belay/plugins/sdk"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// Description is what a plugin of version 2 says about itself.
type Description struct {
	Info         sdk.Info
	OptionsKnown bool // Options is the whole of what the configuration may hold
	Options      []sdk.Option
	Abilities    []string
}

// AbilityImages is the one of runtimes that are image stores.
const AbilityImages = "images"

// ToDescription carries a plugin's name, version, kinds and options.
func ToDescription(d Description) *pluginv2.DescribeResponse {
	i := ToInfo(d.Info)
	return &pluginv2.DescribeResponse{
		Name: i.Name, Version: i.Version, Kinds: i.Kinds, OptionsKnown: d.OptionsKnown,
		Abilities: mapSlice(d.Abilities, text),
		Options: mapSlice(d.Options, func(o sdk.Option) *pluginv2.Option {
			return &pluginv2.Option{
				Name: text(o.Name), Type: text(string(o.Type)), Help: text(o.Help), DefaultJson: text(string(o.Default)),
				Required: o.Required, Enum: mapSlice(o.Enum, text), Min: clone(o.Min), Max: clone(o.Max),
			}
		}),
	}
}

// FromDescription reads what ToDescription wrote.
func FromDescription(p *pluginv2.DescribeResponse) Description {
	return Description{
		Info: sdk.Info{
			Name: p.GetName(), Version: p.GetVersion(),
			Kinds: mapSlice(p.GetKinds(), func(k string) sdk.Kind { return sdk.Kind(k) }),
		},
		Abilities:    p.GetAbilities(),
		OptionsKnown: p.GetOptionsKnown(),
		Options: mapSlice(p.GetOptions(), func(o *pluginv2.Option) sdk.Option {
			if o == nil {
				return sdk.Option{}
			}
			opt := sdk.Option{
				Name: o.Name, Type: sdk.OptionType(o.Type), Help: o.Help, Required: o.Required,
				Enum: o.Enum, Min: clone(o.Min), Max: clone(o.Max),
			}
			if o.DefaultJson != "" {
				opt.Default = []byte(o.DefaultJson)
			}
			return opt
		}),
	}
}
