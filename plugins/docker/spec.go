package docker

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// createRequest is the body of POST /containers/create.
type createRequest struct {
	Image        string
	Entrypoint   []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	Env          []string            `json:",omitempty"`
	WorkingDir   string              `json:",omitempty"`
	User         string              `json:",omitempty"`
	Hostname     string              `json:",omitempty"`
	Tty          bool                `json:",omitempty"`
	OpenStdin    bool                `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
	Labels       map[string]string
	Healthcheck  map[string][]string
	HostConfig   hostConfig
}

type hostConfig struct {
	NetworkMode       string
	PidMode           string                   `json:",omitempty"`
	IpcMode           string                   `json:",omitempty"`
	PortBindings      map[string][]portBinding `json:",omitempty"`
	Mounts            []mount                  `json:",omitempty"`
	Tmpfs             map[string]string        `json:",omitempty"`
	Devices           []device                 `json:",omitempty"`
	DeviceCgroupRules []string                 `json:",omitempty"`
	GroupAdd          []string                 `json:",omitempty"`
	Ulimits           []ulimit                 `json:",omitempty"`
	CapAdd            []string                 `json:",omitempty"`
	CapDrop           []string                 `json:",omitempty"`
	SecurityOpt       []string                 `json:",omitempty"`
	DNS               []string                 `json:"Dns,omitempty"`
	DNSSearch         []string                 `json:"DnsSearch,omitempty"`
	ExtraHosts        []string                 `json:",omitempty"`
	Sysctls           map[string]string        `json:",omitempty"`
	Privileged        bool                     `json:",omitempty"`
	ReadonlyRootfs    bool                     `json:",omitempty"`
	Init              bool
	ShmSize           uint64          `json:",omitempty"`
	CgroupParent      string          `json:",omitempty"`
	Runtime           string          `json:",omitempty"`
	DeviceRequests    []deviceRequest `json:",omitempty"`
	CPUShares         uint64          `json:"CpuShares,omitempty"`
	CPUQuota          uint64          `json:"CpuQuota,omitempty"`
	CPUPeriod         uint64          `json:"CpuPeriod,omitempty"`
	Memory            uint64          `json:",omitempty"`
	MemoryReservation uint64          `json:",omitempty"`
	MemorySwap        int64           `json:",omitempty"`
	MemorySwappiness  *int64          `json:",omitempty"`
	PidsLimit         int64           `json:",omitempty"`
	RestartPolicy     map[string]string
	LogConfig         logConfig
}

type portBinding struct{ HostIP, HostPort string }

type mount struct {
	Type, Source, Target string
	ReadOnly             bool
	BindOptions          bindOptions
}

type bindOptions struct {
	Propagation  string `json:",omitempty"`
	NonRecursive bool   `json:",omitempty"`
}

type device struct{ PathOnHost, PathInContainer, CgroupPermissions string }

type ulimit struct {
	Name       string
	Soft, Hard int64
}

type logConfig struct {
	Type   string
	Config map[string]string
}

// logging is how the daemon keeps output until it is copied: its driver
// "local" keeps every byte, where "json-file" replaces what is not UTF-8
// (measured on 20.10). It must not be rotated, as how much has been copied is
// counted from the beginning.
var logging = logConfig{Type: "local", Config: map[string]string{"max-size": "1000000g", "max-file": "1", "compress": "false"}}

// request turns an attempt into the daemon's words. Everything that can be
// checked before anything is made has been.
func (r *Runtime) request(q sdk.StartRequest, t sdk.TaskSpec, d *daemonInfo, by handed, network string, stdout, stderr target) *createRequest {
	s := q.Spec
	c := &createRequest{
		Image: pinned(s.Image, s.Digest), Entrypoint: s.EntryPoint, Cmd: s.Command, Env: s.Env,
		WorkingDir: s.WorkingDir, User: s.User, Hostname: s.Hostname, Tty: s.Terminal, OpenStdin: s.StdinOpen,
		Labels:      r.labels(q, stdout, stderr),
		Healthcheck: map[string][]string{"Test": {"NONE"}}, // health is the agent's to ask for
		HostConfig: hostConfig{
			NetworkMode: network, PidMode: t.PIDMode, IpcMode: t.IPCMode,
			CapAdd: s.CapabilitiesAdd, CapDrop: s.CapabilitiesDrop, Privileged: s.Privileged, ReadonlyRootfs: s.ReadOnlyRoot,
			DNS: s.DNSServers, DNSSearch: s.DNSSearch, Sysctls: s.Sysctls, Init: s.Init, ShmSize: s.ShmBytes,
			Runtime: cmp.Or(by.runtime, r.cfg.Runtime), DeviceRequests: by.requests, CgroupParent: r.parentOf(d, t),
			RestartPolicy: map[string]string{"Name": "no"}, LogConfig: logging,
		},
	}
	h := &c.HostConfig
	if network == sdk.NetworkBridge {
		h.NetworkMode = r.cfg.Network
	}
	if c.Hostname == "" && network != sdk.NetworkHost {
		c.Hostname = q.Attempt.Task[:12]
	}
	setLimits(h, s.Limits)
	for _, m := range s.Mounts {
		if m.Type == "tmpfs" {
			options := m.Options
			if m.ReadOnly {
				options = append(slices.Clone(options), "ro")
			}
			if h.Tmpfs == nil {
				h.Tmpfs = map[string]string{}
			}
			h.Tmpfs[m.Target] = strings.Join(options, ",")
			continue
		}
		ro, options, _ := bindMount(m) // checked
		h.Mounts = append(h.Mounts, mount{Type: "bind", Source: m.Source, Target: m.Target, ReadOnly: ro, BindOptions: options})
	}
	for _, p := range s.Ports {
		if c.ExposedPorts == nil {
			c.ExposedPorts, h.PortBindings = map[string]struct{}{}, map[string][]portBinding{}
		}
		key := fmt.Sprintf("%d/%s", p.ContainerPort, p.Protocol)
		c.ExposedPorts[key] = struct{}{}
		h.PortBindings[key] = append(h.PortBindings[key], portBinding{HostIP: p.HostIP, HostPort: formatInt(int64(p.HostPort))})
	}
	for _, v := range s.Devices {
		x := device{v.HostPath, v.ContainerPath, v.Permissions}
		if x.PathInContainer == "" {
			x.PathInContainer = v.HostPath
		}
		if x.CgroupPermissions == "" {
			x.CgroupPermissions = "rwm"
		}
		h.Devices = append(h.Devices, x)
	}
	for _, r := range s.DeviceRules {
		h.DeviceCgroupRules = append(h.DeviceCgroupRules, fmt.Sprintf("%s %d:* %s", r.Type, r.Major, cmp.Or(r.Permissions, "rwm")))
	}
	for _, gid := range s.AdditionalGIDs {
		h.GroupAdd = append(h.GroupAdd, strconv.FormatUint(uint64(gid), 10))
	}
	for _, u := range s.Ulimits {
		h.Ulimits = append(h.Ulimits, ulimit{u.Name, orUnlimited(u.Soft), orUnlimited(u.Hard)})
	}
	for _, e := range s.ExtraHosts {
		h.ExtraHosts = append(h.ExtraHosts, e.Name+":"+e.Address)
	}
	for _, o := range s.SecurityOptions {
		h.SecurityOpt = append(h.SecurityOpt, securityOption(o))
	}
	return c
}

func setLimits(h *hostConfig, l sdk.Limits) {
	h.CPUShares, h.Memory, h.MemoryReservation, h.PidsLimit = l.CPUShares, l.MemoryBytes, l.MemoryReservation, l.Pids
	if h.CPUShares == 1 {
		h.CPUShares = 2 // the kernel's least
	}
	if l.CPUQuota > 0 {
		h.CPUQuota, h.CPUPeriod = l.CPUQuota, 100000
	}
	if l.MemorySwap != nil && l.MemoryBytes > 0 {
		h.MemorySwap = -1
		if *l.MemorySwap >= 0 {
			h.MemorySwap = int64(l.MemoryBytes) + *l.MemorySwap
		}
	}
	if l.Swappiness != nil {
		n := int64(*l.Swappiness)
		h.MemorySwappiness = &n
	}
}

// orUnlimited: Docker says "no limit" as -1.
func orUnlimited(v uint64) int64 {
	if v > math.MaxInt64 {
		return -1
	}
	return int64(v)
}

// securityOption is "no-new-privileges" or KEY=VALUE to the daemon.
func securityOption(o string) string {
	key, value, given := strings.Cut(strings.Replace(o, "=", ":", 1), ":")
	if !given {
		return key
	}
	return key + "=" + value
}

// check refuses what can never work, in better words than come later.
func check(q sdk.StartRequest, t sdk.TaskSpec, d *daemonInfo, network string) error {
	s := q.Spec
	for _, f := range []func() error{
		func() error { return checkPorts(network, s.Ports) },
		func() error { return checkLimits(s.Limits, d) },
		func() error { return checkMounts(s.Mounts) },
		func() error { return checkNames(s) },
		func() error { return checkSecurity(s.SecurityOptions) },
	} {
		if err := f(); err != nil {
			return err
		}
	}
	if s.ShmBytes > 0 && (t.IPCMode == "host" || t.IPCMode == "none") {
		return sdk.Errorf(sdk.Unsupported, "", "sharedMemorySize has no effect with ipcMode %s: the container gets no /dev/shm of its own", t.IPCMode).WithHint("leave one of the two out")
	}
	if s.Init && d.InitBinary == "" {
		return sdk.Errorf(sdk.Unsupported, "", "initProcessEnabled needs docker-init, which this daemon does not have").WithHint("install tini")
	}
	return nil
}

func checkPorts(network string, ports []sdk.PortMapping) error {
	if len(ports) > 0 && network != sdk.NetworkBridge {
		return sdk.Errorf(sdk.Invalid, "", "port mappings need the bridge network, this is %s", network)
	}
	for i, m := range ports {
		switch {
		case m.Protocol != "tcp" && m.Protocol != "udp":
			return sdk.Errorf(sdk.Invalid, "", "port mapping %d: protocol %q is neither tcp nor udp", i, m.Protocol)
		case m.ContainerPort < 1 || m.ContainerPort > 65535:
			return sdk.Errorf(sdk.Invalid, "", "port mapping %d: container port %d is out of range", i, m.ContainerPort)
		case m.HostPort < 1 || m.HostPort > 65535:
			return sdk.Errorf(sdk.Invalid, "", "port mapping %d: host port %d is out of range", i, m.HostPort)
		}
		if m.HostIP != "" {
			if _, err := netip.ParseAddr(m.HostIP); err != nil {
				return sdk.Errorf(sdk.Invalid, "", "port mapping %d: %q is not an address", i, m.HostIP)
			}
		}
	}
	return nil
}

// checkLimits refuses limits this kernel cannot keep, by name: the daemon
// would drop them with a warning.
func checkLimits(l sdk.Limits, d *daemonInfo) error {
	lacks := func(what, hint string) error {
		return sdk.Errorf(sdk.Unsupported, "", "%s cannot be limited: the Docker daemon finds no cgroup controller for it", what).WithHint(hint)
	}
	switch {
	case (l.MemoryBytes > 0 || l.MemoryReservation > 0 || l.MemorySwap != nil || l.Swappiness != nil) && !d.MemoryLimit:
		return lacks("memory", "on a Raspberry Pi add cgroup_enable=memory to the kernel's command line and reboot")
	case l.CPUShares > 0 && !d.CPUShares, l.CPUQuota > 0 && !d.CPUCfsQuota:
		return lacks("cpu", "enable CONFIG_CGROUP_SCHED and CONFIG_CFS_BANDWIDTH in the kernel")
	case l.Pids > 0 && !d.PidsLimit:
		return lacks("the number of processes", "enable CONFIG_CGROUP_PIDS in the kernel")
	case l.CPUQuota > 0 && l.CPUQuota < 1000:
		return sdk.Errorf(sdk.Invalid, "", "a CPU quota of %d µs is below the kernel's minimum of 1000 µs in 100 ms", l.CPUQuota)
	case l.MemorySwap != nil && *l.MemorySwap >= 0 && l.MemoryBytes == 0:
		return sdk.Errorf(sdk.Invalid, "", "swap is limited together with memory, which has no limit").WithHint("give the container memory, or leave maxSwap out")
	case l.Swappiness != nil && d.cgroupVersion() != "1":
		return sdk.Errorf(sdk.Unsupported, "", "swappiness cannot be set: cgroup v2 has no such setting").WithHint("leave it out, or limit swap")
	case l.MemorySwap != nil && !d.SwapLimit && hostSwap():
		return sdk.Errorf(sdk.Unsupported, "", "swap cannot be limited: this kernel does not account for it").WithHint("boot with swapaccount=1")
	}
	return nil
}

// hostSwap tells whether the host has any: /proc/swaps has a line of titles.
func hostSwap() bool {
	b, err := os.ReadFile("/proc/swaps")
	return err == nil && strings.Count(string(b), "\n") > 1
}

func checkMounts(mounts []sdk.Mount) error {
	for _, m := range mounts {
		if !filepath.IsAbs(m.Target) || filepath.Clean(m.Target) == "/" {
			return sdk.Errorf(sdk.Invalid, "", "mount target %q is not an absolute path below /", m.Target)
		}
		switch m.Type {
		case "tmpfs":
		case "bind":
			if !filepath.IsAbs(m.Source) {
				return sdk.Errorf(sdk.Invalid, "", "mount source %q is not an absolute path", m.Source)
			}
			if _, _, err := bindMount(m); err != nil {
				return err
			}
			if _, err := os.Stat(m.Source); err != nil {
				return sdk.Errorf(sdk.Invalid, "", "mount %s: %w", m.Target, err).WithHint("make the directory on the device first")
			}
		default:
			return sdk.Errorf(sdk.Unsupported, "", "there is no mount type %q", m.Type)
		}
	}
	return nil
}

// bindMount puts the options of a bind mount into the daemon's words. It has
// none for nosuid, nodev and noexec, which only take something away: those are
// not kept.
func bindMount(m sdk.Mount) (readOnly bool, b bindOptions, err error) {
	readOnly = m.ReadOnly
	for _, o := range m.Options {
		switch o {
		case "ro":
			readOnly = true
		case "rw", "nosuid", "nodev", "noexec", "relatime":
		case "bind", "rbind":
			b.NonRecursive = o == "bind"
		case "private", "rprivate", "shared", "rshared", "slave", "rslave":
			b.Propagation = o
		default:
			return false, b, sdk.Errorf(sdk.Unsupported, "", "mount %s: Docker knows no option %q for it", m.Target, o)
		}
	}
	return readOnly, b, nil
}

var ulimits = []string{"core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"}

func isPermissions(s string) bool { return len(s) <= 3 && strings.Trim(s, "rwm") == "" }

// checkNames refuses what the daemon would refuse later in worse words.
func checkNames(s sdk.ContainerSpec) error {
	for _, u := range s.Ulimits {
		if !slices.Contains(ulimits, u.Name) {
			return sdk.Errorf(sdk.Invalid, "", "there is no ulimit %q with Docker", u.Name)
		}
		if u.Soft > u.Hard {
			return sdk.Errorf(sdk.Invalid, "", "ulimit %s: soft limit %d is above the hard limit %d", u.Name, u.Soft, u.Hard)
		}
	}
	for _, d := range s.Devices {
		if !filepath.IsAbs(d.HostPath) || d.ContainerPath != "" && !filepath.IsAbs(d.ContainerPath) {
			return sdk.Errorf(sdk.Invalid, "", "device %q: not an absolute path", d.HostPath)
		}
		if !isPermissions(d.Permissions) {
			return sdk.Errorf(sdk.Invalid, "", "device %s: permissions %q are not of r, w and m", d.HostPath, d.Permissions)
		}
		if _, err := os.Stat(d.HostPath); err != nil {
			return sdk.Errorf(sdk.NotFound, "", "device %s: %w", d.HostPath, err).WithHint("is it plugged in, and its driver loaded?")
		}
	}
	for k, v := range s.Labels {
		if strings.HasPrefix(k, labelPrefix) {
			return sdk.Errorf(sdk.Invalid, "", "label %q: names with %q are kept for the runtime", k, labelPrefix)
		}
		if len(k)+len(v) > 4096 {
			return sdk.Errorf(sdk.Invalid, "", "label %.40q is longer than 4096 bytes", k)
		}
	}
	return nil
}

func checkSecurity(options []string) error {
	for _, o := range options {
		switch key, value, _ := strings.Cut(securityOption(o), "="); {
		case key == "no-new-privileges" && (value == "" || value == "true" || value == "false"):
		case key == "seccomp" && value == "unconfined", key == "label" && value == "disable":
		case key == "label" && value != "":
			if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
				return sdk.Errorf(sdk.Unsupported, "", "security option %q: SELinux is not enabled on this device", o)
			}
		case key == "apparmor" && value != "":
			if _, err := os.Stat("/sys/kernel/security/apparmor"); err != nil && value != "unconfined" {
				return sdk.Errorf(sdk.Unsupported, "", "apparmor profile %q: AppArmor is not enabled on this device", value)
			}
		default:
			return sdk.Errorf(sdk.Unsupported, "", "security option %q is not supported", o).
				WithHint("there are no-new-privileges, apparmor:PROFILE, seccomp:unconfined and label:VALUE")
		}
	}
	return nil
}
