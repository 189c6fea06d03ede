package controlplane

import (
	"context"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Devices is what the hub, which carries the tunnels, asks of the domain.
// Implemented by *Plane.
type Devices interface {
	// Incarnation names this life of the store; a restore makes a new one.
	Incarnation() string
	// Enroll turns an activation and a device's key into an instance. The
	// same key again is the same instance and takes no further use of the
	// activation. Errors: NotFound (no such activation, or deleted), Expired,
	// Exhausted (used up), Unauthenticated (wrong secret), Precondition (the
	// key belongs to a deregistered instance), InvalidArgument.
	Enroll(ctx context.Context, e Enrollment) (i Instance, already bool, err error)
	// Authenticate finds the instance a session says it is and checks that
	// it holds the key. Errors: NotFound, Unauthenticated (another key),
	// Denied (deregistered).
	Authenticate(ctx context.Context, instance, keyFingerprint string) (Instance, error)
	// ReportFacts stores what the device tells of itself, if it changed.
	ReportFacts(ctx context.Context, instance string, h Hello) error
	// ReportTask merges an observed status into the task, never backwards,
	// and returns once it is stored. A task that is not this instance's is
	// NotFound: the caller then tells the device to forget it.
	ReportTask(ctx context.Context, instance string, s *wire.TaskStatus) error
	// Assignments returns what the instance should have, as of now: only what
	// changed after sequence when incarnation is this one's and sequence is
	// not ahead of it, else everything (Full).
	Assignments(ctx context.Context, instance, incarnation string, sequence uint64) (AssignmentSet, error)
	// WatchInstance calls f, never concurrently, after each change of the
	// instance's record or assignments, coalesced, until ctx ends.
	WatchInstance(ctx context.Context, instance string, f func()) error
}

// Enrollment is a device asking to become an instance.
type Enrollment struct {
	ActivationID    string
	Secret          []byte
	KeyFingerprint  string // hex SHA-256 of the public key's SubjectPublicKeyInfo
	HashedMachineID string
	Hostname        string
	AgentVersion    string
	Facts           Facts
}

// Hello is what a device says of itself on registering a session.
type Hello struct {
	AgentVersion    string
	Hostname        string
	HashedMachineID string
	Capabilities    []string
	Facts           Facts
}

// AssignmentSet is a complete set of assignments up to Sequence.
type AssignmentSet struct {
	Full     bool
	Set      []*wire.Assignment
	Sequence uint64
}

// Tunnels is what the domain and the API ask of the hub.
type Tunnels interface {
	// Session tells of the instance's live session, if it has one here.
	Session(instance string) (Session, bool)
	// LastSeen is when anything was last heard of it since this process
	// started; zero when nothing was.
	LastSeen(instance string) time.Time
	// Disconnect ends the instance's session at once, telling it why.
	Disconnect(instance string, code, message string)
	// Logs reads a container's output from its device. Errors: Unavailable
	// when it is not connected.
	Logs(ctx context.Context, instance string, r *wire.LogsRequest, chunk func(*wire.Chunk) error) error
}

// Session is a live tunnel.
type Session struct {
	Transport   string // "quic" or "tcp"
	RemoteAddr  string
	ConnectedAt time.Time
	AgentNonce  string
}
