package controlplane

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Config is what a Plane stands on. All fields but Tunnels are needed.
type Config struct {
	Store  Store
	Now    func() time.Time // the server's clock: the only one expiry is judged by
	Rand   io.Reader        // cryptographic, safe for concurrent use
	Place  PlaceFunc
	Logger *slog.Logger
	// Pepper is a secret of this control plane, kept outside the store, from
	// which the secrets of activations are derived, so that a create repeated
	// with the same client token can show the same code without storing it.
	Pepper []byte
	// Addresses and Pin go into activation codes: where devices find this
	// control plane, and what they know its CA by.
	Addresses []string
	Pin       wire.Pin
}

// Plane is a control plane without its transports: the operations of the
// operator API and of the hub, over a Store. It keeps the state in memory
// from a watch and reads from there; it writes through transactions that
// compare what was read.
type Plane struct {
	cfg         Config
	log         *slog.Logger
	store       Store
	state       *state
	tunnels     Tunnels
	incarnation string
	lives       lives

	// enrolling serialises enrolments, and contended the second and later
	// tries of everything else: those who lost a race here queue up instead
	// of losing the next one to each other.
	enrolling, contended, beginning semaphore
}

var _ Devices = (*Plane)(nil)

const (
	// operationTimeout bounds one operation, whatever its caller allows.
	operationTimeout = 15 * time.Second
	// syncWait bounds waiting for memory to reach a revision.
	syncWait = 5 * time.Second
	// maxTries is how often a write that lost a race is tried again.
	maxTries = 40
)

// Open reads the store, making its incarnation and the default cluster when
// it is new, and returns a Plane that answers as soon as Run runs.
func Open(ctx context.Context, cfg Config) (*Plane, error) {
	p := &Plane{
		cfg: cfg, log: cfg.Logger, store: cfg.Store, state: newState(cfg.Logger),
		tunnels: noTunnels{}, enrolling: newSemaphore(), contended: newSemaphore(), beginning: newSemaphore(),
	}
	if err := p.initialise(ctx); err != nil {
		return nil, fmt.Errorf("initialising the store: %w", err)
	}
	if err := p.begin(ctx); err != nil {
		// A store that takes no write for now can still be read; the first
		// write makes up for it.
		p.log.Warn("this start is not in the store yet", "error", err)
	}
	if err := p.load(ctx); err != nil {
		return nil, fmt.Errorf("reading the store: %w", err)
	}
	return p, nil
}

// SetTunnels joins the hub to the plane; before Run, since each needs the other.
func (p *Plane) SetTunnels(t Tunnels) { p.tunnels = t }

// Incarnation implements Devices.
func (p *Plane) Incarnation() string { return p.incarnation }

func (p *Plane) initialise(ctx context.Context) error {
	// Looked at first: a store that takes no write for now can still be read.
	if kv, err := p.store.Get(ctx, incarnationKey); err != nil || len(kv.Value) > 0 {
		p.incarnation = string(kv.Value)
		return err
	}
	id, err := p.newID()
	if err != nil {
		return err
	}
	cluster, err := json.Marshal(Cluster{Name: DefaultCluster, CreatedAt: p.now()})
	if err != nil {
		return err
	}
	key := incarnationKey
	if _, _, err := p.store.Txn(ctx, []Compare{{Key: key}},
		[]Op{Put(key, []byte(id)), Put(clusterKey(DefaultCluster), cluster)}); err != nil {
		return err
	}
	kv, err := p.store.Get(ctx, key)
	if err != nil {
		return err
	}
	if len(kv.Value) == 0 {
		return errors.New("the store has no incarnation after writing one")
	}
	p.incarnation = string(kv.Value)
	return nil
}

// Run follows the store and sweeps what is no longer kept, until ctx ends.
func (p *Plane) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.follow(ctx) })
	g.Go(func() error { return p.sweepLoop(ctx) })
	return g.Wait()
}

func (p *Plane) load(ctx context.Context) error {
	kvs, revision, err := p.store.List(ctx, root, "", 0)
	if err != nil {
		return err
	}
	p.state.reset(kvs, revision)
	return nil
}

// follow keeps the memory in step with the store. What fails is tried again:
// with the store away, reads go on from memory.
func (p *Plane) follow(ctx context.Context) error {
	backoff := 50 * time.Millisecond
	for {
		err := p.store.Watch(ctx, root, p.state.at(), func(c Change) error {
			p.state.apply(c)
			backoff = 50 * time.Millisecond
			return nil
		})
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrCompacted) {
			p.log.Warn("fell behind the store's history, reading it anew", "revision", p.state.at())
			err = p.load(ctx)
		}
		if err != nil {
			p.log.Warn("following the store failed, trying again", "error", err, "in", backoff)
			if !wait(ctx, backoff) {
				return nil
			}
			backoff = min(2*backoff, 5*time.Second)
		}
	}
}

func (p *Plane) now() time.Time { return p.cfg.Now().UTC().Truncate(time.Millisecond) }

// newID returns 32 random hex digits.
func (p *Plane) newID() (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(p.cfg.Rand, b[:]); err != nil {
		return "", fmt.Errorf("reading random bytes: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

func (p *Plane) newRand() (*rand.Rand, error) {
	var seed [32]byte
	if _, err := io.ReadFull(p.cfg.Rand, seed[:]); err != nil {
		return nil, fmt.Errorf("reading random bytes: %w", err)
	}
	return rand.New(rand.NewChaCha8(seed)), nil
}

// Freshness says how current a read must be: memory as it is, memory at a
// revision the caller has seen, or (Consistent) at the store's own.
type Freshness struct {
	MinRevision int64
	Consistent  bool
}

// fresh waits until memory is as fresh as asked.
func (p *Plane) fresh(ctx context.Context, f Freshness) error {
	want := f.MinRevision
	if f.Consistent {
		r, err := p.store.Revision(ctx)
		if err != nil {
			return err
		}
		want = max(want, r)
	}
	return p.caughtUp(ctx, want)
}

// caughtUp waits until memory has reached a revision.
func (p *Plane) caughtUp(ctx context.Context, revision int64) error {
	ctx, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	for {
		at, changed := p.state.progress()
		if at >= revision {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Errorf(Unavailable, "this control plane has seen revision %d of its store, not yet %d: try again; if the store was restored from a backup, forget the revision: %w", at, revision, ctx.Err())
		}
	}
}

// Ready fails when the store does not answer or memory does not follow it.
func (p *Plane) Ready(ctx context.Context) error { return p.fresh(ctx, Freshness{Consistent: true}) }

// hash is the SHA-256 of parts, each preceded by its length.
func hash(parts ...[]byte) []byte {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:", len(p))
		h.Write(p)
	}
	return h.Sum(nil)
}

// semaphore is a mutex whose Lock gives up with its context.
type semaphore chan struct{}

func newSemaphore() semaphore { return make(semaphore, 1) }

func (s semaphore) lock(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return Errorf(Unavailable, "waiting for others that write the same: %w", ctx.Err())
	}
}

func (s semaphore) unlock() { <-s }

// wait sleeps; it returns false when ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	pause, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-pause.Done()
	return ctx.Err() == nil
}

// noTunnels stands in where no hub is joined: nothing is connected.
type noTunnels struct{ Tunnels }

func (noTunnels) Session(string) (Session, bool)    { return Session{}, false }
func (noTunnels) LastSeen(string) time.Time         { return time.Time{} }
func (noTunnels) Disconnect(string, string, string) {}
func (noTunnels) Rebind(string)                     {}
