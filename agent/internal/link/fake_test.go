package link

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

const (
	instanceA = "a0000000000000000000000000000001"
	taskB     = "b0000000000000000000000000000001"
)

// downlink is an agent that writes down what it is told.
type downlink struct {
	mu          sync.Mutex
	incarnation string
	sequence    uint64
	sets        []assigned
	acks        []uint64
	ups         []bool
	full        int // so many times Assign finds the disk full
	logs        func(ctx context.Context, r *wire.LogsRequest, chunk func(string, []byte) error) error
}

type assigned struct {
	Incarnation string
	Full        bool
	Tasks       []string
	Sequence    uint64
}

func (d *downlink) Held() (string, uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.incarnation, d.sequence
}

func (d *downlink) Assign(_ context.Context, incarnation string, full bool, set []*wire.Assignment, sequence uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	a := assigned{Incarnation: incarnation, Full: full, Sequence: sequence}
	for _, as := range set {
		a.Tasks = append(a.Tasks, as.TaskId+" "+as.Desired)
	}
	d.sets = append(d.sets, a)
	if d.full > 0 {
		d.full--
		return syscall.ENOSPC
	}
	d.incarnation, d.sequence = incarnation, sequence
	return nil
}

func (d *downlink) Acked(_ string, sequence uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.acks = append(d.acks, sequence)
}

func (d *downlink) Connected(up bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ups = append(d.ups, up)
}

func (d *downlink) Logs(ctx context.Context, r *wire.LogsRequest, chunk func(string, []byte) error) error {
	d.mu.Lock()
	logs := d.logs
	d.mu.Unlock()
	return logs(ctx, r, chunk)
}

func (d *downlink) setLogs(f func(ctx context.Context, r *wire.LogsRequest, chunk func(string, []byte) error) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.logs = f
}

func (d *downlink) read(f func(*downlink) bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f(d)
}

// clock is that of a device which booted a moment ago, in 1970.
type clock struct{}

func (clock) Now() time.Duration                     { return 5 * time.Second }
func (clock) BootID() string                         { return "boot-1" }
func (clock) After(d time.Duration) <-chan time.Time { return time.After(d) }
func (clock) When() *wire.When {
	return &wire.When{BootId: "boot-1", BoottimeNs: int64(5 * time.Second), WallUnixNs: int64(time.Minute)}
}

// start runs a link and ends it with the test.
func start(t *testing.T, cfg Config, d *downlink) *Link {
	t.Helper()
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.Attach(d)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(wiretest.Patience):
			t.Error("Run did not end")
		}
	})
	return l
}

func config(t *testing.T, c *wiretest.ControlPlane, transport string) Config {
	t.Helper()
	key, _ := wiretest.NewDevice(t)
	return Config{
		InstanceID: instanceA, Key: key, Pins: []wire.Pin{c.CA.Pin()}, Addresses: []string{c.Address()},
		Transport: transport, Clock: clock{}, Nonce: "nonce-1",
	}
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

// pipe is a session in memory whose time synctest can bend. The test is the
// control plane and has the other end of the control stream.
type pipe struct {
	agent, control net.Conn
	done           chan struct{}
	once           sync.Once
}

func newPipe() *pipe {
	p := &pipe{done: make(chan struct{})}
	p.agent, p.control = net.Pipe()
	return p
}

func (p *pipe) OpenStream(context.Context) (wire.Stream, error) { return pipeStream{p.agent}, nil }
func (p *pipe) AcceptStream(ctx context.Context) (wire.Stream, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-p.done:
		return nil, io.EOF
	}
}
func (p *pipe) Close(string, string) {
	p.once.Do(func() {
		close(p.done)
		_ = p.agent.Close()
		_ = p.control.Close()
	})
}
func (p *pipe) Done() <-chan struct{} { return p.done }
func (p *pipe) Err() error {
	select {
	case <-p.done:
		return errors.New("closed")
	default:
		return nil
	}
}
func (p *pipe) PeerCertificate() *x509.Certificate { return nil }
func (p *pipe) RemoteAddr() net.Addr               { return p.agent.RemoteAddr() }
func (p *pipe) Transport() string                  { return wire.TransportQUIC }
func (p *pipe) Protocol() string                   { return wire.ProtocolTunnel }

type pipeStream struct{ net.Conn }

func (pipeStream) CloseWrite() error { return nil }
