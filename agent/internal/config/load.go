package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// Load reads the file at path over the defaults and validates the whole. A
// missing file is an error unless path is DefaultPath. The plugins' own files
// are read by Plugin.
func Load(path string) (Config, error) {
	c := Default()
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && path == DefaultPath:
	case err != nil:
		return Config{}, fmt.Errorf("read configuration: %w", err)
	default:
		if err := decode(path, text, &c); err != nil {
			return Config{}, err
		}
	}
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// decode is strict, and says where: "agent.toml:12: ...".
func decode(path string, text []byte, into any) error { return decodeOnly(path, text, into, "") }

// decodeOnly is decode that, unless only is "", leaves all other tables alone.
func decodeOnly(path string, text []byte, into any, only string) error {
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	err := d.Decode(into)
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) {
		var all []error
		for _, e := range missing.Errors {
			if only != "" && e.Key()[0] != only {
				continue
			}
			line, _ := e.Position()
			all = append(all, fmt.Errorf("%s:%d: unknown key %s", path, line, strings.Join(e.Key(), ".")))
		}
		return errors.Join(all...)
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		line, column := bad.Position()
		key := ""
		if len(bad.Key()) > 0 {
			key = strings.Join(bad.Key(), ".") + ": "
		}
		return fmt.Errorf("%s:%d:%d: %s%s", path, line, column, key, strings.TrimPrefix(bad.Error(), "toml: "))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// What names and checksums are made of. Regular expressions would stay in
// memory for as long as the agent runs.
const (
	digits  = "0123456789"
	lower   = "abcdefghijklmnopqrstuvwxyz"
	letters = lower + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

// only tells whether s is 1 to most bytes, all of them in set.
func only(s, set string, most int) bool {
	return s != "" && len(s) <= most && strings.Trim(s, set) == ""
}

func isPluginName(s string) bool { return only(s, lower+digits+"-", 63) }

func isAttributeName(s string) bool {
	return only(s, letters+digits+"._/-", 128) && only(s[:1], letters+digits, 1)
}

// Validate names every key that is wrong, with its value and the rule, all at once.
func (c *Config) Validate() error {
	var all []error
	bad := func(format string, args ...any) { all = append(all, fmt.Errorf(format, args...)) }
	oneOf := func(key, value string, allowed ...string) {
		if !slices.Contains(allowed, value) {
			bad("%s is %q: must be one of %s", key, value, strings.Join(allowed, ", "))
		}
	}
	for _, d := range []struct{ key, dir string }{
		{"state_dir", c.StateDir}, {"run_dir", c.RunDir}, {"plugin_dir", c.PluginDir}, {"plugin_config_dir", c.PluginConfigDir},
	} {
		if !filepath.IsAbs(d.dir) {
			bad("%s is %q: must be an absolute path", d.key, d.dir)
		}
	}
	oneOf("transport", c.Transport, "auto", "quic", "tcp")
	oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	oneOf("log.format", c.Log.Format, "text", "json")
	if c.PullGiveUp < 0 {
		bad("pull_give_up is negative: must be 0s (never give up) or more")
	}
	if c.KeepStopped < 0 {
		bad("keep_stopped is negative: must be 0s or more")
	}
	if c.KeepStoppedTasks < 1 {
		bad("keep_stopped_tasks is %d: must be 1 or more", c.KeepStoppedTasks)
	}
	if c.Reserve.CPUPercent < 0 || c.Reserve.CPUPercent > 90 {
		bad("reserve.cpu_percent is %d: must be 0 to 90", c.Reserve.CPUPercent)
	}
	const decade = Duration(10 * 365 * 24 * time.Hour)
	if k := c.Images.KeepUnused; k < 0 || k > decade {
		bad("images.keep_unused is %s: must be 0s (for ever) to ten years", time.Duration(k))
	}
	if a := c.Images.MinAge; a < 0 || a > decade {
		bad("images.min_age is %s: must be 0s to ten years", time.Duration(a))
	}
	if h := c.Images.HighPercent; h < 1 || h > 100 {
		bad("images.high_percent is %d: must be 1 to 100 (which is never)", h)
	} else if l := c.Images.LowPercent; l < 0 || l > h {
		bad("images.low_percent is %d: must be 0 to high_percent, which is %d", l, h)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Attributes)) {
		switch {
		case strings.HasPrefix(name, "belay."):
			bad("attributes.%q: names beginning with \"belay.\" are the agent's own", name)
		case !isAttributeName(name):
			bad("attributes.%q: a name is 1 to 128 letters, digits, '.', '_', '-' and '/', the first a letter or digit", name)
		}
		if len(c.Attributes[name]) > 128 {
			bad("attributes.%q: a value has at most 128 bytes", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Plugins)) {
		if !isPluginName(name) {
			bad("plugins.%q: a plugin's name is 1 to 63 lower-case letters, digits and '-'", name)
		}
		if _, err := json.Marshal(c.Plugins[name]); err != nil { // infinity and NaN have none
			bad("plugin %s: %w", name, err)
		}
	}
	return errors.Join(all...)
}
