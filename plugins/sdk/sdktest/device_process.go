package sdktest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

func testByHand(t T, r *deviceRig) {
	ctx, cancel := context.WithTimeout(r.ctx(t), r.patience(10*time.Second))
	defer cancel()
	cmd := exec.CommandContext(ctx, r.opts.Executable)
	cmd.Env, cmd.WaitDelay = r.plainEnv(), time.Second
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Errorf("expected it to end when no agent started it, it went on")
	case !errors.As(err, &exit):
		t.Errorf("expected an exit status other than 0, got %v", orNil(err))
	case len(strings.TrimSpace(string(out))) == 0:
		t.Errorf("expected a sentence that says what it is, it printed nothing")
	}
}

func testDescription(t T, r *deviceRig) {
	first := r.launchRaw(t)
	var said [3]bridge.Description
	var err error
	for i := range said {
		if i == 1 {
			if err := first.configure(r.ctx(t), r.dirs); err != nil {
				t.Fatalf("Configure: %v", err)
			}
		}
		if i == 2 {
			r.over(first)
			first = r.launchRaw(t)
		}
		if said[i], err = first.describe(r.ctx(t)); err != nil {
			t.Fatalf("Describe: %v", err)
		}
	}
	for i, when := range []string{1: "after Configure", 2: "in a new process"} {
		if i > 0 && !reflect.DeepEqual(said[0], said[i]) {
			t.Errorf("expected the same %s: first %+v, then %+v", when, said[0], said[i])
		}
	}
	for _, o := range said[0].Options {
		if o.Name == "" {
			t.Errorf("an option has no name: %+v", o)
		}
		types := []sdk.OptionType{sdk.TypeString, sdk.TypeInteger, sdk.TypeNumber, sdk.TypeBoolean, sdk.TypeDuration, sdk.TypeStrings, sdk.TypeTable}
		if !slices.Contains(types, o.Type) {
			t.Errorf("option %s is of type %q, want one of %q", o.Name, o.Type, types)
		}
		if o.Default != nil {
			config := fmt.Appendf(nil, "{%q:%s}", o.Name, o.Default)
			if err := sdk.CheckConfig([]sdk.Option{o}, config); err != nil {
				t.Errorf("option %s does not allow its own default: %v", o.Name, err)
			}
		}
	}
}

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

// testWrongConfig launches as an agent does, which checks what the plugin has
// declared before the plugin sees it.
func testWrongConfig(t T, r *deviceRig) {
	const unknown = "no_such_key"
	try := func(key string, value any) {
		table := map[string]any{}
		if len(r.dirs.JSON) > 0 {
			if err := json.Unmarshal(r.dirs.JSON, &table); err != nil {
				t.Fatalf("the configuration is no table: %v", err)
			}
		}
		table[key] = value
		o := r.hostOptions()
		o.Config.JSON, _ = json.Marshal(table)
		p, err := host.Launch(r.ctx(t), o)
		if err == nil {
			r.born(p)
			r.close(p)
			t.Errorf("expected %s = %v to be refused, it was accepted", key, value)
			return
		}
		wantKind(t, fmt.Sprintf("launch with %s = %v", key, value), err, sdk.Invalid)
		if !strings.Contains(err.Error(), key) {
			t.Errorf("expected the key %s in the message, got: %v", key, err)
		}
	}
	try(unknown, 1)
	p, _ := r.devices(t)
	options, _ := p.Options()
	r.close(p)
	for _, o := range options {
		if o.Type == sdk.TypeBoolean {
			try(o.Name, "neither")
		} else {
			try(o.Name, true)
		}
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

// asked ends the plugin as an agent does and tells whether it did by itself.
func (r *deviceRig) asked(p *host.Plugin) (took time.Duration, killed bool) {
	begun := time.Now()
	r.close(p)
	return time.Since(begun), strings.Contains(p.ExitReason(), "SIGKILL")
}

func testEnds(t T, r *deviceRig) {
	p, d := r.devices(t)
	_, _ = d.Stats(r.ctx(t), nil)
	if _, killed := r.asked(p); killed {
		t.Error("expected it to end within 4 s when nothing was going on, it had to be killed")
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

func testHostDies(t T, r *deviceRig) {
	p := r.launchRaw(t)
	if err := p.configure(r.ctx(t), r.dirs); err != nil {
		t.Fatalf("Configure: %v", err)
	}
	// What the kernel does to a host that was killed.
	p.lifeline.Close()
	p.conn.Close()
	if !p.ends(r.patience(8 * time.Second)) {
		t.Error("expected it to end within 8 s once its standard input had ended, it went on")
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
