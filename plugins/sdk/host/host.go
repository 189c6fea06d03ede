// Package host is the agent's side of the plugin protocol: it launches one
// executable, agrees with it on a protocol version, and gives typed access to
// what the plugin can do. Supervision (when to launch again) is the caller's.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
	"github.com/belay-edge/belay/plugins/sdk/internal/idle"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// Options say what to launch and how.
type Options struct {
	// Path is the executable.
	Path string
	// Args follow the executable's name; usually none.
	Args []string
	// Name the plugin must have; "" accepts any.
	Name string
	// SocketDir is a directory of mode 0700 for the plugin's socket. Its path
	// must be short: the kernel allows a socket 107 bytes.
	SocketDir string
	// Config is handed to the plugin. Its directories must exist.
	Config sdk.Config
	// Env is added to the environment; nothing of the host's own environment
	// but PATH, HOME, TMPDIR, TZ, LANG and proxy settings reaches a plugin.
	Env []string
	// Wrap is a program with its first arguments that is run in place of the
	// executable and becomes it, by execve, once it has made the process safer:
	// Path and Args follow as its last arguments. WrapGo
	// and WrapStatus say how it is talked to. Nil: the executable runs at once.
	Wrap []string
	// Place is called with the process while it waits in Wrap or, without one,
	// has just started. It may put it where its use of resources is limited.
	Place func(ctx context.Context, pid int)
	// Outlive are the files a process id is written to that is to leave where
	// Place has put the plugin; the plugin is told. Nil: there is nothing to leave.
	Outlive []string
	// KeepLeftovers leaves alone what the plugin leaves in its session when it
	// ends: for those who want to see that.
	KeepLeftovers bool
	// Logger gets what the plugin writes to stderr and stdout, at most
	// LogRate lines a second; nil: slog's default.
	Logger *slog.Logger
	// StartTimeout bounds everything Launch does; 0: 10 s.
	StartTimeout time.Duration
	// CloseTimeout is what Close grants before it kills; 0: 4 s.
	CloseTimeout time.Duration
}

// Plugin is a running, configured plugin process.
type Plugin struct {
	info         sdk.Info
	version      int // of the protocol
	options      []sdk.Option
	optionsKnown bool
	abilities    []string

	opts   Options
	proc   *process
	stderr *stderrLog
	client *goplugin.Client
	addr   net.Addr // of its socket
	conn   *grpc.ClientConn

	alive   context.Context // ends when the process has
	closing sync.Once
	closed  chan struct{}
}

// Info is what the plugin said about itself.
func (p *Plugin) Info() sdk.Info { return p.info }

// ProtocolVersion is the one both sides agreed on.
func (p *Plugin) ProtocolVersion() int { return p.version }

// Options are what its configuration may hold; false when it does not say.
func (p *Plugin) Options() ([]sdk.Option, bool) { return p.options, p.optionsKnown }

// Missing are the protections that Wrap could not give it, one sentence each.
func (p *Plugin) Missing() []string { return p.proc.missing() }

// PID of the process.
func (p *Plugin) PID() int { return p.proc.pid() }

// Exited is closed when the process has ended.
func (p *Plugin) Exited() <-chan struct{} { return p.proc.exited }

// ExitReason says how the process ended and what it last wrote; "" while it runs.
func (p *Plugin) ExitReason() string {
	if !p.hasExited() {
		return ""
	}
	return p.exitStatus() + p.said()
}

func (p *Plugin) hasExited() bool {
	select {
	case <-p.proc.exited:
		return true
	default:
		return false
	}
}

// exitStatus is to be called after the exit.
func (p *Plugin) exitStatus() string {
	var ee *exec.ExitError
	switch {
	case p.proc.err == nil:
		return "exit status 0"
	case errors.As(p.proc.err, &ee):
		if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return fmt.Sprintf("killed by signal %d (%s)", ws.Signal(), unix.SignalName(ws.Signal()))
		}
	}
	return p.proc.err.Error()
}

// Ping asks the plugin's health service. An error means the process is dead,
// hangs, or says it is not well.
func (p *Plugin) Ping(ctx context.Context) error {
	cctx, done := p.call(ctx)
	defer done()
	r, err := grpc_health_v1.NewHealthClient(p.conn).Check(cctx, &grpc_health_v1.HealthCheckRequest{Service: handshake.HealthService})
	if err != nil {
		return p.explain(ctx, "ping plugin "+p.info.Name, err)
	}
	if r.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return sdk.Errorf(sdk.Unavailable, "ping plugin "+p.info.Name, "it reports %s", r.GetStatus())
	}
	return nil
}

// Runtime gives the plugin's runtime; false when it is not one.
func (p *Plugin) Runtime() (sdk.Runtime, bool) {
	if !slices.Contains(p.info.Kinds, sdk.KindRuntime) {
		return nil, false
	}
	return newRuntimeClient(p), true
}

// Devices gives the plugin's devices; false when it has none.
func (p *Plugin) Devices() (sdk.Devices, bool) {
	if p.version < 2 || !slices.Contains(p.info.Kinds, sdk.KindDevice) {
		return nil, false
	}
	return &deviceClient{p: p, rpc: pluginv2.NewDeviceClient(p.conn)}, true
}

// Close asks the plugin to end, kills it when it does not in time or when ctx
// ends, and returns once the process is gone, with what it left in its session.
func (p *Plugin) Close(ctx context.Context) {
	p.closing.Do(func() {
		go func() {
			defer close(p.closed)
			p.askToEnd()
			_ = p.proc.Kill(context.Background())
			p.client.Kill()
			<-p.proc.swept
		}()
	})
	select {
	case <-p.closed:
	case <-ctx.Done():
		_ = p.proc.Kill(context.Background())
		<-p.closed
	}
}

// askToEnd waits for the end no longer than CloseTimeout. go-plugin's own
// request would wait for ever on a process that hangs, and its patience with
// one that does not is too short to undo half a Start.
func (p *Plugin) askToEnd() {
	if p.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(p.alive, p.opts.CloseTimeout)
	defer cancel()
	_ = p.conn.Invoke(ctx, handshake.ShutdownMethod, &emptypb.Empty{}, &emptypb.Empty{})
	p.proc.lifeline.Close() // for plugins that watch only this
	<-ctx.Done()
}

// Kill ends the process without asking and returns once it is gone.
func (p *Plugin) Kill() {
	_ = p.proc.Kill(context.Background())
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	p.Close(gone)
}

// call bounds a call by the plugin's life.
func (p *Plugin) call(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(p.alive, cancel)
	return ctx, func() { unhook(); cancel(); idle.Worked() }
}

// explain translates the failure of a call made with ctx.
func (p *Plugin) explain(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	e := bridge.FromStatus(ctx, op, err)
	var said *sdk.Error
	if errors.As(e, &said) {
		said.Op, said.Message, said.Hint = cut(said.Op), cut(said.Message), cut(said.Hint)
	}
	switch k := sdk.KindOf(e); {
	case ctx.Err() != nil || k != sdk.Canceled && k != sdk.Unavailable:
	case p.alive.Err() != nil:
		return sdk.Errorf(sdk.Unavailable, op, "plugin %s has ended: %s", pluginName(p.opts), p.exitStatus())
	case k == sdk.Canceled: // not by the caller
		return sdk.Errorf(sdk.Unavailable, op, "plugin %s is ending", pluginName(p.opts))
	}
	return e
}
