package sdk

import (
	"context"
	"fmt"
	"time"
)

// Runtime runs the containers of tasks.
//
// Every call may be made at the same time as every other; calls about one
// attempt are never made at the same time as each other, except Exec and
// Stats. A call ends when its context does: the agent then assumes nothing and
// learns the truth from List. Every call but Exec is idempotent, so the agent
// may repeat it after a crash of either side.
//
// Errors carry a Kind (see Error); anything else is treated as KindInternal.
type Runtime interface {
	// Info says what this runtime can do. Constant for the life of the
	// process but for the version of the daemon behind it.
	Info(ctx context.Context) (RuntimeInfo, error)

	// PrepareTask makes what the task's containers share: its cgroup with
	// the task's limits, its directories. Called before the first Pull or
	// Start of a task, again after a restart of the agent.
	PrepareTask(ctx context.Context, t TaskSpec) error
	// RemoveTask undoes PrepareTask. Called once every attempt is removed.
	// A task that is not there is no error.
	RemoveTask(ctx context.Context, task string) error

	// Pull makes an image usable on this device and returns the digest that
	// was resolved: that of the manifest for the platform, "sha256:...". A
	// reference with a digest that is already here needs no network. It calls
	// progress from one goroutine, at most a few times a second, never after
	// it returned. Errors: NotFound (no such image, tag or platform in it),
	// Unauthorized, Invalid (not a reference), Unavailable (try again later).
	Pull(ctx context.Context, r PullRequest, progress func(PullProgress)) (Image, error)

	// Start starts one attempt and returns it running, or already exited if
	// it was that quick. A second call for the same attempt adopts what the
	// first one made, in whatever state it is: it never starts a second
	// process, and after an exit it returns the exit. Errors: Invalid (this
	// spec can never start), NotFound (image or program), Conflict (a host
	// port or name is taken), Unsupported (names the feature), Unavailable.
	// After an error nothing of the attempt is left running, but for a caller
	// whose context ended: once the program may have run it stays, and the
	// next Start adopts it. Undoing it would run it twice.
	Start(ctx context.Context, r StartRequest) (Container, error)

	// Stop sends the stop signal of the attempt's image (SIGTERM unless it
	// says otherwise), waits up to grace, sends SIGKILL, and returns the
	// exited container. An attempt that has exited returns its exit at once.
	// Errors: NotFound when the runtime knows no such attempt.
	Stop(ctx context.Context, a Attempt, grace time.Duration) (Container, error)

	// Remove forgets an exited attempt and everything made for it. A running
	// one is Conflict; one that is not there is no error. The exit is lost
	// with it: the agent has recorded it by then.
	Remove(ctx context.Context, a Attempt) error

	// List returns everything the runtime holds for this agent: every
	// attempt, running or exited, that Remove has not removed, and every
	// task that RemoveTask has not. It is the truth after any restart, so it
	// must fail (Unavailable) rather than leave something out.
	List(ctx context.Context) (Inventory, error)

	// Events calls f with attempts that may have changed, until ctx ends or
	// the stream breaks. Hints only: loss is repaired by List.
	Events(ctx context.Context, f func(Attempt)) error

	// Stats measures one running attempt. Errors: NotFound, Unsupported.
	Stats(ctx context.Context, a Attempt) (Stats, error)

	// Exec runs a command to completion inside a running attempt, as health
	// checks need it. Past r.Timeout the command is killed and the error is
	// KindDeadline; a command that cannot be found exits 127 as in a shell.
	Exec(ctx context.Context, r ExecRequest) (ExecResult, error)
}

// ImageStore is what a Runtime with images may implement beside: the agent
// then removes what it pulled and no longer needs, by age and when the disk
// fills. Without it images stay for ever. Since version 2; package serve tells
// the host of it.
type ImageStore interface {
	// Images lists the images that Pull made, of this agent and no other:
	// what somebody else put there is not in it. It must fail (Unavailable)
	// rather than leave something out.
	Images(ctx context.Context) (ImageInventory, error)

	// RemoveImage removes the image of that digest under every reference Pull
	// kept it by, and what of it no other image needs. When it returns, the
	// space is free or soon will be. Never called at the same time as a Pull.
	// An image that is not there, or is not in Images, is no error and is left
	// alone. Errors: Conflict when a container uses it, whoever's that is.
	RemoveImage(ctx context.Context, digest string) error
}

// ImageInventory is everything of an ImageStore.
type ImageInventory struct {
	Images []StoredImage
	Disk   Disk
}

// StoredImage is an image on this device.
type StoredImage struct {
	Digest     string   // as Pull returned it
	References []string // what Pull kept it by, "REPOSITORY@DIGEST"; tags are not needed
	Bytes      uint64   // on disk, about: what is shared counts for each; 0: unknown
	InUse      bool     // RemoveImage would refuse it
}

// Disk is the file system that images are on.
type Disk struct {
	TotalBytes uint64 // 0: unknown
	FreeBytes  uint64 // for others than root, as df counts
}

// RuntimeInfo is what a runtime can do on this device.
type RuntimeInfo struct {
	Version    string            // of the daemon behind it, or of the plugin
	Images     bool              // containers come from images; false: Pull is never called
	Exec       bool              // Exec works
	Stats      bool              // Stats works
	Networks   []string          // of NetworkBridge, NetworkHost, NetworkNone; first is the default
	Attributes map[string]string // facts for placement, e.g. "containerd.version"
}

// Network modes of a task.
const (
	NetworkBridge = "bridge" // a network namespace per container, ports mapped to the host
	NetworkHost   = "host"
	NetworkNone   = "none"
)

// Attempt identifies one start of one container of a task. Everything a
// runtime keeps is keyed by it and labelled with it.
type Attempt struct {
	Task      string // 32 lower-case hex digits
	Container string // as named in the task definition
	Number    int    // from 1
}

// String is "task/container/number".
func (a Attempt) String() string { return fmt.Sprintf("%s/%s/%d", a.Task, a.Container, a.Number) }

// TaskSpec is what a task's containers share.
type TaskSpec struct {
	ID         string
	Family     string
	Network    string // NetworkBridge, NetworkHost or NetworkNone
	PIDMode    string // "", "task" or "host"
	IPCMode    string // "", "task", "host" or "none"
	Limits     Limits // of all containers together; zero values: none
	Containers []string
}

// Limits of a task or of one container. Zero means no limit unless noted.
type Limits struct {
	CPUShares         uint64 // relative weight, 1024 a core
	CPUQuota          uint64 // microseconds of CPU per 100 ms of wall time
	MemoryBytes       uint64
	MemoryReservation uint64  // bytes
	MemorySwap        *int64  // bytes of swap on top of memory; nil: runtime's default, -1: unlimited
	Swappiness        *uint64 // 0..100
	Pids              int64
}

// PullRequest names an image to fetch.
type PullRequest struct {
	Task        string
	Image       string // as in the task definition; short names mean docker.io as elsewhere
	Credentials *Credentials
	Platform    Platform // zero: the device's own
}

// Credentials for one registry. Never logged: it formats as "[redacted]".
type Credentials struct {
	Username string
	Password string
}

// String hides the secret.
func (Credentials) String() string { return "[redacted]" }

// GoString hides the secret.
func (Credentials) GoString() string { return "[redacted]" }

// Platform in OCI's words: linux, arm64, v8.
type Platform struct {
	OS, Architecture, Variant string
}

// PullProgress counts what a pull has to fetch and what it has; both grow as
// manifests are read.
type PullProgress struct {
	Layers, LayersDone uint64
	Bytes, BytesDone   uint64
}

// Image is a pulled image.
type Image struct {
	Reference string // normalised, with registry and tag
	Digest    string // "sha256:<64 hex>", of the platform's manifest
	Bytes     uint64 // compressed size of what was needed, fetched now or before
}

// StartRequest is one attempt and all that is needed to start it.
type StartRequest struct {
	Attempt Attempt
	Network string // the task's
	Spec    ContainerSpec
	// Stdout and Stderr are paths of existing files or FIFOs that the
	// container's output is appended to, outliving plugin and agent.
	Stdout, Stderr string
}

// ContainerSpec is a container in runtime-neutral words.
type ContainerSpec struct {
	Image            string   // normalised reference from Pull; empty for runtimes without images
	Digest           string   // digest from Pull
	EntryPoint       []string // nil: the image's
	Command          []string // nil: the image's, unless EntryPoint is given
	Env              []string // NAME=value, in order; later wins over the image's
	WorkingDir       string   // "": the image's
	User             string   // uid, uid:gid, name or name:group; "": the image's
	Hostname         string
	Limits           Limits
	Mounts           []Mount
	Ports            []PortMapping // bridge network only
	Ulimits          []Ulimit
	Devices          []HostDevice
	CDIDevices       []string // injected after everything else; fully qualified names
	Hooks            []Hook
	AdditionalGIDs   []uint32 // groups of the first process, beside the image's
	DeviceRules      []DeviceRule
	CapabilitiesAdd  []string // "NET_ADMIN" or "ALL", without CAP_
	CapabilitiesDrop []string
	Privileged       bool
	ReadOnlyRoot     bool
	DNSServers       []string
	DNSSearch        []string
	ExtraHosts       []HostEntry
	Init             bool // a tiny init reaps zombies and forwards signals
	Terminal         bool // allocate a TTY; stdout then carries both streams
	StdinOpen        bool
	ShmBytes         uint64 // size of /dev/shm; 0: 64 MiB
	Sysctls          map[string]string
	Labels           map[string]string
	SecurityOptions  []string // "no-new-privileges", "apparmor:PROFILE", "label:..."
}

// HostEntry is a line of /etc/hosts.
type HostEntry struct{ Name, Address string }

// Mount is a bind or tmpfs mount inside the container.
type Mount struct {
	Type     string // "bind" or "tmpfs"
	Source   string // bind: absolute host path, which exists
	Target   string // absolute path in the container
	ReadOnly bool
	Options  []string // tmpfs: "size=64m", "mode=1777", ...
}

// PortMapping maps a port of the host to one of the container.
type PortMapping struct {
	Name          string
	Protocol      string // "tcp" or "udp"
	ContainerPort int
	HostPort      int    // chosen before Start: never 0
	HostIP        string // "": every address
}

// Ulimit is an rlimit by its lower-case name without RLIMIT_, e.g. "nofile".
type Ulimit struct {
	Name       string
	Soft, Hard uint64
}

// HostDevice gives a device node to the container.
type HostDevice struct {
	HostPath      string
	ContainerPath string // "": as HostPath
	Permissions   string // subset of "rwm"; "": all
}

// State of an attempt in its runtime.
type State string

// States.
const (
	StateCreated State = "created" // made but never started; Start will start it
	StateRunning State = "running"
	StateExited  State = "exited"
)

// Container is an attempt as its runtime sees it.
type Container struct {
	Attempt   Attempt
	RuntimeID string // the runtime's own name for it
	State     State
	PID       int // of the first process, in the host's namespace; 0 unless running
	// ExitCode is set when exited, 128+n after signal n; nil when exited but
	// nobody saw the exit (a reboot), and Reason then says so.
	ExitCode    *int
	Reason      string
	OOMKilled   bool
	ImageDigest string
	Ports       []PortMapping // as bound
	IP          string        // bridge network: the container's address
	// RanFor is how long an exited one ran, by whatever the runtime itself
	// knows; 0: it cannot say. List alone tells it. It may have been taken from
	// a wall clock that was set: it can lengthen the back-off, and no more.
	RanFor time.Duration
}

// Inventory is everything a runtime holds for this agent.
type Inventory struct {
	Containers []Container
	Tasks      []string // prepared and not removed
}

// Stats of a running attempt.
type Stats struct {
	CPUNanos         uint64 // since its start
	MemoryBytes      uint64
	MemoryLimitBytes uint64 // 0: none
	Pids             uint64
}

// ExecRequest is a command to run inside a running attempt.
type ExecRequest struct {
	Attempt   Attempt
	Command   []string
	Env       []string // added to the container's
	Timeout   time.Duration
	MaxOutput int // bytes of combined output kept, the last ones; 0: 4096
}

// ExecResult is how a command ended.
type ExecResult struct {
	ExitCode int
	Output   []byte // stdout and stderr together
}
