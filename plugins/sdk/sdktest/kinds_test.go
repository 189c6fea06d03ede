package sdktest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

const failingPlugin = "failing"

// failing is a runtime and devices at once whose every call fails with the kind
// of error it is asked for.
type failing struct{}

func (failing) Info() sdk.Info {
	return sdk.Info{Name: failingPlugin, Version: "1", Kinds: []sdk.Kind{sdk.KindRuntime, sdk.KindDevice}}
}
func (failing) Configure(context.Context, sdk.Config) error { return nil }
func (failing) Runtime() sdk.Runtime                        { return failingRuntime{NewMemory()} }
func (failing) Devices() sdk.Devices                        { return failingDevices{} }

func failWith(kind string) error {
	return sdk.Errorf(sdk.ErrorKind(kind), "try "+kind, "it failed").WithHint("do this")
}

type failingRuntime struct{ *Memory }

func (failingRuntime) Stop(_ context.Context, a sdk.Attempt, _ time.Duration) (sdk.Container, error) {
	return sdk.Container{}, failWith(a.Container)
}

type failingDevices struct{}

func (failingDevices) Watch(context.Context, func([]sdk.Device)) error {
	return failWith(string(sdk.Exhausted))
}

func (failingDevices) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	return sdk.Edits{}, failWith(ids[0])
}

func (failingDevices) Stats(_ context.Context, ids []string) ([]sdk.DeviceStats, error) {
	return nil, failWith(ids[0])
}

// Every kind of error is found by errors.Is on the host, with the words it was
// made with, from calls of either kind of plugin; one process serves both.
func TestErrorKindsCrossTheProcessBoundary(t *testing.T) {
	b := newBench(t, benchOptions{executable: plugin(t, failingPlugin)})
	p := b.launch(t)
	runtime, isRuntime := p.Runtime()
	devices, isDevices := p.Devices()
	if !isRuntime || !isDevices {
		t.Fatalf("kinds %v", p.Info().Kinds)
	}
	check := func(call string, kind sdk.ErrorKind, err error) {
		t.Helper()
		want := "try " + string(kind) + ": it failed (do this)"
		if !errors.Is(err, kind) || sdk.KindOf(err) != kind || err.Error() != want {
			t.Errorf("%s: got %v of kind %q, want %q of kind %q", call, err, sdk.KindOf(err), want, kind)
		}
	}
	kinds := []sdk.ErrorKind{sdk.Invalid, sdk.NotFound, sdk.Unauthorized, sdk.Conflict, sdk.Exhausted,
		sdk.Unsupported, sdk.Unavailable, sdk.Deadline, sdk.Internal}
	for _, k := range kinds {
		_, err := runtime.Stop(t.Context(), sdk.Attempt{Task: "t", Container: string(k), Number: 1}, 0)
		check("Stop", k, err)
		_, err = devices.Edits(t.Context(), []string{string(k)})
		check("Edits", k, err)
		_, err = devices.Stats(t.Context(), []string{string(k)})
		check("Stats", k, err)
	}
	// A plugin that gives a call up though its caller did not is ending: the
	// caller is to try again.
	if _, err := devices.Edits(t.Context(), []string{string(sdk.Canceled)}); !errors.Is(err, sdk.Unavailable) {
		t.Errorf("Edits given up by the plugin: %v", err)
	}
	check("Watch", sdk.Exhausted, devices.Watch(t.Context(), func([]sdk.Device) {}))
}
