// Package hub is the control plane's end of the tunnels: it takes sessions from
// the carriers, enrols devices, keeps one session per instance, sends it what
// it should run and passes on what it reports. All knowledge is behind
// controlplane.Devices; the hub holds nothing that outlives a session but when
// each instance was last heard of.
package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// Limits. Each bounds what one peer can take from the others.
const (
	maxPending    = 4096           // sessions that have not registered yet
	maxFromOne    = maxPending / 2 // of them from one source address, which may be a NAT before a fleet
	maxOpening    = 16             // streams until one is the control stream
	helloTimeout  = 10 * time.Second
	callTimeout   = 30 * time.Second // one call into the domain
	writeTimeout  = 30 * time.Second // one frame to a slow device
	lastWords     = time.Second      // to deliver a Goodbye
	stopTimeout   = 5 * time.Second  // to end every session at shutdown
	outFrames     = 64               // queued to one device
	inStatuses    = 8                // queued from one device, before flow control stops it
	maxLate       = 1024             // tasks whose status waits for the store
	maxRequests   = 32               // open to one device
	answerTimeout = 10 * time.Second // to an answer's first frame: less than callers wait
	chunkTimeout  = 30 * time.Second // between two frames of an answer
	overloadHint  = 5 * time.Second  // RetryAfter when pending is full
	shutdownHint  = 500 * time.Millisecond
	drainTimeout  = 10 * time.Second // to requests under way on a session that was replaced
)

// Acceptor yields sessions of agents: *carrier.Listener.
type Acceptor interface {
	Accept(ctx context.Context) (wire.Session, error)
}

// Config is what a Hub needs.
type Config struct {
	Devices   controlplane.Devices
	Version   string   // of this control plane, told to devices
	Advertise []string // addresses told to devices, host:port
	Logger    *slog.Logger
	Now       func() time.Time // nil: time.Now
	// Peers lets devices hear at once of a restart after a crash; nil: they
	// find out by themselves.
	Peers Peers
	// Registrations is how many devices may register in a second; 0: 500 for
	// each CPU. The others are asked to come back.
	Registrations int
}

// Hub implements controlplane.Tunnels.
type Hub struct {
	cfg     Config
	devices controlplane.Devices
	log     *slog.Logger
	pending chan struct{}
	fresh   *carrier.Sources // the same places, by source
	gate    *gate

	mu       sync.Mutex
	sessions map[string]*session  // by instance
	rivals   map[string]*rivals   // by instance, of those that had any
	seen     map[string]time.Time // by instance, for those without a session
}

var _ controlplane.Tunnels = (*Hub)(nil)

// New makes a Hub; Serve makes it work.
func New(cfg Config) *Hub {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Hub{
		cfg: cfg, devices: cfg.Devices, log: cfg.Logger,
		pending:  make(chan struct{}, maxPending),
		fresh:    carrier.NewSources(maxFromOne),
		gate:     newGate(cfg.Registrations, cfg.Logger),
		sessions: map[string]*session{},
		rivals:   map[string]*rivals{},
		seen:     map[string]time.Time{},
	}
}

// Serve takes sessions until ctx ends, then tells every device to come back
// later and returns nil once all sessions have ended.
func (h *Hub) Serve(ctx context.Context, from Acceptor) error {
	// Sessions end by a cause of their own, so that each is told why.
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	var all sync.WaitGroup
	if n, ok := from.(Nudger); ok && h.cfg.Peers != nil {
		all.Go(func() { h.keepPeers(ctx, n) })
	}
	var err error
	for {
		var s wire.Session
		if s, err = from.Accept(ctx); err != nil {
			break
		}
		free, ok := h.fresh.Take(s.RemoteAddr())
		if !ok {
			all.Go(func() { s.Close(wire.CodeOverloaded, "too many devices are registering from one address, try again") })
			continue
		}
		select {
		case h.pending <- struct{}{}:
			all.Go(func() { h.handle(work, s, free) })
		default:
			free()
			all.Go(func() { s.Close(wire.CodeOverloaded, "too many devices are registering, try again") })
		}
	}
	gone := wire.Failf(wire.CodeShutdown, "the control plane is shutting down")
	gone.RetryAfterMs = uint32(shutdownHint.Milliseconds())
	cancel(&ending{failure: gone})
	if !waitFor(&all, stopTimeout) {
		h.log.Warn("some sessions did not end in time", "after", stopTimeout)
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("accept sessions: %w", err)
}

// handle owns one session from its first stream to its end.
func (h *Hub) handle(ctx context.Context, s wire.Session, free func()) {
	registered := sync.OnceFunc(func() { <-h.pending; free() })
	defer registered()
	// Whatever happens below, nothing of this session stays.
	defer s.Close("", "")
	log := h.log.With("peer", s.RemoteAddr().String(), "transport", s.Transport())
	if s.Protocol() == wire.ProtocolEnroll {
		h.enroll(ctx, s, log)
		return
	}
	h.tunnel(ctx, s, log, registered)
}

// Session implements controlplane.Tunnels.
func (h *Hub) Session(instance string) (controlplane.Session, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.sessions[instance]
	if !ok {
		return controlplane.Session{}, false
	}
	return controlplane.Session{
		Transport:   s.wire.Transport(),
		RemoteAddr:  s.wire.RemoteAddr().String(),
		ConnectedAt: s.since,
		AgentNonce:  s.nonce,
	}, true
}

// LastSeen implements controlplane.Tunnels. A live session counts as heard
// now: the carrier ends one that has been silent for wire.Idle.
func (h *Hub) LastSeen(instance string) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.sessions[instance]; ok {
		return h.cfg.Now()
	}
	return h.seen[instance]
}

// Disconnect implements controlplane.Tunnels.
func (h *Hub) Disconnect(instance string, code, message string) {
	h.mu.Lock()
	s, ok := h.sessions[instance]
	h.mu.Unlock()
	if ok {
		h.drop(s)
		s.end(wire.Failf(code, "%s", message))
	}
}

// install makes s the session of its instance and ends the one before. False:
// the same agent has registered again since it asked for this one, which it
// therefore means no longer.
func (h *Hub) install(s *session) bool {
	h.mu.Lock()
	old := h.sessions[s.instance]
	same := old != nil && old.nonce == s.nonce
	if same && old.ordinal > s.ordinal {
		h.mu.Unlock()
		return false
	}
	s.before = old
	h.sessions[s.instance] = s
	if h.cfg.Peers != nil {
		h.cfg.Peers.Put(s.instance, whereabouts(s.wire))
	}
	h.mu.Unlock()
	if old == nil {
		return true
	}
	if old.nonce != s.nonce {
		h.replaced(s.instance, old.nonce)
	}
	// An agent that moves to another way lets what it was asked over the old
	// one finish; any other is gone, or an impostor.
	failure := wire.Failf(wire.CodeReplaced, "a newer session of this instance took over, from %s", s.wire.RemoteAddr())
	old.cancel(&ending{failure: failure, drain: same})
	return true
}

// drop takes s out, unless a newer session has its place.
func (h *Hub) drop(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sessions[s.instance] == s {
		delete(h.sessions, s.instance)
		// Told to come back later, it may not have heard: the next process
		// nudges it.
		if h.cfg.Peers != nil && !s.shutDown() {
			h.cfg.Peers.Put(s.instance, netip.AddrPort{})
		}
	}
	h.seen[s.instance] = h.cfg.Now()
}

// ending is the cause with which a session's context ends when this side wants
// it to: what the Goodbye says.
type ending struct {
	failure *wire.Failure
	drain   bool // requests under way may finish
}

// draining tells whether the session ends but its requests may finish.
func (s *session) draining() bool {
	var e *ending
	return errors.As(context.Cause(s.ctx), &e) && e.drain
}

// shutDown tells whether the session ends because this process does.
func (s *session) shutDown() bool {
	var e *ending
	return errors.As(context.Cause(s.ctx), &e) && e.failure.Code == wire.CodeShutdown
}

func (e *ending) Error() string { return e.failure.Code + ": " + e.failure.Message }

// failureOf says to a device why the domain refused. The codes of the domain
// and of the wire share their words; what has none is not for the device.
func failureOf(err error, log *slog.Logger, doing string) *wire.Failure {
	var e *controlplane.Error
	code := controlplane.CodeOf(err)
	switch {
	case code == controlplane.Conflict || code == "":
		log.Error(doing, "err", err)
		return wire.Failf(wire.CodeUnavailable, "the control plane could not do it now, try again")
	case errors.As(err, &e):
		return wire.Failf(string(code), "%s", e.Message)
	}
	return wire.Failf(string(code), "%s", err)
}

func waitFor(wg *sync.WaitGroup, d time.Duration) bool {
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}
