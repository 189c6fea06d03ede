// Package controlplane is the domain of a Belay control plane: what clusters,
// activations, instances, task definitions and tasks are, and what may be done
// with them. It decides and writes through a Store; it knows no transport and
// does no I/O of its own: time, randomness and storage are arguments.
package controlplane

import (
	"encoding/json"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Cluster is a named group of instances.
type Cluster struct {
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"createdAt"`
}

// Activation lets up to Limit devices enrol until ExpiresAt.
type Activation struct {
	ID          string            `json:"id"` // 32 hex digits
	Cluster     string            `json:"cluster"`
	Limit       int               `json:"limit"`
	Used        int               `json:"used"`
	CreatedAt   time.Time         `json:"createdAt"`
	ExpiresAt   time.Time         `json:"expiresAt"`
	Attributes  map[string]string `json:"attributes,omitempty"`
	Description string            `json:"description,omitempty"`
	SecretHash  []byte            `json:"secretHash"` // SHA-256 of the 32 random bytes in the code
}

// Instance statuses.
const (
	InstanceActive   = "ACTIVE"
	InstanceInactive = "INACTIVE"
)

// Instance is one enrolled device. Its key fingerprint is its identity.
type Instance struct {
	ID              string            `json:"id"` // 32 hex digits
	Cluster         string            `json:"cluster"`
	Status          string            `json:"status"`
	KeyFingerprint  string            `json:"keyFingerprint"` // hex SHA-256 of the public key's SubjectPublicKeyInfo
	ActivationID    string            `json:"activationId"`
	HashedMachineID string            `json:"hashedMachineId,omitempty"`
	Hostname        string            `json:"hostname,omitempty"`
	AgentVersion    string            `json:"agentVersion,omitempty"`
	RegisteredAt    time.Time         `json:"registeredAt"`
	Attributes      map[string]string `json:"attributes,omitempty"` // set by activation or operator
	Facts           Facts             `json:"facts"`                // told by the device
	// Capabilities are what its agent can do beyond the first version.
	Capabilities []string `json:"capabilities,omitempty"`

	// Divergence is set while the device relies on what the store has lost;
	// Settled is the sequence at which the last one ended, SettledFrom where
	// the device was when that one was noticed.
	Divergence  *Divergence `json:"divergence,omitempty"`
	Settled     uint64      `json:"settled,omitempty"`
	SettledFrom Position    `json:"settledFrom,omitzero"`
	// Duplicate is another machine that was seen with this instance's key.
	Duplicate *Duplicate `json:"duplicate,omitempty"`
}

// Facts are what a device last told of itself, see wire.Facts.
type Facts struct {
	Attributes    map[string]string `json:"attributes,omitempty"`
	CPU           int               `json:"cpu"`       // 1024 a core
	MemoryMiB     int               `json:"memoryMiB"` // the agent's reserve subtracted
	Plugins       []PluginInfo      `json:"plugins,omitempty"`
	ReservedPorts []PortKey         `json:"reservedPorts,omitempty"`
	Devices       []DeviceFact      `json:"devices,omitempty"`
}

// PluginInfo is a plugin on a device.
type PluginInfo struct {
	Name      string   `json:"name"`
	Version   string   `json:"version"`
	Kinds     []string `json:"kinds"`
	State     string   `json:"state"` // "ready", "starting", "failed", "quarantined"
	LastError string   `json:"lastError,omitempty"`
	Checksum  string   `json:"checksum,omitempty"`
	Restarts  int      `json:"restarts"`
	Networks  []string `json:"networks,omitempty"`
	// Protocol is the version of the plugin protocol; 0: not known.
	Protocol       int      `json:"protocol,omitempty"`
	MemoryBytes    uint64   `json:"memoryBytes,omitempty"`    // as last told
	MemoryMaxBytes uint64   `json:"memoryMaxBytes,omitempty"` // 0: not limited
	Missing        []string `json:"missing,omitempty"`        // protections
}

// PortKey is a port of a host.
type PortKey struct {
	Protocol string `json:"protocol"` // "tcp" or "udp"
	Port     int    `json:"port"`
}

// Bindings are what an instance has been given: the record placement compares
// and swaps, so that two placements never both take the same room.
type Bindings struct {
	// Sequence grows with every change of the instance's assignments.
	Sequence uint64 `json:"sequence"`
	// Tasks that hold resources: bound and not yet known to be stopped.
	Tasks map[string]Demand `json:"tasks,omitempty"`
}

// Demand is the room one task takes.
type Demand struct {
	CPU       int       `json:"cpu,omitempty"`       // 1024 a core
	MemoryMiB int       `json:"memoryMiB,omitempty"` // hard limits, or reservations where those are less
	Ports     []PortKey `json:"ports,omitempty"`     // fixed host ports
	Runtime   string    `json:"runtime,omitempty"`
	Network   string    `json:"network,omitempty"`
	Arch      string    `json:"arch,omitempty"` // as GOARCH; empty: any
	// Devices are what the containers ask for that ask for any.
	Devices []DeviceDemand `json:"devices,omitempty"`
	// StopsAway: the agent must stop the task when it is away for too long.
	StopsAway bool `json:"stopsAway,omitempty"`
}

// TaskDefinitionRecord is one registered revision, immutable but for Status.
type TaskDefinitionRecord struct {
	Family       string          `json:"family"`
	Revision     int             `json:"revision"`
	Status       string          `json:"status"` // ACTIVE, INACTIVE
	RegisteredAt time.Time       `json:"registeredAt"`
	Document     json.RawMessage `json:"document"` // canonical, see TaskDefinition
	Warnings     []string        `json:"warnings,omitempty"`
}

// Task statuses, in the order a task passes them; it may skip some, never go back.
const (
	StatusProvisioning   = "PROVISIONING"
	StatusPending        = "PENDING"
	StatusActivating     = "ACTIVATING"
	StatusRunning        = "RUNNING"
	StatusDeactivating   = "DEACTIVATING"
	StatusStopping       = "STOPPING"
	StatusDeprovisioning = "DEPROVISIONING"
	StatusStopped        = "STOPPED"
)

// Stop codes: who or what wanted a task's end.
const (
	StopCodeUser         = "UserInitiated"
	StopCodeInstanceGone = "TerminationNotice"
)

// Task is one copy of a task definition on one instance.
type Task struct {
	ID            string    `json:"id"` // 32 hex digits
	Cluster       string    `json:"cluster"`
	Family        string    `json:"family"`
	Revision      int       `json:"revision"`
	Group         string    `json:"group,omitempty"`
	StartedBy     string    `json:"startedBy,omitempty"`
	Instance      string    `json:"instance"`
	Runtime       string    `json:"runtime"`
	DesiredStatus string    `json:"desiredStatus"` // RUNNING or STOPPED
	StopCode      string    `json:"stopCode,omitempty"`
	StopReason    string    `json:"stopReason,omitempty"` // of the wish, handed to the device
	Sequence      uint64    `json:"sequence"`             // of the last change of the wish, see Bindings
	CreatedAt     time.Time `json:"createdAt"`
	StoppingAt    time.Time `json:"stoppingAt,omitzero"`
	Version       uint64    `json:"version"` // grows with every change of anything here

	// Observed: written only from what the device reports, and by the control
	// plane for a device that is gone for good.
	LastStatus    string            `json:"lastStatus"`
	Health        string            `json:"health,omitempty"`
	StoppedReason string            `json:"stoppedReason,omitempty"`
	Note          string            `json:"note,omitempty"`
	StartedAt     time.Time         `json:"startedAt,omitzero"`
	StoppedAt     time.Time         `json:"stoppedAt,omitzero"`
	Containers    []ContainerStatus `json:"containers"`

	Spec *wire.TaskSpec `json:"-"` // resolved, stored beside the task as bytes
}

// ContainerStatus is one container of a task as last reported.
type ContainerStatus struct {
	Name        string        `json:"name"`
	Essential   bool          `json:"essential"`
	LastStatus  string        `json:"lastStatus"`
	ExitCode    *int          `json:"exitCode,omitempty"` // nil: has not exited, or nobody saw the exit
	Reason      string        `json:"reason,omitempty"`
	Image       string        `json:"image,omitempty"`
	ImageDigest string        `json:"imageDigest,omitempty"`
	RuntimeID   string        `json:"runtimeId,omitempty"`
	PID         int           `json:"pid,omitempty"`
	Attempt     int           `json:"attempt,omitempty"`
	Restarts    int           `json:"restarts,omitempty"`
	Health      string        `json:"health,omitempty"`
	Ports       []PortBinding `json:"ports,omitempty"`
	IP          string        `json:"ip,omitempty"`
	Pull        *PullProgress `json:"pull,omitempty"`
	Devices     []DeviceKey   `json:"devices,omitempty"` // chosen for the latest attempt
}

// PortBinding is a container port bound on the host.
type PortBinding struct {
	Name          string `json:"name,omitempty"`
	Protocol      string `json:"protocol"`
	ContainerPort int    `json:"containerPort"`
	HostPort      int    `json:"hostPort"`
}

// PullProgress is how far an image pull has come.
type PullProgress struct {
	Layers     int   `json:"layers"`
	LayersDone int   `json:"layersDone"`
	Bytes      int64 `json:"bytes"`
	BytesDone  int64 `json:"bytesDone"`
}
