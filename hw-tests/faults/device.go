package faults

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// device is a host of its own: PID, mount, network, UTS, IPC, cgroup and time
// namespaces below one first process. Killing that is a power cut: the kernel
// kills every process, and the mounts, the network and /run are gone. What
// stays is the disk.
type device struct {
	dir   string // of logs and of what the next boot needs
	disk  string // a small file system that survives: state, containerd's root
	group string // its cgroup in every hierarchy of the machine

	mu     sync.Mutex
	cmd    *exec.Cmd
	in     *json.Encoder
	out    *bufio.Reader
	pid    atomic.Int64    // of its first process, as seen from the harness
	boots  atomic.Int64    // how often its power was cut
	dark   atomic.Bool     // its power is being cut: processes end one by one
	offset int64           // of its clocks to the machine's, in seconds
	awake  int64           // how much later the agent's clocks are than the device's
	atBoot map[string]bool // its mounts before anything of ours ran
}

const diskMiB = 96

func newDevice(dir, group string) (*device, error) {
	d := &device{dir: dir, disk: filepath.Join(dir, "disk"), group: group}
	if err := os.MkdirAll(d.disk, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", d.disk, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0755", diskMiB)); err != nil {
		return nil, fmt.Errorf("mount the device's disk: %w", err)
	}
	return d, nil
}

// controllers are the mounted cgroup hierarchies of the machine: mount point
// to the options that mount the same again.
func controllers() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for line := range strings.Lines(string(b)) {
		before, after, _ := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		switch {
		case len(f) < 5 || len(g) < 3:
		case g[0] == "cgroup2":
			found[f[4]] = "cgroup2"
		case g[0] == "cgroup":
			var o []string
			for _, opt := range strings.Split(g[2], ",") {
				if opt != "rw" && opt != "ro" && opt != "xattr" {
					o = append(o, opt)
				}
			}
			if opts := strings.Join(o, ","); strings.HasPrefix(opts, "name=") {
				found[f[4]] = "none," + opts
			} else {
				found[f[4]] = opts
			}
		}
	}
	if len(found) == 0 {
		return nil, errors.New("this machine has no cgroups")
	}
	return found, nil
}

// boot starts the device's first process. It runs two scripts: one before its
// cgroup and time namespaces are made, one after.
func (d *device) boot() error {
	mounts, err := controllers()
	if err != nil {
		return err
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	h := hex.EncodeToString(id)
	bootID := filepath.Join(d.dir, "boot_id")
	for name, text := range map[string]string{
		bootID:                              fmt.Sprintf("%s-%s-4%s-a%s-%s\n", h[:8], h[8:12], h[13:16], h[17:20], h[20:]),
		filepath.Join(d.dir, "resolv.conf"): "nameserver " + routerLAN + "\noptions timeout:1 attempts:2\n",
		filepath.Join(d.dir, "hosts"):       "127.0.0.1 localhost\n",
	} {
		// A new file each time: an earlier boot has the other mounted.
		_ = os.Remove(name)
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	var early, late bytes.Buffer
	fmt.Fprintln(&early, "set -e")
	fmt.Fprintln(&late, "set -e\nmount -t proc proc /proc\nmount -t sysfs sysfs /sys\nmount -t tmpfs -o mode=0755 tmpfs /sys/fs/cgroup")
	for mount, opts := range mounts {
		at := filepath.Join(mount, d.group)
		fmt.Fprintf(&early, "mkdir -p %s\n", at)
		if strings.Contains(opts, "cpuset") {
			fmt.Fprintf(&early, "cat %s/cpuset.cpus > %s/cpuset.cpus; cat %s/cpuset.mems > %s/cpuset.mems\n", mount, at, mount, at)
		}
		fmt.Fprintf(&early, "echo 0 > %s/cgroup.procs\n", at)
		name := filepath.Join("/sys/fs/cgroup", filepath.Base(mount))
		kind := "cgroup -o " + opts
		if opts == "cgroup2" {
			kind = "cgroup2"
		}
		fmt.Fprintf(&late, "mkdir %s && mount -t %s cgroup %s\n", name, kind, name)
	}
	fmt.Fprintf(&late, `mount --bind %s /proc/sys/kernel/random/boot_id
mount --bind %s /etc/resolv.conf
mount --bind %s /etc/hosts
mount -t tmpfs -o mode=0755 tmpfs /run
touch /run/device-time
mount --bind /proc/self/ns/time /run/device-time
ip link set lo up
exec /proc/self/fd/3 </proc/self/fd/4
`, bootID, filepath.Join(d.dir, "resolv.conf"), filepath.Join(d.dir, "hosts"))
	script := filepath.Join(d.dir, "late.sh")
	if err := os.WriteFile(script, late.Bytes(), 0o600); err != nil {
		return err
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return err
	}
	d.offset, d.awake = 20-up.Sec, 0 // it has been up for 20 s
	fmt.Fprintf(&early, "exec unshare --cgroup --time --boottime=%d --monotonic=%d -- /bin/sh %s\n", d.offset, d.offset, script)

	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	log, err := os.OpenFile(filepath.Join(d.dir, "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	orders, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer orders.Close()
	r, answers, err := os.Pipe()
	if err != nil {
		return err
	}
	defer answers.Close()
	d.cmd = exec.Command("/bin/sh", "-c", early.String())
	d.cmd.Env = append(os.Environ(), stageKey+"="+stageInit)
	d.cmd.ExtraFiles = []*os.File{self, orders}
	d.cmd.Stdout, d.cmd.Stderr = answers, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := d.cmd.Start(); err != nil {
		return fmt.Errorf("boot the device: %w", err)
	}
	d.pid.Store(int64(d.cmd.Process.Pid))
	d.in, d.out = json.NewEncoder(w), bufio.NewReader(r)
	if _, err := d.order(order{Do: "running"}); err != nil {
		b, _ := os.ReadFile(log.Name())
		return fmt.Errorf("the device does not boot: %w: %s", err, b)
	}
	d.atBoot = map[string]bool{}
	at, err := d.mounts()
	for _, m := range at {
		d.atBoot[m] = true
	}
	return err
}

// mounts are the mount points on the device.
func (d *device) mounts() (at []string, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", d.pid.Load()))
	for line := range strings.Lines(string(b)) {
		at = append(at, strings.Fields(line)[4])
	}
	return at, err
}

// order tells the first process to do something. Callers hold no lock.
func (d *device) order(o order) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.in.Encode(o); err != nil {
		return 0, err
	}
	line, err := d.out.ReadBytes('\n')
	if err != nil {
		return 0, err
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return 0, err
	}
	if a.Error != "" {
		return a.PID, fmt.Errorf("%s %s: %s", o.Do, o.Name, a.Error)
	}
	return a.PID, nil
}

// start runs a program on the device; its output goes to name.log.
func (d *device) start(name string, env []string, args ...string) error {
	o := order{Do: "start", Name: name, Args: args, Env: env, Log: filepath.Join(d.dir, name+".log")}
	if d.awake != 0 {
		o.Boottime = d.offset + d.awake
	}
	_, err := d.order(o)
	return err
}

// signal sends a signal to a program that start has started.
func (d *device) signal(name string, s syscall.Signal) error {
	_, err := d.order(order{Do: "signal", Name: name, Signal: int(s)})
	return err
}

// running is the device's own pid of a program, 0 when it does not run.
func (d *device) running(name string) int {
	pid, _ := d.order(order{Do: "running", Name: name})
	return pid
}

// gone waits until a program has ended.
func (d *device) gone(name string, within time.Duration) error {
	return until(within, name+" to end", func() error {
		if pid := d.running(name); pid != 0 {
			return fmt.Errorf("it is process %d", pid)
		}
		return nil
	})
}

// root is the device's file system as the harness reaches it.
func (d *device) root(path string) string {
	return filepath.Join("/proc", strconv.FormatInt(d.pid.Load(), 10), "root", path)
}

// netns is the device's network namespace as the harness reaches it.
func (d *device) netns() string { return fmt.Sprintf("/proc/%d/ns/net", d.pid.Load()) }

// inside makes a command that runs on the device.
func (d *device) inside(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target", strconv.FormatInt(d.pid.Load(), 10), "--mount", "--net", "--"}, args...)...)
}

// cut takes the device's power away and waits until nothing of it runs.
func (d *device) cut() error {
	if d.cmd == nil {
		return nil
	}
	// First: whoever sees a process end looks at these.
	d.dark.Store(true)
	d.boots.Add(1)
	if err := d.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = d.cmd.Wait() // killed, as it shall be
	d.dark.Store(false)
	d.cmd = nil
	return d.wipeCgroups()
}

// wipeCgroups removes what no reboot would leave.
func (d *device) wipeCgroups() error {
	mounts, err := controllers()
	if err != nil {
		return err
	}
	return until(10*time.Second, "the device's cgroups to empty", func() error {
		var failed error
		for mount := range mounts {
			dirs := subdirectories(filepath.Join(mount, d.group))
			slices.Reverse(dirs)
			for _, dir := range dirs {
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					failed = err
				}
			}
		}
		return failed
	})
}

// subdirectories lists a directory and all below it, parents first.
func subdirectories(dir string) []string {
	var found []string
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			found = append(found, path)
		}
		return nil // one that goes while we look is none
	})
	return found
}

// close ends the device for good.
func (d *device) close() error {
	err := d.cut()
	if e := unix.Unmount(d.disk, unix.MNT_DETACH); e != nil {
		err = errors.Join(err, fmt.Errorf("unmount %s: %w", d.disk, e))
	}
	return err
}

// until asks every few milliseconds until ok is content or the time is up.
func until(within time.Duration, what string, ok func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %s for %s: %w", within, what, err)
		}
		<-time.After(15 * time.Millisecond)
	}
}
