package hub

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

const (
	instanceA = "a0000000000000000000000000000001"
	instanceS = "a0000000000000000000000000000002" // a slow one
	taskB     = "b0000000000000000000000000000001"
)

// devices is a control plane's domain in memory, for two instances with the
// same tasks.
type devices struct {
	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at every change
	key      string        // of instanceA; "": any, once
	denied   bool
	down     error // what ReportTask fails with
	sequence uint64
	tasks    map[string]*wire.Assignment
	reported []*wire.TaskStatus
	facts    []controlplane.Hello
	enrolled controlplane.Enrollment
	enrol    controlplane.Instance // what Enroll answers
	refuse   error
	gate     chan struct{} // when set, ReportTask waits for it

	life       string // "": as a control plane of before marks
	reconcile  bool   // what Meet answers
	positions  []controlplane.Position
	held       []*wire.Holding
	known      controlplane.Instance // what Authenticate answers, but for its ID
	duplicates []controlplane.Duplicate
}

func newDevices() *devices {
	return &devices{changed: make(chan struct{}), tasks: map[string]*wire.Assignment{}}
}

func (d *devices) change(edit func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	edit()
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *devices) assign(a *wire.Assignment) {
	d.change(func() {
		d.sequence = a.Sequence
		d.tasks[a.TaskId] = a
	})
}

func (d *devices) Incarnation() string { return "i1" }

func (d *devices) Mark() (string, int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.life, 7
}

func (d *devices) Meet(_ context.Context, _ string, at controlplane.Position, _ bool) (controlplane.Greeting, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.positions = append(d.positions, at)
	return controlplane.Greeting{Sequence: at.Sequence, Reconcile: d.reconcile}, nil
}

func (d *devices) ReportHoldings(_ context.Context, _ string, hs []*wire.Holding) error {
	d.change(func() { d.held = hs })
	return nil
}

func (d *devices) ReportDuplicate(_ context.Context, _ string, dup controlplane.Duplicate) error {
	d.change(func() { d.duplicates = append(d.duplicates, dup) })
	return nil
}

func (d *devices) Enroll(_ context.Context, e controlplane.Enrollment) (controlplane.Instance, bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.enrolled = e
	return d.enrol, false, d.refuse
}

func (d *devices) answer(i controlplane.Instance, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.enrol, d.refuse = i, err
}

func (d *devices) asked() controlplane.Enrollment {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.enrolled
}

func (d *devices) Authenticate(_ context.Context, instance, key string) (controlplane.Instance, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case instance != instanceA && instance != instanceS:
		return controlplane.Instance{}, controlplane.Errorf(controlplane.NotFound, "no instance %s", instance)
	case d.denied:
		return controlplane.Instance{}, controlplane.Errorf(controlplane.Denied, "instance %s was deregistered", instance)
	case d.key != "" && d.key != key:
		return controlplane.Instance{}, controlplane.Errorf(controlplane.Unauthenticated, "instance %s has another key", instance)
	}
	known := d.known
	known.ID = instance
	return known, nil
}

func (d *devices) ReportFacts(_ context.Context, _ string, h controlplane.Hello) error {
	d.change(func() { d.facts = append(d.facts, h) })
	return nil
}

func (d *devices) ReportTask(ctx context.Context, _ string, s *wire.TaskStatus) error {
	d.mu.Lock()
	gate := d.gate
	d.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.down != nil {
		return d.down
	}
	d.reported = append(d.reported, s)
	if d.tasks[s.TaskId] == nil {
		return controlplane.Errorf(controlplane.NotFound, "no task %s", s.TaskId)
	}
	return nil
}

func (d *devices) Assignments(_ context.Context, _, incarnation string, after uint64) (controlplane.AssignmentSet, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	set := controlplane.AssignmentSet{Sequence: d.sequence, Full: incarnation != "i1" || after > d.sequence}
	for _, id := range slices.Sorted(maps.Keys(d.tasks)) {
		if a := d.tasks[id]; set.Full || a.Sequence > after {
			set.Set = append(set.Set, a)
		}
	}
	return set, nil
}

func (d *devices) WatchInstance(ctx context.Context, _ string, f func()) error {
	for {
		d.mu.Lock()
		changed := d.changed
		d.mu.Unlock()
		f()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// rig is a hub on a real port.
type rig struct {
	t       *testing.T
	control *wiretest.ControlPlane
	hub     *Hub
	devices *devices
	stop    context.CancelFunc
	served  chan error
}

func newRig(t *testing.T, d *devices) *rig {
	t.Helper()
	return newRigWith(t, d, nil)
}

func newRigWith(t *testing.T, d *devices, log *slog.Logger) *rig {
	t.Helper()
	r := &rig{t: t, control: wiretest.NewControlPlane(t), devices: d, served: make(chan error, 1)}
	r.hub = New(Config{
		Devices: d, Version: "0.1.0", Advertise: []string{"control.example:7443"}, Logger: log,
		Now: func() time.Time { return time.Unix(0, 1795219200000000000) },
	})
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	go func() { r.served <- r.hub.Serve(ctx, r.control) }()
	t.Cleanup(func() {
		stop()
		select {
		case err := <-r.served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(2 * wiretest.Patience):
			t.Error("Serve did not end")
		}
	})
	return r
}

func (r *rig) agent(transport, protocol string) *wiretest.Peer {
	r.t.Helper()
	_, cert := wiretest.NewDevice(r.t)
	return wiretest.DialAgent(r.t, carrier.DialConfig{
		Address: r.control.Address(), Transport: transport, Protocol: protocol,
		Certificate: cert, Pins: []wire.Pin{r.control.CA.Pin()},
	})
}

// connect registers an agent that holds everything up to sequence.
func (r *rig) connect(transport, nonce string, sequence uint64) *wiretest.Peer {
	r.t.Helper()
	p := r.agent(transport, wire.ProtocolTunnel)
	p.Send(open(wire.StreamType_STREAM_TYPE_CONTROL))
	p.Send(hello(instanceA, nonce, sequence))
	if f := p.Expect("welcome").GetWelcome().Failure; f != nil {
		r.t.Fatalf("refused: %v", f)
	}
	return p
}

func open(kind wire.StreamType) *wire.Frame {
	return &wire.Frame{Body: &wire.Frame_Open{Open: &wire.Open{Type: kind}}}
}

func hello(instance, nonce string, sequence uint64) *wire.Frame {
	return &wire.Frame{Body: &wire.Frame_Hello{Hello: &wire.Hello{
		Version: 1, InstanceId: instance, AgentNonce: nonce, Incarnation: "i1", Sequence: sequence,
	}}}
}

func status(sequence uint64, task, last string) *wire.Frame {
	return &wire.Frame{Body: &wire.Frame_TaskStatus{TaskStatus: &wire.TaskStatus{Sequence: sequence, TaskId: task, LastStatus: last}}}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(wiretest.Patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		<-time.After(2 * time.Millisecond)
	}
}
