package containerd

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/belay-edge/belay/plugins/sdk"
)

// granted is what comes with devices besides nodes and mounts: groups, hooks,
// and CDI devices. These are injected here and not by containerd, which learnt
// it in 1.7, and last of all: what they add must not be reset.
func (p *plan) granted() []oci.SpecOpts {
	s := p.q.Spec
	var opts []oci.SpecOpts
	if len(s.AdditionalGIDs) > 0 {
		opts = append(opts, edit(func(spec *oci.Spec) {
			for _, gid := range s.AdditionalGIDs {
				if !slices.Contains(spec.Process.User.AdditionalGids, gid) {
					spec.Process.User.AdditionalGids = append(spec.Process.User.AdditionalGids, gid)
				}
			}
		}))
	}
	if len(s.Hooks) > 0 {
		opts = append(opts, func(_ context.Context, _ oci.Client, _ *containers.Container, spec *oci.Spec) error {
			return addHooks(spec, s.Hooks)
		})
	}
	if len(s.CDIDevices) > 0 {
		opts = append(opts, func(_ context.Context, _ oci.Client, _ *containers.Container, spec *oci.Spec) error {
			return injectCDI(spec, p.cdiDirs, s.CDIDevices)
		})
	}
	return opts
}

// addHooks adds programs to be run at points of the container's life.
func addHooks(spec *oci.Spec, hooks []sdk.Hook) error {
	if spec.Hooks == nil {
		spec.Hooks = &specs.Hooks{}
	}
	points := map[string]*[]specs.Hook{
		"createRuntime": &spec.Hooks.CreateRuntime, "createContainer": &spec.Hooks.CreateContainer,
		"startContainer": &spec.Hooks.StartContainer, "poststart": &spec.Hooks.Poststart, "poststop": &spec.Hooks.Poststop,
	}
	for _, h := range hooks {
		at, ok := points[h.Point]
		if !ok {
			return sdk.Errorf(sdk.Unsupported, "", "hook %s: there is no point %q in a container's life", h.Path, h.Point)
		}
		out := specs.Hook{Path: h.Path, Args: h.Args, Env: h.Env}
		if h.Timeout > 0 {
			// Whole seconds, and never none: that would be for ever.
			seconds := int((h.Timeout + time.Second - 1) / time.Second)
			out.Timeout = &seconds
		}
		*at = append(*at, out)
	}
	return nil
}

// injectCDI adds to the spec what the CDI specifications in dirs say of the
// devices. They are read anew each time: they change with drivers.
func injectCDI(spec *oci.Spec, dirs, devices []string) error {
	cache, err := cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(dirs...))
	if err != nil {
		return sdk.Errorf(sdk.Unavailable, "", "read the CDI specifications in %s: %w", strings.Join(dirs, ", "), err)
	}
	missing, err := cache.InjectDevices(spec, devices...)
	if err == nil {
		return nil
	}
	if len(missing) == 0 {
		return sdk.Errorf(sdk.Unavailable, "", "inject CDI devices %s from %s: %w", strings.Join(devices, ", "), strings.Join(dirs, ", "), err)
	}
	// A specification that cannot be read is why a device is missing more
	// often than not.
	var bad []string
	for file, errs := range cache.GetErrors() {
		for _, e := range errs {
			bad = append(bad, fmt.Sprintf("%s: %v", file, e))
		}
	}
	slices.Sort(bad)
	why := ""
	if len(bad) > 0 {
		why = " (" + clip(strings.Join(bad, "; ")) + ")"
	}
	return sdk.Errorf(sdk.Unavailable, "", "no CDI specification in %s has %s%s", strings.Join(dirs, ", "), strings.Join(missing, ", "), why).
		WithHint("have the driver's tool write one, for NVIDIA: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml")
}
