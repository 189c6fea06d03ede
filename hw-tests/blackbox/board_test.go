package blackbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// board is a device of its own: its containerd and agent run in process and
// mount namespaces with a /run and a boot id of their own. When its first
// process is killed, the kernel ends all others and takes the mounts away, as
// a power cut would; what is on disk stays.
type board struct {
	t       *testing.T
	dir     string
	bin     rig.Binaries
	agent   *rig.Agent // enrolled; not run by the rig
	boots   int
	machine *exec.Cmd
}

// newBoard enrols a device with more lines of agent.toml. boot starts it.
func newBoard(t *testing.T, cli *rig.CLI, config string) *board {
	t.Helper()
	for _, program := range []string{"unshare", "nsenter", "containerd", "runc"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s: %v", program, err)
		}
	}
	ctx := deadline(t, patience)
	b := &board{t: t, dir: tempDir(t), bin: bin(t)}
	code, err := cli.Activate(ctx, cluster, 1)
	if err != nil {
		t.Fatal(err)
	}
	if b.agent, err = rig.Enroll(ctx, b.bin, b.dir, code); err != nil {
		t.Fatal(err)
	}
	ctd := fmt.Sprintf(`version = 2
root = %q
state = "/run/ctd"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "/run/ctd.sock"
[plugins."io.containerd.internal.v1.opt"]
path = %q
`, filepath.Join(b.dir, "ctd"), filepath.Join(b.dir, "opt"))
	for name, text := range map[string]string{
		"containerd.toml": ctd,
		"agent.toml":      config + "\n[plugins.containerd]\naddress = \"/run/ctd.sock\"\n",
		"init":            bootScript,
	} {
		if err := os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		b.cut()
		b.sweep()
		if t.Failed() {
			for _, log := range []string{"agent.log", "containerd.log", "init.log"} {
				raw, _ := os.ReadFile(filepath.Join(b.dir, log))
				t.Logf("%s ends:\n%s", log, raw[max(0, len(raw)-5000):])
			}
		}
	})
	return b
}

// bootScript is the first process: DIR, the directory of the binaries, and
// that of the plugins are its arguments.
const bootScript = `
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/ctd
mount --bind "$1/boot-id" /proc/sys/kernel/random/boot_id
containerd --config "$1/containerd.toml" >> "$1/containerd.log" 2>&1 &
"$2" run --config "$1/agent.toml" --state-dir "$1/state" --run-dir /run/belay --plugin-dir "$3" >> "$1/agent.log" 2>&1 &
while :; do wait || true; sleep 1; done
`

// boot starts the board, with a boot id it never had.
func (b *board) boot() {
	b.t.Helper()
	b.boots++
	id := fmt.Sprintf("00000000-0000-4000-8000-%012d\n", b.boots)
	if err := os.WriteFile(filepath.Join(b.dir, "boot-id"), []byte(id), 0o644); err != nil {
		b.t.Fatal(err)
	}
	out, err := os.OpenFile(filepath.Join(b.dir, "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		b.t.Fatal(err)
	}
	defer out.Close()
	plugins, err := filepath.Abs(b.bin.Path("plugins"))
	if err != nil {
		b.t.Fatal(err)
	}
	agent, err := filepath.Abs(b.bin.Path("belay-agent"))
	if err != nil {
		b.t.Fatal(err)
	}
	b.machine = exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private",
		"/bin/sh", filepath.Join(b.dir, "init"), b.dir, agent, plugins)
	b.machine.Stdout, b.machine.Stderr = out, out
	b.machine.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := b.machine.Start(); err != nil {
		b.t.Fatal(err)
	}
}

// first is the pid, outside, of the board's first process.
func (b *board) first() (int, error) {
	pid := b.machine.Process.Pid
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(children)))
}

// cut takes the power away and waits until nothing runs any more.
func (b *board) cut() {
	if b.machine == nil {
		return
	}
	if pid, err := b.first(); err == nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = b.machine.Process.Kill()
	_ = b.machine.Wait()
	b.machine = nil
}

// sweep removes the cgroups that a real power cut would have taken as well.
func (b *board) sweep() {
	for _, id := range b.tasks() {
		out, _ := exec.Command("find", "/sys/fs/cgroup", "-depth", "-type", "d", "-path", "*"+id+"*").Output()
		for _, dir := range strings.Fields(string(out)) {
			_ = os.Remove(dir)
		}
	}
}

// tasks are those whose state is on disk.
func (b *board) tasks() (ids []string) {
	entries, _ := os.ReadDir(filepath.Join(b.dir, "state", "tasks"))
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

// run runs a command on the board.
func (b *board) run(command ...string) ([]byte, error) {
	if b.machine == nil {
		return nil, errors.New("the board is off")
	}
	pid, err := b.first()
	if err != nil {
		return nil, err
	}
	args := append([]string{"-t", strconv.Itoa(pid), "-m", "-p", "--"}, command...)
	return exec.CommandContext(deadline(b.t, patience), "nsenter", args...).Output()
}

// localTask is a task as `belay-agent tasks -o json` shows it.
type localTask struct {
	ID, LastStatus, DesiredStatus, StopCode, StoppedReason, Note string
	Containers                                                   []struct {
		Name, LastStatus, Health string
		Attempt, PID             int
	}
}

func (t localTask) container(name string) (attempt, pid int, health string) {
	for _, c := range t.Containers {
		if c.Name == name {
			return c.Attempt, c.PID, c.Health
		}
	}
	return 0, 0, ""
}

// see asks the agent on the board about a task.
func (b *board) see(id string) (localTask, error) {
	out, err := b.run(b.bin.Path("belay-agent"), "tasks", "--run-dir", "/run/belay", "-o", "json")
	if err != nil {
		return localTask{}, err
	}
	var l struct{ Tasks []localTask }
	if err := json.Unmarshal(out, &l); err != nil {
		return localTask{}, fmt.Errorf("%w: %s", err, out)
	}
	for _, t := range l.Tasks {
		if t.ID == id {
			return t, nil
		}
	}
	return localTask{}, fmt.Errorf("it is not among %s", out)
}

// await asks until the board shows a task as it should be.
func (b *board) await(id, what string, ok func(localTask) bool) localTask {
	b.t.Helper()
	var seen localTask
	if err := rig.Until(deadline(b.t, 2*patience), nil, "on the board, "+what, func() error {
		var err error
		if seen, err = b.see(id); err != nil {
			return err
		}
		if !ok(seen) {
			return fmt.Errorf("it is %+v", seen)
		}
		return nil
	}); err != nil {
		b.t.Fatal(err)
	}
	return seen
}
