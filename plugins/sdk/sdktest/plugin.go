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
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
)

// The rules for every plugin, whatever its kinds. No process of the plugin may
// be running when one is tried: two would wait for each other.

const (
	ruleByHand      = "run by hand it says what it is and ends"
	ruleDescription = "what it says about itself is complete and constant"
	ruleConfig      = "a wrong configuration is refused, its key named"
	ruleEnds        = "it ends when it is asked to"
	ruleHostDies    = "it ends when its host dies"
)

func testByHand(t T, b *bench) {
	ctx, cancel := context.WithTimeout(b.ctx(t), b.patience(10*time.Second))
	defer cancel()
	cmd := exec.CommandContext(ctx, b.opts.executable)
	cmd.Env, cmd.WaitDelay = b.plainEnv(), time.Second
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

func testDescription(t T, b *bench) {
	first := b.launchRaw(t)
	var said [3]bridge.Description
	var err error
	for i := range said {
		if i == 1 {
			if err := first.configure(b.ctx(t), b.dirs); err != nil {
				t.Fatalf("Configure: %v", err)
			}
		}
		if i == 2 {
			b.over(first)
			first = b.launchRaw(t)
		}
		if said[i], err = first.describe(b.ctx(t)); err != nil {
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

// testWrongConfig launches as an agent does, which checks what the plugin has
// declared before the plugin sees it.
func testWrongConfig(t T, b *bench) {
	const unknown = "no_such_key"
	try := func(key string, value any) {
		table := map[string]any{}
		if len(b.dirs.JSON) > 0 {
			if err := json.Unmarshal(b.dirs.JSON, &table); err != nil {
				t.Fatalf("the configuration is no table: %v", err)
			}
		}
		table[key] = value
		o := b.hostOptions()
		o.Config.JSON, _ = json.Marshal(table)
		p, err := host.Launch(b.ctx(t), o)
		if err == nil {
			b.born(p)
			b.close(p)
			t.Errorf("expected %s = %v to be refused, it was accepted", key, value)
			return
		}
		wantKind(t, fmt.Sprintf("launch with %s = %v", key, value), err, sdk.Invalid)
		if !strings.Contains(err.Error(), key) {
			t.Errorf("expected the key %s in the message, got: %v", key, err)
		}
	}
	try(unknown, 1)
	p := b.launch(t)
	options, _ := p.Options()
	b.over(p)
	for _, o := range options {
		if o.Type == sdk.TypeBoolean {
			try(o.Name, "neither")
		} else {
			try(o.Name, true)
		}
	}
}

// asked ends the plugin as an agent does and tells whether it did by itself.
func (b *bench) asked(p *host.Plugin) (took time.Duration, killed bool) {
	begun := time.Now()
	b.close(p)
	return time.Since(begun), strings.Contains(p.ExitReason(), "SIGKILL")
}

func testEnds(t T, b *bench) {
	p := b.launch(t)
	if _, killed := b.asked(p); killed {
		t.Error("expected it to end within 4 s when nothing was going on, it had to be killed")
	}
}

func testHostDies(t T, b *bench) {
	p := b.launchRaw(t)
	if err := p.configure(b.ctx(t), b.dirs); err != nil {
		t.Fatalf("Configure: %v", err)
	}
	// What the kernel does to a host that was killed.
	p.lifeline.Close()
	p.conn.Close()
	if !p.ends(b.patience(8 * time.Second)) {
		t.Error("expected it to end within 8 s once its standard input had ended, it went on")
	}
}
