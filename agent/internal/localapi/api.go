// Package localapi lets the operator of a device ask the running agent what it
// knows: HTTP and JSON over a unix socket that only root and the agent's own
// user may use.
package localapi

import "time"

// SocketName is the socket's name in the run directory.
const SocketName = "agent.sock"

// Status is the agent at a glance.
type Status struct {
	Version    string            `json:"version"`
	Instance   string            `json:"instance"`
	Cluster    string            `json:"cluster"`
	PID        int               `json:"pid"`
	StartedAt  time.Time         `json:"startedAt"`
	Link       Link              `json:"link"`
	Tasks      map[string]int    `json:"tasks"` // how many by lastStatus
	Attributes map[string]string `json:"attributes"`
	CPU        uint64            `json:"cpu"` // offered to tasks, 1024 a CPU
	MemoryMiB  uint64            `json:"memoryMiB"`
	// Watched are the loops that the watchdog looks at, by name.
	Watched []string `json:"watched"`
	// Images are those of each runtime that keeps an account of them.
	Images map[string]Images `json:"images,omitempty"`
	// Problems are what an operator should look at, one sentence each.
	Problems []string `json:"problems,omitempty"`
}

// Images are what Belay pulled for a runtime.
type Images struct {
	Count          int    `json:"count"`
	Bytes          uint64 `json:"bytes"` // about: what images share counts for each
	Unused         int    `json:"unused"`
	UnusedBytes    uint64 `json:"unusedBytes"`
	DiskTotalBytes uint64 `json:"diskTotalBytes,omitempty"` // of the file system they are on
	DiskFreeBytes  uint64 `json:"diskFreeBytes,omitempty"`
	// Removed and FreedBytes count since the agent started.
	Removed    int    `json:"removed"`
	FreedBytes uint64 `json:"freedBytes"`
}

// Link is the tunnel to the control plane.
type Link struct {
	Connected bool      `json:"connected"`
	Transport string    `json:"transport,omitempty"` // "quic" or "tcp"
	Address   string    `json:"address,omitempty"`
	Proxy     string    `json:"proxy,omitempty"` // that the way leads through
	Since     time.Time `json:"since,omitzero"`  // of the present state
	LastError string    `json:"lastError,omitempty"`
}

// Task is one task the agent holds.
type Task struct {
	ID            string      `json:"id"`
	Family        string      `json:"family"`
	Revision      uint32      `json:"revision"`
	Runtime       string      `json:"runtime"`
	LastStatus    string      `json:"lastStatus"`
	DesiredStatus string      `json:"desiredStatus"`
	StopCode      string      `json:"stopCode,omitempty"`
	StoppedReason string      `json:"stoppedReason,omitempty"`
	Note          string      `json:"note,omitempty"` // what it is doing or waiting for
	Containers    []Container `json:"containers"`
}

// Container is one container of a task.
type Container struct {
	Name       string `json:"name"`
	LastStatus string `json:"lastStatus"`
	Attempt    int    `json:"attempt,omitempty"`
	ExitCode   *int   `json:"exitCode,omitempty"`
	Reason     string `json:"reason,omitempty"`
	RuntimeID  string `json:"runtimeId,omitempty"`
	PID        int    `json:"pid,omitempty"`
	Image      string `json:"image,omitempty"`
	Digest     string `json:"imageDigest,omitempty"`
	Health     string `json:"health,omitempty"`
	// Devices it was given, for good until it is gone: "PLUGIN/ID".
	Devices []string `json:"devices,omitempty"`
}

// Plugin is one plugin of the device.
type Plugin struct {
	Name      string   `json:"name"`
	Version   string   `json:"version"`
	Kinds     []string `json:"kinds"`
	State     string   `json:"state"`
	LastError string   `json:"lastError,omitempty"` // what is wrong now
	LastDown  string   `json:"lastDown,omitempty"`  // why it last went down by itself
	PID       int      `json:"pid,omitempty"`
	Restarts  int      `json:"restarts"`
	Path      string   `json:"path"`
	Checksum  string   `json:"checksum,omitempty"`
	Protocol  int      `json:"protocol,omitempty"` // version of the plugin protocol
	// MemoryBytes it takes now, its share of what it has in common with others.
	MemoryBytes        uint64   `json:"memoryBytes,omitempty"`
	MemoryMaxBytes     uint64   `json:"memoryMaxBytes,omitempty"` // 0: not limited
	CPUMaxPercent      int      `json:"cpuMaxPercent,omitempty"`  // of one CPU; 0: not limited
	ProtectionsMissing []string `json:"protectionsMissing,omitempty"`
}

// Source is what the server tells of. Calls come at the same time as each
// other and must not block for long.
type Source interface {
	Status() Status
	Tasks() ([]Task, error)
	Plugins() []Plugin
}

// failure is the body of every answer but 200.
type failure struct {
	Error string `json:"error"`
}
