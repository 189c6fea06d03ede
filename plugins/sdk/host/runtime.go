package host

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// runtimeClient is the sdk.Runtime of one plugin process.
type runtimeClient struct {
	p     *Plugin
	rpc   runtimeRPC
	start func(context.Context, sdk.StartRequest) (*pluginpb.StartResponse, error)
	list  func(context.Context) (sdk.Inventory, error)
}

// imageStoreClient is the same of one that describes itself as an image store.
type imageStoreClient struct {
	*runtimeClient
	rpc pluginv2.RuntimeClient
}

// runtimeRPC are the calls that every version of the protocol carries alike.
type runtimeRPC interface {
	Info(context.Context, *pluginpb.InfoRequest, ...grpc.CallOption) (*pluginpb.InfoResponse, error)
	PrepareTask(context.Context, *pluginpb.PrepareTaskRequest, ...grpc.CallOption) (*pluginpb.PrepareTaskResponse, error)
	RemoveTask(context.Context, *pluginpb.RemoveTaskRequest, ...grpc.CallOption) (*pluginpb.RemoveTaskResponse, error)
	Pull(context.Context, *pluginpb.PullRequest, ...grpc.CallOption) (grpc.ServerStreamingClient[pluginpb.PullUpdate], error)
	Stop(context.Context, *pluginpb.StopRequest, ...grpc.CallOption) (*pluginpb.StopResponse, error)
	Remove(context.Context, *pluginpb.RemoveRequest, ...grpc.CallOption) (*pluginpb.RemoveResponse, error)
	Events(context.Context, *pluginpb.EventsRequest, ...grpc.CallOption) (grpc.ServerStreamingClient[pluginpb.Event], error)
	Stats(context.Context, *pluginpb.StatsRequest, ...grpc.CallOption) (*pluginpb.StatsResponse, error)
	Exec(context.Context, *pluginpb.ExecRequest, ...grpc.CallOption) (*pluginpb.ExecResponse, error)
}

func newRuntimeClient(p *Plugin) sdk.Runtime {
	if p.version == 1 {
		v1 := pluginpb.NewRuntimeClient(p.conn)
		return &runtimeClient{p: p, rpc: v1, start: func(ctx context.Context, r sdk.StartRequest) (*pluginpb.StartResponse, error) {
			m, err := bridge.ToStartV1(r)
			if err != nil {
				return nil, err
			}
			return v1.Start(ctx, m)
		}, list: func(ctx context.Context) (sdk.Inventory, error) {
			r, err := v1.List(ctx, &pluginpb.ListRequest{})
			return bridge.FromInventoryV1(r), err
		}}
	}
	v2 := pluginv2.NewRuntimeClient(p.conn)
	c := &runtimeClient{p: p, rpc: v2, start: func(ctx context.Context, r sdk.StartRequest) (*pluginpb.StartResponse, error) {
		return v2.Start(ctx, bridge.ToStart(r))
	}, list: func(ctx context.Context) (sdk.Inventory, error) {
		r, err := v2.List(ctx, &pluginpb.ListRequest{})
		return bridge.FromInventory(r), err
	}}
	if slices.Contains(p.abilities, bridge.AbilityImages) {
		return imageStoreClient{c, v2}
	}
	return c
}

var (
	_ sdk.Runtime    = (*runtimeClient)(nil)
	_ sdk.ImageStore = imageStoreClient{}
)

func (c *runtimeClient) op(what string) string { return what + " (plugin " + c.p.info.Name + ")" }

// container takes an answer about one attempt.
func (c *runtimeClient) container(what string, a sdk.Attempt, m *pluginpb.Container) (sdk.Container, error) {
	got := bridge.FromContainer(m)
	err := sdk.CheckContainer(got)
	if err == nil && got.Attempt != a {
		err = sdk.Errorf(sdk.Internal, "", "it answers for %.100s", got.Attempt)
	}
	if err != nil {
		return sdk.Container{}, c.nonsense(what+" "+a.String(), err)
	}
	got.Reason = cut(got.Reason)
	return got, nil
}

// nonsense is the error of an answer that breaks the contract.
func (c *runtimeClient) nonsense(what string, err error) error {
	var e *sdk.Error
	words := err.Error()
	if errors.As(err, &e) {
		words = e.Message
	}
	return &sdk.Error{Kind: sdk.Internal, Op: c.op(what), Message: words, Hint: "this is a defect of the plugin", Err: ErrNonsense}
}

// Info implements sdk.Runtime.
func (c *runtimeClient) Info(ctx context.Context) (sdk.RuntimeInfo, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	r, err := c.rpc.Info(cctx, &pluginpb.InfoRequest{})
	if err != nil {
		return sdk.RuntimeInfo{}, c.p.explain(ctx, c.op("info"), err)
	}
	info := bridge.FromRuntimeInfo(r)
	if err := sdk.CheckRuntimeInfo(info); err != nil {
		return sdk.RuntimeInfo{}, c.nonsense("info", err)
	}
	return info, nil
}

// PrepareTask implements sdk.Runtime.
func (c *runtimeClient) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	cctx, done := c.p.call(ctx)
	defer done()
	_, err := c.rpc.PrepareTask(cctx, &pluginpb.PrepareTaskRequest{Task: bridge.ToTaskSpec(t)})
	return c.p.explain(ctx, c.op("prepare task "+t.ID), err)
}

// RemoveTask implements sdk.Runtime.
func (c *runtimeClient) RemoveTask(ctx context.Context, task string) error {
	cctx, done := c.p.call(ctx)
	defer done()
	_, err := c.rpc.RemoveTask(cctx, &pluginpb.RemoveTaskRequest{Id: task})
	return c.p.explain(ctx, c.op("remove task "+task), err)
}

// Pull implements sdk.Runtime.
func (c *runtimeClient) Pull(ctx context.Context, r sdk.PullRequest, progress func(sdk.PullProgress)) (sdk.Image, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	fail := func(err error) (sdk.Image, error) {
		return sdk.Image{}, c.p.explain(ctx, c.op("pull "+r.Image), err)
	}
	stream, err := c.rpc.Pull(cctx, bridge.ToPull(r))
	if err != nil {
		return fail(err)
	}
	var image *pluginpb.Image
	for {
		u, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && image != nil:
			i := bridge.FromImage(image)
			if len(i.Digest) > sdk.MaxRuntimeText || len(i.Reference) > 16*sdk.MaxRuntimeText {
				return sdk.Image{}, c.nonsense("pull "+r.Image, sdk.Errorf(sdk.Internal, "", "a digest of %d bytes for a reference of %d", len(i.Digest), len(i.Reference)))
			}
			return i, nil
		case errors.Is(err, io.EOF):
			return sdk.Image{}, sdk.Errorf(sdk.Internal, c.op("pull "+r.Image), "the plugin ended the pull without an image")
		case err != nil:
			return fail(err)
		}
		if i := u.GetImage(); i != nil {
			image = i
		} else if g := u.GetProgress(); g != nil && progress != nil {
			progress(bridge.FromProgress(g))
		}
	}
}

// Start implements sdk.Runtime.
func (c *runtimeClient) Start(ctx context.Context, r sdk.StartRequest) (sdk.Container, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	a, err := c.start(cctx, r)
	var unsaid *sdk.Error // the plugin's own errors are gRPC statuses still
	if errors.As(err, &unsaid) {
		return sdk.Container{}, unsaid
	}
	if err != nil {
		return sdk.Container{}, c.p.explain(ctx, c.op("start "+r.Attempt.String()), err)
	}
	return c.container("start", r.Attempt, a.GetContainer())
}

// Stop implements sdk.Runtime.
func (c *runtimeClient) Stop(ctx context.Context, a sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	r, err := c.rpc.Stop(cctx, &pluginpb.StopRequest{Attempt: bridge.ToAttempt(a), GraceNanos: int64(grace)})
	if err != nil {
		return sdk.Container{}, c.p.explain(ctx, c.op("stop "+a.String()), err)
	}
	return c.container("stop", a, r.GetContainer())
}

// Remove implements sdk.Runtime.
func (c *runtimeClient) Remove(ctx context.Context, a sdk.Attempt) error {
	cctx, done := c.p.call(ctx)
	defer done()
	_, err := c.rpc.Remove(cctx, &pluginpb.RemoveRequest{Attempt: bridge.ToAttempt(a)})
	return c.p.explain(ctx, c.op("remove "+a.String()), err)
}

// List implements sdk.Runtime.
func (c *runtimeClient) List(ctx context.Context) (sdk.Inventory, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	inv, err := c.list(cctx)
	if err != nil {
		return sdk.Inventory{}, c.p.explain(ctx, c.op("list"), err)
	}
	if err := sdk.CheckContainers(inv); err != nil {
		return sdk.Inventory{}, c.nonsense("list", err)
	}
	for i := range inv.Containers {
		inv.Containers[i].Reason = cut(inv.Containers[i].Reason)
	}
	return inv, nil
}

// Events implements sdk.Runtime.
func (c *runtimeClient) Events(ctx context.Context, f func(sdk.Attempt)) error {
	cctx, done := c.p.call(ctx)
	defer done()
	stream, err := c.rpc.Events(cctx, &pluginpb.EventsRequest{})
	if err != nil {
		return c.p.explain(ctx, c.op("events"), err)
	}
	for {
		e, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return sdk.Errorf(sdk.Unavailable, c.op("events"), "the plugin ended the stream")
		case err != nil:
			return c.p.explain(ctx, c.op("events"), err)
		}
		f(bridge.FromAttempt(e.GetAttempt()))
	}
}

// Stats implements sdk.Runtime.
func (c *runtimeClient) Stats(ctx context.Context, a sdk.Attempt) (sdk.Stats, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	r, err := c.rpc.Stats(cctx, &pluginpb.StatsRequest{Attempt: bridge.ToAttempt(a)})
	if err != nil {
		return sdk.Stats{}, c.p.explain(ctx, c.op("stats "+a.String()), err)
	}
	return bridge.FromStats(r), nil
}

// Exec implements sdk.Runtime.
func (c *runtimeClient) Exec(ctx context.Context, r sdk.ExecRequest) (sdk.ExecResult, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	a, err := c.rpc.Exec(cctx, bridge.ToExec(r))
	if err != nil {
		return sdk.ExecResult{}, c.p.explain(ctx, c.op("exec in "+r.Attempt.String()), err)
	}
	result := bridge.FromExecResult(a)
	if most := cmp.Or(max(r.MaxOutput, 0), 4096); len(result.Output) > most {
		result.Output = bytes.Clone(result.Output[len(result.Output)-most:]) // or all of it would be held
	}
	return result, nil
}

// Images implements sdk.ImageStore.
func (c imageStoreClient) Images(ctx context.Context) (sdk.ImageInventory, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	r, err := c.rpc.Images(cctx, &pluginv2.ImagesRequest{})
	if err != nil {
		return sdk.ImageInventory{}, c.p.explain(ctx, c.op("list images"), err)
	}
	inv := bridge.FromImages(r)
	if err := sdk.CheckImages(inv); err != nil {
		return sdk.ImageInventory{}, c.nonsense("list images", err)
	}
	return inv, nil
}

// RemoveImage implements sdk.ImageStore.
func (c imageStoreClient) RemoveImage(ctx context.Context, digest string) error {
	cctx, done := c.p.call(ctx)
	defer done()
	_, err := c.rpc.RemoveImage(cctx, &pluginv2.RemoveImageRequest{Digest: digest})
	return c.p.explain(ctx, c.op("remove image "+digest), err)
}
