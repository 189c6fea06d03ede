package nvidia

import (
	"log/slog"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// cdiKind is what NVIDIA's toolkit calls its devices (HARDWARE 1, 8).
const cdiKind = "nvidia.com/gpu"

// maxSpec is more than toolkits write for machines of eight divided GPUs.
const maxSpec = 4 << 20

// cdiSpec is what of a CDI spec tells which device is which.
type cdiSpec struct {
	Kind    string     `yaml:"kind"`
	Devices []cdiEntry `yaml:"devices"`
	Edits   cdiEdits   `yaml:"containerEdits"`
}

type cdiEntry struct {
	Name  string   `yaml:"name"`
	Edits cdiEdits `yaml:"containerEdits"`
}

type cdiEdits struct {
	Nodes []struct {
		Path     string `yaml:"path"`
		HostPath string `yaml:"hostPath"`
	} `yaml:"deviceNodes"`
	Mounts []struct {
		HostPath string `yaml:"hostPath"`
	} `yaml:"mounts"`
}

// cdiNames finds the fully qualified names of these devices, one for each, in
// the specs of this machine; false when one has none that holds.
func cdiNames(fs sysfs.FS, chosen []gpu) ([]string, bool) {
	var specs []cdiSpec
	for _, dir := range []string{"/var/run/cdi", "/etc/cdi"} { // generated before static
		for _, name := range fs.List(dir) {
			file := path.Join(dir, name)
			if ext := path.Ext(name); ext != ".yaml" && ext != ".json" { // JSON is YAML
				continue
			}
			b, ok := fs.BytesUpTo(file, maxSpec)
			if !ok || !strings.Contains(string(b), cdiKind) {
				continue
			}
			var s cdiSpec
			if err := yaml.Unmarshal(b, &s); err != nil {
				slog.Warn("skipping a CDI spec that cannot be read", "file", file, "err", err)
				continue
			}
			if s.Kind != cdiKind {
				continue
			}
			if missing := missingMount(fs, s.Edits); missing != "" {
				slog.Warn("skipping a CDI spec of another driver: run nvidia-ctk cdi generate again", "file", file, "missing", missing)
				continue
			}
			specs = append(specs, s)
		}
	}
	var names []string
	for _, g := range chosen {
		name := ""
		for _, s := range specs {
			if name = cdiName(s, g); name != "" {
				break
			}
		}
		if name == "" {
			return nil, false
		}
		names = append(names, cdiKind+"="+name)
	}
	return names, len(names) > 0
}

// missingMount is a file the spec mounts that is not there: containers with it
// would not start.
func missingMount(fs sysfs.FS, e cdiEdits) string {
	for _, m := range e.Mounts {
		if m.HostPath != "" && !fs.Exists(m.HostPath) {
			return m.HostPath
		}
	}
	return ""
}

// cdiName finds the device's name in a spec: its UUID, else the entry with its
// node and nobody else's. The number of an entry alone tells nothing: it is
// that of the order at the time the spec was made.
func cdiName(s cdiSpec, g gpu) string {
	if g.tegra {
		return tegraName(s)
	}
	for _, d := range s.Devices {
		if g.uuid != "" && d.Name == g.uuid {
			return d.Name
		}
	}
	for _, d := range s.Devices {
		var own []string
		for _, n := range d.Edits.Nodes {
			host := first(n.HostPath, n.Path)
			if isOwn(host) {
				own = append(own, host)
			}
		}
		slices.Sort(own)
		mine := slices.Sorted(slices.Values(g.own))
		if d.Name != "all" && len(mine) > 0 && slices.Equal(own, mine) {
			return d.Name
		}
	}
	return ""
}

// tegraName: specs made from lists of files name the one GPU 0 (2.4, CTK).
func tegraName(s cdiSpec) string {
	if slices.ContainsFunc(s.Devices, func(d cdiEntry) bool { return d.Name == "0" }) {
		return "0"
	}
	return ""
}

// isOwn tells the nodes of one GPU, or a part of one, from those of all.
func isOwn(node string) bool {
	if strings.HasPrefix(node, "/dev/nvidia-caps/nvidia-cap") {
		return true
	}
	minor, ok := strings.CutPrefix(node, nodePrefix)
	return ok && minor != "" && strings.Trim(minor, "0123456789") == ""
}
