package examples_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// camera makes what the kernel shows of a USB camera below root.
func camera(root, name, place string, index string) error {
	device := filepath.Join(root, "sys/devices/usb1", place)
	video := filepath.Join(device, "video4linux", name)
	for _, dir := range []string{video, filepath.Join(root, "sys/class/video4linux"), filepath.Join(root, "sys/bus/usb"), filepath.Join(root, "dev")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for file, text := range map[string]string{"index": index, "name": "Acme Camera"} {
		if err := os.WriteFile(filepath.Join(video, file), []byte(text+"\n"), 0o644); err != nil {
			return err
		}
	}
	for link, to := range map[string]string{
		filepath.Join(video, "device"):                     "../..",
		filepath.Join(device, "subsystem"):                 filepath.Join(root, "sys/bus/usb"),
		filepath.Join(root, "sys/class/video4linux", name): video,
	} {
		if err := os.Symlink(to, link); err != nil && !os.IsExist(err) {
			return err
		}
	}
	return nil
}

// The plugin in Python, written without the SDK, keeps what plugins built on
// it keep.
func TestPythonExample(t *testing.T) {
	if out, err := exec.Command("/usr/bin/python3", "-c", "import grpc").CombinedOutput(); err != nil {
		t.Skipf("/usr/bin/python3 has no gRPC: apt install python3-grpcio (%v: %.200s)", err, out)
	}
	executable, err := filepath.Abs("python/usb-cameras")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	for _, err := range []error{
		camera(root, "video0", "1-1/1-1:1.0", "0"),
		camera(root, "video1", "1-1/1-1:1.0", "1"), // its metadata
		camera(root, "video2", "1-2/1-2:1.0", "0"), // has no node
		os.Symlink("/dev/null", filepath.Join(root, "dev/video0")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	config, err := json.Marshal(map[string]string{"root": root, "scan": "200ms"})
	if err != nil {
		t.Fatal(err)
	}
	sdktest.Device(t, sdktest.DeviceOptions{
		Executable: executable, Config: config,
		Change: func() error { return camera(root, "video3", "1-3/1-3:1.0", "0") },
	})
}
