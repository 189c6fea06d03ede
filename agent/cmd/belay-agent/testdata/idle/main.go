// Command idle is a runtime plugin that holds nothing and starts nothing.
package main

import (
	"context"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

func main() { serve.Main(idle{}) }

type idle struct{}

func (idle) Info() sdk.Info {
	return sdk.Info{Name: "idle", Version: "1.2.3", Kinds: []sdk.Kind{sdk.KindRuntime}}
}

func (idle) Configure(_ context.Context, c sdk.Config) error {
	if string(c.JSON) != `{"address":"/here"}` {
		return sdk.Errorf(sdk.Invalid, "configure", "got the table %s", c.JSON)
	}
	return nil
}

var errIdle = sdk.Errorf(sdk.Unsupported, "idle", "this plugin does nothing")

func (idle) Runtime() sdk.Runtime { return runtime{} }

type runtime struct{}

func (runtime) Info(context.Context) (sdk.RuntimeInfo, error) {
	return sdk.RuntimeInfo{Version: "1", Networks: []string{sdk.NetworkHost}, Attributes: map[string]string{"idle.version": "1"}}, nil
}

func (runtime) PrepareTask(context.Context, sdk.TaskSpec) error { return errIdle }
func (runtime) RemoveTask(context.Context, string) error        { return nil }

func (runtime) Pull(context.Context, sdk.PullRequest, func(sdk.PullProgress)) (sdk.Image, error) {
	return sdk.Image{}, errIdle
}

func (runtime) Start(context.Context, sdk.StartRequest) (sdk.Container, error) {
	return sdk.Container{}, errIdle
}

func (runtime) Stop(context.Context, sdk.Attempt, time.Duration) (sdk.Container, error) {
	return sdk.Container{}, errIdle
}

func (runtime) Remove(context.Context, sdk.Attempt) error             { return nil }
func (runtime) List(context.Context) (sdk.Inventory, error)           { return sdk.Inventory{}, nil }
func (runtime) Stats(context.Context, sdk.Attempt) (sdk.Stats, error) { return sdk.Stats{}, errIdle }

func (runtime) Events(ctx context.Context, _ func(sdk.Attempt)) error {
	<-ctx.Done()
	return ctx.Err()
}

func (runtime) Exec(context.Context, sdk.ExecRequest) (sdk.ExecResult, error) {
	return sdk.ExecResult{}, errIdle
}
