package process_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// built holds bin/belay-plugins, bin/belay-supervise and bin/plugins/process,
// laid out as make build does.
var built string

// binEnv names a directory that is laid out so already: for runs of the test
// binary where there is no Go, as another user or in another system.
const binEnv = "BELAY_TEST_PROCESS_BUILT"

func TestMain(m *testing.M) {
	if mode := filepath.Base(os.Args[0]); strings.HasPrefix(mode, "rt-") {
		pretend(mode) // a runtime with a defect, see broken_test.go
		return
	}
	os.Exit(func() int {
		defer removeCgroups()
		var err error
		if built = os.Getenv(binEnv); built != "" {
			return m.Run()
		}
		if built, err = os.MkdirTemp("", "belay-process"); err != nil {
			panic(err)
		}
		defer os.RemoveAll(built)
		// Others must be able to reach it: tests run without root too.
		if err := os.Chmod(built, 0o755); err != nil {
			panic(err)
		}
		build := exec.Command("go", "build", "-tags=grpcnotrace", "-ldflags=-s -w", "-o", filepath.Join(built, "bin")+"/",
			"./cmd/belay-supervise", "../cmd/belay-plugins")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			panic("build: " + err.Error() + "\n" + string(out))
		}
		plugins := filepath.Join(built, "bin", "plugins")
		if err := os.Mkdir(plugins, 0o755); err != nil {
			panic(err)
		}
		if err := os.Symlink("../belay-plugins", filepath.Join(plugins, "process")); err != nil {
			panic(err)
		}
		return m.Run()
	}())
}

// cgroupParent is this run's own, so that nothing of it stays behind.
func cgroupParent() string { return "belay-test-" + strconv.Itoa(os.Getpid()) }

func removeCgroups() {
	if os.Geteuid() == 0 {
		_ = exec.Command("find", "/sys/fs/cgroup", "-depth", "-type", "d", "-path", "*/"+cgroupParent()+"*", "-exec", "rmdir", "{}", "+").Run()
	}
}

// suite runs the conformance suite of runtimes over the real protocol.
func suite(t *testing.T, mode string) {
	config, err := json.Marshal(map[string]string{"supervisor_mode": mode, "cgroup_parent": cgroupParent()})
	if err != nil {
		t.Fatal(err)
	}
	o := sdktest.RuntimeOptions{Executable: filepath.Join(built, "bin", "plugins", "process"), Config: config}
	if os.Geteuid() == 0 {
		o.User = "65534:65534"
	}
	sdktest.Runtime(t, o)
}

func TestConformanceOwnSupervisor(t *testing.T) { suite(t, "own") }
