package docker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Config is the plugin's own table. Every field may be left out. How
// registries are reached (mirrors, CAs, plain HTTP, proxies) is the daemon's
// own configuration and is asked of it.
type Config struct {
	// Address is the daemon's socket.
	Address string `json:"address"`
	// Runtime is the daemon's name of an OCI runtime, such as "nvidia"; empty:
	// the daemon's default.
	Runtime string `json:"runtime"`
	// Network is the daemon's name of the network of tasks in bridge mode.
	Network string `json:"network"`
	// CgroupParent is where the cgroups of tasks with limits are made, with
	// the daemon's cgroup driver cgroupfs.
	CgroupParent string `json:"cgroup_parent"`
	// CDISpecDirs are searched for specifications of CDI devices; the last one
	// that has a device counts.
	CDISpecDirs []string `json:"cdi_spec_dirs"`
	// Registries has credentials by host or host:port as in image references;
	// Docker Hub is "docker.io".
	Registries map[string]Registry `json:"registries"`
}

// Registry has the credentials for one registry.
type Registry struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// String hides the password.
func (Registry) String() string { return "[registry, credentials hidden]" }

// GoString hides the password.
func (r Registry) GoString() string { return r.String() }

func defaultConfig() Config {
	return Config{Address: "/run/docker.sock", Network: "bridge", CgroupParent: "/belay-docker", CDISpecDirs: []string{"/etc/cdi", "/var/run/cdi"}}
}

// parseConfig reads the table over the defaults. Unknown keys are errors.
func parseConfig(raw json.RawMessage) (Config, error) {
	const op = "configure docker"
	c := defaultConfig()
	if len(raw) == 0 {
		return c, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Config{}, sdk.Errorf(sdk.Invalid, op, "%w", err).WithHint("see the reference of this plugin's settings")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Config{}, sdk.Errorf(sdk.Invalid, op, "something follows the table")
	}
	c.Address = strings.TrimPrefix(c.Address, "unix://")
	if err := c.validate(); err != nil {
		return Config{}, sdk.Errorf(sdk.Invalid, op, "%w", err)
	}
	return c, nil
}

func isCgroupPath(s string) bool {
	return strings.HasPrefix(s, "/") && only(s[1:], alphanumeric+"._/-")
}

func isDockerName(s string) bool {
	return only(s, alphanumeric+"_.-") && only(s[:1], alphanumeric)
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
	if c.Runtime != "" && !isDockerName(c.Runtime) {
		bad("runtime", "%q is not the name of a runtime", c.Runtime)
	}
	if !isDockerName(c.Network) || c.Network == sdk.NetworkHost || c.Network == sdk.NetworkNone {
		bad("network", "%q is not the name of a bridge network", c.Network)
	}
	if !isCgroupPath(c.CgroupParent) || filepath.Clean(c.CgroupParent) != c.CgroupParent {
		bad("cgroup_parent", "%q is not a clean absolute path below the root cgroup", c.CgroupParent)
	}
	for i, dir := range c.CDISpecDirs {
		if !filepath.IsAbs(dir) {
			bad(fmt.Sprintf("cdi_spec_dirs[%d]", i), "%q is not absolute", dir)
		}
	}
	for host, r := range c.Registries {
		if host == "" || strings.ContainsAny(host, "/@ ") {
			bad("registries."+host, "the key must be a host or host:port")
		}
		if r.Username == "" || r.Password == "" {
			bad("registries."+host, "username and password go together")
		}
	}
	return errors.Join(errs...)
}
