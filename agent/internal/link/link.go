// Package link is the device's end of the tunnel: it enrols the device, dials
// the control plane for as long as the agent runs, and carries levels both
// ways. A session is disposable. What has to reach the control plane is kept
// here as the latest of each sort and sent on every new session until it is
// acknowledged; what comes from it goes to agent.Downlink.
package link

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// TransportAuto tries QUIC first and falls back to TCP.
const TransportAuto = "auto"

// Config is what a Link needs.
type Config struct {
	InstanceID string
	Key        crypto.Signer // the device's
	Pins       []wire.Pin
	Addresses  []string // host:port, in order of preference
	Transport  string   // TransportAuto (default), "quic" or "tcp"

	AgentVersion    string
	HashedMachineID string
	Capabilities    []string
	Facts           *wire.Facts // SetFacts replaces them
	Clock           agent.Clock
	Nonce           string // of this start of the agent; "": random

	// Watch has a loop watched until done is called: it receives from pulse
	// whenever it waits, and is stuck when it has not for deadline. Nil: none is.
	Watch func(name string, deadline time.Duration) (pulse <-chan struct{}, done func())
	// Mind has a loop watched that waits in calls: it says when it is busy, and
	// is stuck when one piece of work takes longer than deadline. Nil: none is.
	Mind func(name string, deadline time.Duration) (busy func(bool), done func())
	// Remember is told the control plane's addresses when they change. May
	// be nil.
	Remember func(addresses []string)
	// Proxy is for TCP; nil: directly.
	Proxy *carrier.Proxy
	// Known are addresses of names from an earlier run, for when there is no
	// DNS; Resolved is told when they change. Both may be nil.
	Known    map[string][]netip.Addr
	Resolved func(known map[string][]netip.Addr)
	// QUIC is tried beside a session over TCP after ProbeFirst, then after
	// twice as long each time, up to ProbeMost. 0: 1 and 30 minutes.
	ProbeFirst, ProbeMost time.Duration
	Logger                *slog.Logger

	dial func(ctx context.Context, transport, address string) (wire.Session, error) // for tests
	rand func() float64                                                             // [0, 1), for tests
}

// States of a link.
const (
	StateConnecting = "connecting" // dialling or registering
	StateConnected  = "connected"
	StateWaiting    = "waiting" // between two tries
)

// Status is what the local API tells of the link.
type Status struct {
	State     string    `json:"state"`
	Transport string    `json:"transport,omitempty"` // when connected
	Address   string    `json:"address,omitempty"`   // when connected
	Proxy     string    `json:"proxy,omitempty"`     // when connected through one
	Since     time.Time `json:"since"`               // connected, or not
	LastError string    `json:"lastError,omitempty"`
	Refused   bool      `json:"refused,omitempty"` // LastError is the control plane's own answer
	NextTry   time.Time `json:"nextTry,omitzero"`  // when waiting
	Instance  string    `json:"instance"`
	Control   string    `json:"controlVersion,omitempty"`
}

// Link implements agent.Uplink.
type Link struct {
	cfg  Config
	cert tls.Certificate
	log  *slog.Logger
	down agent.Downlink

	mu        sync.Mutex
	addresses []string // the preferred one first
	noQUIC    bool     // TCP was needed last
	ordinal   uint64   // Hellos said so far
	resolver  *carrier.Resolver
	status    Status
	statuses  map[string]*wire.TaskStatus // latest not acknowledged, by task
	facts     *wire.Facts
	factsGen  int
	ack       ackLevel
	held      []*wire.Holding // until a session has them
	heldGen   int
	wake      chan struct{} // cap 1: there may be something to send

	changed chan string   // cap 1: the network, and why
	rebuild chan struct{} // cap 1
}

// ackLevel is how far assignments are persisted.
type ackLevel struct {
	incarnation string
	sequence    uint64
}

var (
	_ agent.Uplink    = (*Link)(nil)
	_ agent.Forgetter = (*Link)(nil)
	_ agent.Holder    = (*Link)(nil)
)

// New makes a Link; Attach and then Run make it work.
func New(cfg Config) (*Link, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Transport == "" {
		cfg.Transport = TransportAuto
	}
	if err := CheckTransport(cfg.Transport); err != nil {
		return nil, err
	}
	if cfg.ProbeFirst <= 0 {
		cfg.ProbeFirst = probeFirst
	}
	if cfg.ProbeMost <= 0 {
		cfg.ProbeMost = probeMost
	}
	cfg.ProbeMost = max(cfg.ProbeMost, cfg.ProbeFirst)
	if len(cfg.Addresses) == 0 {
		return nil, errors.New("no address of a control plane: enrol this device again")
	}
	for _, a := range cfg.Addresses {
		if err := wire.CheckAddress(a); err != nil {
			return nil, err
		}
	}
	if cfg.Nonce == "" {
		b := make([]byte, 16)
		_, _ = rand.Read(b) // never fails
		cfg.Nonce = hex.EncodeToString(b)
	}
	l := &Link{
		cfg: cfg, log: cfg.Logger, addresses: slices.Clone(cfg.Addresses),
		statuses: map[string]*wire.TaskStatus{}, facts: cfg.Facts,
		wake: make(chan struct{}, 1), changed: make(chan string, 1), rebuild: make(chan struct{}, 1),
		resolver: carrier.NewResolver(cfg.Known, cfg.Resolved),
		status:   Status{State: StateConnecting, Since: time.Now(), Instance: cfg.InstanceID},
	}
	if cfg.Key != nil {
		var err error
		if l.cert, err = carrier.SelfSigned(cfg.Key); err != nil {
			return nil, err
		}
	}
	if l.cfg.dial == nil {
		l.cfg.dial = l.dialCarrier
	}
	return l, nil
}

// CheckTransport tells whether t is one of auto, quic and tcp.
func CheckTransport(t string) error {
	switch t {
	case TransportAuto, wire.TransportQUIC, wire.TransportTCP:
		return nil
	}
	return fmt.Errorf("transport %q: want %s, %s or %s", t, TransportAuto, wire.TransportQUIC, wire.TransportTCP)
}

// Attach names who gets what the control plane sends. Once, before Run.
func (l *Link) Attach(d agent.Downlink) { l.down = d }

// TaskStatus implements agent.Uplink. s is not changed by either side after.
func (l *Link) TaskStatus(s *wire.TaskStatus) {
	l.mu.Lock()
	if old := l.statuses[s.TaskId]; old == nil || old.Sequence <= s.Sequence {
		l.statuses[s.TaskId] = s
	}
	l.mu.Unlock()
	l.nudge()
}

// ForgetTask implements agent.Forgetter: nobody will acknowledge a status of a
// task that the control plane no longer knows.
func (l *Link) ForgetTask(id string) {
	l.mu.Lock()
	delete(l.statuses, id)
	l.mu.Unlock()
	l.nudge() // the session forgets that it said it
}

// AckAssignments implements agent.Uplink.
func (l *Link) AckAssignments(incarnation string, sequence uint64) {
	l.mu.Lock()
	if l.ack.incarnation != incarnation || l.ack.sequence < sequence {
		l.ack = ackLevel{incarnation, sequence}
	}
	l.mu.Unlock()
	l.nudge()
}

// SetFacts replaces what the device tells of itself. f is not changed after.
func (l *Link) SetFacts(f *wire.Facts) {
	l.mu.Lock()
	l.facts = f
	l.factsGen++
	l.mu.Unlock()
	l.nudge()
}

// Status tells how the link does.
func (l *Link) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status
}

func (l *Link) nudge() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// acked forgets a status once the control plane has it.
func (l *Link) acked(sequence uint64) {
	l.mu.Lock()
	task := ""
	for id, s := range l.statuses {
		if s.Sequence == sequence {
			task = id
			delete(l.statuses, id)
			break
		}
	}
	l.mu.Unlock()
	if task != "" {
		l.down.Acked(task, sequence)
	}
}

func (l *Link) setStatus(edit func(*Status)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.status.State == StateConnected
	edit(&l.status)
	if is := l.status.State == StateConnected; is != was {
		l.status.Since = time.Now()
	}
}

// answerTime bounds the question whether one address answers.
const answerTime = 10 * time.Second

// Answers tells whether a control plane's port takes TCP connections, asked by
// nothing that the link uses or remembers but the addresses.
func (l *Link) Answers(ctx context.Context) bool {
	l.mu.Lock()
	addresses := slices.Clone(l.addresses)
	l.mu.Unlock()
	for _, a := range addresses[:min(len(addresses), raceWidth)] {
		asked, cancel := context.WithTimeout(ctx, answerTime)
		err := carrier.Reach(asked, a, l.cfg.Proxy)
		cancel()
		if err == nil {
			return true
		}
	}
	return false
}

func (l *Link) dialCarrier(ctx context.Context, transport, address string) (wire.Session, error) {
	l.mu.Lock()
	resolver := l.resolver
	l.mu.Unlock()
	word := wordsOf(ctx)
	return carrier.Dial(ctx, carrier.DialConfig{
		Address: address, Transport: transport, Protocol: wire.ProtocolTunnel,
		Certificate: l.cert, Pins: l.cfg.Pins, Proxy: l.cfg.Proxy, Resolver: resolver,
		Answered: word.answered, Knock: word.let != nil, Let: word.let,
	})
}
