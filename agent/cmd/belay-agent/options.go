package main

import (
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/belay-edge/belay/agent/internal/config"
)

// options are the flags that win over the configuration file.
type options struct {
	config     string
	stateDir   string
	runDir     string
	pluginDir  string
	transport  string
	containerd string
	logLevel   string
	logFormat  string
}

func (o *options) addConfig(f *pflag.FlagSet) {
	f.StringVar(&o.config, "config", config.DefaultPath, "configuration `file`")
}

func (o *options) addStateDir(f *pflag.FlagSet) {
	f.StringVar(&o.stateDir, "state-dir", "", "`directory` of the device's identity and state (default "+config.Default().StateDir+")")
}

func (o *options) addRunDir(f *pflag.FlagSet) {
	f.StringVar(&o.runDir, "run-dir", "", "`directory` of sockets (default "+config.Default().RunDir+")")
}

func (o *options) addPlugins(f *pflag.FlagSet) {
	f.StringVar(&o.pluginDir, "plugin-dir", "", "`directory` of plugins (default "+config.Default().PluginDir+")")
	f.StringVar(&o.containerd, "containerd-address", "", "containerd's `socket`, for the plugin containerd")
}

func (o *options) addTransport(f *pflag.FlagSet) {
	f.StringVar(&o.transport, "transport", "", "how to reach the control plane: quic, tcp or auto (default auto)")
}

func (o *options) addLog(f *pflag.FlagSet) {
	f.StringVar(&o.logLevel, "log-level", "", "debug, info, warn or error (default info)")
	f.StringVar(&o.logFormat, "log-format", "", "text or json (default text)")
}

// load reads the configuration and puts the flags over it.
func (o *options) load() (config.Config, error) {
	c, err := config.Load(o.config)
	if err != nil {
		return config.Config{}, usageError{err}
	}
	for _, f := range []struct {
		flag, value string
		into        *string
		path        bool
	}{
		{"--state-dir", o.stateDir, &c.StateDir, true},
		{"--run-dir", o.runDir, &c.RunDir, true},
		{"--plugin-dir", o.pluginDir, &c.PluginDir, true},
		{"--transport", o.transport, &c.Transport, false},
		{"--log-level", o.logLevel, &c.Log.Level, false},
		{"--log-format", o.logFormat, &c.Log.Format, false},
	} {
		if f.value == "" {
			continue
		}
		if f.path {
			abs, err := filepath.Abs(f.value)
			if err != nil {
				return config.Config{}, usageError{fmt.Errorf("%s %s: %w", f.flag, f.value, err)}
			}
			f.value = abs
		}
		*f.into = f.value
	}
	if o.containerd != "" {
		abs, err := filepath.Abs(o.containerd)
		if err != nil {
			return config.Config{}, usageError{fmt.Errorf("--containerd-address %s: %w", o.containerd, err)}
		}
		c.SetPlugin("containerd", "address", abs)
	}
	if err := c.Validate(); err != nil {
		return config.Config{}, usageError{err}
	}
	return c, nil
}

// logger makes the log the configuration asks for.
func logger(c config.Log, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // Validate has seen it
	}
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
