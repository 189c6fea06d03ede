// Package agent keeps the tasks assigned to one device running. One loop owns
// all mutable state: assignments, runtime events, timers and link changes come
// in; plan, a pure function, says what to do; actions run beside the loop and
// report back. It does no I/O itself: what it needs is in this file.
package agent

import (
	"context"
	"io"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// Runtimes finds runtime plugins by name. It outlives any one plugin process.
type Runtimes interface {
	// Runtime returns the running plugin of that name. Errors: sdk.NotFound
	// when the device has no such plugin, sdk.Unavailable while it is down.
	Runtime(name string) (sdk.Runtime, error)
	// RuntimeNames lists the runtimes this device has, up or down.
	RuntimeNames() []string
	// Changes receives the name of a plugin whenever it came up or went
	// down; a full channel drops, so it is a hint to look again.
	Changes() <-chan string
}

// Devices tells what the device plugins found. It outlives any one plugin
// process.
type Devices interface {
	// Inventory is the latest of every device plugin, by the plugin's name. A
	// plugin that is down or being relaunched keeps what it last told, so that
	// a relaunch does not look like unplugged hardware; one whose executable
	// is gone is left out. The devices are shared: do not change them.
	Inventory() []PluginDevices
	// Device returns the devices of the plugin of that name; the answer stays
	// good when the process is replaced. Errors: sdk.NotFound when there is no
	// such device plugin, sdk.Unavailable while it is down.
	Device(plugin string) (sdk.Devices, error)
	// DeviceChanges receives when Inventory answers otherwise than before; a
	// full channel drops, so it is a hint to look again. A plugin causes at
	// most about one a second, however often its inventory changes.
	DeviceChanges() <-chan struct{}
}

// PluginDevices is what one device plugin told.
type PluginDevices struct {
	Plugin string
	// Ready: the plugin is up and these are its devices now. Otherwise they
	// are the last known, perhaps none, and Error says why.
	Ready   bool
	Error   string
	Devices []sdk.Device // by id
}

// Journal persists what the agent must not forget. Everything saved is on
// stable storage when the call returns. Calls come from one goroutine.
type Journal interface {
	// SaveAssignment writes a task's assignment once; a second time with the
	// same task replaces it.
	SaveAssignment(a *wire.Assignment) error
	// Append writes records, all of them with one fsync.
	Append(records ...Record) error
	// ForgetTask removes everything about a task.
	ForgetTask(id string) error
}

// Record is one entry of the append log. Exactly one field but Task is set.
// The latest record of its sort wins at load, per task or per attempt.
type Record struct {
	Task    string         `json:"task,omitempty"`
	Applied *Applied       `json:"applied,omitempty"`
	Desired *Desired       `json:"desired,omitempty"`
	Attempt *AttemptRecord `json:"attempt,omitempty"`
	Status  *StatusRecord  `json:"status,omitempty"`
	// Origin is the incarnation in which the control plane last named the task.
	Origin string `json:"origin,omitempty"`
	Doubt  *Doubt `json:"doubt,omitempty"`
	// Away and Unused are the device's, not a task's.
	Away   *Away   `json:"away,omitempty"`
	Unused *Unused `json:"unused,omitempty"`
}

// Doubt is that saved state was damaged: there may be tasks and wishes that
// the agent does not know of any more. It lasts across restarts, until the
// control plane has sent everything again.
type Doubt struct {
	Problems []string `json:"problems,omitempty"`
	Cleared  bool     `json:"cleared,omitempty"` // it is over
}

// Applied is the last assignment set that was taken over whole, and the latest
// of the control plane's history that anything on the device relies on.
type Applied struct {
	Incarnation string `json:"incarnation"`
	Sequence    uint64 `json:"sequence"`
	Mark
}

// Mark is a moment of the control plane's history, see wire.Mark.
type Mark struct {
	Life     string `json:"life,omitempty"`
	Revision uint64 `json:"revision,omitempty"`
}

// Desired is the control plane's wish for a task, when it is not RUNNING.
type Desired struct {
	Status   string `json:"status"` // STOPPED
	Reason   string `json:"reason,omitempty"`
	Sequence uint64 `json:"sequence"`
	Removed  bool   `json:"removed,omitempty"` // stop, then forget
}

// AttemptRecord is written before an attempt starts, once it runs and after it
// exits.
type AttemptRecord struct {
	Container string `json:"container"`
	Number    int    `json:"number"`
	BootID    string `json:"bootId"`          // of the boot it was started in
	Image     string `json:"image,omitempty"` // normalised reference
	Digest    string `json:"digest,omitempty"`
	// HostPorts are the chosen ports, in the order of the container's mappings.
	HostPorts []int `json:"hostPorts,omitempty"`
	// Devices are the ones the attempt has been given. An agent that knows none
	// leaves them out: a record without them says nothing about devices.
	Devices []DeviceRef `json:"devices,omitempty"`
	// StartedAt is since boot BootID.
	StartedAt time.Duration `json:"startedAt,omitempty"`
	Started   bool          `json:"started,omitempty"` // the runtime has run it
	RuntimeID string        `json:"runtimeId,omitempty"`

	Exited   bool   `json:"exited,omitempty"`
	ExitCode *int   `json:"exitCode,omitempty"` // nil when exited: nobody saw it
	Reason   string `json:"reason,omitempty"`
	// RanFor is how long it ran, as far as this boot saw it.
	RanFor   time.Duration `json:"ranFor,omitempty"`
	Rebooted bool          `json:"rebooted,omitempty"` // ended by a reboot, not by itself
	Removed  bool          `json:"removed,omitempty"`  // proven gone from the runtime
	// Crashes are the short runs in a row before the attempt, once it has exited
	// with it, and NotBefore when the next may start, since boot BootID.
	Crashes   int           `json:"crashes,omitempty"`
	NotBefore time.Duration `json:"notBefore,omitempty"`
	// HaltedAt is when it was told to stop, since boot BootID; 0: it was not.
	HaltedAt time.Duration `json:"haltedAt,omitempty"`
}

// DeviceRef names a device of a plugin.
type DeviceRef struct {
	Plugin string `json:"plugin"`
	ID     string `json:"id"`
}

// StatusRecord is the task's observed status and why it stopped.
type StatusRecord struct {
	LastStatus string `json:"lastStatus"`
	StopCode   string `json:"stopCode,omitempty"`
	Reason     string `json:"reason,omitempty"`
	Acked      bool   `json:"acked,omitempty"` // the control plane has this terminal status
}

// Saved is what a Journal held when it was opened.
type Saved struct {
	Applied Applied
	Away    *Away   // nil: none on record
	Unused  *Unused // the same
	Tasks   []SavedTask
	// Problems are damaged records that were set aside, now or at an earlier
	// start, one sentence each. While there are any, Saved may not be all.
	Problems []string
	// Unwritable says why nothing can be written now; empty when it can.
	Unwritable string
}

// SavedTask is one task as it was persisted.
type SavedTask struct {
	// ID is the task's when its Assignment is nil: damaged, or not to be read.
	// The rest is what is known of it all the same.
	ID         string
	Assignment *wire.Assignment
	Origin     string
	Desired    *Desired
	Status     *StatusRecord
	Attempts   []AttemptRecord // the latest of each container, and older ones not yet removed
}

// Uplink carries levels to the control plane. It keeps the latest of each and
// sends it again on every new session until it is acknowledged; calls never
// block on the network.
type Uplink interface {
	// TaskStatus replaces what is to be said about that task.
	TaskStatus(s *wire.TaskStatus)
	// AckAssignments says everything up to this sequence is persisted.
	AckAssignments(incarnation string, sequence uint64)
}

// Forgetter is an Uplink that can drop the level it keeps for a task, once the
// control plane no longer knows that task. Optional.
type Forgetter interface {
	ForgetTask(id string)
}

// Downlink is what the tunnel calls on the agent. Implemented by *Agent.
type Downlink interface {
	// Held is what Hello says the agent holds.
	Held() (incarnation string, sequence uint64)
	// Assign hands over a received set, complete up to sequence. full: a task
	// not in it does not exist for this incarnation. Blocks until persisted.
	Assign(ctx context.Context, incarnation string, full bool, set []*wire.Assignment, sequence uint64) error
	// Acked says the control plane has this status.
	Acked(taskID string, sequence uint64)
	// Connected says a session was registered (true) or ended.
	Connected(up bool)
	// Logs copies a container's kept output: chunk is called in order.
	Logs(ctx context.Context, r *wire.LogsRequest, chunk func(stream string, data []byte) error) error
}

// Witness is a Downlink that remembers how much of the control plane's history
// it relies on, and tells a control plane that was restored from a backup what
// it holds. Optional.
type Witness interface {
	// Mark is the latest mark seen; the zero one before any.
	Mark() Mark
	// Welcomed comes before anything else of a session. reconcile: the control
	// plane asks for all that is held, once the first set is applied.
	Welcomed(m Mark, reconcile bool)
	// Saw comes before the set or the acknowledgement that carried the mark.
	// False: it is of a session that a control plane started later has
	// superseded, and what carried it counts for nothing.
	Saw(m Mark) bool
	// AssignSettled is Assign for a full set that an operator has made count for
	// all that is held, whoever assigned it.
	AssignSettled(ctx context.Context, incarnation string, set []*wire.Assignment, sequence uint64) error
}

// Holder is an Uplink that can tell what the device holds. Optional.
type Holder interface {
	// Holdings answers Welcomed's wish to reconcile.
	Holdings(hs []*wire.Holding)
}

// Outputs owns the files that attempts write to. Safe for concurrent use.
type Outputs interface {
	// Open makes the two files of an attempt and returns their paths.
	Open(a sdk.Attempt) (stdout, stderr string, err error)
	// Read opens what an attempt wrote to "stdout" or "stderr". Errors:
	// sdk.NotFound when nothing is kept. A reader that is also an io.Seeker
	// makes reading the last lines of a large file cheap.
	Read(a sdk.Attempt, stream string) (io.ReadCloser, error)
	// Forget deletes what the task's attempts wrote.
	Forget(task string) error
}

// Volumes owns the directories behind a task's volumes. Safe for concurrent use.
type Volumes interface {
	// Dir makes and returns the directory of a volume that has no host path.
	Dir(task, volume string, shared bool) (string, error)
	// Host makes sure that a volume's host path exists: a missing one becomes
	// a directory.
	Host(path string) error
	// Forget deletes the task's own volumes.
	Forget(task string) error
}

// Clock is the device's time as far as it can be trusted: how long since boot.
type Clock interface {
	// Since boot, suspend included, never going back (CLOCK_BOOTTIME).
	Now() time.Duration
	// When is the moment in all the clocks there are, for the wire.
	When() *wire.When
	// BootID is constant until the next boot.
	BootID() string
	// After fires once d has passed.
	After(d time.Duration) <-chan time.Time
}
