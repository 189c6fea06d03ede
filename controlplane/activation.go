package controlplane

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"strings"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Bounds of activations.
const (
	MaxActivationLimit    = 1000
	DefaultActivationLife = 24 * time.Hour
	MaxActivationLife     = 30 * 24 * time.Hour
	maxAttributes         = 64
)

// NewActivation asks for an activation.
type NewActivation struct {
	Token       string            `json:"-"`
	Cluster     string            `json:"cluster"` // "": default; made when there is none of the name
	Limit       int               `json:"limit"`   // 0: 1
	Life        time.Duration     `json:"life"`    // 0: 24 h
	Attributes  map[string]string `json:"attributes"`
	Description string            `json:"description"`
}

// CreateActivation makes an activation and the code devices enrol with. The
// code is not kept: only its hash is.
func (p *Plane) CreateActivation(ctx context.Context, n NewActivation) (a Activation, code string, revision int64, err error) {
	if n.Cluster == "" {
		n.Cluster = DefaultCluster
	}
	if n.Limit == 0 {
		n.Limit = 1
	}
	if n.Life == 0 {
		n.Life = DefaultActivationLife
	}
	if err := n.validate(); err != nil {
		return Activation{}, "", 0, err
	}
	type made struct{ ID string }
	m, revision, err := mutate(ctx, p, "creating an activation", n.Token, n, func() (*change, made, error) {
		id, err := p.newID()
		if err != nil {
			return nil, made{}, err
		}
		secret, err := p.secret(id, n.Token)
		if err != nil {
			return nil, made{}, err
		}
		now, digest := p.now(), sha256.Sum256(secret)
		a = Activation{
			ID: id, Cluster: n.Cluster, Limit: n.Limit, CreatedAt: now, ExpiresAt: now.Add(n.Life),
			Attributes: n.Attributes, Description: n.Description, SecretHash: digest[:],
		}
		if code, err = p.code(id, secret); err != nil {
			return nil, made{}, err
		}
		c := &change{}
		c.compare(activationKey(id), 0)
		if err := c.put(activationKey(id), a); err != nil {
			return nil, made{}, err
		}
		return c, made{id}, p.touchCluster(c, n.Cluster)
	})
	if err != nil || m.ID == a.ID {
		return a, code, revision, err
	}
	// The answer to an earlier call: the same code, made again.
	kv, err := p.store.Get(ctx, activationKey(m.ID))
	if err != nil {
		return Activation{}, "", 0, err
	}
	if kv.ModRevision == 0 {
		return Activation{}, "", 0, Errorf(NotFound, "this call made activation %s, which has been deleted since: use a new client token to make another", m.ID)
	}
	a = Activation{}
	if err := json.Unmarshal(kv.Value, &a); err != nil {
		return Activation{}, "", 0, fmt.Errorf("reading activation %s: %w", m.ID, err)
	}
	secret, err := p.secret(m.ID, n.Token)
	if err != nil {
		return Activation{}, "", 0, err
	}
	if digest := sha256.Sum256(secret); !bytes.Equal(digest[:], a.SecretHash) {
		return Activation{}, "", 0, Errorf(Precondition, "the code of activation %s cannot be shown again: this control plane's secret key has changed; delete it and make another", a.ID)
	}
	code, err = p.code(a.ID, secret)
	return a, code, revision, err
}

// secret makes the 32 bytes an activation's code carries: random, or, so that
// a repetition finds the same, derived from the client token and the pepper.
func (p *Plane) secret(id, token string) ([]byte, error) {
	if token == "" {
		b := make([]byte, 32)
		_, err := io.ReadFull(p.cfg.Rand, b)
		return b, err
	}
	m := hmac.New(sha256.New, p.cfg.Pepper)
	m.Write(hash([]byte("activation"), []byte(id), []byte(token)))
	return m.Sum(nil), nil
}

// code is the text that a device enrols with.
func (p *Plane) code(id string, secret []byte) (string, error) {
	return wire.ActivationCode{Addresses: p.cfg.Addresses, Pin: p.cfg.Pin, ID: id, Secret: secret}.Encode()
}

func (n *NewActivation) validate() error {
	if !isName(n.Cluster) {
		return badClusterName(n.Cluster)
	}
	if n.Limit < 1 || n.Limit > MaxActivationLimit {
		return Errorf(InvalidArgument, "limit: %d devices, want 1 to %d", n.Limit, MaxActivationLimit)
	}
	if n.Life < time.Second || n.Life > MaxActivationLife {
		return Errorf(InvalidArgument, "expires: %s from now, want 1s to %s (30 days)", n.Life, MaxActivationLife)
	}
	if len(n.Description) > 255 {
		return Errorf(InvalidArgument, "description: %d bytes, at most 255 are allowed", len(n.Description))
	}
	if len(n.Attributes) > maxAttributes {
		return Errorf(InvalidArgument, "attributes: %d, at most %d are allowed", len(n.Attributes), maxAttributes)
	}
	for name, value := range n.Attributes {
		if err := validateAttribute(name, value); err != nil {
			return err
		}
	}
	return nil
}

// validateAttribute holds an operator's attribute to ECS's rules.
func validateAttribute(name, value string) error {
	outside := func(allowed string) func(rune) bool {
		return func(c rune) bool {
			return (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && !strings.ContainsRune(allowed, c)
		}
	}
	switch {
	case name == "" || len(name) > 128 || strings.ContainsFunc(name, outside("-_./")):
		return Errorf(InvalidArgument, "attribute %q: the name must be 1 to 128 letters, digits, hyphens, underscores, slashes or periods", name)
	case strings.HasPrefix(name, "belay."):
		return Errorf(InvalidArgument, "attribute %q: names beginning with \"belay.\" are what devices tell of themselves: choose another", name)
	case len(value) > 128 || strings.ContainsFunc(value, outside(`-_./\:@ `)) || strings.TrimSpace(value) != value:
		return Errorf(InvalidArgument, "attribute %q: the value must be at most 128 letters, digits or -_./\\:@ and inner spaces", name)
	}
	return nil
}

// ListActivations returns the activations of a cluster ("": of all).
func (p *Plane) ListActivations(ctx context.Context, f Freshness, cluster string, page Page) (as []Activation, next string, revision int64, err error) {
	if err := p.fresh(ctx, f); err != nil {
		return nil, "", 0, err
	}
	p.state.read(func(r *records, at int64) {
		revision = at
		for _, e := range r.activations {
			if cluster == "" || e.V.Cluster == cluster {
				as = append(as, e.V)
			}
		}
	})
	as, next, err = paginate(as, page, func(a Activation) string { return byTime(a.CreatedAt, a.ID) })
	return as, next, revision, err
}

// Expired tells whether an activation's time is over.
func (p *Plane) Expired(a Activation) bool { return !p.now().Before(a.ExpiresAt) }

// DeleteActivation makes an activation's code worthless. Devices that have
// enrolled stay enrolled.
func (p *Plane) DeleteActivation(ctx context.Context, token, id string) (revision int64, err error) {
	_, revision, err = mutate(ctx, p, "deleting an activation", token, id, func() (*change, struct{}, error) {
		id, err := p.find("activation", id, func(r *records) []string { return matching(maps.Keys(r.activations), id) })
		if err != nil {
			return nil, struct{}{}, err
		}
		var mod int64
		p.state.read(func(r *records, _ int64) { mod = r.activations[id].Mod })
		c := &change{}
		c.compare(activationKey(id), mod)
		c.delete(activationKey(id))
		return c, struct{}{}, nil
	})
	return revision, err
}

// Enroll implements Devices.
func (p *Plane) Enroll(ctx context.Context, e Enrollment) (Instance, bool, error) {
	if len(e.ActivationID) != 32 || !isHex(e.ActivationID) || len(e.KeyFingerprint) != 64 || !isHex(e.KeyFingerprint) {
		return Instance{}, false, Errorf(InvalidArgument, "the activation id must be 32 hex digits and the key fingerprint 64")
	}
	told := Hello{AgentVersion: e.AgentVersion, Hostname: e.Hostname, HashedMachineID: e.HashedMachineID, Facts: e.Facts}
	if err := told.bound(); err != nil {
		return Instance{}, false, err
	}
	e.AgentVersion, e.Hostname, e.HashedMachineID = told.AgentVersion, told.Hostname, told.HashedMachineID
	// Enrolments are rare and all of one activation write its record: in turn
	// they need one try each. Other replicas are met by the compare.
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	if err := p.enrolling.lock(ctx); err != nil {
		return Instance{}, false, err
	}
	defer p.enrolling.unlock()
	var already bool
	i, _, err := mutate(ctx, p, "enrolling", "", nil, func() (*change, Instance, error) {
		var c *change
		var i Instance
		var err error
		c, i, already, err = p.enroll(ctx, e)
		return c, i, err
	})
	return i, already, err
}

func (p *Plane) enroll(ctx context.Context, e Enrollment) (c *change, i Instance, already bool, err error) {
	refuse := func(code Code, format string, args ...any) (*change, Instance, bool, error) {
		return nil, Instance{}, false, Errorf(code, format, args...)
	}
	kv, err := p.store.Get(ctx, activationKey(e.ActivationID))
	if err != nil {
		return nil, Instance{}, false, err
	}
	if kv.ModRevision == 0 {
		return refuse(NotFound, "no activation %s here: it was deleted, or belongs to another control plane; create a new one with belay activation create", e.ActivationID)
	}
	var a Activation
	if err := json.Unmarshal(kv.Value, &a); err != nil {
		return nil, Instance{}, false, fmt.Errorf("reading activation %s: %w", e.ActivationID, err)
	}
	if digest := sha256.Sum256(e.Secret); subtle.ConstantTimeCompare(digest[:], a.SecretHash) != 1 {
		return refuse(Unauthenticated, "the code does not match activation %s: copy it again, whole, or create a new one", a.ID)
	}
	holder, err := p.store.Get(ctx, fingerprintKey(e.KeyFingerprint))
	if err != nil {
		return nil, Instance{}, false, err
	}
	if holder.ModRevision != 0 {
		i, err := p.readInstance(ctx, string(holder.Value))
		if err == nil && i.Status != InstanceActive {
			return refuse(Precondition, "this device's key belongs to instance %s, which was deregistered: remove the device's identity to enrol it as a new instance", i.ID)
		}
		return nil, i, true, err
	}
	if p.Expired(a) {
		return refuse(Expired, "activation %s expired at %s: create a new one with belay activation create", a.ID, a.ExpiresAt.Format(time.RFC3339))
	}
	if a.Used >= a.Limit {
		return refuse(Exhausted, "activation %s is used up: it was for %d device(s); create a new one with belay activation create", a.ID, a.Limit)
	}
	id, err := p.newID()
	if err != nil {
		return nil, Instance{}, false, err
	}
	a.Used++
	i = Instance{
		ID: id, Cluster: a.Cluster, Status: InstanceActive, KeyFingerprint: e.KeyFingerprint, ActivationID: a.ID,
		HashedMachineID: e.HashedMachineID, Hostname: e.Hostname, AgentVersion: e.AgentVersion,
		RegisteredAt: p.now(), Attributes: a.Attributes, Facts: e.Facts,
	}
	c = &change{}
	c.compare(activationKey(a.ID), kv.ModRevision)
	c.compare(fingerprintKey(e.KeyFingerprint), 0)
	c.compare(instanceKey(id), 0)
	c.ops = append(c.ops, Put(fingerprintKey(e.KeyFingerprint), []byte(id)))
	for _, o := range []struct {
		key string
		v   any
	}{{activationKey(a.ID), a}, {instanceKey(id), i}, {bindingsKey(id), Bindings{}}} {
		if err := c.put(o.key, o.v); err != nil {
			return nil, Instance{}, false, err
		}
	}
	return c, i, false, p.touchCluster(c, a.Cluster)
}
