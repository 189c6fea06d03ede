package host_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// Version 1 is what plugins in the field speak: it never changes again.
func TestVersion1IsFrozen(t *testing.T) {
	d := protodesc.ToFileDescriptorProto(pluginpb.File_plugin_proto)
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	const frozen = "1a946bb2136230d5764816109c5e52e003afbd4a3889a069a6a6b0fef9ec913c"
	if got := hex.EncodeToString(sum[:]); got != frozen {
		t.Errorf("plugin.proto of version 1 changed (%s): put what is new into a later version", got)
	}
}

// servePluginOfVersion1 is a plugin as the foundation built them, written from
// the protocol of version 1 alone: the handshake line, the health service and
// the two services of that version. Nothing of package serve is in it.
func servePluginOfVersion1(mem *sdktest.Memory) {
	if !strings.Contains(os.Getenv("PLUGIN_PROTOCOL_VERSIONS"), "1") {
		fmt.Fprintln(os.Stderr, "this host does not speak version 1")
		os.Exit(1)
	}
	path := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), fmt.Sprintf("host.%d", os.Getpid()))
	l, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s := grpc.NewServer()
	h := health.NewServer()
	h.SetServingStatus("plugin", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(s, h)
	v1 := &pluginOfVersion1{mem: mem}
	pluginpb.RegisterPluginServer(s, v1)
	pluginpb.RegisterRuntimeServer(s, runtimeOfVersion1{pluginOfVersion1: v1})
	fmt.Printf("1|1|unix|%s|grpc|\n", path)
	_ = s.Serve(l)
}

type pluginOfVersion1 struct {
	pluginpb.UnsafePluginServer
	mem *sdktest.Memory
}

func (*pluginOfVersion1) Describe(context.Context, *pluginpb.DescribeRequest) (*pluginpb.DescribeResponse, error) {
	return &pluginpb.DescribeResponse{Name: "good", Version: "old", Kinds: []string{"runtime"}}, nil
}

func (*pluginOfVersion1) Configure(_ context.Context, r *pluginpb.ConfigureRequest) (*pluginpb.ConfigureResponse, error) {
	if string(r.GetConfigJson()) != `{"a":1}` {
		return nil, fmt.Errorf("configuration %s", r.GetConfigJson())
	}
	return &pluginpb.ConfigureResponse{}, nil
}

type runtimeOfVersion1 struct {
	pluginpb.UnimplementedRuntimeServer
	*pluginOfVersion1
}

func (s runtimeOfVersion1) Info(ctx context.Context, _ *pluginpb.InfoRequest) (*pluginpb.InfoResponse, error) {
	i, err := s.mem.Info(ctx)
	return bridge.ToRuntimeInfo(i), err
}

func (s runtimeOfVersion1) PrepareTask(ctx context.Context, r *pluginpb.PrepareTaskRequest) (*pluginpb.PrepareTaskResponse, error) {
	return &pluginpb.PrepareTaskResponse{}, s.mem.PrepareTask(ctx, bridge.FromTaskSpec(r.GetTask()))
}

func (s runtimeOfVersion1) Pull(r *pluginpb.PullRequest, stream grpc.ServerStreamingServer[pluginpb.PullUpdate]) error {
	i, err := s.mem.Pull(stream.Context(), bridge.FromPull(r), func(sdk.PullProgress) {})
	if err != nil {
		return err
	}
	return stream.Send(&pluginpb.PullUpdate{Update: &pluginpb.PullUpdate_Image{Image: bridge.ToImage(i)}})
}

func (s runtimeOfVersion1) Start(ctx context.Context, r *pluginpb.StartRequest) (*pluginpb.StartResponse, error) {
	c, err := s.mem.Start(ctx, bridge.FromStartV1(r))
	return &pluginpb.StartResponse{Container: bridge.ToContainer(c)}, err
}

func (s runtimeOfVersion1) Stop(ctx context.Context, r *pluginpb.StopRequest) (*pluginpb.StopResponse, error) {
	c, err := s.mem.Stop(ctx, bridge.FromAttempt(r.GetAttempt()), time.Duration(r.GetGraceNanos()))
	return &pluginpb.StopResponse{Container: bridge.ToContainer(c)}, err
}

func (s runtimeOfVersion1) List(ctx context.Context, _ *pluginpb.ListRequest) (*pluginpb.ListResponse, error) {
	i, err := s.mem.List(ctx)
	return bridge.ToInventoryV1(i), err
}

func TestPluginOfVersion1StillWorks(t *testing.T) {
	p := launch(t, "protocol1")
	if p.ProtocolVersion() != 1 || p.Info().Version != "old" {
		t.Fatalf("protocol %d, %+v", p.ProtocolVersion(), p.Info())
	}
	if _, ok := p.Devices(); ok {
		t.Error("it has devices")
	}
	r := runtime(t, p)
	if _, ok := r.(sdk.ImageStore); ok {
		t.Error("it is an image store, which nobody told its author of")
	}
	ctx := t.Context()
	task := strings.Repeat("a", 32)
	if err := r.PrepareTask(ctx, sdk.TaskSpec{ID: task, Network: sdk.NetworkNone, Containers: []string{"c"}}); err != nil {
		t.Fatal(err)
	}
	image, err := r.Pull(ctx, sdk.PullRequest{Task: task, Image: "app:1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(out, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	start := sdk.StartRequest{
		Attempt: sdk.Attempt{Task: task, Container: "c", Number: 1}, Network: sdk.NetworkNone, Stdout: out, Stderr: out,
		Spec: sdk.ContainerSpec{Image: image.Reference, Digest: image.Digest, Command: []string{"sleep", "60"},
			ExtraHosts: []sdk.HostEntry{{Name: "h", Address: "10.0.0.1"}}},
	}
	if c, err := r.Start(ctx, start); err != nil || c.State != sdk.StateRunning {
		t.Fatalf("%+v, %v", c, err)
	}
	gpu := start
	gpu.Attempt.Number = 2
	gpu.Spec.CDIDevices = []string{"nvidia.com/gpu=0"}
	if _, err := r.Start(ctx, gpu); !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), "protocol 1") {
		t.Errorf("a start with devices: %v", err)
	}
	if c, err := r.Stop(ctx, start.Attempt, time.Second); err != nil || c.State != sdk.StateExited {
		t.Errorf("%+v, %v", c, err)
	}
	if i, err := r.List(ctx); err != nil || len(i.Containers) != 1 {
		t.Errorf("%+v, %v", i, err)
	}
}

// devicePlugin has one device and, when asked, one inventory too bad to take.
type devicePlugin struct{ config deviceConfig }

type deviceConfig struct {
	Speed int    `json:"speed" default:"3" min:"1" max:"9"`
	Break string `json:"break" enum:"inventory,nothing" default:"nothing"`
}

func (*devicePlugin) Info() sdk.Info {
	return sdk.Info{Name: "devices", Version: "1", Kinds: []sdk.Kind{sdk.KindDevice}}
}
func (*devicePlugin) Options() []sdk.Option { return sdk.OptionsOf(deviceConfig{}) }
func (p *devicePlugin) Configure(_ context.Context, c sdk.Config) error {
	return sdk.DecodeConfig(c, &p.config)
}
func (p *devicePlugin) Devices() sdk.Devices { return p }

func (p *devicePlugin) Watch(ctx context.Context, f func([]sdk.Device)) error {
	f(nil)
	f([]sdk.Device{{ID: "tpu-1", Kind: sdk.DeviceTPU, Ready: true, Shares: 2, Attributes: map[string]string{"speed": fmt.Sprint(p.config.Speed)}}})
	if p.config.Break == "inventory" {
		f([]sdk.Device{{ID: "x", Kind: "Not A Kind"}})
	}
	<-ctx.Done()
	return nil
}

func (*devicePlugin) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	if len(ids) != 1 || ids[0] != "tpu-1" {
		return sdk.Edits{}, sdk.Errorf(sdk.NotFound, "edits", "there is no device %v", ids)
	}
	return sdk.Edits{Devices: []sdk.HostDevice{{HostPath: "/dev/null"}}, Env: []string{"TPU=1"}, AdditionalGIDs: []uint32{44}}, nil
}

func (*devicePlugin) Stats(context.Context, []string) ([]sdk.DeviceStats, error) {
	t := 41.5
	return []sdk.DeviceStats{{ID: "tpu-1", TemperatureCelsius: &t}}, nil
}

func launchDevices(t *testing.T, config string) (*host.Plugin, error) {
	t.Helper()
	o := options(t, "devices")
	o.Name, o.Config.JSON = "devices", json.RawMessage(config)
	p, err := host.Launch(t.Context(), o)
	if err == nil {
		t.Cleanup(p.Kill)
	}
	return p, err
}

func TestDevices(t *testing.T) {
	p, err := launchDevices(t, `{"speed":7}`)
	if err != nil {
		t.Fatal(err)
	}
	d, ok := p.Devices()
	if !ok || p.ProtocolVersion() != 2 {
		t.Fatalf("devices: %t, protocol %d", ok, p.ProtocolVersion())
	}
	if _, ok := p.Runtime(); ok {
		t.Error("it has a runtime")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var got [][]sdk.Device
	err = d.Watch(ctx, func(devices []sdk.Device) {
		if got = append(got, devices); len(got) == 2 {
			cancel()
		}
	})
	want := [][]sdk.Device{nil, {{ID: "tpu-1", Kind: "tpu", Ready: true, Shares: 2, Attributes: map[string]string{"speed": "7"}}}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	e, err := d.Edits(t.Context(), []string{"tpu-1"})
	if diff := cmp.Diff(sdk.Edits{Devices: []sdk.HostDevice{{HostPath: "/dev/null"}}, Env: []string{"TPU=1"}, AdditionalGIDs: []uint32{44}}, e); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if _, err := d.Edits(t.Context(), []string{"gone"}); !errors.Is(err, sdk.NotFound) {
		t.Errorf("edits of a device that is not there: %v", err)
	}
	s, err := d.Stats(t.Context(), nil)
	if err != nil || len(s) != 1 || *s[0].TemperatureCelsius != 41.5 || s[0].PowerWatts != nil {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestBadInventoryEndsTheWatch(t *testing.T) {
	p, err := launchDevices(t, `{"break":"inventory"}`)
	if err != nil {
		t.Fatal(err)
	}
	d, _ := p.Devices()
	n := 0
	if err := d.Watch(t.Context(), func([]sdk.Device) { n++ }); !errors.Is(err, sdk.Invalid) || !strings.Contains(err.Error(), `"x"`) || n != 2 {
		t.Errorf("%d inventories, %v", n, err)
	}
}

func TestConfigurationIsCheckedBeforeItIsHandedOver(t *testing.T) {
	for config, word := range map[string]string{`{"speed":11}`: "at most 9", `{"sped":1}`: "sped is not known (known: speed, break)"} {
		if _, err := launchDevices(t, config); !errors.Is(err, sdk.Invalid) || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", config, err)
		}
	}
}

// A runtime that is an image store is one at the other end as well.
func TestImageStore(t *testing.T) {
	r := runtime(t, launch(t, "good"))
	store, ok := r.(sdk.ImageStore)
	if !ok {
		t.Fatal("the runtime is no image store")
	}
	ctx := t.Context()
	img, err := r.Pull(ctx, sdk.PullRequest{Task: strings.Repeat("a", 32), Image: "registry.test:5000/app:1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	inv, err := store.Images(ctx)
	want := sdk.ImageInventory{
		Images: []sdk.StoredImage{{Digest: img.Digest, References: []string{"registry.test:5000/app@" + img.Digest}, Bytes: 100}},
		Disk:   sdk.Disk{TotalBytes: 1 << 40, FreeBytes: 1 << 39},
	}
	if d := cmp.Diff(want, inv); d != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	if err := store.RemoveImage(ctx, img.Digest); err != nil {
		t.Fatal(err)
	}
	if inv, err := store.Images(ctx); err != nil || len(inv.Images) != 0 {
		t.Errorf("after it was removed: %+v, %v", inv, err)
	}
}
