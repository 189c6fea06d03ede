package nvidia

import (
	"log/slog"
	"slices"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// maxMounts bounds what a list of files can ask for.
const maxMounts = 512

// edits names the devices to CDI where its specs know every one of them, and
// gives nodes and libraries otherwise: never a mix, which would mount the
// libraries twice.
func (p *Plugin) edits(chosen []gpu) sdk.Edits {
	if p.cdi {
		if names, ok := cdiNames(p.fs, chosen); ok {
			return sdk.Edits{CDIDevices: names}
		}
	}
	// "void" keeps NVIDIA's own runtime, where it is the default one, from
	// adding every GPU (HARDWARE 8).
	e := sdk.Edits{Env: []string{"NVIDIA_VISIBLE_DEVICES=void"}}
	for _, g := range chosen {
		for _, n := range g.nodes {
			if slices.ContainsFunc(e.Devices, func(d sdk.HostDevice) bool { return d.HostPath == n.Path }) {
				continue
			}
			e.Devices = append(e.Devices, sdk.HostDevice{HostPath: n.Path, Permissions: "rw"})
			if gid, ok := n.Group(); ok && !slices.Contains(e.AdditionalGIDs, gid) {
				e.AdditionalGIDs = append(e.AdditionalGIDs, gid)
			}
		}
	}
	if slices.ContainsFunc(chosen, func(g gpu) bool { return g.tegra }) {
		e.Mounts = tegraFiles(p.fs)
	}
	for _, g := range chosen {
		if g.tegra || g.driver == "" {
			continue
		}
		libraries, err := driverLibraries(p.fs, g.driver, machine)
		if err != nil {
			slog.Warn("the container gets the GPU without the driver's libraries", "gpu", g.ID, "err", err)
		}
		e.Mounts = append(e.Mounts, libraries...)
		break // one driver serves every card
	}
	if len(e.Mounts) > maxMounts {
		e.Mounts = e.Mounts[:maxMounts]
	}
	return e
}

// wanted are the driver's libraries for computing and video, without those for
// displays (HARDWARE 8: own ldconfig, fallback B).
var wanted = []string{
	"libcuda", "libcudadebugger", "libnvidia-ml", "libnvidia-ptxjitcompiler", "libnvidia-nvvm", "libnvidia-opencl", "libnvidia-compiler",
	"libnvidia-fatbinaryloader", "libnvidia-gpucomp", "libnvidia-allocator", "libnvidia-cfg", "libnvidia-pkcs11", "libnvidia-pkcs11-openssl3",
	"libnvidia-encode", "libnvidia-opticalflow", "libnvcuvid",
}

func isWanted(soname string) bool {
	name, _, _ := strings.Cut(soname, ".so")
	return slices.Contains(wanted, name)
}
