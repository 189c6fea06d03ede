package serve

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
)

// runtimeServer carries calls to an sdk.Runtime. Errors are translated by the
// interceptors.
type runtimeServer struct {
	pluginpb.UnimplementedRuntimeServer
	sdk.Runtime
}

func (s *runtimeServer) Info(ctx context.Context, _ *pluginpb.InfoRequest) (*pluginpb.InfoResponse, error) {
	i, err := s.Runtime.Info(ctx)
	if err != nil {
		return nil, err
	}
	return bridge.ToRuntimeInfo(i), nil
}

func (s *runtimeServer) PrepareTask(ctx context.Context, r *pluginpb.PrepareTaskRequest) (*pluginpb.PrepareTaskResponse, error) {
	return &pluginpb.PrepareTaskResponse{}, s.Runtime.PrepareTask(ctx, bridge.FromTaskSpec(r.GetTask()))
}

func (s *runtimeServer) RemoveTask(ctx context.Context, r *pluginpb.RemoveTaskRequest) (*pluginpb.RemoveTaskResponse, error) {
	return &pluginpb.RemoveTaskResponse{}, s.Runtime.RemoveTask(ctx, r.GetId())
}

func (s *runtimeServer) Pull(r *pluginpb.PullRequest, stream grpc.ServerStreamingServer[pluginpb.PullUpdate]) error {
	// The contract forbids progress after Pull returned; a plugin that does it
	// all the same must not write on a stream that is being ended.
	var mu sync.Mutex
	over := false
	image, err := s.Runtime.Pull(stream.Context(), bridge.FromPull(r), func(g sdk.PullProgress) {
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

func (s *runtimeServer) Start(ctx context.Context, r *pluginpb.StartRequest) (*pluginpb.StartResponse, error) {
	c, err := s.Runtime.Start(ctx, bridge.FromStart(r))
	if err != nil {
		return nil, err
	}
	return &pluginpb.StartResponse{Container: bridge.ToContainer(c)}, nil
}

func (s *runtimeServer) Stop(ctx context.Context, r *pluginpb.StopRequest) (*pluginpb.StopResponse, error) {
	c, err := s.Runtime.Stop(ctx, bridge.FromAttempt(r.GetAttempt()), time.Duration(r.GetGraceNanos()))
	if err != nil {
		return nil, err
	}
	return &pluginpb.StopResponse{Container: bridge.ToContainer(c)}, nil
}

func (s *runtimeServer) Remove(ctx context.Context, r *pluginpb.RemoveRequest) (*pluginpb.RemoveResponse, error) {
	return &pluginpb.RemoveResponse{}, s.Runtime.Remove(ctx, bridge.FromAttempt(r.GetAttempt()))
}

func (s *runtimeServer) List(ctx context.Context, _ *pluginpb.ListRequest) (*pluginpb.ListResponse, error) {
	i, err := s.Runtime.List(ctx)
	if err != nil {
		return nil, err
	}
	return bridge.ToInventory(i), nil
}

func (s *runtimeServer) Events(_ *pluginpb.EventsRequest, stream grpc.ServerStreamingServer[pluginpb.Event]) error {
	var mu sync.Mutex
	over := false
	err := s.Runtime.Events(stream.Context(), func(a sdk.Attempt) {
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

func (s *runtimeServer) Stats(ctx context.Context, r *pluginpb.StatsRequest) (*pluginpb.StatsResponse, error) {
	st, err := s.Runtime.Stats(ctx, bridge.FromAttempt(r.GetAttempt()))
	if err != nil {
		return nil, err
	}
	return bridge.ToStats(st), nil
}

func (s *runtimeServer) Exec(ctx context.Context, r *pluginpb.ExecRequest) (*pluginpb.ExecResponse, error) {
	res, err := s.Runtime.Exec(ctx, bridge.FromExec(r))
	if err != nil {
		return nil, err
	}
	return bridge.ToExecResult(res), nil
}
