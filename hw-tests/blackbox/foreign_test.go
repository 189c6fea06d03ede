package blackbox

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// TestForeignProcessor has a device of another processor, emulated: its agent
// enrols with this machine's control plane, starts the process plugin, and a
// program's output and exit code come back. The binaries take minutes to build:
//
//	make build GOARCH=arm64 BIN=/tmp/arm64
//	GOARM=6 make build GOARCH=arm BIN=/tmp/armv6
//	BELAY_FOREIGN_BIN=/tmp/arm64:/tmp/armv6 go test -run TestForeignProcessor ./hw-tests/blackbox
//
// The agent starts the plugin and that its supervisor, so that the kernel must
// know the emulator: qemu-user-static, registered with binfmt_misc.
func TestForeignProcessor(t *testing.T) {
	dirs := filepath.SplitList(os.Getenv("BELAY_FOREIGN_BIN"))
	if len(dirs) == 0 {
		t.Skip("BELAY_FOREIGN_BIN names no directory of binaries for another processor")
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			foreign := rig.Binaries(dir)
			out, err := exec.CommandContext(deadline(t, patience), foreign.Path("belay-agent"), "version").CombinedOutput()
			if err != nil {
				t.Skipf("this kernel does not run %s: %v (install qemu-user-static, and see /proc/sys/fs/binfmt_misc)", foreign.Path("belay-agent"), err)
			}
			t.Logf("%s", out)
			s := &site{Control: newControl(t), runtime: "process", dir: tempDir(t)}
			s.cli = s.Control.CLI()
			plugins := filepath.Join(s.dir, "plugins")
			if err := os.Mkdir(plugins, 0o755); err != nil {
				t.Fatal(err)
			}
			link(t, foreign.Path("belay-plugins"), filepath.Join(plugins, "process"))
			s.agent = newDeviceOf(t, foreign, s.cli, s.dir, func(a *rig.Agent) { a.PluginDir = plugins })
			if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process"); err != nil {
				t.Fatal(err)
			}
			id, err := s.cli.RunTask(deadline(t, patience), cluster, s.document(t, "foreign", container{"name": "c", "script": "echo from afar; exit 23"}))
			if err != nil {
				t.Fatal(err)
			}
			if now := s.await(t, id, "the task to end", patience, stopped); now.Container("c").ExitCode == nil || *now.Container("c").ExitCode != 23 {
				t.Errorf("want exit code 23 of %+v", now)
			}
			if logs, err := s.cli.Run(deadline(t, patience), "logs", id); err != nil || string(logs) != "from afar\n" {
				t.Errorf("its output is %q, %v", logs, err)
			}
			// What runs outlives an agent that is killed, emulated or not.
			before := s.run(t, "stays", container{"name": "c", "script": "while :; do sleep 0.1; done"})
			s.agent.Kill()
			if err := s.agent.Restart(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process"); err != nil {
				t.Fatal(err)
			}
			if now := s.await(t, before.ID, "what ran before", patience, running); now.Container("c").PID != before.Container("c").PID || !alive(now.Container("c").PID) {
				t.Errorf("it ran as %+v, now as %+v", before, now)
			}
			s.sweep(t)
		})
	}
}
