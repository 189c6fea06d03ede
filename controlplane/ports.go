package controlplane

import (
	"context"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Devices is what the hub, which carries the tunnels, asks of the domain.
// Implemented by *Plane.
type Devices interface {
	// Incarnation names the store: what one made from nothing has anew.
	Incarnation() string
	// Mark is the present moment of the store's history: what a call before
	// it returned is in the store by then. life is "" while this start could
	// not be written down.
	Mark() (life string, revision int64)
	// Meet compares how far a device says it is with the store. When the store
	// has lost what the device relies on, it notes that for an operator, and
	// sees to it that Assignments has nothing more for the device than wishes
	// to stop and tasks made since. reconciles: the device can tell what it
	// holds.
	Meet(ctx context.Context, instance string, at Position, reconciles bool) (Greeting, error)
	// ReportHoldings takes in all that a device holds, as Meet asked for.
	ReportHoldings(ctx context.Context, instance string, hs []*wire.Holding) error
	// ReportDuplicate notes another machine that uses an instance's key.
	ReportDuplicate(ctx context.Context, instance string, d Duplicate) error
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
	// NotFound: the caller then tells the device to forget it. Not so in
	// conflict: there it is Unavailable until the holdings are reported, and
	// kept with them from then on.
	ReportTask(ctx context.Context, instance string, s *wire.TaskStatus) error
	// Assignments returns what the instance should have, as of now: only what
	// changed after sequence when incarnation is this one's and sequence is
	// not ahead of it, else everything (Full). In conflict it is never Full.
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
	Full bool
	// Settled: an operator has decided that the set, which is Full, counts for
	// everything the device holds.
	Settled  bool
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
	// Rebind ends the instance's session and forgets which machines were
	// refused its place.
	Rebind(instance string)
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
