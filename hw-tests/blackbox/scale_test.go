package blackbox

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// cost is what a process has taken: its CPU time and its memory, in KiB.
type cost struct {
	cpu       time.Duration
	peak, now int // peak since the process began
}

func costOf(b *testing.B, pid int) (c cost) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, field := range f[11:13] { // utime, stime of proc(5), in ticks of 10 ms
		n, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
		c.cpu += time.Duration(n) * 10 * time.Millisecond
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch n, _ := strconv.Atoi(f[1]); f[0] {
		case "VmHWM:":
			c.peak = n
		case "VmRSS:":
			c.now = n
		}
	}
	return c
}

// BenchmarkReconnect prints how a fleet comes back after its control plane was
// killed, and after it was restarted in good order: BELAY_BENCH_DEVICES of them,
// 2000 if not set. Fleet and control plane share the machine.
func BenchmarkReconnect(b *testing.B) {
	devices := 2000
	if s := os.Getenv("BELAY_BENCH_DEVICES"); s != "" {
		var err error
		if devices, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	patience := 2*time.Minute + time.Duration(devices)*20*time.Millisecond
	for b.Loop() {
		c := newControl(b)
		if _, err := c.CLI().Run(deadline(b, patience), "cluster", "create", cluster); err != nil {
			b.Fatal(err)
		}
		bare := costOf(b, c.PID())
		begun := time.Now()
		f, err := rig.StartFleet(deadline(b, patience), c, tempDir(b), cluster, devices)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(f.Kill)
		allBack(b, f, begun, patience)
		full := costOf(b, c.PID())
		fmt.Printf("\n%d simulated devices enrolled and connected within %s; control plane: %s of CPU, %d KiB at most, %.1f KiB a device\n",
			devices, time.Since(begun).Round(100*time.Millisecond), full.cpu, full.peak, float64(full.peak-bare.peak)/float64(devices))
		moment(5 * time.Second)
		for _, how := range []string{"killed", "restarted"} {
			down := time.Now()
			if how == "killed" {
				_ = c.Signal(syscall.SIGKILL)
				<-c.Done()
			} else if _, err := c.Stop(30 * time.Second); err != nil {
				b.Fatal(err)
			}
			moment(time.Second)
			begun := time.Now()
			if err := c.Restart(deadline(b, patience)); err != nil {
				b.Fatal(err)
			}
			ready := time.Now()
			back := allBack(b, f, down, patience)
			report(b, fmt.Sprintf("%s: ready %s after its start", how, ready.Sub(begun).Round(time.Millisecond)), c, begun, back)
			moment(10 * time.Second)
		}
	}
}

// allBack waits until every device is connected again.
func allBack(b *testing.B, f *rig.Fleet, since time.Time, within time.Duration) map[int]rig.FleetEvent {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	var back map[int]rig.FleetEvent
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		var err error
		if back, err = f.Back(since); err != nil {
			b.Fatal(err)
		}
		if len(back) == f.Devices {
			return back
		}
		select {
		case <-tick.C:
		case <-f.Done():
			b.Fatalf("the fleet ended: %s", f.Tail(2000))
		case <-ctx.Done():
			b.Fatalf("%d of %d devices are connected after %s", len(back), f.Devices, within)
		}
	}
}

// report prints when devices came back, counted from begun, the start of the
// control plane's process: in all, and in each tenth of the time.
func report(b *testing.B, what string, c *rig.Control, begun time.Time, back map[int]rig.FleetEvent) {
	var at []time.Duration
	transports := map[string]int{}
	for _, e := range back {
		at = append(at, time.Unix(0, e.At).Sub(begun))
		transports[e.Transport]++
	}
	slices.Sort(at)
	spent := costOf(b, c.PID())
	fmt.Printf("\ncontrol plane %s\n  devices back %d (QUIC %d, TCP %d): first %s, p50 %s, p99 %s, last %s\n  control plane: %s of CPU, %d KiB at most, %d KiB now\n",
		what, len(at), transports["quic"], transports["tcp"], round(at[0]), round(quantile(at, 0.5)), round(quantile(at, 0.99)), round(at[len(at)-1]),
		spent.cpu, spent.peak, spent.now)
	var wave int
	for i := range at {
		n, _ := slices.BinarySearch(at, at[i]+100*time.Millisecond)
		wave = max(wave, n-i)
	}
	fmt.Printf("  most in 100 ms: %d (%.1f%%)\n  a second: ", wave, 100*float64(wave)/float64(len(at)))
	for s := time.Duration(0); s <= at[len(at)-1]; s += time.Second {
		from, _ := slices.BinarySearch(at, s)
		to, _ := slices.BinarySearch(at, s+time.Second)
		fmt.Printf(" %d", to-from)
	}
	fmt.Println()
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Millisecond) }
