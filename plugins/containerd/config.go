package containerd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Config is the plugin's own table. Every field may be left out.
type Config struct {
	// Address is containerd's socket.
	Address string `json:"address"`
	// Namespace is containerd's namespace for everything of ours.
	Namespace string `json:"namespace"`
	// Runtime is containerd's name of the shim.
	Runtime string `json:"runtime"`
	// Snapshotter holds images and root file systems. "auto" is overlayfs
	// where it works on the disk, else native (slow, whole copies).
	Snapshotter string `json:"snapshotter"`
	// Registries says how to reach registries, by host or host:port as in
	// image references; Docker Hub is "docker.io".
	Registries map[string]Registry `json:"registries"`
	// PullConcurrency is how many layers of one image are fetched at a time.
	PullConcurrency int `json:"pull_concurrency"`
	// CgroupParent is where the cgroups of tasks are made.
	CgroupParent string `json:"cgroup_parent"`
	// CNIBinDirs are searched for the CNI plugins of the bridge network.
	CNIBinDirs []string `json:"cni_bin_dirs"`
	// Bridge is the network of tasks in bridge mode.
	Bridge Bridge `json:"bridge"`
	// DNS are the servers for bridged containers when those of the host are
	// on its own loopback and so out of their reach.
	DNS []string `json:"dns"`
	// InitPath is a static init for containers that ask for one. Empty: one
	// is looked for where distributions put theirs.
	InitPath string `json:"init_path"`
	// CDISpecDirs are searched for specifications of CDI devices; the last
	// one that has a device counts.
	CDISpecDirs []string `json:"cdi_spec_dirs"`
}

// Registry is how one registry is reached.
type Registry struct {
	// PlainHTTP: never TLS. Unset, a registry on loopback is tried with TLS
	// first and then without; any other must speak TLS.
	PlainHTTP  *bool  `json:"plain_http"`
	CA         string `json:"ca"` // PEM file added to the system's roots
	SkipVerify bool   `json:"skip_verify"`
	Username   string `json:"username"`
	Password   string `json:"password"`
	// Mirrors are tried in order before the registry itself: host, host:port
	// or host/path. How each is reached is said by its own entry.
	Mirrors []string `json:"mirrors"`
}

// String hides the password.
func (r Registry) String() string { return "[registry, credentials hidden]" }

// GoString hides the password.
func (r Registry) GoString() string { return r.String() }

// Bridge is the network that bridged containers are connected to.
type Bridge struct {
	Name   string `json:"name"`   // of the interface, at most 15 characters
	Subnet string `json:"subnet"` // IPv4, CIDR
	MTU    int    `json:"mtu"`    // 0: the kernel's default
}

func defaultConfig() Config {
	return Config{
		Address:         "/run/containerd/containerd.sock",
		Namespace:       "belay",
		Runtime:         "io.containerd.runc.v2",
		Snapshotter:     "auto",
		PullConcurrency: 3,
		CgroupParent:    "/belay",
		CNIBinDirs:      []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"},
		Bridge:          Bridge{Name: "belay0", Subnet: "10.203.0.0/16"},
		DNS:             []string{"1.1.1.1", "8.8.8.8"},
		CDISpecDirs:     []string{"/etc/cdi", "/var/run/cdi"},
	}
}

// parseConfig reads the table over the defaults. Unknown keys are errors.
func parseConfig(raw json.RawMessage) (Config, error) {
	c := defaultConfig()
	if len(raw) == 0 {
		return c, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Config{}, sdk.Errorf(sdk.Invalid, "configure containerd", "%w", err).WithHint("see the reference of this plugin's settings")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Config{}, sdk.Errorf(sdk.Invalid, "configure containerd", "something follows the table")
	}
	if err := c.validate(); err != nil {
		return Config{}, sdk.Errorf(sdk.Invalid, "configure containerd", "%w", err)
	}
	return c, nil
}

func isInterfaceName(s string) bool {
	return only(s, alphanumeric+"._-") && only(s[:1], alphanumeric) && len(s) <= 15
}

func isCgroupPath(s string) bool {
	return strings.HasPrefix(s, "/") && only(s[1:], alphanumeric+"._/-")
}

// validate reports everything that is wrong at once.
func (c *Config) validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	}
	if !filepath.IsAbs(c.Address) {
		bad("address", "%q is not the absolute path of a socket", c.Address)
	}
	if !isPlainName(c.Namespace) || len(c.Namespace) > 76 {
		bad("namespace", "%q is not a containerd namespace", c.Namespace)
	}
	if c.Runtime == "" {
		bad("runtime", "must not be empty")
	}
	if c.Snapshotter == "" {
		bad("snapshotter", "must not be empty")
	}
	if c.PullConcurrency < 1 || c.PullConcurrency > 64 {
		bad("pull_concurrency", "%d is not within 1 to 64", c.PullConcurrency)
	}
	if !isCgroupPath(c.CgroupParent) || filepath.Clean(c.CgroupParent) != c.CgroupParent {
		bad("cgroup_parent", "%q is not a clean absolute path below the root cgroup", c.CgroupParent)
	}
	for _, d := range c.CNIBinDirs {
		if !filepath.IsAbs(d) {
			bad("cni_bin_dirs", "%q is not absolute", d)
		}
	}
	if !isInterfaceName(c.Bridge.Name) {
		bad("bridge.name", "%q is not an interface name", c.Bridge.Name)
	}
	if p, err := netip.ParsePrefix(c.Bridge.Subnet); err != nil || !p.Addr().Is4() || p.Bits() > 29 || p != p.Masked() {
		bad("bridge.subnet", "%q is not an IPv4 network of at least 8 addresses", c.Bridge.Subnet)
	}
	if c.Bridge.MTU < 0 || c.Bridge.MTU > 65535 {
		bad("bridge.mtu", "%d is out of range", c.Bridge.MTU)
	}
	for _, s := range c.DNS {
		if _, err := netip.ParseAddr(s); err != nil {
			bad("dns", "%q is not an address", s)
		}
	}
	for i, dir := range c.CDISpecDirs {
		if !filepath.IsAbs(dir) {
			bad(fmt.Sprintf("cdi_spec_dirs[%d]", i), "%q is not absolute", dir)
		}
	}
	if c.InitPath != "" && !filepath.IsAbs(c.InitPath) {
		bad("init_path", "%q is not absolute", c.InitPath)
	}
	for host, r := range c.Registries {
		key := "registries." + host
		if host == "" || strings.ContainsAny(host, "/@ ") {
			bad(key, "the key must be a host or host:port")
		}
		if r.CA != "" {
			if _, err := os.Stat(r.CA); err != nil {
				bad(key+".ca", "%v", err)
			}
		}
		if (r.Username == "") != (r.Password == "") {
			bad(key, "username and password go together")
		}
		if r.PlainHTTP != nil && *r.PlainHTTP && (r.CA != "" || r.SkipVerify) {
			bad(key, "plain_http excludes ca and skip_verify")
		}
		for _, m := range r.Mirrors {
			if m == "" || strings.Contains(m, "://") {
				bad(key+".mirrors", "%q is not HOST[:PORT][/PATH]", m)
			}
		}
	}
	return errors.Join(errs...)
}
