// Package wire is the protocol between an agent and a control plane: frames,
// failure codes, activation codes, and the seam (Session, Stream) behind which
// package carrier moves bytes.
//
// # Carriers and sessions
//
// The agent dials out, over QUIC or over TLS 1.3 on TCP, to one port. Both
// ends name what they speak by ALPN: ProtocolTunnel for the tunnel,
// ProtocolEnroll for enrolment. The agent trusts a server whose certificate is
// signed by the CA whose public key hashes to its Pin; names and validity times
// are ignored, because device clocks cannot be trusted. The server asks for a
// client certificate and looks at nothing but its public key.
//
// A session is disposable: any failure ends it, and the next one starts from
// levels. Nothing is remembered from one to the next but what Hello says.
//
// # Silence and restarts
//
// Over QUIC the agent's side alone keeps an idle session alive, with a packet
// every KeepAlive; either side gives one up after Idle. An agent that doubts
// sends a Ping at once and takes its session for lost when 7 s bring no answer.
// It doubts when what it sent stays unanswered for a few seconds, and when it is
// nudged: a control plane that was killed and started again sends, from its UDP
// port, one small datagram that is not QUIC ("\x00belay nudge 1\n") to where
// each QUIC session of its last life was. The Ping then meets a stateless reset,
// and the agent dials again without waiting. Whoever forges a nudge can cause a
// Ping every 3 s and nothing else; agents that do not know nudges ignore them.
// Over TCP there is no need: the kernel resets what it does not know.
//
// # Knocks
//
// Before a handshake over QUIC an agent that has had no answer to its first try,
// or whose session has just ended, asks by one small datagram whether the control
// plane is there and when it has time; package carrier says what is in it and in
// the answer. So waiting for a control plane costs a metered link little, and
// thousands that wait for the same one come one after the other. The answer
// proves nothing: what follows is the handshake, and an agent that gets none
// begins a handshake all the same now and then. A control plane that does not
// know knocks is reached that way, or over TCP.
//
// # Several ways, one session
//
// An agent may dial several ways at once, and may dial others while its session
// lives, because that is in doubt or because QUIC may pass again; what has shaken
// hands costs little, and one session at a time says Hello. A registration takes
// the place of the session before: that is told Goodbye (replaced), and nothing
// it had queued reaches the store after anything of its successor. Where both
// are of one start of the agent, requests under way on the old one may finish
// for 10 s. Hello's ordinal counts the Hellos of a start of the agent: one that
// is handled late is refused (replaced) when a later one has registered already.
//
// # Admission
//
// A control plane takes so many registrations and enrolments a second; the
// others are refused (overloaded) with a retry_after_ms of their own, spread
// over as long as the backlog takes. An agent does not ask again sooner, nor
// waits longer than a minute for it. Who is registered is never sent away. One
// source address (an IPv6 network of 64 bits) may hold half of the places of
// sessions that have not registered.
//
// # Frames
//
// A stream carries frames: four bytes of length, big-endian, then that many
// bytes of a protobuf Frame, at most MaxFrame. Whoever opens a stream sends
// Open first. A receiver ignores a frame whose body it does not know and fields
// it does not know, and abandons a stream whose type it does not know; the
// session goes on. Bytes that are no frame end the session.
//
// # Streams
//
//   - CONTROL: opened by the agent, once. Hello is answered by Welcome; with a
//     failure in it the session is over. Then the control plane sends
//     Assignments, one a task, and EndOfSet; later changes come the same way,
//     as increments unless EndOfSet says full. The agent answers AssignmentAck
//     once a set is persisted. The agent sends TaskStatus, the latest of each
//     task, again on every new session until a StatusAck carries its sequence.
//     Facts go whole whenever they change. Ping is answered by Pong from the
//     other side at once, in order with what came before it. Goodbye from the
//     control plane ends the session and says why.
//   - REQUEST: opened by the control plane. One Request; the agent answers
//     with Chunks or a Reply, then Done. The asker sends nothing more; when its
//     direction ends before Done it no longer wants the answer.
//
// No stream depends on half-close: ends are marked by frames (Done, Goodbye),
// because yamux, which carries streams over TCP, can only close both ways.
//
// An enrolment session has one stream: Open (CONTROL), EnrollRequest, then
// EnrollResponse from the control plane, which closes the session.
//
// # Capabilities
//
// What an agent can do beyond version 1 it names in Hello, and a control plane
// asks nothing of it that it did not name:
//
//   - devices: it tells its devices in Facts, chooses devices for the
//     DeviceRequests of a task's containers, and tells the choice in their
//     status. An agent without it would start the containers without devices,
//     so it is sent no task with requests. However fast an inventory changes,
//     it is the reason of one Facts in 3 s, and of ever fewer while it goes on.
//   - disconnect: it stops a task whose spec has disconnect_stop_after_s once it
//     has been without a registered session for so long. An agent without it
//     would let the task run, so it is sent no such task.
//   - reconcile: it remembers the Mark of the latest of the control plane's
//     history that it relies on (a set it applied, a final status that was
//     acknowledged) and says it in Hello. When Welcome asks to reconcile, it
//     persists the first set of the session and the Mark with it, then tells
//     all it holds, one Holding a task and EndOfHoldings, and each status again.
//     A set that is settled and full counts for whatever it holds.
//
// # Restores and copies
//
// A control plane whose store lacks what a device relies on was restored from a
// backup. It then sends that device nothing but wishes to stop and tasks that
// were made since, in sets that are never full, until an operator has decided;
// the set that follows is full and settled.
//
// Two machines that use one key at the same time are told apart by the hash of
// their machine, their boot and the agent's nonce. A control plane that meets a
// second one pings the first: when that answers, the second is refused with
// CodeCloned, and goes on asking slowly.
//
// # Versions
//
// Version is one integer. Each side says its own, both then speak the lower.
// An agent works with every newer control plane, always; a control plane
// serves every agent from version 1 on. History:
//
//   - 1 (2026-11): enrolment; hello and welcome; assignments, full and
//     incremental; task status; facts; ping; logs by request stream.
package wire

import "time"

// Version is the protocol version this build speaks. See the package comment
// for what each one brought.
const Version = 1

// CapabilityDevices is the one of agents that give devices to containers.
const CapabilityDevices = "devices"

// CapabilityDisconnect is the one of agents that stop tasks which must not
// outlive their device's connection for long.
const CapabilityDisconnect = "disconnect"

// CapabilityReconcile is the one of agents that tell what they hold.
const CapabilityReconcile = "reconcile"

// ALPN names.
const (
	ProtocolTunnel = "belay/1"
	ProtocolEnroll = "belay-enroll/1"
)

// Limits and times both sides keep to.
const (
	// MaxFrame is the size of the largest frame, without its length.
	MaxFrame = 4 << 20
	// MaxFirstFrame bounds what is read from a peer that has not registered.
	MaxFirstFrame = 256 << 10

	// KeepAlive is how often the agent's side shows that the session lives.
	KeepAlive = 25 * time.Second
	// KeepAliveTCP is the same over TCP, where it takes three packets of 228
	// bytes in all, and where NATs remember for hours what they forget of UDP
	// within a minute.
	KeepAliveTCP = 40 * time.Second
	// Idle is how long a silent session is kept.
	Idle = 75 * time.Second
)
