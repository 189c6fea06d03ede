package faults

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
)

var (
	binFlag   = flag.String("bin", os.Getenv("BELAY_BIN"), "directory with the built binaries; empty: run make build")
	seedFlag  = flag.Uint64("seed", 1, "seed of the campaign")
	firstFlag = flag.Int("first", 0, "run to begin with")
	runsFlag  = flag.Int("runs", 3, "how many runs")
)

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 {
		code, done, err := Isolated()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if done {
			os.Exit(code)
		}
	}
	os.Exit(m.Run())
}

func TestFaults(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes namespaces and runs containerd")
	}
	c := Campaign{Bin: binaries(t), Seed: *seedFlag, First: *firstFlag, Runs: *runsFlag, Log: t.Logf}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rep, err := c.Run(ctx)
	if rep != nil {
		t.Logf("%s", rep)
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Violations) > 0 {
		t.Errorf("play it again with SEED=%d FIRST=%d FAULT_RUNS=%d", *seedFlag, *firstFlag, rep.Runs)
	}
}

func binaries(t *testing.T) rig.Binaries {
	t.Helper()
	if *binFlag != "" {
		return rig.Binaries(*binFlag)
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("make", "-C", root, "build").CombinedOutput(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
	return rig.Binaries(filepath.Join(root, "bin"))
}
