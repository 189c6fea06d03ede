package hwtests

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
)

var (
	targetFlag   = flag.String("target", "local", "the machine to look at: local, or ssh://[user@]host[:port] with Linux")
	binFlag      = flag.String("bin", os.Getenv("BELAY_BIN"), "directory that make build filled, for the target's architecture; empty: what needs built plugins is left out")
	probeFlag    = flag.String("probe", "", "a statically linked ./probe; empty: it is built")
	emulatorFlag = flag.String("emulator", "", "program to run the built plugins with, such as qemu-aarch64-static")
	loadFlag     = flag.String("load", "", "shell command that keeps the devices busy for ten seconds at least")
)

// detectors are the plugins of kind device there are.
var detectors = []string{"edgetpu", "nvidia"}

func TestMain(m *testing.M) {
	flag.Parse()
	if address, remote := strings.CutPrefix(*targetFlag, "ssh://"); remote {
		os.Exit(runThere(address))
	} else if *targetFlag != "local" {
		fmt.Fprintf(os.Stderr, "-target=%s: want local or ssh://[user@]host[:port]\n", *targetFlag)
		os.Exit(2)
	}
	os.Exit(m.Run())
}

// launch starts a built plugin as the agent does.
func launch(t *testing.T, name string, config json.RawMessage) sdk.Devices {
	t.Helper()
	if *binFlag == "" {
		t.Skip("no built plugins: make build, then -bin")
	}
	bin, err := filepath.Abs(*binFlag)
	if err != nil {
		t.Fatal(err)
	}
	o := host.Options{Path: filepath.Join(bin, "plugins", name), Name: name, Logger: slog.New(slog.DiscardHandler), StartTimeout: time.Minute}
	if _, err := os.Stat(o.Path); errors.Is(err, os.ErrNotExist) {
		t.Skipf("plugin %s was not built", name)
	}
	if *emulatorFlag != "" {
		// It shows the plugin its own file's name, not the link's.
		file := "belay-plugins"
		if name == "nvidia" {
			file = "belay-plugin-nvidia"
		}
		path, err := exec.LookPath(*emulatorFlag)
		if err != nil {
			t.Skip(err)
		}
		o.Path, o.Args = path, []string{filepath.Join(bin, file), name}
	}
	dir, err := os.MkdirTemp("", "bd") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	o.SocketDir, o.Config = dir, sdk.Config{StateDir: t.TempDir(), RunDir: t.TempDir(), JSON: config}
	p, err := host.Launch(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		p.Close(ctx)
	})
	d, ok := p.Devices()
	if !ok {
		t.Fatalf("plugin %s has no devices", name)
	}
	return d
}

// The built plugins give the golden inventories too, over the real protocol.
func TestGoldenBuilt(t *testing.T) {
	for _, name := range detectors {
		t.Run(name, func(t *testing.T) {
			for _, board := range boards(t) {
				t.Run(board, func(t *testing.T) {
					compare(t, readGolden(t, board).Inventories[name], look(t, launch(t, name, treeConfig(t, board))))
				})
			}
		})
	}
}

// TestTarget asks the plugins what is in this very machine and uses it.
func TestTarget(t *testing.T) {
	if *emulatorFlag != "" {
		t.Skip("emulated plugins see another machine's /sys")
	}
	for _, name := range detectors {
		t.Run(name, func(t *testing.T) {
			// Nodes and libraries are tried here; CDI is the runtime's part.
			config := json.RawMessage(nil)
			if name == "nvidia" {
				config = json.RawMessage(`{"cdi":false}`)
			}
			d := launch(t, name, config)
			found := firstInventory(t, d)
			if err := sdk.CheckInventory(found); err != nil {
				t.Fatal(err)
			}
			describe(t, found)
			if len(found) == 0 {
				t.Skipf("no hardware for %s here: detecting ran and found nothing; edits, containers, stats and load did not run", name)
			}
			for _, f := range found {
				t.Run(strings.ReplaceAll(f.ID, "/", "_"), func(t *testing.T) { use(t, d, f) })
			}
		})
	}
}

func describe(t *testing.T, found []sdk.Device) {
	t.Helper()
	for _, f := range found {
		b, err := json.MarshalIndent(f, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s", b)
	}
}

// use runs what a device is good for.
func use(t *testing.T, d sdk.Devices, f sdk.Device) {
	if !f.Ready {
		t.Skipf("not ready: %s; edits, containers, stats and load did not run", f.Reason)
	}
	t.Run("container", func(t *testing.T) {
		e, err := d.Edits(t.Context(), []string{f.ID})
		if err != nil {
			t.Fatal(err)
		}
		if why := missingForContainers(); why != "" {
			t.Skip("no container: ", why)
		}
		var named []string
		for _, n := range e.Devices {
			named = append(named, n.HostPath)
		}
		checkReach(t, e, runProbe(t, nobody, e, named))
	})
	t.Run("stats", func(t *testing.T) {
		s, told := measure(t, d, f.ID)
		if !told {
			t.Skip("this device tells no measurements")
		}
		b, err := json.Marshal(stats(s))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s", b)
	})
	t.Run("load", func(t *testing.T) {
		if *loadFlag == "" {
			t.Skip("nothing to keep the device busy with: name a command with -load")
		}
		underLoad(t, d, f.ID)
	})
}

func measure(t *testing.T, d sdk.Devices, id string) (sdk.DeviceStats, bool) {
	t.Helper()
	all, err := d.Stats(t.Context(), []string{id})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(s sdk.DeviceStats) bool { return s.ID == id })
	if i < 0 {
		return sdk.DeviceStats{}, false
	}
	return all[i], true
}

// underLoad wants some measurement to be higher while the load runs.
func underLoad(t *testing.T, d sdk.Devices, id string) {
	t.Helper()
	before, told := measure(t, d, id)
	if !told {
		t.Skip("this device tells no measurements")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	load := exec.CommandContext(ctx, "sh", "-c", *loadFlag)
	load.Stderr = os.Stderr
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = load.Wait() }()
	higher := func(a, b *float64) bool { return a != nil && b != nil && *b > *a }
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		now, _ := measure(t, d, id)
		if higher(before.UtilizationPercent, now.UtilizationPercent) || higher(before.PowerWatts, now.PowerWatts) || higher(before.TemperatureCelsius, now.TemperatureCelsius) ||
			before.MemoryUsedBytes != nil && now.MemoryUsedBytes != nil && *now.MemoryUsedBytes > *before.MemoryUsedBytes {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("no measurement moved while the load ran")
		}
	}
}
