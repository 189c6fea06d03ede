// Package config reads the agent's configuration: /etc/belay/agent.toml and
// one file for each plugin beside it. Decoding is strict: what is not known is
// an error that names the key and the line. A mistake in agent.toml keeps the
// agent from starting; one in a plugin's file is that plugin's alone.
package config

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// DefaultPath is read when no other path is given, and may be missing.
const DefaultPath = "/etc/belay/agent.toml"

// Config is everything an operator can set. packaging/agent.toml documents
// every key and decodes to Default.
type Config struct {
	StateDir        string   `toml:"state_dir"`
	RunDir          string   `toml:"run_dir"`
	PluginDir       string   `toml:"plugin_dir"`
	PluginConfigDir string   `toml:"plugin_config_dir"`
	Transport       string   `toml:"transport"`
	PullGiveUp      Duration `toml:"pull_give_up"` // 0: never
	KeepStopped     Duration `toml:"keep_stopped"`
	// KeepStoppedTasks bounds how many are kept so long.
	KeepStoppedTasks int               `toml:"keep_stopped_tasks"`
	ReservedPorts    []Ports           `toml:"reserved_ports"`
	Log              Log               `toml:"log"`
	Reserve          Reserve           `toml:"reserve"`
	Images           Images            `toml:"images"`
	Attributes       map[string]string `toml:"attributes"`
	// Plugins are the tables of this file; Plugin adds the files beside it.
	Plugins map[string]Table `toml:"plugins"`
	// Overrides are the keys of plugins that flags set.
	Overrides map[string]Table `toml:"-"`
}

// Log says what is logged and how.
type Log struct {
	Level  string `toml:"level"`
	Format string `toml:"format"`
}

// Reserve is what tasks may not use.
type Reserve struct {
	CPUPercent int    `toml:"cpu_percent"`
	MemoryMiB  uint64 `toml:"memory_mib"`
}

// Images says which images that no task needs are removed.
type Images struct {
	KeepUnused  Duration `toml:"keep_unused"` // 0: for ever
	HighPercent int      `toml:"high_percent"`
	LowPercent  int      `toml:"low_percent"`
	MinAge      Duration `toml:"min_age"`
}

// Table is the configuration of one plugin, opaque to the agent.
type Table map[string]any

// Default is the configuration of a device without a file.
func Default() Config {
	return Config{
		StateDir:         "/var/lib/belay",
		RunDir:           "/run/belay",
		PluginDir:        "/usr/libexec/belay/plugins",
		PluginConfigDir:  "/etc/belay/plugins.d",
		Transport:        "auto",
		PullGiveUp:       Duration(5 * time.Minute),
		KeepStopped:      Duration(time.Hour),
		KeepStoppedTasks: 100,
		ReservedPorts:    []Ports{{Port: 22, Protocol: "tcp"}},
		Log:              Log{Level: "info", Format: "text"},
		Reserve:          Reserve{CPUPercent: 5, MemoryMiB: 128},
		Images:           Images{KeepUnused: Duration(7 * 24 * time.Hour), HighPercent: 85, LowPercent: 80, MinAge: Duration(2 * time.Minute)},
	}
}

// Duration is written as "90s" or "1h30m".
type Duration time.Duration

// UnmarshalText parses what time.ParseDuration takes.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration: write it like \"90s\" or \"1h30m\"", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalText is the reverse of UnmarshalText.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Ports is a port of the host, of one protocol or, with Protocol "", of both.
type Ports struct {
	Port     uint16
	Protocol string
}

// UnmarshalText parses "PORT" and "PORT/PROTOCOL".
func (p *Ports) UnmarshalText(b []byte) error {
	port, proto, slash := strings.Cut(string(b), "/")
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || slash && proto != "tcp" && proto != "udp" {
		return fmt.Errorf("%q is not a port: write it like \"22\", \"22/tcp\" or \"53/udp\"", b)
	}
	*p = Ports{Port: uint16(n), Protocol: proto}
	return nil
}

// MarshalText is the reverse of UnmarshalText.
func (p Ports) MarshalText() ([]byte, error) {
	s := strconv.Itoa(int(p.Port))
	if p.Protocol != "" {
		s += "/" + p.Protocol
	}
	return []byte(s), nil
}
