package sdktest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

const goodDevice = "good-device"

// brokenDevices are the plugins of the tests and the one rule each breaks.
var brokenDevices = map[string]string{
	"other-name":        ruleLaunch,
	"serves-anyone":     ruleByHand,
	"inconstant":        ruleDescription,
	"hasty":             "calls before Configure are refused",
	"takes-any-config":  ruleConfig,
	"waits-for-change":  ruleInventory,
	"doubles":           ruleContract,
	"repeats":           "a watch is silent while nothing changes",
	"one-watch":         ruleTwoWatches,
	"ends-all-watches":  "the end of one watch leaves another alone",
	"random-ids":        ruleIDs,
	"no-such-node":      ruleEdits,
	"gives-not-ready":   "the edits of a device that is not ready are unavailable",
	"gives-unknown":     "the edits of an unknown device are not found",
	"needs-watch":       "edits are the same in a new process that never watched",
	"overdrive":         "stats are plausible",
	"measures-all":      "stats asked of one device are of that device",
	"measures-unknown":  "the stats of an unknown device are not found",
	"one-at-a-time":     "calls run beside each other",
	"no-health":         "it answers pings while it is watched",
	"does-not-end":      ruleEnds,
	"watch-never-ends":  "a watch ends when it is asked to",
	"outlives-its-host": ruleHostDies,
	"leaves-a-child":    "killed while it is watched, it leaves no process behind",
	"blind":             "a change is reported within five seconds",
}

// detector is a device plugin with one defect, or none.
type detector struct {
	mode     string
	hardware string

	mu      sync.Mutex
	watched bool
	watches map[int]context.CancelFunc
	inEdits atomic.Int32
	number  int
	prefix  string
}

type detectorConfig struct {
	Hardware string        `json:"hardware" help:"directory that stands for the hardware" required:"true"`
	Scan     time.Duration `json:"scan" default:"50ms" min:"0.01"`
	Names    []string      `json:"names"`
	Fast     bool          `json:"fast"`
}

func pretend(mode string) {
	d := &detector{mode: mode, watches: map[int]context.CancelFunc{}, prefix: "bus-"}
	var p sdk.Plugin = d
	if mode == "random-ids" {
		d.prefix = "bus-" + strconv.Itoa(rand.Int()) + "-"
	}
	if mode != "takes-any-config" {
		p = strict{d}
	}
	switch mode {
	case "serves-anyone":
		announced := func(line string) error { _, err := fmt.Println(line); return err }
		ctx, cancel := context.WithCancel(context.Background())
		go func() { _, _ = io.Copy(io.Discard, os.Stdin); <-time.After(time.Second); cancel() }()
		if os.Getenv(handshake.CookieKey) == "" {
			onAndOn()
		}
		_ = serve.Run(ctx, p, serve.Options{Dir: os.Getenv(handshake.SocketDirKey), HostVersions: "2", Announce: announced})
	case "outlives-its-host":
		if os.Getenv(handshake.CookieKey) == "" {
			serve.Main(p)
		}
		_ = serve.Run(context.Background(), p, serve.Options{Dir: os.Getenv(handshake.SocketDirKey), HostVersions: "2"})
	case "does-not-end":
		if os.Getenv(handshake.CookieKey) == "" {
			serve.Main(p)
		}
		var asked atomic.Bool
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			<-time.After(time.Second)
			if !asked.Load() {
				os.Exit(0)
			}
		}()
		_ = serve.Run(context.Background(), p, serve.Options{Dir: os.Getenv(handshake.SocketDirKey), HostVersions: "2"})
		asked.Store(true)
		onAndOn()
	case "hasty", "no-health":
		if os.Getenv(handshake.CookieKey) == "" {
			serve.Main(p)
		}
		serveBare(strict{d}, mode == "no-health")
	default:
		serve.Main(p)
	}
}

// strict is a detector that says what its configuration may hold.
type strict struct{ *detector }

func (strict) Options() []sdk.Option { return sdk.OptionsOf(detectorConfig{}) }

func (d *detector) Info() sdk.Info {
	i := sdk.Info{Name: d.mode, Version: "1", Kinds: []sdk.Kind{sdk.KindDevice}}
	switch d.mode {
	case "other-name":
		i.Name = "another"
	case "inconstant":
		i.Version = strconv.Itoa(os.Getpid())
	}
	return i
}

func (d *detector) Configure(_ context.Context, c sdk.Config) error {
	var config detectorConfig
	if d.mode == "takes-any-config" {
		var lenient struct{ Hardware string }
		_ = json.Unmarshal(c.JSON, &lenient)
		d.hardware = lenient.Hardware
		return nil
	}
	if err := sdk.DecodeConfig(c, &config); err != nil {
		return err
	}
	d.hardware = config.Hardware
	return nil
}

func (d *detector) Devices() sdk.Devices { return d }

func (d *detector) find() []sdk.Device {
	all := []sdk.Device{
		{ID: d.prefix + "1", Kind: sdk.DeviceSerial, Ready: true, Health: sdk.HealthHealthy, Attributes: map[string]string{"node": "/dev/null"}},
		{ID: d.prefix + "2", Kind: sdk.DeviceSerial, Ready: true, Attributes: map[string]string{"node": "/dev/zero"}},
		{ID: d.prefix + "3", Kind: sdk.DeviceTPU, Reason: "no driver is bound to it"},
	}
	if d.mode == "doubles" {
		all[2].ID = all[1].ID
	}
	if _, err := os.Stat(filepath.Join(d.hardware, "more")); err == nil && d.mode != "blind" {
		all = append(all, sdk.Device{ID: d.prefix + "4", Kind: sdk.DeviceCamera, Ready: true})
	}
	return all
}

func (d *detector) Watch(ctx context.Context, f func([]sdk.Device)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.mu.Lock()
	d.watched = true
	d.number++
	me := d.number
	if d.mode == "one-watch" {
		for range 20 { // the one before may be about to end
			if len(d.watches) == 0 {
				break
			}
			d.mu.Unlock()
			<-time.After(50 * time.Millisecond)
			d.mu.Lock()
		}
		if len(d.watches) > 0 {
			d.mu.Unlock()
			return sdk.Errorf(sdk.Conflict, "watch", "somebody watches already")
		}
	}
	d.watches[me] = cancel
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.watches, me)
		if d.mode == "ends-all-watches" {
			for _, end := range d.watches {
				end()
			}
		}
	}()
	if d.mode == "leaves-a-child" {
		child := exec.CommandContext(ctx, "sleep", "600")
		if err := child.Start(); err != nil {
			return err
		}
		defer func() { _ = child.Wait() }()
	}
	if d.mode == "watch-never-ends" {
		ctx = context.WithoutCancel(ctx)
	}
	last := -1
	if d.mode == "waits-for-change" {
		last = len(d.find())
	}
	for {
		if all := d.find(); len(all) != last || d.mode == "repeats" {
			f(all)
			last = len(all)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (d *detector) get(id string) (sdk.Device, bool) {
	for _, dev := range d.find() {
		if dev.ID == id {
			return dev, true
		}
	}
	return sdk.Device{}, false
}

func (d *detector) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	var e sdk.Edits
	if n := d.inEdits.Add(1); d.mode == "one-at-a-time" {
		<-time.After(100 * time.Millisecond)
		if n > 1 {
			d.inEdits.Add(-1)
			return e, sdk.Errorf(sdk.Unavailable, "edits", "busy")
		}
	}
	defer d.inEdits.Add(-1)
	d.mu.Lock()
	watched := d.watched
	d.mu.Unlock()
	for _, id := range ids {
		dev, ok := d.get(id)
		switch {
		case d.mode == "needs-watch" && !watched:
			return e, sdk.Errorf(sdk.NotFound, "edits of "+id, "no such device")
		case !ok && d.mode != "gives-unknown":
			return e, sdk.Errorf(sdk.NotFound, "edits of "+id, "no such device")
		case ok && !dev.Ready && d.mode != "gives-not-ready":
			return e, sdk.Errorf(sdk.Unavailable, "edits of "+id, "%s", dev.Reason)
		}
		if node := dev.Attributes["node"]; node != "" {
			if d.mode == "no-such-node" {
				node = "/dev/no-such-node"
			}
			e.Devices = append(e.Devices, sdk.HostDevice{HostPath: node, Permissions: "rw"})
		}
	}
	return e, nil
}

func (d *detector) Stats(_ context.Context, ids []string) ([]sdk.DeviceStats, error) {
	var out []sdk.DeviceStats
	if len(ids) == 0 || d.mode == "measures-all" {
		for _, id := range ids {
			if _, ok := d.get(id); !ok {
				return nil, sdk.Errorf(sdk.NotFound, "stats of "+id, "no such device")
			}
		}
		ids = nil
		for _, dev := range d.find() {
			ids = append(ids, dev.ID)
		}
	}
	for _, id := range ids {
		if _, ok := d.get(id); !ok {
			if d.mode == "measures-unknown" {
				continue
			}
			return nil, sdk.Errorf(sdk.NotFound, "stats of "+id, "no such device")
		}
		load := 12.5
		if d.mode == "overdrive" {
			load = 250
		}
		out = append(out, sdk.DeviceStats{ID: id, UtilizationPercent: &load})
	}
	return out, nil
}

// bare serves without what package serve takes care of.
type bare struct {
	pluginv2.UnimplementedPluginServer
	pluginv2.UnimplementedDeviceServer
	plugin strict
	noPing bool
	mu     sync.Mutex
	ready  bool
}

func serveBare(p strict, noPing bool) {
	path := handshake.SocketPath(os.Getenv(handshake.SocketDirKey), os.Getpid())
	l, err := net.Listen("unix", path)
	if err != nil {
		panic(err)
	}
	s := grpc.NewServer()
	b := &bare{plugin: p, noPing: noPing}
	pluginv2.RegisterPluginServer(s, b)
	pluginv2.RegisterDeviceServer(s, b)
	if !noPing {
		h := health.NewServer()
		h.SetServingStatus(handshake.HealthService, grpc_health_v1.HealthCheckResponse_SERVING)
		grpc_health_v1.RegisterHealthServer(s, h)
	}
	fmt.Println(handshake.Line(2, "unix", path))
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); s.Stop() }()
	_ = s.Serve(l)
}

func (b *bare) Describe(context.Context, *pluginpb.DescribeRequest) (*pluginv2.DescribeResponse, error) {
	return bridge.ToDescription(bridge.Description{Info: b.plugin.Info(), OptionsKnown: true, Options: b.plugin.Options()}), nil
}

func (b *bare) Configure(ctx context.Context, r *pluginpb.ConfigureRequest) (*pluginpb.ConfigureResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready = true
	return &pluginpb.ConfigureResponse{}, bridge.ToStatus(b.plugin.Configure(ctx, bridge.FromConfig(r)))
}

// enter refuses what comes too early, but for the plugin that is to be hasty.
func (b *bare) enter() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ready && b.noPing {
		return bridge.ToStatus(sdk.Errorf(sdk.Conflict, "", "called before Configure"))
	}
	return nil
}

func (b *bare) Watch(_ *pluginv2.WatchRequest, s grpc.ServerStreamingServer[pluginv2.DeviceInventory]) error {
	if err := b.enter(); err != nil {
		return err
	}
	return bridge.ToStatus(b.plugin.Watch(s.Context(), func(d []sdk.Device) { _ = s.Send(bridge.ToInventoryOfDevices(d)) }))
}

func (b *bare) Edits(ctx context.Context, r *pluginv2.EditsRequest) (*pluginv2.EditsResponse, error) {
	if err := b.enter(); err != nil {
		return nil, err
	}
	e, err := b.plugin.Edits(ctx, r.GetIds())
	return bridge.ToEdits(e), bridge.ToStatus(err)
}

func (b *bare) Stats(ctx context.Context, r *pluginv2.DeviceStatsRequest) (*pluginv2.DeviceStatsResponse, error) {
	if err := b.enter(); err != nil {
		return nil, err
	}
	s, err := b.plugin.Stats(ctx, r.GetIds())
	return bridge.ToDeviceStats(s), bridge.ToStatus(err)
}

// onAndOn never returns. A plain select{} would end a program without cgo, which
// notices that nothing can happen any more.
func onAndOn() {
	for {
		<-time.After(time.Hour)
	}
}
