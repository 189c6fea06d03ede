package host

import (
	"context"
	"errors"
	"io"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// deviceClient is the sdk.Devices of one plugin process.
type deviceClient struct {
	p   *Plugin
	rpc pluginv2.DeviceClient
}

var _ sdk.Devices = (*deviceClient)(nil)

func (c *deviceClient) op(what string) string { return what + " (plugin " + c.p.info.Name + ")" }

// Watch implements sdk.Devices. An inventory that breaks the contract ends it.
func (c *deviceClient) Watch(ctx context.Context, f func([]sdk.Device)) error {
	cctx, done := c.p.call(ctx)
	defer done()
	stream, err := c.rpc.Watch(cctx, &pluginv2.WatchRequest{})
	if err != nil {
		return c.p.explain(ctx, c.op("watch devices"), err)
	}
	for {
		m, err := stream.Recv()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, io.EOF):
			return sdk.Errorf(sdk.Unavailable, c.op("watch devices"), "the plugin ended the stream")
		case err != nil:
			return c.p.explain(ctx, c.op("watch devices"), err)
		}
		devices := bridge.FromInventoryOfDevices(m)
		if err := sdk.CheckInventory(devices); err != nil {
			return err
		}
		f(devices)
	}
}

// Edits implements sdk.Devices.
func (c *deviceClient) Edits(ctx context.Context, ids []string) (sdk.Edits, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	r, err := c.rpc.Edits(cctx, &pluginv2.EditsRequest{Ids: ids})
	if err != nil {
		return sdk.Edits{}, c.p.explain(ctx, c.op("edits for "+strings.Join(ids, ", ")), err)
	}
	e := bridge.FromEdits(r)
	if err := sdk.CheckEdits(e); err != nil {
		return sdk.Edits{}, err
	}
	return e, nil
}

// Stats implements sdk.Devices.
func (c *deviceClient) Stats(ctx context.Context, ids []string) ([]sdk.DeviceStats, error) {
	cctx, done := c.p.call(ctx)
	defer done()
	r, err := c.rpc.Stats(cctx, &pluginv2.DeviceStatsRequest{Ids: ids})
	if err != nil {
		return nil, c.p.explain(ctx, c.op("stats of devices"), err)
	}
	return bridge.FromDeviceStats(r), nil
}
