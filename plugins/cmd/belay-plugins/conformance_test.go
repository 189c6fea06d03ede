package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// boards are recorded trees with what the plugin finds: ready, and not.
var boards = map[string][]string{
	"edgetpu": {"coral-pcie", "coral-pcie-no-driver"},
	"nvidia":  {"nvidia-gpu-no-driver"},
}

// Our own detectors keep the rules that everybody's are held to, over this
// machine and over recorded boards, whose device nodes are not here.
func TestDetectorsKeepTheContract(t *testing.T) {
	for _, c := range []struct{ plugin, program, cgo string }{
		{"edgetpu", ".", "0"}, {"nvidia", "../belay-plugin-nvidia", "1"},
	} {
		t.Run(c.plugin, func(t *testing.T) {
			if _, err := exec.LookPath("gcc"); err != nil && c.cgo == "1" {
				t.Skip("no C compiler: apt install gcc libc6-dev")
			}
			executable := filepath.Join(t.TempDir(), c.plugin)
			build := exec.Command("go", "build", "-tags=grpcnotrace", "-o", executable, c.program)
			build.Env = append(os.Environ(), "CGO_ENABLED="+c.cgo)
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("go build: %v\n%s", err, out)
			}
			t.Run("here", func(t *testing.T) { sdktest.Device(t, sdktest.DeviceOptions{Executable: executable}) })
			for _, board := range boards[c.plugin] {
				root, err := filepath.Abs("../../../hw-tests/fixtures/" + board + "/root")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(root); err != nil {
					t.Fatal(err)
				}
				config, err := json.Marshal(map[string]string{"root": root})
				if err != nil {
					t.Fatal(err)
				}
				t.Run(board, func(t *testing.T) {
					sdktest.Device(t, sdktest.DeviceOptions{Executable: executable, Config: config,
						Exists: func(string) bool { return true }})
				})
			}
		})
	}
}
