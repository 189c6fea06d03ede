package serve

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
	"github.com/belay-edge/belay/plugins/sdk/internal/idle"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// server ties the services of one process together.
type server struct {
	pluginv2.UnimplementedPluginServer
	grpc *grpc.Server
	done context.Context // ends every call

	plugin    sdk.Plugin
	abilities []string // beyond what its kinds ask for
	mu        sync.Mutex
	state     configState
	lock      *os.File // held for the life of the process
}

type configState int

const (
	unconfigured configState = iota
	configuring
	configured
)

func newServer(done context.Context, stop func(), p sdk.Plugin) *server {
	s := &server{done: done, plugin: p}
	s.grpc = grpc.NewServer(
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(math.MaxInt32), // the host is trusted; a List of everything may be long
		// One connection with small messages: gRPC's own 32 KB buffers each
		// way are memory for nothing.
		grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10),
	)
	h := health.NewServer()
	h.SetServingStatus(handshake.HealthService, grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(s.grpc, h)
	s.grpc.RegisterService(&controllerDesc, stop)
	// All versions at once: which one the host speaks shows in what it calls.
	pluginpb.RegisterPluginServer(s.grpc, serverV1{server: s})
	pluginv2.RegisterPluginServer(s.grpc, s)
	if r, ok := p.(sdk.RuntimePlugin); ok {
		calls := runtimeCalls{r.Runtime()}
		if _, ok := calls.runtime.(sdk.ImageStore); ok {
			s.abilities = append(s.abilities, bridge.AbilityImages)
		}
		pluginpb.RegisterRuntimeServer(s.grpc, &runtimeServerV1{runtimeCalls: calls})
		pluginv2.RegisterRuntimeServer(s.grpc, &runtimeServer{runtimeCalls: calls})
	}
	if d, ok := p.(sdk.DevicePlugin); ok {
		pluginv2.RegisterDeviceServer(s.grpc, &deviceServer{devices: d.Devices()})
	}
	return s
}

// controllerDesc is go-plugin's controller service. Its stdio and broker
// services are left out; hosts treat them as optional.
var controllerDesc = grpc.ServiceDesc{
	ServiceName: handshake.ControllerService,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Shutdown",
		Handler: func(srv any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			if err := decode(new(emptypb.Empty)); err != nil {
				return nil, err
			}
			srv.(func())()
			return new(emptypb.Empty), nil
		},
	}},
}

// unary gives every call a context that also ends with the process, turns a
// panic into an error of that one call, and translates errors.
func (s *server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	ctx, cancel := s.join(ctx)
	defer cancel()
	defer idle.Worked()
	defer func() { err = bridge.ToStatus(err) }()
	defer recovered(info.FullMethod, &err)
	if err := s.ready(info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	ctx, cancel := s.join(ss.Context())
	defer cancel()
	defer idle.Worked()
	defer func() { err = bridge.ToStatus(err) }()
	defer recovered(info.FullMethod, &err)
	if err := s.ready(info.FullMethod); err != nil {
		return err
	}
	return next(srv, joinedStream{ss, ctx})
}

func (s *server) join(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(s.done, cancel)
	return ctx, func() { unhook(); cancel() }
}

type joinedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s joinedStream) Context() context.Context { return s.ctx }

func (s joinedStream) SendMsg(m any) error {
	defer idle.Worked()
	return s.ServerStream.SendMsg(m)
}

func recovered(method string, err *error) {
	r := recover()
	if r == nil {
		return
	}
	// Plain text, unescaped: this is for a person with a broken plugin.
	fmt.Fprintf(os.Stderr, "panic in %s: %v\n%s", method, r, debug.Stack())
	*err = sdk.Errorf(sdk.Internal, method, "the plugin panicked: %v", r).
		WithHint("the plugin's log has the stack; this is a defect of the plugin")
}

// ready refuses calls that come before Configure.
func (s *server) ready(method string) error {
	switch method {
	case pluginpb.Plugin_Describe_FullMethodName, pluginpb.Plugin_Configure_FullMethodName,
		pluginv2.Plugin_Describe_FullMethodName, pluginv2.Plugin_Configure_FullMethodName,
		grpc_health_v1.Health_Check_FullMethodName, grpc_health_v1.Health_List_FullMethodName, grpc_health_v1.Health_Watch_FullMethodName:
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != configured {
		return sdk.Errorf(sdk.Conflict, method, "called before Configure succeeded")
	}
	return nil
}

// Describe implements pluginv2.PluginServer.
func (s *server) Describe(context.Context, *pluginpb.DescribeRequest) (*pluginv2.DescribeResponse, error) {
	d := bridge.Description{Info: s.plugin.Info(), Abilities: s.abilities}
	if c, ok := s.plugin.(sdk.Configurable); ok {
		d.OptionsKnown, d.Options = true, c.Options()
	}
	return bridge.ToDescription(d), nil
}

// serverV1 is the Plugin service of version 1.
type serverV1 struct {
	pluginpb.UnsafePluginServer
	*server
}

// Describe implements pluginpb.PluginServer. A host of version 1 would refuse
// kinds it does not know.
func (s serverV1) Describe(context.Context, *pluginpb.DescribeRequest) (*pluginpb.DescribeResponse, error) {
	i := s.plugin.Info()
	i.Kinds = slices.DeleteFunc(slices.Clone(i.Kinds), func(k sdk.Kind) bool { return k != sdk.KindRuntime })
	return bridge.ToInfo(i), nil
}

// Configure implements pluginpb.PluginServer.
func (s *server) Configure(ctx context.Context, r *pluginpb.ConfigureRequest) (*pluginpb.ConfigureResponse, error) {
	s.mu.Lock()
	if s.state != unconfigured {
		s.mu.Unlock()
		return nil, sdk.Errorf(sdk.Conflict, "configure", "configured already")
	}
	s.state = configuring
	s.mu.Unlock()

	c := bridge.FromConfig(r)
	lock, err := lockRunDir(ctx, c.RunDir)
	if err == nil {
		err = s.plugin.Configure(ctx, c)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.state = unconfigured
		_ = lock.Close()
		return nil, err
	}
	s.state, s.lock = configured, lock
	return &pluginpb.ConfigureResponse{}, nil
}

// lockRunDir waits for an earlier process of the same plugin, which may still
// be undoing a call its dead host made, so that never two work at once. The
// kernel lets go when a process ends, however it ends.
func lockRunDir(ctx context.Context, dir string) (*os.File, error) {
	if dir == "" {
		return nil, nil
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, sdk.Errorf(sdk.Internal, "lock the run directory", "%w", err)
	}
	patience := time.NewTimer(drain + 5*time.Second)
	defer patience.Stop()
	busy := func() (*os.File, error) {
		f.Close()
		return nil, sdk.Errorf(sdk.Unavailable, "lock "+f.Name(), "an earlier process of this plugin has not finished")
	}
	for warned := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, sdk.Errorf(sdk.Internal, "lock "+f.Name(), "%w", err)
		}
		if !warned {
			slog.Info("waiting for an earlier process of this plugin to finish")
			warned = true
		}
		select {
		case <-ctx.Done():
			return busy()
		case <-patience.C:
			return busy()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
