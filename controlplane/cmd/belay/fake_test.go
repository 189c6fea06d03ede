package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"connectrpc.com/connect"

	"github.com/belay-edge/belay/controlplane"
	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

const fakeToken = "fake-token"

// fakePlane answers as a control plane does, from what its callers said: the
// family of a task definition names what becomes of its tasks.
type fakePlane struct {
	apiv1connect.UnimplementedBelayHandler
	mu       sync.Mutex
	clusters []*apiv1.Cluster
	tokens   map[string]string // client token: what it made
	taskdefs []*apiv1.TaskDefinition
	lost     bool // one answer was lost already
	watches  int
}

func newFakePlane() *fakePlane { return &fakePlane{tokens: map[string]string{}} }

func (p *fakePlane) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(apiv1connect.NewBelayHandler(p, connect.WithInterceptors(fakeAuth{})))
	return mux
}

type fakeAuth struct{}

func (fakeAuth) check(h http.Header) error {
	if h.Get("Authorization") != "Bearer "+fakeToken {
		return connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("no such token"))
	}
	return nil
}

func (a fakeAuth) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		if err := a.check(r.Header()); err != nil {
			return nil, err
		}
		return next(ctx, r)
	}
}
func (fakeAuth) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}
func (a fakeAuth) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, c connect.StreamingHandlerConn) error {
		if err := a.check(c.RequestHeader()); err != nil {
			return err
		}
		return next(ctx, c)
	}
}

// CreateCluster of "flaky" does its work and loses the first answer.
func (p *fakePlane) CreateCluster(_ context.Context, r *connect.Request[apiv1.CreateClusterRequest]) (*connect.Response[apiv1.CreateClusterResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := r.Msg.GetName()
	if r.Msg.GetClientToken() == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a client token is missing"))
	}
	cl := &apiv1.Cluster{Name: name, Status: "ACTIVE", CreatedAt: "2026-01-02T03:04:05Z"}
	if _, done := p.tokens[r.Msg.GetClientToken()]; !done {
		for _, c := range p.clusters {
			if c.GetName() == name {
				return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("cluster %q exists already", name))
			}
		}
		p.tokens[r.Msg.GetClientToken()] = name
		p.clusters = append(p.clusters, cl)
	}
	if name == "flaky" && !p.lost {
		p.lost = true
		return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("the store is away"))
	}
	return connect.NewResponse(&apiv1.CreateClusterResponse{Cluster: cl, Revision: 7}), nil
}

// ListClusters has pages of one.
func (p *fakePlane) ListClusters(_ context.Context, r *connect.Request[apiv1.ListClustersRequest]) (*connect.Response[apiv1.ListClustersResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := 0
	fmt.Sscan(r.Msg.GetPage().GetToken(), &at)
	res := &apiv1.ListClustersResponse{Revision: 9}
	if at < len(p.clusters) {
		res.Clusters = p.clusters[at : at+1]
	}
	if at+1 < len(p.clusters) {
		res.NextToken = fmt.Sprint(at + 1)
	}
	return connect.NewResponse(res), nil
}

func (p *fakePlane) CreateActivation(_ context.Context, r *connect.Request[apiv1.CreateActivationRequest]) (*connect.Response[apiv1.CreateActivationResponse], error) {
	return connect.NewResponse(&apiv1.CreateActivationResponse{
		Code: "belay1.CODE", Revision: 3,
		Activation: &apiv1.Activation{Id: strings.Repeat("a", 32), Cluster: r.Msg.GetCluster(), Limit: r.Msg.GetLimit(),
			CreatedAt: "2026-01-02T03:04:05Z", ExpiresAt: "2026-01-02T04:04:05Z", Attributes: r.Msg.GetAttributes(),
			Description: fmt.Sprintf("%ds", r.Msg.GetExpiresSeconds())},
	}), nil
}

func (p *fakePlane) ListInstances(context.Context, *connect.Request[apiv1.ListInstancesRequest]) (*connect.Response[apiv1.ListInstancesResponse], error) {
	res := &apiv1.ListInstancesResponse{}
	for i, long := range []string{"nuc", "a-device-with-a-very-long-host-name-in-the-far-corner-of-warehouse-42.example.com"} {
		res.Instances = append(res.Instances, &apiv1.Instance{Id: fmt.Sprintf("%032x", i+1), Cluster: "warehouse-in-the-north-west",
			Hostname: long, Status: "ACTIVE", Connected: i == 0, Transport: "quic", LastSeenAt: "2026-01-02T03:04:05Z",
			RegisteredAt: "2026-01-02T03:04:05Z",
			Resources:    &apiv1.InstanceResources{Registered: &apiv1.Resources{Cpu: 4096, Memory: 7000}, Remaining: &apiv1.Resources{Cpu: 3584, Memory: 6000, Ports: []string{"80/tcp"}}},
			Attributes:   []*apiv1.Attribute{{Name: "belay.arch", Value: "arm64"}},
			Plugins: []*apiv1.Plugin{
				{Name: "containerd", Version: "1.2.0-45-gdeadbeef", Kinds: []string{"runtime"}, State: "ready", Checksum: strings.Repeat("0123456789abcdef", 4),
					Restarts: 1, ProtocolVersion: 2, MemoryBytes: 9<<20 + 1, MemoryMaxBytes: 256 << 20, LastError: "up again after: the process ended: killed by signal 9 (SIGKILL)"},
				{Name: "edgetpu", Version: "1.2.0", Kinds: []string{"device"}, State: "ready", Checksum: strings.Repeat("fedcba9876543210", 4),
					ProtocolVersion: 2, MemoryBytes: 3 << 20, MemoryMaxBytes: 64 << 20, ProtectionsMissing: []string{"read-only file system (Landlock): this kernel has none"}},
				{Name: "vendor", State: "quarantined", Checksum: strings.Repeat("77", 32), Restarts: 5, LastError: "killed: out of memory (limit 64 MiB)"},
			},
			Devices: []*apiv1.Device{
				{Plugin: "edgetpu", Id: "0000:01:00.0", Kind: "tpu", Health: "unknown", Shares: 1, Reason: "its driver is not bound: load the module apex, or look why it is not there"},
				{Plugin: "nvidia", Id: "GPU-8f3b5c1e-0000-4d2c-9d0b-1f6f2a7c1e55", Kind: "gpu", Ready: true, Health: "healthy", Shares: 2,
					UsedBy: []*apiv1.DeviceUse{{Task: strings.Repeat("ab", 16), Container: "detector-of-the-north-gate"}}},
			}})
	}
	return connect.NewResponse(res), nil
}

func (p *fakePlane) DescribeInstance(ctx context.Context, r *connect.Request[apiv1.DescribeInstanceRequest]) (*connect.Response[apiv1.DescribeInstanceResponse], error) {
	list, _ := p.ListInstances(ctx, nil)
	for _, i := range list.Msg.GetInstances() {
		if strings.HasPrefix(i.GetId(), r.Msg.GetId()) {
			return connect.NewResponse(&apiv1.DescribeInstanceResponse{Instance: i}), nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no instance %q", r.Msg.GetId()))
}

// RegisterTaskDefinition is the real decoder's word.
func (p *fakePlane) RegisterTaskDefinition(_ context.Context, r *connect.Request[apiv1.RegisterTaskDefinitionRequest]) (*connect.Response[apiv1.RegisterTaskDefinitionResponse], error) {
	td, warnings, err := controlplane.DecodeTaskDefinition([]byte(r.Msg.GetDocument()))
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	out := &apiv1.TaskDefinition{Family: td.Family, Revision: uint32(len(p.taskdefs) + 1), Status: "ACTIVE",
		RegisteredAt: "2026-01-02T03:04:05Z", Document: string(td.Canonical()), Warnings: warnings}
	p.taskdefs = append(p.taskdefs, out)
	return connect.NewResponse(&apiv1.RegisterTaskDefinitionResponse{TaskDefinition: out, StoreRevision: 12}), nil
}

func fakeTask(family string, n int) *apiv1.Task {
	return &apiv1.Task{Id: fmt.Sprintf("%s%0*d", strings.Repeat("f", 8), 24, n), TaskDefinition: family + ":1", Cluster: "default",
		Instance: fmt.Sprintf("%032x", 1), LastStatus: "PENDING", DesiredStatus: "RUNNING", CreatedAt: "2026-01-02T03:04:05Z",
		InstanceConnected: true, Containers: []*apiv1.Container{{Name: "main", Essential: true, LastStatus: "PENDING", Image: "web:1"}}}
}

func (p *fakePlane) RunTask(_ context.Context, r *connect.Request[apiv1.RunTaskRequest]) (*connect.Response[apiv1.RunTaskResponse], error) {
	family := r.Msg.GetTaskDefinition()
	res := &apiv1.RunTaskResponse{Revision: 20}
	switch family {
	case "missing":
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no task definition %q", family))
	case "full":
		res.Failures = []*apiv1.Placement{{Reason: "RESOURCE:MEMORY", Instance: fmt.Sprintf("%032x", 1), Detail: "needs 9000 MiB, 6000 MiB are free"}}
	default:
		for n := range r.Msg.GetCount() {
			res.Tasks = append(res.Tasks, fakeTask(family, int(n)))
		}
	}
	p.mu.Lock()
	p.tokens["family"] = family
	p.mu.Unlock()
	return connect.NewResponse(res), nil
}

func (p *fakePlane) DescribeTask(_ context.Context, r *connect.Request[apiv1.DescribeTaskRequest]) (*connect.Response[apiv1.DescribeTaskResponse], error) {
	if !strings.HasPrefix(strings.Repeat("f", 8), r.Msg.GetId()) {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no task %q", r.Msg.GetId()))
	}
	t := fakeTask("ok", 0)
	ended(t, 0)
	return connect.NewResponse(&apiv1.DescribeTaskResponse{Task: t, Revision: 21}), nil
}

func ended(t *apiv1.Task, code int32) {
	t.LastStatus, t.DesiredStatus, t.StoppedReason = "STOPPED", "STOPPED", "Essential container in task exited"
	t.StartedAt = "2026-01-02T03:04:06Z"
	t.Containers[0].LastStatus, t.Containers[0].ExitCode = "STOPPED", &code
}

// WatchTasks of "drops" loses its stream once.
func (p *fakePlane) WatchTasks(ctx context.Context, r *connect.Request[apiv1.WatchTasksRequest], s *connect.ServerStream[apiv1.WatchTasksResponse]) error {
	p.mu.Lock()
	family := p.tokens["family"]
	p.watches++
	watches := p.watches
	p.mu.Unlock()
	for n := range r.Msg.GetIds() {
		t := fakeTask(family, n)
		t.Containers[0].Pull = &apiv1.PullProgress{Layers: 3, LayersDone: 1, Kib: 2048, KibDone: 512}
		if err := s.Send(&apiv1.WatchTasksResponse{Task: t}); err != nil {
			return err
		}
	}
	switch {
	case family == "slow":
		<-ctx.Done()
		return ctx.Err()
	case family == "drops" && watches == 1:
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("shutting down"))
	}
	for n := range r.Msg.GetIds() {
		t := fakeTask(family, n)
		switch family {
		case "nostart":
			t.LastStatus, t.StoppedReason = "STOPPED", "CannotPullContainerError: no such image"
		case "fails":
			ended(t, 3)
		default:
			ended(t, 0)
		}
		if err := s.Send(&apiv1.WatchTasksResponse{Task: t}); err != nil {
			return err
		}
	}
	return nil
}

func (p *fakePlane) TaskLogs(_ context.Context, r *connect.Request[apiv1.TaskLogsRequest], s *connect.ServerStream[apiv1.TaskLogsResponse]) error {
	if r.Msg.GetContainer() == "away" {
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("instance 0001 is not connected; its logs are on the device, try again when it is back"))
	}
	for _, m := range []*apiv1.TaskLogsResponse{
		{Stream: "stdout", Data: []byte("one\ntw")}, {Stream: "stderr", Data: []byte("oops\n")},
		{Stream: "stdout", Data: []byte("o\nlast")},
	} {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	return nil
}
