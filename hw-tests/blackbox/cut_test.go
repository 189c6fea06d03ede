package blackbox

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// away is a fleet of real devices behind one link.
type away struct {
	*rig.Netns
	control *rig.Control
	dir     string
	agents  []*rig.Agent
	stay    []string // tasks that run all the time, one for each device
	end     []string // tasks that end when the file go appears
}

// newAway starts devices with the process runtime in a namespace of their own,
// each with two tasks.
func newAway(b *testing.B, devices int, transport string) *away {
	b.Helper()
	ns, err := rig.NewNetns("belaycut", 177)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := ns.Close(); err != nil {
			b.Error(err)
		}
	})
	a := &away{Netns: ns, dir: tempDir(b)}
	port, err := rig.FreePort()
	if err != nil {
		b.Fatal(err)
	}
	ctx := deadline(b, 5*time.Minute)
	if a.control, err = rig.StartControlAt(ctx, bin(b), tempDir(b), net.JoinHostPort(ns.Here, strconv.Itoa(port))); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(a.control.Kill)
	cli := a.control.CLI()
	code, err := cli.Activate(ctx, cluster, devices)
	if err != nil {
		b.Fatal(err)
	}
	plugins := filepath.Join(a.dir, "plugins")
	if err := os.Mkdir(plugins, 0o755); err != nil {
		b.Fatal(err)
	}
	for _, p := range []string{"belay-plugins", "belay-supervise"} {
		if err := os.Symlink(bin(b).Path(p), filepath.Join(a.dir, p)); err != nil {
			b.Fatal(err)
		}
	}
	if err := os.Symlink(bin(b).Path("belay-plugins"), filepath.Join(plugins, "process")); err != nil {
		b.Fatal(err)
	}
	for i := range devices {
		d, err := rig.Enroll(ctx, bin(b), filepath.Join(a.dir, strconv.Itoa(i)), code)
		if err != nil {
			b.Fatal(err)
		}
		d.PluginDir, d.Within, d.Extra = plugins, ns.Within(), []string{"--transport", transport}
		if err := d.Restart(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _, _ = d.Stop(20 * time.Second) })
		a.agents = append(a.agents, d)
	}
	instances, err := cli.Connected(ctx, cluster, devices, "process")
	if err != nil {
		b.Fatal(err)
	}
	for _, t := range []struct {
		family, script string
		into           *[]string
	}{
		{"stay", "trap 'exit 0' TERM; while :; do sleep 0.5; done", &a.stay},
		{"end", fmt.Sprintf("trap 'exit 0' TERM; while [ ! -e %s/go ]; do sleep 0.5; done; exit 7", a.dir), &a.end},
	} {
		doc := fmt.Sprintf(`{"family":%q,"belay":{"runtime":"process"},"containerDefinitions":[{"name":"c","command":["/bin/sh","-c",%q],"stopTimeout":2}]}`, t.family, t.script)
		if _, err := cli.Pipe(ctx, []byte(doc), "taskdef", "register", "-f", "-"); err != nil {
			b.Fatal(err)
		}
		var ran struct{ Tasks []rig.Task }
		for _, instance := range instances {
			if err := cli.JSON(ctx, &ran, "task", "run", "--cluster", cluster, "--taskdef", t.family, "--instance", instance); err != nil || len(ran.Tasks) != 1 {
				b.Fatalf("%v, %+v", err, ran)
			}
			*t.into = append(*t.into, ran.Tasks[0].ID)
		}
	}
	a.await(b, ctx, "every task to run", func(t rig.Task) bool { return running(t) }, append(a.stay, a.end...))
	return a
}

// await polls until each of the tasks is as wanted, and tells when each was.
func (a *away) await(b *testing.B, ctx context.Context, what string, ok func(rig.Task) bool, ids []string) map[string]time.Time {
	b.Helper()
	api, err := a.control.API()
	if err != nil {
		b.Fatal(err)
	}
	at := map[string]time.Time{}
	err = rig.Until(ctx, a.control.Process, what, func() error {
		tasks, err := list(ctx, api)
		if err != nil {
			return err
		}
		now := time.Now()
		for _, id := range ids {
			if _, done := at[id]; !done && ok(tasks[id]) {
				at[id] = now
			}
		}
		if len(at) < len(ids) {
			return fmt.Errorf("%d of %d", len(at), len(ids))
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return at
}

// list returns every task of the cluster by its id.
func list(ctx context.Context, api *rig.API) (map[string]rig.Task, error) {
	all := map[string]rig.Task{}
	for page := ""; ; {
		var l struct {
			Tasks     []rig.Task `json:"tasks"`
			NextToken string     `json:"nextToken"`
		}
		if err := api.Call(ctx, "ListTasks", map[string]any{
			"cluster": cluster, "all": true, "page": map[string]any{"limit": 1000, "token": page},
		}, &l); err != nil {
			return nil, err
		}
		for _, t := range l.Tasks {
			all[t.ID] = t
		}
		if page = l.NextToken; page == "" {
			return all, nil
		}
	}
}

// BenchmarkCut prints how soon a control plane knows what happened on devices
// whose link was silent for a minute, counted from the moment the link passes
// packets again.
func BenchmarkCut(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("network namespaces need root: run as root")
	}
	const devices, cut = 50, 60 * time.Second
	for b.Loop() {
		for _, transport := range []string{"quic", "tcp", "auto"} {
			b.Run(transport, func(b *testing.B) {
				a := newAway(b, devices, transport)
				ctx := deadline(b, 5*time.Minute)
				api, err := a.control.API()
				if err != nil {
					b.Fatal(err)
				}
				before, err := list(ctx, api)
				if err != nil {
					b.Fatal(err)
				}
				if err := a.Cut(); err != nil {
					b.Fatal(err)
				}
				moment(cut / 2)
				if err := os.WriteFile(filepath.Join(a.dir, "go"), nil, 0o644); err != nil {
					b.Fatal(err)
				}
				moment(cut / 2)
				if err := a.Heal(); err != nil {
					b.Fatal(err)
				}
				healed := time.Now()
				at := a.await(b, ctx, "what happened meanwhile to be known", stopped, a.end)
				var took []time.Duration
				for _, t := range at {
					took = append(took, t.Sub(healed))
				}
				fmt.Printf("\nlink of %d devices silent for %s, %s: in sync after p50 %s, p99 %s, last %s\n",
					devices, cut, transport, round(quantile(took, 0.5)), round(quantile(took, 0.99)), round(quantile(took, 1)))
				after, err := list(ctx, api)
				if err != nil {
					b.Fatal(err)
				}
				same := 0
				for _, id := range a.stay {
					was, is := before[id].Container("c"), after[id].Container("c")
					if running(after[id]) && is.PID == was.PID && is.PID != 0 && is.Attempt == 1 {
						same++
					} else {
						b.Errorf("a task that ran all the time: %+v, before %+v", after[id], before[id])
					}
				}
				for _, id := range a.end {
					if c := after[id].Container("c"); c.ExitCode == nil || *c.ExitCode != 7 {
						b.Errorf("a task that ended meanwhile: %+v", after[id])
					}
				}
				fmt.Printf("  %d of %d containers that ran all the time have the same pid and attempt\n", same, len(a.stay))
				for _, id := range a.stay {
					if err := api.Call(ctx, "StopTask", map[string]any{"id": id}, &struct{}{}); err != nil {
						b.Fatal(err)
					}
				}
				a.await(b, ctx, "every task to have stopped", stopped, a.stay)
			})
		}
	}
}
