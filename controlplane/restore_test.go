package controlplane_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/internal/storetest"
	"github.com/belay-edge/belay/controlplane/wire"
)

// restoreModel is an instance's device, which keeps to the rules of package
// wire, and a control plane that is restored from older copies of its store
// again and again.
type restoreModel struct {
	t        *rapid.T
	ctx      context.Context
	plane    *fixture
	end      func()
	store    *storetest.Memory
	random   io.Reader
	backups  []*storetest.Memory
	instance string
	up       bool

	// The device: what it knows, and what of that survives its crash.
	at, saved controlplane.Position
	tasks     map[string]*heldTask
	now       uint64 // sequence of reports

	ended  map[string]bool // tasks that have ended on the device
	wished map[string]bool // tasks that an operator wished stopped, ever
	drop   bool            // the latest settlement was one
}

type heldTask struct {
	status string
	spec   *wire.TaskSpec
	told   bool // the control plane has the status
	origin string
	asked  bool // wished to stop, by the control plane
}

func (m *restoreModel) open(store *storetest.Memory) {
	m.store = store
	m.plane, m.end = start(m.t, io.Discard, m.random, store)
	m.up = false
	m.plane.tunnels.away[m.instance] = true
}

func (m *restoreModel) mark() {
	life, revision := m.plane.Mark()
	m.at.Mark = controlplane.Mark{Life: life, Revision: revision}
}

func (m *restoreModel) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// connect is a session's beginning: hello, welcome, the first set, and what
// the control plane asks for.
func (m *restoreModel) connect() {
	g, err := m.plane.Meet(m.ctx, m.instance, m.at, true)
	m.check(err)
	m.check(m.plane.ReportFacts(m.ctx, m.instance, controlplane.Hello{Facts: facts(), Capabilities: []string{wire.CapabilityReconcile}}))
	set, err := m.plane.Assignments(m.ctx, m.instance, m.at.Incarnation, g.Sequence)
	m.check(err)
	m.mark()
	m.apply(set, g.Reconcile)
	if g.Reconcile {
		var hs []*wire.Holding
		for id, t := range m.tasks {
			h := &wire.Holding{TaskId: id, Desired: "RUNNING", Spec: t.spec, Status: m.statusOf(id, t)}
			if t.asked {
				h.Desired = "STOPPED"
			}
			hs = append(hs, h)
			t.told = false
		}
		m.check(m.plane.ReportHoldings(m.ctx, m.instance, hs))
	}
	m.up = true
	m.plane.tunnels.away[m.instance] = false
	m.follow()
}

// follow takes over what changed since the last set.
func (m *restoreModel) follow() {
	set, err := m.plane.Assignments(m.ctx, m.instance, m.at.Incarnation, m.at.Sequence)
	m.check(err)
	m.mark()
	m.apply(set, false)
}

func (m *restoreModel) apply(set controlplane.AssignmentSet, persist bool) {
	incarnation := m.plane.Incarnation()
	named := map[string]bool{}
	for _, a := range set.Set {
		named[a.TaskId] = true
		t := m.tasks[a.TaskId]
		stop := a.Desired == "STOPPED"
		switch {
		case t == nil && stop && a.Spec == nil: // nothing to end
		case t == nil && stop:
			m.tasks[a.TaskId] = &heldTask{status: "PENDING", spec: a.Spec, origin: incarnation}
			m.finish(a.TaskId)
		case t == nil:
			if m.ended[a.TaskId] && !m.drop {
				m.t.Fatalf("task %s runs again", a.TaskId)
			}
			m.tasks[a.TaskId] = &heldTask{status: "RUNNING", spec: a.Spec, origin: incarnation}
		case stop:
			if t.status == "RUNNING" && !m.wished[a.TaskId] {
				m.t.Fatalf("task %s is to stop, which nobody wished", a.TaskId)
			}
			t.asked, t.origin = true, incarnation
			m.finish(a.TaskId)
		default:
			t.origin = incarnation
		}
	}
	for id, t := range m.tasks {
		if set.Settled {
			t.origin = incarnation
		}
		if !set.Full || named[id] || t.origin != incarnation {
			continue
		}
		if t.status == "RUNNING" && (!m.drop || !set.Settled) {
			m.t.Fatalf("task %s is to stop, because the store has forgotten it", id)
		}
		m.finish(id)
		delete(m.tasks, id)
	}
	changed := len(set.Set) > 0 || m.at.Incarnation != incarnation || m.at.Sequence != set.Sequence
	m.at.Incarnation, m.at.Sequence = incarnation, set.Sequence
	if changed || persist {
		m.saved = m.at
	}
}

// finish ends a task on the device.
func (m *restoreModel) finish(id string) {
	t := m.tasks[id]
	if t.status != "STOPPED" {
		t.status, t.told = "STOPPED", false
	}
	m.ended[id] = true
}

func (m *restoreModel) statusOf(id string, t *heldTask) *wire.TaskStatus {
	m.now++
	return &wire.TaskStatus{Sequence: m.now, TaskId: id, LastStatus: t.status}
}

// report tells what the control plane does not have. lost: the answers get lost.
func (m *restoreModel) report(lost bool) {
	for _, id := range slices.Sorted(maps.Keys(m.tasks)) {
		t := m.tasks[id]
		if t.told {
			continue
		}
		before, _, known := m.plane.DescribeTask(m.ctx, controlplane.Freshness{}, id)
		err := m.plane.ReportTask(m.ctx, m.instance, m.statusOf(id, t))
		if errors.Is(err, controlplane.NotFound) {
			if t.status == "RUNNING" {
				m.t.Fatalf("task %s is to be removed, because the store has forgotten it", id)
			}
			delete(m.tasks, id)
			continue
		}
		m.check(err)
		if after, _, err := m.plane.DescribeTask(m.ctx, controlplane.Freshness{}, id); known == nil && err == nil && before.LastStatus == "STOPPED" && after.LastStatus != "STOPPED" {
			m.t.Fatalf("task %s went from %s back to %s", id, before.LastStatus, after.LastStatus)
		}
		if lost {
			continue
		}
		t.told = true
		m.mark()
		if t.status == "STOPPED" {
			m.saved.Mark = m.at.Mark // with the record that it was acknowledged
		}
	}
}

func (m *restoreModel) settle(adopt bool) {
	settle := m.plane.DropInstance
	if adopt {
		settle = m.plane.AdoptInstance
	}
	m.drop = !adopt
	_, _, err := settle(m.ctx, "", m.instance)
	m.check(err)
	if m.up {
		m.follow()
	}
	m.drop = false
	if !m.up {
		m.drop = !adopt // heard of at the next session
	}
}

func (m *restoreModel) view() controlplane.InstanceView {
	v, _, err := m.plane.DescribeInstance(m.ctx, controlplane.Freshness{}, m.instance)
	m.check(err)
	return v
}

// A control plane that is restored from any older copy of its store, at any
// moment, stops nothing and starts nothing again by itself; once an operator
// has decided, both sides agree.
func TestRestoreProperty(t *testing.T) {
	base := newPlane(t)
	instance := base.device(t, 1).ID
	base.register(t, sleep)
	rapid.Check(t, func(rt *rapid.T) {
		m := &restoreModel{
			t: rt, ctx: t.Context(), instance: instance, random: rand.NewChaCha8([32]byte{1}), // ids in one order at every try
			tasks: map[string]*heldTask{}, ended: map[string]bool{}, wished: map[string]bool{},
		}
		m.open(base.store.Copy())
		defer func() { m.end() }()
		pick := func(status string) string {
			var ids []string
			for _, id := range slices.Sorted(maps.Keys(m.tasks)) {
				if m.tasks[id].status == status {
					ids = append(ids, id)
				}
			}
			if len(ids) == 0 {
				rt.Skip()
			}
			return rapid.SampledFrom(ids).Draw(rt, "task")
		}
		rt.Repeat(map[string]func(*rapid.T){
			"run": func(rt *rapid.T) {
				if !m.up {
					rt.Skip()
				}
				_, failures, _, err := m.plane.RunTask(m.ctx, controlplane.NewTasks{TaskDefinition: "sleep"})
				if err != nil || len(failures) > 0 {
					rt.Fatal(failures, err)
				}
				if rapid.Bool().Draw(rt, "arrives") {
					m.follow()
				}
			},
			"stop": func(rt *rapid.T) {
				ts, _, _, err := m.plane.ListTasks(m.ctx, controlplane.Freshness{}, controlplane.TaskFilter{Instance: instance, DesiredStatus: "RUNNING"}, controlplane.Page{})
				m.check(err)
				if len(ts) == 0 {
					rt.Skip()
				}
				slices.SortFunc(ts, func(a, b controlplane.Task) int { return int(a.Sequence) - int(b.Sequence) })
				id := ts[rapid.IntRange(0, len(ts)-1).Draw(rt, "task")].ID
				m.wished[id] = true
				_, _, err = m.plane.StopTask(m.ctx, "", id, "")
				m.check(err)
				if m.up && rapid.Bool().Draw(rt, "arrives") {
					m.follow()
				}
			},
			"exit": func(*rapid.T) { m.finish(pick("RUNNING")) },
			"forget": func(rt *rapid.T) {
				if id := pick("STOPPED"); m.tasks[id].told {
					delete(m.tasks, id)
				}
			},
			"report": func(rt *rapid.T) {
				if !m.up {
					rt.Skip()
				}
				m.report(rapid.Bool().Draw(rt, "lost"))
			},
			"disconnect": func(*rapid.T) { m.up, m.plane.tunnels.away[instance] = false, true },
			"connect": func(rt *rapid.T) {
				if m.up {
					rt.Skip()
				}
				m.connect()
				m.drop = false
			},
			"agent restarts": func(*rapid.T) {
				m.up, m.plane.tunnels.away[instance] = false, true
				m.at = m.saved
				for _, t := range m.tasks {
					t.told = t.told && t.status == "STOPPED"
				}
			},
			"control plane restarts": func(*rapid.T) { m.end(); m.open(m.store) },
			"backup":                 func(*rapid.T) { m.backups = append(m.backups, m.store.Copy()) },
			"restore": func(rt *rapid.T) {
				if len(m.backups) == 0 {
					rt.Skip()
				}
				m.end()
				m.drop = false
				m.open(m.backups[rapid.IntRange(0, len(m.backups)-1).Draw(rt, "backup")].Copy())
			},
			"settle": func(rt *rapid.T) {
				if c := m.view().Conflict; c == nil || !c.Reported {
					rt.Skip()
				}
				m.settle(rapid.Bool().Draw(rt, "adopt"))
			},
		})
		// In the end both sides agree.
		if !m.up {
			m.connect()
			m.drop = false
		}
		m.report(false)
		if m.view().Conflict != nil {
			m.settle(rapid.Bool().Draw(rt, "adopt at last"))
		}
		m.follow()
		m.report(false)
		m.follow()
		ts, _, _, err := m.plane.ListTasks(m.ctx, controlplane.Freshness{}, controlplane.TaskFilter{Instance: instance}, controlplane.Page{Limit: 1000})
		m.check(err)
		var want, have []string
		for _, task := range ts {
			if task.LastStatus != "STOPPED" {
				want = append(want, task.ID+" "+task.LastStatus)
			}
		}
		for id, held := range m.tasks {
			if held.status != "STOPPED" {
				have = append(have, id+" "+held.status)
			}
		}
		slices.Sort(want)
		slices.Sort(have)
		if !slices.Equal(want, have) {
			rt.Fatalf("the store has %v, the device %v", want, have)
		}
		if v := m.view(); v.Conflict != nil || v.Running != len(have) {
			rt.Fatalf("after all: %+v, want %d running and no conflict", v, len(have))
		}
	})
}
