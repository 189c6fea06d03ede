// Package sdk is the contract between a Belay agent and its plugins: plain Go
// interfaces and value types. Packages serve (the plugin's side) and host (the
// agent's side) carry it over gRPC on a unix socket; neither leaks here.
//
// A plugin is one process the agent starts and may kill at any moment, on
// purpose: a plugin holds nothing that a fresh one cannot learn again. What a
// runtime plugin started keeps running when the plugin dies, and the next
// process reports it from List by the identity labels it put on it.
package sdk

import (
	"context"
	"encoding/json"
)

// The plugin protocol: a host and a plugin of this module speak every version
// from OldestProtocolVersion to ProtocolVersion and agree on the newest that
// both know. What an older one cannot say is refused, never left out.
//
//   - 1: the foundation, runtimes only.
//   - 2 (2026-11): kind device; containers take CDI devices, hooks and
//     additional groups; a plugin describes its configuration. Runtimes may
//     be image stores: they say so in what they can do.
const (
	ProtocolVersion       = 2
	OldestProtocolVersion = 1
)

// Kind says what a plugin can do. A plugin may be several kinds at once.
type Kind string

// The kinds.
const (
	KindRuntime Kind = "runtime" // implements RuntimePlugin
	KindDevice  Kind = "device"  // implements DevicePlugin; since version 2
)

// Info names a plugin.
type Info struct {
	Name    string // [a-z0-9-]{1,63}; what task definitions and operators call it
	Version string // the author's, free form
	Kinds   []Kind
}

// Config is what the agent hands a plugin once, before any other call.
type Config struct {
	// StateDir is the plugin's own directory, kept across reboots. It exists, mode 0700.
	StateDir string
	// RunDir is the plugin's own directory, emptied by a reboot. It exists, mode 0700.
	RunDir string
	// JSON is the plugin's own configuration table, or nil when none was
	// given. DecodeConfig reads it.
	JSON json.RawMessage
}

// Plugin is implemented by every plugin, beside the interfaces of its kinds.
type Plugin interface {
	// Info is constant and must not fail or block: it is asked before Configure.
	Info() Info
	// Configure is called exactly once, before any other call. An error of
	// kind Invalid means the configuration is wrong and restarting will not
	// help; its message is shown to the operator. A daemon that is not up yet
	// is no error here: calls that need it answer Unavailable.
	Configure(ctx context.Context, c Config) error
}

// RuntimePlugin is a Plugin of kind runtime. Runtime is asked once, before
// Configure; its calls come after.
type RuntimePlugin interface {
	Plugin
	Runtime() Runtime
}
