package hub

import (
	"context"
	"slices"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

const (
	// proofWait is how long a session has to show that its device lives, when
	// another one comes with its key. Devices give a hello two seconds.
	proofWait = time.Second
	// maxRivals bounds what is remembered of one instance's.
	maxRivals = 16
)

// rivals are agents that came with one instance's key, by their nonces: an
// agent whose session another one took over, and one that was refused. Only
// what lives comes back.
type rivals struct{ replaced, refused []string }

func remember(nonces []string, nonce string) []string {
	if slices.Contains(nonces, nonce) {
		return nonces
	}
	nonces = append(nonces, nonce)
	return nonces[max(0, len(nonces)-maxRivals):]
}

// replaced notes whose session was taken over. h.mu is not held.
func (h *Hub) replaced(instance, nonce string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.rivals[instance]
	if r == nil {
		r = &rivals{}
		h.rivals[instance] = r
	}
	r.replaced = remember(r.replaced, nonce)
}

// admitMachine decides whether a session may take its instance's place. Two
// machines with one key are a copied disk: the one that came first keeps it.
// A device that rebooted, whose agent was restarted, or that moved to another
// board comes alone: its former session does not answer any more.
func (h *Hub) admitMachine(ctx context.Context, s *session, known controlplane.Instance) *wire.Failure {
	h.mu.Lock()
	old := h.sessions[s.instance]
	var returned, refused bool
	if r := h.rivals[s.instance]; r != nil {
		returned, refused = slices.Contains(r.replaced, s.nonce), slices.Contains(r.refused, s.nonce)
	}
	h.mu.Unlock()
	// While a second machine is known of, only the first one's hash counts.
	rightful := known.HashedMachineID == "" || s.machine == known.HashedMachineID
	switch {
	case old != nil && old.nonce == s.nonce:
		return nil // the same process, on a new way
	case refused, known.Duplicate != nil && !rightful:
		return h.refuseDuplicate(ctx, s)
	case old == nil, old.machine == s.machine && old.boot == s.boot && !returned:
		return nil
	case !old.proves(ctx):
		return nil
	case returned || s.machine != "" && old.machine != s.machine && known.HashedMachineID == s.machine:
		// The one that has the session is the second machine.
		failure := h.refuseDuplicate(ctx, old)
		h.drop(old)
		old.end(failure)
		return nil
	}
	return h.refuseDuplicate(ctx, s)
}

// proves tells whether the session's device answers.
func (s *session) proves(ctx context.Context) bool {
	select {
	case <-s.pong: // of an earlier question
	default:
	}
	wait := time.NewTimer(proofWait)
	defer wait.Stop()
	select {
	case s.out <- &wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 1}}}:
	case <-wait.C:
		return false
	case <-s.ctx.Done():
		return false
	case <-ctx.Done():
		return false
	}
	select {
	case <-s.pong:
		return true
	case <-wait.C:
	case <-s.ctx.Done():
	case <-ctx.Done():
	}
	return false
}

// refuseDuplicate notes a second machine and says what it is told.
func (h *Hub) refuseDuplicate(ctx context.Context, s *session) *wire.Failure {
	h.mu.Lock()
	r := h.rivals[s.instance]
	if r == nil {
		r = &rivals{}
		h.rivals[s.instance] = r
	}
	r.refused = remember(r.refused, s.nonce)
	r.replaced = slices.DeleteFunc(r.replaced, func(n string) bool { return n == s.nonce })
	h.mu.Unlock()
	err := h.devices.ReportDuplicate(ctx, s.instance, controlplane.Duplicate{
		HashedMachineID: s.machine, BootID: s.boot, Hostname: s.host, Address: s.wire.RemoteAddr().String(),
	})
	if err != nil {
		s.log.Warn("note a duplicate", "err", err)
	}
	return wire.Failf(wire.CodeCloned, "another machine is using the identity of instance %s: this one's disk is a copy. "+
		"Delete its identity (\"identity\" in the agent's state directory) and enrol it by itself; or, if this is the one to stay, run \"belay instance rebind\"", s.instance)
}

// Rebind implements controlplane.Tunnels.
func (h *Hub) Rebind(instance string) {
	h.mu.Lock()
	delete(h.rivals, instance)
	h.mu.Unlock()
	h.Disconnect(instance, wire.CodeShutdown, "the instance was released for the machine that connects next")
}
