package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// agentTable is the table of a plugin's configuration that is the agent's. The
// plugin never sees it.
const agentTable = "belay"

// Plugin is the configuration of one plugin.
type Plugin struct {
	Settings
	// Source is where it is written, for messages: a file, or a table of
	// agent.toml; "" when there is none.
	Source string
	// JSON is what the plugin itself is handed; nil when there is nothing.
	JSON json.RawMessage
}

// Settings are the keys of the table [belay]: what the agent does with a plugin.
type Settings struct {
	Enabled   *bool    `toml:"enabled"`    // nil: true
	SHA256    string   `toml:"sha256"`     // of the executable, hex; "": any
	MemoryMax *Memory  `toml:"memory_max"` // nil: the default of the plugin's kind
	CPUMax    *Percent `toml:"cpu_max"`    // nil: the default
	Profile   string   `toml:"profile"`    // "", ProfileAuto, ProfileDevice or ProfileNone
}

// Profiles.
const (
	ProfileAuto   = "auto"   // by the plugin's kinds
	ProfileDevice = "device" // the least there is, whatever it says it is
	ProfileNone   = "none"   // no confinement
)

// Memory in bytes, written "256MiB"; 0 is written "none".
type Memory uint64

// UnmarshalText parses a number with KiB, MiB or GiB, or "none".
func (m *Memory) UnmarshalText(b []byte) error {
	text := string(b)
	if text == "none" {
		*m = 0
		return nil
	}
	for unit, shift := range map[string]uint{"KiB": 10, "MiB": 20, "GiB": 30} {
		if digits, ok := strings.CutSuffix(text, unit); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(digits), 10, 64)
			if err == nil && n > 0 && n <= math.MaxInt64>>shift {
				*m = Memory(n << shift)
				return nil
			}
		}
	}
	return fmt.Errorf("%q is not an amount of memory: write it like \"256MiB\" or \"1GiB\", or \"none\" for no limit", b)
}

// Percent of one CPU, written "50%"; 0 is written "none".
type Percent int

// UnmarshalText parses a percentage or "none".
func (p *Percent) UnmarshalText(b []byte) error {
	text := string(b)
	if text == "none" {
		*p = 0
		return nil
	}
	if digits, ok := strings.CutSuffix(text, "%"); ok {
		if n, err := strconv.Atoi(strings.TrimSpace(digits)); err == nil && n >= 1 && n <= 100_000 {
			*p = Percent(n)
			return nil
		}
	}
	return fmt.Errorf("%q is not a share of CPU: write it like \"50%%\" of one CPU or \"200%%\" for two, or \"none\" for no limit", b)
}

func (s Settings) validate() error {
	var all []error
	if s.SHA256 != "" && (len(s.SHA256) != 64 || !only(s.SHA256, digits+"abcdef", 64)) {
		all = append(all, fmt.Errorf("belay.sha256 is %q: must be 64 digits 0-9 and a-f", s.SHA256))
	}
	if !slices.Contains([]string{"", ProfileAuto, ProfileDevice, ProfileNone}, s.Profile) {
		all = append(all, fmt.Errorf("belay.profile is %q: must be one of %s, %s, %s", s.Profile, ProfileAuto, ProfileDevice, ProfileNone))
	}
	if m := s.MemoryMax; m != nil && *m != 0 && *m < 8<<20 {
		all = append(all, fmt.Errorf("belay.memory_max is %d KiB: no plugin starts with less than 8MiB", *m>>10))
	}
	return errors.Join(all...)
}

// PluginNames lists the plugins that are configured, wrongly or not.
func (c *Config) PluginNames() []string {
	names := map[string]bool{}
	for name := range c.Plugins {
		names[name] = true
	}
	for name := range c.Overrides {
		names[name] = true
	}
	files, _ := filepath.Glob(filepath.Join(c.PluginConfigDir, "*.toml"))
	for _, f := range files {
		names[strings.TrimSuffix(filepath.Base(f), ".toml")] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// Plugin reads the configuration of one plugin as it is now: its table of
// agent.toml or its own file, which may change while the agent runs. A mistake
// in it is that plugin's alone.
func (c *Config) Plugin(name string) (Plugin, error) {
	if !isPluginName(name) {
		return Plugin{}, fmt.Errorf("configuration of plugin %q: a plugin's name is 1 to 63 lower-case letters, digits and '-'", name)
	}
	file := filepath.Join(c.PluginConfigDir, name+".toml")
	text, err := os.ReadFile(file)
	inline, both := c.Plugins[name]
	p, table := Plugin{}, Table{}
	switch {
	case err == nil && both:
		return Plugin{}, fmt.Errorf("plugin %s is configured twice: by [plugins.%s] and by %s: keep one of them", name, name, file)
	case err == nil:
		p.Source = file
		if err := decode(file, text, &table); err != nil {
			return Plugin{}, err
		}
		if p.Settings, err = decodeSettings(file, text); err != nil {
			return Plugin{}, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return Plugin{}, fmt.Errorf("read configuration of plugin %s: %w", name, err)
	case both:
		p.Source = "[plugins." + name + "]"
		table = maps.Clone(inline)
		own, err := toml.Marshal(map[string]any{agentTable: inline[agentTable]})
		if _, given := inline[agentTable]; given && err == nil {
			p.Settings, err = decodeSettings(p.Source, own)
		}
		if err != nil {
			return Plugin{}, err
		}
	}
	delete(table, agentTable)
	for key, value := range c.Overrides[name] {
		table[key] = value
	}
	if err := p.validate(); err != nil {
		return Plugin{}, fmt.Errorf("%s: %w", p.Source, err)
	}
	if p.Source == "" && len(table) == 0 {
		return p, nil
	}
	if p.JSON, err = json.Marshal(table); err != nil { // infinity and NaN have no JSON
		return Plugin{}, fmt.Errorf("configuration of plugin %s: %w", name, err)
	}
	return p, nil
}

// decodeSettings reads the agent's table of a plugin's file and nothing else.
func decodeSettings(path string, text []byte) (Settings, error) {
	var f struct {
		Belay Settings `toml:"belay"`
	}
	err := decodeOnly(path, text, &f, agentTable)
	return f.Belay, err
}

// SetPlugin sets one key of a plugin's configuration, as flags do. It wins
// over what is written.
func (c *Config) SetPlugin(name, key string, value any) {
	if c.Overrides == nil {
		c.Overrides = map[string]Table{}
	}
	if c.Overrides[name] == nil {
		c.Overrides[name] = Table{}
	}
	c.Overrides[name][key] = value
}
