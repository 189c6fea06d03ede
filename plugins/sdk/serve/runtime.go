package serve

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// runtimeCalls carries the calls that are the same in every version of the
// protocol to an sdk.Runtime. Errors are translated by the interceptors.
type runtimeCalls struct{ runtime sdk.Runtime }

// runtimeServer serves version 2.
type runtimeServer struct {
	pluginv2.UnsafeRuntimeServer // every method is runtimeCalls' or below
	runtimeCalls
}

func (s *runtimeServer) Start(ctx context.Context, r *pluginv2.StartRequest) (*pluginpb.StartResponse, error) {
	return s.start(ctx, bridge.FromStart(r))
}

func (s *runtimeServer) List(ctx context.Context, _ *pluginpb.ListRequest) (*pluginv2.ListResponse, error) {
	i, err := s.runtime.List(ctx)
	if err != nil {
		return nil, err
	}
	return bridge.ToInventory(i), nil
}

func (s *runtimeServer) store(what string) (sdk.ImageStore, error) {
	if store, ok := s.runtime.(sdk.ImageStore); ok {
		return store, nil
	}
	return nil, sdk.Errorf(sdk.Unsupported, what, "this runtime is no image store")
}

func (s *runtimeServer) Images(ctx context.Context, _ *pluginv2.ImagesRequest) (*pluginv2.ImagesResponse, error) {
	store, err := s.store("list images")
	if err != nil {
		return nil, err
	}
	i, err := store.Images(ctx)
	if err != nil {
		return nil, err
	}
	return bridge.ToImages(i), nil
}

func (s *runtimeServer) RemoveImage(ctx context.Context, r *pluginv2.RemoveImageRequest) (*pluginv2.RemoveImageResponse, error) {
	store, err := s.store("remove an image")
	if err != nil {
		return nil, err
	}
	return &pluginv2.RemoveImageResponse{}, store.RemoveImage(ctx, r.GetDigest())
}

// runtimeServerV1 serves version 1.
type runtimeServerV1 struct {
	pluginpb.UnsafeRuntimeServer
	runtimeCalls
}

func (s *runtimeServerV1) Start(ctx context.Context, r *pluginpb.StartRequest) (*pluginpb.StartResponse, error) {
	return s.start(ctx, bridge.FromStartV1(r))
}

func (s *runtimeServerV1) List(ctx context.Context, _ *pluginpb.ListRequest) (*pluginpb.ListResponse, error) {
	i, err := s.runtime.List(ctx)
	if err != nil {
		return nil, err
	}
	return bridge.ToInventoryV1(i), nil
}

func (s *runtimeCalls) Info(ctx context.Context, _ *pluginpb.InfoRequest) (*pluginpb.InfoResponse, error) {
	i, err := s.runtime.Info(ctx)
	if err != nil {
		return nil, err
	}
	return bridge.ToRuntimeInfo(i), nil
}

func (s *runtimeCalls) PrepareTask(ctx context.Context, r *pluginpb.PrepareTaskRequest) (*pluginpb.PrepareTaskResponse, error) {
	return &pluginpb.PrepareTaskResponse{}, s.runtime.PrepareTask(ctx, bridge.FromTaskSpec(r.GetTask()))
}

func (s *runtimeCalls) RemoveTask(ctx context.Context, r *pluginpb.RemoveTaskRequest) (*pluginpb.RemoveTaskResponse, error) {
	return &pluginpb.RemoveTaskResponse{}, s.runtime.RemoveTask(ctx, r.GetId())
}

func (s *runtimeCalls) Pull(r *pluginpb.PullRequest, stream grpc.ServerStreamingServer[pluginpb.PullUpdate]) error {
	// The contract forbids progress after Pull returned; a plugin that does it
	// all the same must not write on a stream that is being ended.
	var mu sync.Mutex
	over := false
	image, err := s.runtime.Pull(stream.Context(), bridge.FromPull(r), func(g sdk.PullProgress) {
		mu.Lock()
		defer mu.Unlock()
		if !over {
			// A host that is gone ends the context, which ends the pull.
			_ = stream.Send(&pluginpb.PullUpdate{Update: &pluginpb.PullUpdate_Progress{Progress: bridge.ToProgress(g)}})
		}
	})
	mu.Lock()
	defer mu.Unlock()
	over = true
	if err != nil {
		return err
	}
	return stream.Send(&pluginpb.PullUpdate{Update: &pluginpb.PullUpdate_Image{Image: bridge.ToImage(image)}})
}

func (s *runtimeCalls) start(ctx context.Context, r sdk.StartRequest) (*pluginpb.StartResponse, error) {
	c, err := s.runtime.Start(ctx, r)
	if err != nil {
		return nil, err
	}
	return &pluginpb.StartResponse{Container: bridge.ToContainer(c)}, nil
}

func (s *runtimeCalls) Stop(ctx context.Context, r *pluginpb.StopRequest) (*pluginpb.StopResponse, error) {
	c, err := s.runtime.Stop(ctx, bridge.FromAttempt(r.GetAttempt()), time.Duration(r.GetGraceNanos()))
	if err != nil {
		return nil, err
	}
	return &pluginpb.StopResponse{Container: bridge.ToContainer(c)}, nil
}

func (s *runtimeCalls) Remove(ctx context.Context, r *pluginpb.RemoveRequest) (*pluginpb.RemoveResponse, error) {
	return &pluginpb.RemoveResponse{}, s.runtime.Remove(ctx, bridge.FromAttempt(r.GetAttempt()))
}

func (s *runtimeCalls) Events(_ *pluginpb.EventsRequest, stream grpc.ServerStreamingServer[pluginpb.Event]) error {
	var mu sync.Mutex
	over := false
	err := s.runtime.Events(stream.Context(), func(a sdk.Attempt) {
		mu.Lock()
		defer mu.Unlock()
		if !over {
			_ = stream.Send(&pluginpb.Event{Attempt: bridge.ToAttempt(a)})
		}
	})
	mu.Lock()
	defer mu.Unlock()
	over = true
	return err
}

func (s *runtimeCalls) Stats(ctx context.Context, r *pluginpb.StatsRequest) (*pluginpb.StatsResponse, error) {
	st, err := s.runtime.Stats(ctx, bridge.FromAttempt(r.GetAttempt()))
	if err != nil {
		return nil, err
	}
	return bridge.ToStats(st), nil
}

func (s *runtimeCalls) Exec(ctx context.Context, r *pluginpb.ExecRequest) (*pluginpb.ExecResponse, error) {
	res, err := s.runtime.Exec(ctx, bridge.FromExec(r))
	if err != nil {
		return nil, err
	}
	return bridge.ToExecResult(res), nil
}
