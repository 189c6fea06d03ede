package containerd

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// TestConformance runs the SDK's suite against the plugin as a process, on
// every network mode.
func TestConformance(t *testing.T) {
	ctd, reg := daemons(t)
	bin := filepath.Join(built, "containerd")
	if built == "" {
		bin = filepath.Join(t.TempDir(), "containerd")
		if out, err := exec.Command("go", "build", "-o", bin, "./testdata/containerd").CombinedOutput(); err != nil {
			t.Fatalf("build the plugin: %v\n%s", err, out)
		}
	}
	for _, network := range []string{sdk.NetworkNone, sdk.NetworkBridge} {
		t.Run(network, func(t *testing.T) {
			before, networkBefore := leftovers(t, &world{ctd: ctd, run: "/none", state: "/none"}), networkLeftovers(t)
			dir, err := os.MkdirTemp("", "bc") // short: sockets need short paths
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			t.Setenv("TMPDIR", dir) // the suite's own directories, to look into
			// An image that another agent pulled here is only shared.
			if out, err := exec.Command("sh", "-c", `ctr -a "$0" -n belay images ls -q | xargs -r ctr -a "$0" -n belay images rm --sync`, ctd.Address).CombinedOutput(); err != nil {
				t.Fatalf("remove what other tests pulled: %v: %s", err, out)
			}
			sdktest.Runtime(t, sdktest.RuntimeOptions{
				Executable: bin,
				Config:     json.RawMessage(fmt.Sprintf(`{"address":%q,"bridge":{"name":%q,"subnet":%q}}`, ctd.Address, bridgeName, bridgeSubnet)),
				Image:      reg.Address + "/" + images.Shell + ":1",
				Network:    network,
				User:       "1234:5678",
				HangUp:     hangUps(t),
			})
			runs, err := filepath.Glob(filepath.Join(dir, "sdktest*"))
			if err != nil || len(runs) != 1 {
				t.Fatalf("the suite's directories are %v, %v", runs, err)
			}
			w := &world{ctd: ctd, run: filepath.Join(runs[0], "run"), state: filepath.Join(runs[0], "state")}
			var left []string
			for _, l := range leftovers(t, w) {
				// Other agents under test have their tasks in the same cgroup;
				// that this one's tasks are gone is known from RemoveTask.
				if !slices.Contains(before, l) && !strings.HasPrefix(l, "path /sys/fs/cgroup/") {
					left = append(left, l)
				}
			}
			if len(left) > 0 {
				t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			}
			// The kernel ends a network namespace in its own time.
			(&world{t: t}).eventually("nothing of the network is left", func() bool {
				d := cmp.Diff(networkBefore, networkLeftovers(t))
				if d != "" {
					t.Log(d)
				}
				return d == ""
			})
		})
	}
}

// hangUps is how often a rule about starts that are given up repeats itself.
func hangUps(t *testing.T) int {
	v := os.Getenv("BELAY_TEST_HANGUPS")
	if v == "" {
		return 8
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("BELAY_TEST_HANGUPS: %v", err)
	}
	return n
}
