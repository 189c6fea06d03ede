package hub

import (
	"testing"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// machine is an agent on a machine, by the hash of it, its boot and its nonce.
type machine struct{ hash, boot, nonce string }

// hail says hello as a machine.
func (r *rig) hail(m machine) *wiretest.Peer {
	r.t.Helper()
	p := r.agent(wire.TransportTCP, wire.ProtocolTunnel)
	p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
	h := hello(instanceA, m.nonce, 0)
	h.GetHello().HashedMachineId, h.GetHello().BootId = m.hash, m.boot
	p.Send(h)
	return p
}

// greet says hello as a machine and returns how it is met.
func (r *rig) greet(m machine) (*wiretest.Peer, *wire.Welcome) {
	r.t.Helper()
	p := r.hail(m)
	w := p.Expect("welcome").GetWelcome()
	if w.GetFailure() == nil {
		p.Expect("end_of_set")
	}
	return p, w
}

// greetBeside is greet while another one has the session: that one is asked
// whether it lives, and answers.
func (r *rig) greetBeside(first *wiretest.Peer, m machine) *wire.Welcome {
	r.t.Helper()
	p := r.hail(m)
	ping := first.Expect("ping").GetPing()
	first.Send(&wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: ping.Id}}})
	return p.Expect("welcome").GetWelcome()
}

func TestCopyIsRefusedWhileTheFirstAnswers(t *testing.T) {
	for name, copied := range map[string]machine{
		"another machine":               {"m2", "b2", "n2"},
		"a machine with the same hash":  {"m1", "b2", "n2"},
		"one that knows no machine ids": {"", "b2", "n2"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevices()
			r := newRig(t, d)
			first, _ := r.greet(machine{"m1", "b1", "n1"})
			if w := r.greetBeside(first, copied); w.GetFailure().GetCode() != wire.CodeCloned {
				t.Fatalf("welcome %v", w)
			}
			if s, ok := r.hub.Session(instanceA); !ok || s.AgentNonce != "n1" {
				t.Errorf("session %+v, %t: the first one lost it", s, ok)
			}
			d.mu.Lock()
			noted := len(d.duplicates)
			d.mu.Unlock()
			if noted != 1 {
				t.Errorf("%d duplicates noted", noted)
			}
			// Known by now, it is refused without asking.
			if _, w := r.greet(copied); w.GetFailure().GetCode() != wire.CodeCloned {
				t.Errorf("again: %v", w)
			}
			r.hub.Rebind(instanceA)
			if _, w := r.greet(copied); w.GetFailure() != nil {
				t.Errorf("after rebind: %v", w.GetFailure())
			}
		})
	}
}

func TestDeviceThatComesBackIsNoCopy(t *testing.T) {
	for name, again := range map[string]machine{
		"agent restarted":  {"m1", "b1", "n2"},
		"rebooted":         {"m1", "b2", "n2"},
		"moved to a board": {"m2", "b2", "n2"},
		"reconnected":      {"m1", "b1", "n1"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, newDevices())
			r.greet(machine{"m1", "b1", "n1"}) // and answers nothing any more
			if _, w := r.greet(again); w.GetFailure() != nil {
				t.Errorf("refused: %v", w.GetFailure())
			}
		})
	}
}

// Two copies in one boot of alike machines cannot be told apart at once; one
// that is replaced and comes back shows that both live.
func TestCopiesThatReplaceEachOther(t *testing.T) {
	r := newRig(t, newDevices())
	r.greet(machine{"m1", "b1", "n1"})
	second, w := r.greet(machine{"m1", "b1", "n2"})
	if w.GetFailure() != nil {
		t.Fatal(w.GetFailure())
	}
	if w := r.greetBeside(second, machine{"m1", "b1", "n1"}); w.GetFailure() != nil {
		t.Fatalf("the first one was refused: %v", w.GetFailure())
	}
	if f := second.Expect("goodbye").GetGoodbye().GetFailure(); f.GetCode() != wire.CodeCloned {
		t.Errorf("goodbye %v", f)
	}
	if _, w := r.greet(machine{"m1", "b1", "n2"}); w.GetFailure().GetCode() != wire.CodeCloned {
		t.Errorf("the copy again: %v", w)
	}
}

// A control plane that was restarted remembers which machine was the first.
func TestKnownCopyIsRefusedAfterRestart(t *testing.T) {
	d := newDevices()
	d.known = controlplane.Instance{HashedMachineID: "m1", Duplicate: &controlplane.Duplicate{HashedMachineID: "m2"}}
	r := newRig(t, d)
	if _, w := r.greet(machine{"m2", "b3", "n3"}); w.GetFailure().GetCode() != wire.CodeCloned {
		t.Errorf("the copy: %v", w)
	}
	if _, w := r.greet(machine{"m1", "b9", "n9"}); w.GetFailure() != nil {
		t.Errorf("the first: %v", w.GetFailure())
	}
}

func TestHoldingsReachTheDomain(t *testing.T) {
	d := newDevices()
	d.life, d.reconcile = "l1", true
	r := newRig(t, d)
	p, w := r.greet(machine{"m1", "b1", "n1"})
	if !w.GetReconcile() || w.GetMark().GetLife() != "l1" {
		t.Fatalf("welcome %v", w)
	}
	p.Send(&wire.Frame{Body: &wire.Frame_Holding{Holding: &wire.Holding{TaskId: taskB, Desired: "RUNNING"}}})
	p.Send(&wire.Frame{Body: &wire.Frame_EndOfHoldings{EndOfHoldings: &wire.EndOfHoldings{Count: 1}}})
	until(t, "holdings reported", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.held) == 1 && d.held[0].TaskId == taskB
	})
}
