package containerd

import (
	"fmt"
	"os/exec"
	"testing"
	"time"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// TestStartTime reports how long Start takes on each network beside `ctr run`
// of the same image, one after the other so that both see the same machine.
// It fails only far beyond the budget: shared machines are noisy.
func TestStartTime(t *testing.T) {
	w := newWorld(t)
	img := w.pull(images.Workload)
	runs := time.Duration(8)
	if slow(1) > 1 {
		runs = 2 // an emulator's seconds tell little and cost minutes
	}
	var plain, host, bridge time.Duration
	for i := range runs {
		begun := time.Now()
		name := fmt.Sprintf("bench%d", i)
		ref := w.reg.Address + "/workload@" + img.Digest
		if out, err := exec.Command("ctr", "-a", w.ctd.Address, "-n", "belay", "run", "-d", "--net-host", ref, name, "/workload", "sleep").CombinedOutput(); err != nil {
			t.Fatalf("ctr run: %v\n%s", err, out)
		}
		plain += time.Since(begun)
		_ = exec.Command("ctr", "-a", w.ctd.Address, "-n", "belay", "tasks", "rm", "-f", name).Run()
		_ = exec.Command("ctr", "-a", w.ctd.Address, "-n", "belay", "containers", "rm", name).Run()
		for network, sum := range map[string]*time.Duration{sdk.NetworkHost: &host, sdk.NetworkBridge: &bridge} {
			q := w.request(w.attempt(sdk.TaskSpec{Network: network}), network, images.Workload, "sleep")
			begun := time.Now()
			w.start(q)
			*sum += time.Since(begun)
			if _, err := w.rt.Stop(w.ctx(), q.Attempt, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("mean of %d: ctr run %s, Start host %s, Start bridge %s", int(runs), plain/runs, host/runs, bridge/runs)
	if host > plain+runs*slow(500*time.Millisecond) {
		t.Errorf("Start takes %s longer than ctr run", (host-plain)/runs)
	}
}
