package serve

import (
	"context"
	"sync"

	"google.golang.org/grpc"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// deviceServer carries calls to an sdk.Devices. Errors are translated by the
// interceptors.
type deviceServer struct {
	pluginv2.UnsafeDeviceServer
	devices sdk.Devices
}

func (s *deviceServer) Watch(_ *pluginv2.WatchRequest, stream grpc.ServerStreamingServer[pluginv2.DeviceInventory]) error {
	// What a plugin sends after Watch returned must not meet a stream that is
	// being ended; the first inventory that breaks the contract ends it.
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	var mu sync.Mutex
	over := false
	err := s.devices.Watch(ctx, func(devices []sdk.Device) {
		mu.Lock()
		defer mu.Unlock()
		if over || ctx.Err() != nil {
			return
		}
		if err := sdk.CheckInventory(devices); err != nil {
			cancel(err)
			return
		}
		if err := stream.Send(bridge.ToInventoryOfDevices(devices)); err != nil {
			cancel(err)
		}
	})
	mu.Lock()
	defer mu.Unlock()
	over = true
	if cause := context.Cause(ctx); cause != nil && stream.Context().Err() == nil {
		return cause
	}
	return err
}

func (s *deviceServer) Edits(ctx context.Context, r *pluginv2.EditsRequest) (*pluginv2.EditsResponse, error) {
	e, err := s.devices.Edits(ctx, r.GetIds())
	if err != nil {
		return nil, err
	}
	return bridge.ToEdits(e), nil
}

func (s *deviceServer) Stats(ctx context.Context, r *pluginv2.DeviceStatsRequest) (*pluginv2.DeviceStatsResponse, error) {
	stats, err := s.devices.Stats(ctx, r.GetIds())
	if err != nil {
		return nil, err
	}
	return bridge.ToDeviceStats(stats), nil
}
