package host_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// rawCodec passes messages on as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) ([]byte, error) {
	return *v.(*[]byte), nil
}
func (rawCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), b...)
	return nil
}

// serveRaw is a plugin of both kinds that introduces itself properly and
// answers everything else with the bytes of the file TEST_ANSWER.
func serveRaw() {
	answer, err := os.ReadFile(os.Getenv("TEST_ANSWER"))
	if err != nil {
		os.Exit(9)
	}
	marshal := func(m proto.Message) []byte { b, _ := proto.Marshal(m); return b }
	s := grpc.NewServer(grpc.ForceServerCodec(rawCodec{}), grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
		var q []byte
		if err := ss.RecvMsg(&q); err != nil {
			return err
		}
		method, _ := grpc.MethodFromServerStream(ss)
		out := answer
		switch method {
		case pluginv2.Plugin_Describe_FullMethodName:
			out = marshal(&pluginv2.DescribeResponse{Name: "good", Version: "raw", Kinds: []string{"runtime", "device", "novel"}, Abilities: []string{"levitation", "images"}})
			if os.Getenv("TEST_DESCRIBE") != "" {
				out = answer
			}
		case pluginv2.Plugin_Configure_FullMethodName:
			out = nil
		case grpc_health_v1.Health_Check_FullMethodName:
			out = marshal(&grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING})
		}
		return ss.SendMsg(&out)
	}))
	path := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), fmt.Sprintf("host.%d", os.Getpid()))
	l, err := net.Listen("unix", path)
	if err != nil {
		os.Exit(9)
	}
	fmt.Printf("1|2|unix|%s|grpc|\n", path)
	_ = s.Serve(l)
}

func raw(t *testing.T, answer []byte, env ...string) (*host.Plugin, error) {
	t.Helper()
	o := options(t, "raw")
	file := filepath.Join(o.SocketDir, "answer")
	if err := os.WriteFile(file, answer, 0o600); err != nil {
		t.Fatal(err)
	}
	o.Env = append(append(o.Env, "TEST_ANSWER="+file), env...)
	p, err := host.Launch(t.Context(), o)
	if err == nil {
		t.Cleanup(p.Kill)
	}
	return p, err
}

// Well-formed calls with answers that are none: an error that says so, and the
// next call works as well as this one.
func TestAnswersThatBreakTheContract(t *testing.T) {
	attempt := &pluginpb.Attempt{Task: "t", Container: "c", Number: 1}
	one := func(change func(*pluginpb.Container)) proto.Message {
		c := &pluginpb.Container{Attempt: attempt, State: "running"}
		change(c)
		return &pluginpb.ListResponse{Containers: []*pluginpb.Container{c}}
	}
	twice := &pluginpb.ListResponse{Containers: []*pluginpb.Container{{Attempt: attempt, State: "running"}, {Attempt: attempt, State: "exited"}}}
	many := &pluginpb.ListResponse{}
	for i := range sdk.MaxContainers + 1 {
		many.Containers = append(many.Containers, &pluginpb.Container{Attempt: &pluginpb.Attempt{Task: "t", Container: "c", Number: uint32(i)}, State: "running"})
	}
	long := strings.Repeat("x", 10_000)
	device := func(change func(*pluginv2.DeviceInfo)) proto.Message {
		d := &pluginv2.DeviceInfo{Id: "a", Kind: "gpu", Ready: true}
		change(d)
		return &pluginv2.DeviceInventory{Devices: []*pluginv2.DeviceInfo{d}}
	}
	list := func(ctx context.Context, p *host.Plugin) error {
		r, _ := p.Runtime()
		_, err := r.List(ctx)
		return err
	}
	start := func(ctx context.Context, p *host.Plugin) error {
		r, _ := p.Runtime()
		_, err := r.Start(ctx, sdk.StartRequest{Attempt: sdk.Attempt{Task: "t", Container: "d", Number: 1}})
		return err
	}
	info := func(ctx context.Context, p *host.Plugin) error {
		r, _ := p.Runtime()
		_, err := r.Info(ctx)
		return err
	}
	images := func(ctx context.Context, p *host.Plugin) error {
		r, _ := p.Runtime()
		_, err := r.(sdk.ImageStore).Images(ctx)
		return err
	}
	image := func(change func(*pluginv2.StoredImage)) proto.Message {
		i := &pluginv2.StoredImage{Digest: "sha256:1", References: []string{"a@sha256:1"}}
		change(i)
		return &pluginv2.ImagesResponse{Images: []*pluginv2.StoredImage{i}}
	}
	watch := func(ctx context.Context, p *host.Plugin) error {
		d, _ := p.Devices()
		return d.Watch(ctx, func(found []sdk.Device) {
			if len(found) != 0 {
				t.Errorf("took %d devices", len(found))
			}
		})
	}
	edits := func(ctx context.Context, p *host.Plugin) error {
		d, _ := p.Devices()
		_, err := d.Edits(ctx, []string{"a"})
		return err
	}
	for _, c := range []struct {
		name   string
		answer any // bytes or a message
		call   func(context.Context, *host.Plugin) error
		words  string
	}{
		{"bytes that are no message", []byte("\xff\xff\xff\xff"), list, "unmarshal"},
		{"text that is not UTF-8", []byte("\x0a\x04\x0a\x02\xff\xfe"), watch, "UTF-8"},
		{"the same attempt twice", twice, list, "t/c/1 is there twice"},
		{"more containers than there can be", many, list, "2049 containers"},
		{"a state nobody knows", one(func(c *pluginpb.Container) { c.State = "levitating" }), list, `"levitating"`},
		{"no attempt", one(func(c *pluginpb.Container) { c.Attempt = nil }), list, "is no attempt"},
		{"an id of 10,000 bytes", one(func(c *pluginpb.Container) { c.RuntimeId = long }), list, "10000"},
		{"nothing at all", []byte(nil), start, "is no attempt"},
		{"an answer for another attempt", &pluginpb.StartResponse{Container: &pluginpb.Container{Attempt: attempt, State: "running"}}, start, "answers for t/c/1"},
		{"an attribute of 10,000 bytes", &pluginpb.InfoResponse{Attributes: map[string]string{"a": long}}, info, "10000"},
		{"a version of 10,000 bytes", &pluginpb.InfoResponse{Version: long}, info, "10000"},
		{"an image without a digest", image(func(i *pluginv2.StoredImage) { i.Digest = "" }), images, "0 bytes"},
		{"an image of 10,000 bytes", image(func(i *pluginv2.StoredImage) { i.References = []string{long} }), images, "10000"},
		{"the same image twice", &pluginv2.ImagesResponse{Images: []*pluginv2.StoredImage{{Digest: "d"}, {Digest: "d"}}}, images, "d is there twice"},
		{"more free than there is", &pluginv2.ImagesResponse{Disk: &pluginv2.Disk{TotalBytes: 1, FreeBytes: 2}}, images, "of 1 bytes of disk 2 are free"},
		{"a device of no kind", device(func(d *pluginv2.DeviceInfo) { d.Kind = "" }), watch, "kind"},
		{"a device with 10,000 bytes of id", device(func(d *pluginv2.DeviceInfo) { d.Id = long }), watch, "10000"},
		{"edits of 100 KB", &pluginv2.EditsResponse{Env: strings.Split(strings.Repeat(long+"\n", 10), "\n")}, edits, "at most 65536"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, ok := c.answer.([]byte)
			if m, isMessage := c.answer.(proto.Message); isMessage {
				var err error
				if b, err = proto.Marshal(m); err != nil {
					t.Fatal(err)
				}
			} else if !ok {
				t.Fatal("no answer")
			}
			p, err := raw(t, b)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				err := c.call(ctx, p)
				cancel()
				if err == nil || !strings.Contains(err.Error(), c.words) || len(err.Error()) > 1000 {
					t.Fatalf("error is %.1000v, want %q", err, c.words)
				}
			}
			if err := p.Ping(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestNonsenseDescription(t *testing.T) {
	for name, m := range map[string]*pluginv2.DescribeResponse{
		"version": {Name: "good", Version: strings.Repeat("x", 10_000), Kinds: []string{"runtime"}},
		"kinds":   {Name: "good", Version: "1", Kinds: strings.Split(strings.Repeat("kind ", 100), " ")},
		"kind":    {Name: "good", Version: "1", Kinds: []string{strings.Repeat("x", 10_000)}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := raw(t, b, "TEST_DESCRIBE=1"); !errors.Is(err, host.ErrNonsense) || !errors.Is(err, sdk.Invalid) || len(err.Error()) > 1000 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What says too much is cut where it comes in.
func TestLongWordsAreCut(t *testing.T) {
	p := launch(t, "wordy")
	r := runtime(t, p)
	_, err := r.List(t.Context())
	if !errors.Is(err, sdk.Conflict) || len(err.Error()) > 3*sdk.MaxReason+100 || !strings.Contains(err.Error(), "blah") {
		t.Errorf("an error of %d bytes: %.200s", len(err.Error()), err)
	}
}
