package containerd

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

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
			sdktest.Runtime(t, sdktest.RuntimeOptions{
				Executable: bin,
				Config:     json.RawMessage(fmt.Sprintf(`{"address":%q,"bridge":{"name":%q,"subnet":%q}}`, ctd.Address, bridgeName, bridgeSubnet)),
				Image:      reg.Address + "/" + images.Shell + ":1",
				Network:    network,
				User:       "1234:5678",
				HangUp:     15,
			})
		})
	}
}
