package sdktest

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

func testBeforeConfigure(t T, r *deviceRig) {
	p := r.launchRaw(t)
	calls := pluginv2.NewDeviceClient(p.conn)
	ctx, cancel := context.WithTimeout(r.ctx(t), r.patience(10*time.Second))
	defer cancel()
	refused := func(what string, err error) {
		err = bridge.FromStatus(ctx, what, err)
		wantKind(t, what+" before Configure", err, sdk.Conflict)
	}
	stream, err := calls.Watch(ctx, &pluginv2.WatchRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	refused("Watch", err)
	_, err = calls.Edits(ctx, &pluginv2.EditsRequest{Ids: []string{"any"}})
	refused("Edits", err)
	_, err = calls.Stats(ctx, &pluginv2.DeviceStatsRequest{})
	refused("Stats", err)
	// And none of that is in the way of what comes.
	if _, err := pluginv2.NewPluginClient(p.conn).Describe(ctx, &pluginpb.DescribeRequest{}); err != nil {
		t.Errorf("Describe after calls that were refused: %v", err)
	}
}

func testPing(t T, r *deviceRig) {
	p, d := r.devices(t)
	w := r.watch(t, d)
	defer w.stop()
	for range 3 {
		ctx, cancel := context.WithTimeout(r.ctx(t), r.patience(2*time.Second))
		if err := p.Ping(ctx); err != nil {
			t.Errorf("expected an answer from the health service within 2 s: %v", err)
		}
		cancel()
	}
}

func testWatchEnds(t T, r *deviceRig) {
	p, d := r.devices(t)
	w := r.watch(t, d)
	if _, err := w.next(r.patience(5 * time.Second)); err != nil && !badInventory(err) {
		r.missing(t, ruleInventory, "expected an inventory: %v", err)
	}
	w.stop()
	<-w.ended
	// Whether the plugin's own Watch has returned shows at its end, which
	// waits three seconds for calls that go on.
	took, killed := r.asked(p)
	if killed {
		r.missing(t, ruleEnds, "expected it to end, it had to be killed")
	}
	if took > r.patience(2*time.Second) {
		t.Errorf("expected Watch to return when its context ended; %s after that it had not", took.Round(100*time.Millisecond))
	}
}

func testKilledLeavesNothing(t T, r *deviceRig) {
	p, d := r.devices(t)
	w := r.watch(t, d)
	_, _ = w.next(r.patience(5 * time.Second))
	if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", p.PID(), err)
	}
	<-p.Exited()
	var left []string
	deadline := time.Now().Add(r.patience(3 * time.Second))
	for left = r.marked(); len(left) > 0 && time.Now().Before(deadline); left = r.marked() {
		<-time.After(50 * time.Millisecond)
	}
	if len(left) > 0 {
		t.Errorf("expected none of its processes 3 s after a kill -9, there are %s", strings.Join(left, ", "))
		r.sweep(left)
	}
}

// sweep kills what the plugin should not have left behind.
func (r *deviceRig) sweep(processes []string) {
	for _, p := range processes {
		var pid int
		if _, err := fmt.Sscanf(p, "%d", &pid); err == nil && pid > 1 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}
