package blackbox

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// mem is what a process holds, in KiB: its proportional set size, and of that
// what is its own and not pages of files, which the kernel could drop and
// read again. A figure with small file pages and large anonymous ones would
// only look small.
type mem struct{ pss, anon int }

func (m mem) plus(n mem) mem { return mem{m.pss + n.pss, m.anon + n.anon} }

func memory(b *testing.B, pid int) (m mem) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	into := map[string]*int{"Pss:": &m.pss, "Anonymous:": &m.anon}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && into[f[0]] != nil {
			if *into[f[0]], err = strconv.Atoi(f[1]); err != nil {
				b.Fatal(err)
			}
		}
	}
	if m.pss == 0 {
		b.Fatalf("no Pss of %d", pid)
	}
	return m
}

// printMemory prints what the device's processes hold, on average over so
// many looks a second apart: between two pieces of work they give back what
// the last one mapped, so a single look would show either more or less than
// what they cost.
func printMemory(b *testing.B, s *site, when string, looks int) {
	const apart = 977 * time.Millisecond // in step with nothing that is done each second
	var order []string
	sums, most := map[string]mem{}, map[string]int{}
	add := func(name string, m mem) {
		if _, known := sums[name]; !known {
			order = append(order, name)
		}
		sums[name] = sums[name].plus(m)
		most[name] = max(most[name], m.pss)
	}
	const four, all = "agent, 4 plugins", "agent, every plugin"
	for range looks {
		total := memory(b, s.agent.PID())
		add("belay-agent", total)
		budgeted := total
		for _, pid := range pluginPIDs(s.agent) {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			name := filepath.Base(strings.SplitN(string(cmdline), "\x00", 2)[0])
			m := memory(b, pid)
			add(name, m)
			total = total.plus(m)
			if name != "nvidia" { // for boards with that vendor's driver
				budgeted = budgeted.plus(m)
			}
		}
		add(four, budgeted)
		add(all, total)
		add("belay-control", memory(b, s.Control.PID()))
		if looks > 1 {
			moment(apart)
		}
	}
	fmt.Printf("\n%s, KiB, mean of %d looks\n  %-22s %7s  %15s  %7s\n", when, looks, "", "PSS", "of it anonymous", "most")
	row := func(name string) {
		fmt.Printf("  %-22s %7d  %15d  %7d\n", name, sums[name].pss/looks, sums[name].anon/looks, most[name])
	}
	for _, name := range order {
		if name != four && name != all && name != "belay-control" {
			row(name)
		}
	}
	row(four)
	fmt.Printf("  %-22s %7d\n", "budget for these", 28<<10)
	row(all)
	row("belay-control")
}

// BenchmarkMemory prints what an idle device costs: as it came up, and idle
// again after it ran a task.
func BenchmarkMemory(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("containerd needs root: run as root")
	}
	for b.Loop() {
		s := newSite(b, "containerd")
		const settle, looks = 60 * time.Second, 30
		moment(settle)
		printMemory(b, s, fmt.Sprintf("idle for %s", settle), looks)
		doc := s.document(b, "bench", container{"name": "c", "script": "exec sleep 600", "stopTimeout": 2})
		if _, err := s.cli.Pipe(deadline(b, patience), []byte(doc), "taskdef", "register", "-f", "-"); err != nil {
			b.Fatal(err)
		}
		api, err := s.Control.API()
		if err != nil {
			b.Fatal(err)
		}
		begun := time.Now()
		id := apiRun(b, deadline(b, patience), api, "bench")
		fmt.Printf("\nfirst task after that, pull included: %s\n", time.Since(begun).Round(time.Millisecond))
		printMemory(b, s, "one task just started", 1)
		moment(settle)
		printMemory(b, s, fmt.Sprintf("that task running for %s", settle), looks)
		stop(b, s, id)
		moment(settle)
		printMemory(b, s, fmt.Sprintf("task stopped, idle for %s", settle), looks)
	}
}

func quantile(d []time.Duration, q float64) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[min(len(d)-1, int(q*float64(len(d))))]
}

// BenchmarkFoundation prints how long an API call takes to a running container
// beside ctr run of the same image, and sizes.
func BenchmarkFoundation(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("containerd needs root: run as root")
	}
	for b.Loop() {
		s := newSite(b, "containerd")
		latency(b, s)

		fmt.Println("\nbinary sizes, MiB")
		for _, name := range []string{"belay-agent", "belay-plugins", "belay-supervise", "belay-control", "belay"} {
			if fi, err := os.Stat(bin(b).Path(name)); err == nil {
				fmt.Printf("  %-22s %7.1f\n", name, float64(fi.Size())/(1<<20))
			}
		}
		fmt.Println()
	}
}

// latency times an API call to a RUNNING container, on the bridge and without
// a network, beside ctr run of the same image, which makes no network either.
func latency(b *testing.B, s *site) {
	const runs = 20
	ctx := deadline(b, 10*time.Minute)
	sleep := container{"name": "c", "script": "exec sleep 600", "stopTimeout": 2}
	networks := []string{"bridge", "none"}
	for _, network := range networks {
		doc := strings.Replace(s.document(b, "bench-"+network, sleep), "{", fmt.Sprintf(`{"networkMode":%q,`, network), 1)
		if _, err := s.cli.Pipe(ctx, []byte(doc), "taskdef", "register", "-f", "-"); err != nil {
			b.Fatal(err)
		}
	}
	h := host(b)
	image := h.image("shell")
	ctr := func(args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, "ctr", append([]string{"--address", h.containerd.Address, "--namespace", "bench"}, args...)...)
	}
	if out, err := ctr("images", "pull", "--plain-http", image).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	api, err := s.Control.API()
	if err != nil {
		b.Fatal(err)
	}
	stop(b, s, apiRun(b, ctx, api, "bench-none")) // the image is there from now on
	took := map[string][]time.Duration{}
	for i := range runs {
		for _, network := range networks {
			begun := time.Now()
			id := apiRun(b, ctx, api, "bench-"+network)
			took[network] = append(took[network], time.Since(begun))
			stop(b, s, id)
		}
		name := fmt.Sprintf("bench-%d", i)
		begun := time.Now()
		if out, err := ctr("run", "--detach", "--seccomp", image, name, "/bin/sleep", "600").CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		took["ctr"] = append(took["ctr"], time.Since(begun))
		_ = ctr("tasks", "kill", "-s", "KILL", name).Run()
		_ = ctr("tasks", "delete", "-f", name).Run()
		_ = ctr("containers", "delete", name).Run()
	}
	fmt.Printf("\nAPI call to RUNNING, %d runs each, in turn\n", runs)
	base := quantile(took["ctr"], .5)
	for _, row := range []struct{ name, key string }{{"ctr run --detach", "ctr"}, {"belay, no network", "none"}, {"belay, bridge", "bridge"}} {
		p50, p99 := quantile(took[row.key], .5), quantile(took[row.key], .99)
		fmt.Printf("  %-22s p50 %-8s p99 %-8s p50 is %.2f of ctr's\n", row.name, p50.Round(time.Millisecond), p99.Round(time.Millisecond), float64(p50)/float64(base))
	}
}

func stop(b *testing.B, s *site, id string) {
	if _, err := s.cli.Run(deadline(b, patience), "task", "stop", id); err != nil {
		b.Fatal(err)
	}
	s.await(b, id, "STOPPED", patience, stopped)
}

// apiRun runs one task over the API and returns once it is RUNNING.
func apiRun(b *testing.B, ctx context.Context, api *rig.API, definition string) string {
	var run struct{ Tasks []rig.Task }
	if err := api.Call(ctx, "RunTask", map[string]any{"cluster": cluster, "taskDefinition": definition}, &run); err != nil || len(run.Tasks) != 1 {
		b.Fatalf("%v: %+v", err, run)
	}
	for {
		var now struct{ Task rig.Task }
		if err := api.Call(ctx, "DescribeTask", map[string]any{"id": run.Tasks[0].ID}, &now); err != nil {
			b.Fatal(err)
		}
		switch {
		case running(now.Task):
			return now.Task.ID
		case stopped(now.Task):
			b.Fatalf("the task stopped: %s", now.Task.StoppedReason)
		}
		moment(2 * time.Millisecond)
	}
}
