package serve

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
)

type plain struct{ info sdk.Info }

func (p plain) Info() sdk.Info                              { return p.info }
func (p plain) Configure(context.Context, sdk.Config) error { return nil }

// hollow is a runtime in name; no test gets as far as a call.
type hollow struct{ plain }

func (hollow) Runtime() sdk.Runtime { return nil }

func TestPickVersion(t *testing.T) {
	for host, want := range map[string]int{"": 2, "1": 1, "2,1": 2, "3,2": 2, "rubbish": 2, " 1 ,7": 1, "99": 2} {
		if got := pickVersion(host); got != want {
			t.Errorf("pickVersion(%q) = %d, want %d", host, got, want)
		}
	}
}

func TestRunRefusesPluginsThatContradictThemselves(t *testing.T) {
	kinds := []sdk.Kind{sdk.KindRuntime}
	for _, c := range []struct {
		name   string
		plugin sdk.Plugin
		word   string
	}{
		{"no name", plain{}, "plugin name"},
		{"bad name", plain{sdk.Info{Name: "Big Name"}}, "plugin name"},
		{"says more than it can", plain{sdk.Info{Name: "a", Kinds: kinds}}, "must agree"},
		{"can more than it says", hollow{plain{sdk.Info{Name: "a"}}}, "must agree"},
	} {
		err := Run(t.Context(), c.plugin, Options{Dir: t.TempDir(), Announce: func(string) error { t.Error("announced"); return nil }})
		if err == nil || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.word)
		}
	}
}

// serving runs a plugin inside the test and connects to it as any gRPC client.
func serving(t *testing.T, p sdk.Plugin) (conn *grpc.ClientConn, dir string, done chan error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "serve")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	lines, done := make(chan string, 1), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go func() {
		done <- Run(ctx, p, Options{Dir: dir, HostVersions: "1", Announce: func(l string) error { lines <- l; return nil }})
	}()
	var line string
	select {
	case line = <-lines:
	case err := <-done:
		t.Fatal(err)
	}
	parts := strings.Split(line, "|")
	if len(parts) != 6 || parts[0] != "1" || parts[1] != "1" || parts[2] != "unix" || parts[4] != "grpc" || parts[5] != "" {
		t.Fatalf("handshake line is %q", line)
	}
	conn, err = grpc.NewClient("unix:"+parts[3], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, dir, done
}

func TestProtocol(t *testing.T) {
	conn, dir, done := serving(t, hollow{plain{sdk.Info{Name: "a", Version: "v", Kinds: []sdk.Kind{sdk.KindRuntime}}}})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	h, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "plugin"})
	if err != nil || h.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}
	plugin := pluginpb.NewPluginClient(conn)
	if d, err := plugin.Describe(ctx, &pluginpb.DescribeRequest{}); err != nil || d.Name != "a" || d.Kinds[0] != "runtime" {
		t.Errorf("Describe: %v, %v", d, err)
	}
	_, err = pluginpb.NewRuntimeClient(conn).List(ctx, &pluginpb.ListRequest{})
	if err = bridge.FromStatus(ctx, "", err); sdk.KindOf(err) != sdk.Conflict || !strings.Contains(err.Error(), "before Configure") {
		t.Errorf("a call before Configure: %v", err)
	}
	if _, err := plugin.Configure(ctx, &pluginpb.ConfigureRequest{}); err != nil {
		t.Errorf("Configure: %v", err)
	}
	_, err = plugin.Configure(ctx, &pluginpb.ConfigureRequest{})
	if err = bridge.FromStatus(ctx, "", err); sdk.KindOf(err) != sdk.Conflict {
		t.Errorf("second Configure: %v", err)
	}
	_, err = pluginpb.NewRuntimeClient(conn).List(ctx, &pluginpb.ListRequest{}) // a nil runtime
	if err = bridge.FromStatus(ctx, "", err); sdk.KindOf(err) != sdk.Internal || !strings.Contains(err.Error(), "panicked") {
		t.Errorf("a call that panics: %v", err)
	}
	if err := conn.Invoke(ctx, handshake.ShutdownMethod, &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Run: %v", err)
		}
	case <-ctx.Done():
		t.Fatal("Run did not end")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Two processes of one plugin never work at once: the second waits for the
// first to finish what its dead host had asked for.
func TestConfigureWaitsForAnEarlierProcess(t *testing.T) {
	dir := t.TempDir()
	earlier, err := lockRunDir(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lockRunDir(ctx, dir); sdk.KindOf(err) != sdk.Unavailable {
		t.Errorf("while the earlier one lives: %v", err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := lockRunDir(context.Background(), dir)
		got <- err
	}()
	earlier.Close()
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("still waiting after the earlier one ended")
	}
}
