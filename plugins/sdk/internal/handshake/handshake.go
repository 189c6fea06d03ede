// Package handshake holds what both sides must agree on before the first call:
// go-plugin's environment variables and the line a plugin prints.
package handshake

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// Environment of a plugin process.
const (
	CookieKey   = "BELAY_PLUGIN"
	CookieValue = "5d1c1f0a-belay-plugin"

	SocketDirKey = "PLUGIN_UNIX_SOCKET_DIR"
	VersionsKey  = "PLUGIN_PROTOCOL_VERSIONS"

	// LifelineKey says what ends when the host does: LifelineStdin means the
	// plugin's stdin is a pipe only the host holds the other end of.
	LifelineKey   = "BELAY_PLUGIN_LIFELINE"
	LifelineStdin = "stdin"

	// OutliveKey: see serve.OutliveKey.
	OutliveKey = "BELAY_PLUGIN_OUTLIVE"
)

// HealthService is the name go-plugin asks the health service about.
const HealthService = "plugin"

// go-plugin's controller service: one call, with which the host asks the
// process to end.
const (
	ControllerService = "plugin.GRPCController"
	ShutdownMethod    = "/" + ControllerService + "/Shutdown"
)

const coreVersion = 1

// ValidName reports whether s may name a plugin: 1 to 63 of a-z, 0-9 and -.
func ValidName(s string) bool {
	return s != "" && len(s) <= 63 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// SocketPrefix begins the names of plugins' sockets, which may share their
// directory with other files.
const SocketPrefix = "host."

// SocketPath is short on purpose: see CheckSocketPath.
func SocketPath(dir string, pid int) string {
	return filepath.Join(dir, SocketPrefix+strconv.Itoa(pid))
}

// CheckSocketPath explains what the kernel would call an invalid argument.
func CheckSocketPath(path string) error {
	const limit = 107 // sockaddr_un's path without its final zero
	if len(path) > limit {
		return fmt.Errorf("socket path %q has %d bytes, the kernel allows %d: use a shorter run directory", path, len(path), limit)
	}
	return nil
}

// Line is what a plugin prints once its socket accepts connections.
func Line(version int, network, address string) string {
	return fmt.Sprintf("%d|%d|%s|%s|grpc|", coreVersion, version, network, address)
}

// ParseVersion reads the plugin's protocol version out of its first line; ok
// is false when the line is not a handshake.
func ParseVersion(line string) (version int, ok bool) {
	parts := strings.Split(strings.TrimSpace(line), "|")
	if len(parts) < 4 || parts[0] != strconv.Itoa(coreVersion) {
		return 0, false
	}
	v, err := strconv.Atoi(parts[1])
	return v, err == nil
}
