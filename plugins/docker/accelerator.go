package docker

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Daemons before 25 know nothing of CDI, and the API has no words for much of
// it. So what the specifications say of a device is put here into words that
// every daemon knows. Programs to be run at points of a container's life it
// has no words for at all: such devices are left to a daemon that knows CDI,
// or to NVIDIA's runtime, which does the same from a name.
const (
	nvidiaKind    = "nvidia.com/gpu"
	nvidiaRuntime = "nvidia"
	nvidiaVisible = "NVIDIA_VISIBLE_DEVICES"
	nvidiaWants   = "NVIDIA_DRIVER_CAPABILITIES"
)

// handed is what a container gets its devices by besides its spec.
type handed struct {
	runtime  string // the daemon's name of one; "": as configured
	requests []deviceRequest
}

type deviceRequest struct {
	Driver    string
	DeviceIDs []string
}

// resolve replaces CDI devices by what Docker is told of them.
func (r *Runtime) resolve(s sdk.ContainerSpec, d *daemonInfo) (sdk.ContainerSpec, handed, error) {
	var h handed
	if len(s.Hooks) > 0 {
		return s, h, sdk.Errorf(sdk.Unsupported, "", "the device comes with a program to be run at %s (%s), which Docker cannot be told", s.Hooks[0].Point, s.Hooks[0].Path).
			WithHint("use the runtime containerd")
	}
	if len(s.CDIDevices) == 0 {
		return s, h, nil
	}
	specs, err := findCDI(r.cfg.CDISpecDirs, s.CDIDevices)
	if err != nil {
		return s, h, err
	}
	s.Env, s.Devices, s.Mounts, s.AdditionalGIDs = slices.Clone(s.Env), slices.Clone(s.Devices), slices.Clone(s.Mounts), slices.Clone(s.AdditionalGIDs)
	for _, c := range specs {
		switch untold := c.untold(); {
		case untold == "":
			if err := c.apply(&s); err != nil {
				return s, h, err
			}
			// Where it is the daemon's default, NVIDIA's runtime would add
			// every device that the image asks for.
			if c.kind == nvidiaKind && !hasEnv(c.edits.Env, nvidiaVisible) {
				s.Env = append(s.Env, nvidiaVisible+"=void")
			}
		case len(d.CDISpecDirs) > 0:
			h.requests = append(h.requests, deviceRequest{Driver: "cdi", DeviceIDs: c.names()})
		case c.kind == nvidiaKind && d.Runtimes[nvidiaRuntime] != nil:
			h.runtime = nvidiaRuntime
			if !hasEnv(s.Env, nvidiaWants) {
				s.Env = append(s.Env, nvidiaWants+"=all") // as its CDI specifications give
			}
			s.Env = append(s.Env, nvidiaVisible+"="+strings.Join(c.devices, ","))
		default:
			hint := "use the runtime containerd, or Docker 25 or newer with features.cdi in /etc/docker/daemon.json"
			if c.kind == nvidiaKind {
				hint = "run nvidia-ctk runtime configure --runtime=docker and restart Docker, so that docker info lists the runtime nvidia; or use the runtime containerd"
			}
			return s, h, sdk.Errorf(sdk.Unsupported, "", "CDI device %s comes with %s, which this Docker daemon cannot be told", strings.Join(c.names(), ", "), untold).WithHint(hint)
		}
	}
	s.CDIDevices = nil
	return s, h, nil
}

// cdiGroup are devices of one specification, and all that it says of them.
type cdiGroup struct {
	kind    string   // vendor/class
	devices []string // names without the kind
	edits   *cdi.ContainerEdits
}

func (c *cdiGroup) names() []string {
	var all []string
	for _, d := range c.devices {
		all = append(all, c.kind+"="+d)
	}
	return all
}

// findCDI reads the specifications anew: they change with drivers.
func findCDI(dirs, devices []string) ([]*cdiGroup, error) {
	where := strings.Join(dirs, ", ")
	cache, err := cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(dirs...))
	if err != nil {
		return nil, sdk.Errorf(sdk.Unavailable, "", "read the CDI specifications in %s: %w", where, err)
	}
	var missing []string
	var groups []*cdiGroup
	of := map[*cdi.Spec]*cdiGroup{}
	for _, name := range devices {
		d := cache.GetDevice(name)
		if d == nil {
			missing = append(missing, name)
			continue
		}
		spec := d.GetSpec()
		g := of[spec]
		if g == nil {
			g = &cdiGroup{kind: spec.Kind, edits: (*cdi.ContainerEdits)(nil).Append(&cdi.ContainerEdits{ContainerEdits: &spec.ContainerEdits})}
			of[spec] = g
			groups = append(groups, g)
		}
		g.devices = append(g.devices, d.Name)
		g.edits.Append(&cdi.ContainerEdits{ContainerEdits: &d.ContainerEdits})
	}
	if len(missing) == 0 {
		return groups, nil
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
	return nil, sdk.Errorf(sdk.Unavailable, "", "no CDI specification in %s has %s%s", where, strings.Join(missing, ", "), why).
		WithHint("have the driver's tool write one, for NVIDIA: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml")
}

// untold names what Docker's API has no words for; "" when there is nothing.
func (c *cdiGroup) untold() string {
	e := c.edits
	switch {
	case len(e.Hooks) > 0:
		return fmt.Sprintf("a program to be run at %s (%s)", e.Hooks[0].HookName, e.Hooks[0].Path)
	case len(e.NetDevices) > 0:
		return fmt.Sprintf("the network device %s", e.NetDevices[0].HostInterfaceName)
	case e.IntelRdt != nil:
		return "a class of cache and memory bandwidth (intelRdt)"
	}
	return ""
}

// apply adds what the specification says to the container, over what the
// container says itself.
func (c *cdiGroup) apply(s *sdk.ContainerSpec) error {
	name := strings.Join(c.names(), ", ")
	s.Env = append(s.Env, c.edits.Env...)
	for _, n := range c.edits.DeviceNodes {
		x := sdk.HostDevice{HostPath: cmp.Or(n.HostPath, n.Path), ContainerPath: n.Path, Permissions: n.Permissions}
		if n.Permissions == cdi.NoPermissions {
			return sdk.Errorf(sdk.Unsupported, "", "CDI device %s: Docker gives no node without any permission, as %s is to be", name, n.Path)
		}
		var st syscall.Stat_t
		if err := syscall.Stat(x.HostPath, &st); err != nil {
			return sdk.Errorf(sdk.NotFound, "", "CDI device %s: device %s: %w", name, x.HostPath, err).WithHint("is it plugged in, and its driver loaded?")
		}
		major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		if (n.Major != 0 || n.Minor != 0) && (n.Major != major || n.Minor != minor) {
			return sdk.Errorf(sdk.Unavailable, "", "CDI device %s: %s is %d:%d on this device, and %d:%d in the specification", name, x.HostPath, major, minor, n.Major, n.Minor).
				WithHint("have the driver's tool write the specification again")
		}
		// Docker makes nodes as they are on the host: owner and mode that the
		// specification asks for must be had from them, and who may use one
		// there by its group may here.
		mode, needs := os.FileMode(st.Mode).Perm(), os.FileMode(0)
		if n.FileMode != nil {
			needs = n.FileMode.Perm()
		}
		if mode|needs != mode {
			return sdk.Errorf(sdk.Unsupported, "", "CDI device %s: %s is to have mode %04o, and Docker makes it as it is on the host, %04o", name, n.Path, needs, mode).
				WithHint("give it that mode with a rule for udev, or use the runtime containerd")
		}
		uid, gid := st.Uid, st.Gid
		if n.UID != nil {
			uid = *n.UID
		}
		if n.GID != nil {
			gid = *n.GID
		}
		byGroup := mode&0o060 == 0o060 && st.Gid != 0
		if (uid != st.Uid || gid != st.Gid) && mode&0o006 != 0o006 && !byGroup {
			return sdk.Errorf(sdk.Unsupported, "", "CDI device %s: %s is to belong to %d:%d, and Docker makes it as it is on the host, of %d:%d with mode %04o", name, n.Path, uid, gid, st.Uid, st.Gid, mode).
				WithHint("give it that owner with a rule for udev, or use the runtime containerd")
		}
		if mode&0o006 != 0o006 && mode&0o060 != 0 && st.Gid != 0 && !slices.Contains(s.AdditionalGIDs, st.Gid) {
			s.AdditionalGIDs = append(s.AdditionalGIDs, st.Gid)
		}
		s.Devices = slices.DeleteFunc(s.Devices, func(o sdk.HostDevice) bool { return cmp.Or(o.ContainerPath, o.HostPath) == n.Path })
		s.Devices = append(s.Devices, x)
	}
	for _, m := range c.edits.Mounts {
		x := sdk.Mount{Type: cmp.Or(m.Type, "bind"), Source: m.HostPath, Target: m.ContainerPath, Options: m.Options}
		if x.Type == "tmpfs" {
			x.Source = ""
		}
		s.Mounts = slices.DeleteFunc(s.Mounts, func(o sdk.Mount) bool { return o.Target == x.Target })
		s.Mounts = append(s.Mounts, x)
	}
	for _, gid := range c.edits.AdditionalGIDs {
		if gid != 0 && !slices.Contains(s.AdditionalGIDs, gid) {
			s.AdditionalGIDs = append(s.AdditionalGIDs, gid)
		}
	}
	return nil
}

func hasEnv(env []string, name string) bool {
	return slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
}
