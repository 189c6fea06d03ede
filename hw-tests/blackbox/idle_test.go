package blackbox

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// flash is a file system of its own on a file, so that what is written to it
// can be counted where a card would be worn: at the block device.
type flash struct{ dir, device string }

func newFlash(b *testing.B) flash {
	b.Helper()
	dir := tempDir(b)
	f := flash{dir: filepath.Join(dir, "m")}
	file := filepath.Join(dir, "image")
	for _, args := range [][]string{{"truncate", "-s", "2G", file}, {"mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", file}, {"mkdir", f.dir}, {"mount", "-o", "loop", file, f.dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			b.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	b.Cleanup(func() {
		if err := unix.Unmount(f.dir, unix.MNT_DETACH); err != nil {
			b.Error(err)
		}
	})
	var st unix.Stat_t
	if err := unix.Stat(f.dir, &st); err != nil {
		b.Fatal(err)
	}
	f.device = fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
	return f
}

// written is how many bytes the device has taken, all that waits included.
func (f flash) written(b *testing.B) int64 {
	fd, err := unix.Open(f.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		b.Fatal(err)
	}
	text, err := os.ReadFile(f.device)
	if err != nil {
		b.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.Fields(string(text))[6], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return n * 512
}

// changed names the files that were written to since.
func (f flash) changed(b *testing.B, since time.Time) (names []string) {
	err := filepath.WalkDir(f.dir, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return nil // gone meanwhile
		case path == filepath.Join(f.dir, "containerd", "state"):
			return fs.SkipDir
		}
		if i, err := e.Info(); err == nil && i.ModTime().After(since) {
			name, _ := filepath.Rel(f.dir, path)
			names = append(names, name)
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return names
}

// traffic is what a namespace has sent and received: packets of IPv4, their
// bytes from the IP header on, and frames of anything else on its link.
type traffic struct{ packets, bytes, others int64 }

// trafficOf counts at IP level: what the kernel sends for itself (ARP, IPv6's
// neighbours and routers), with Belay or without it, is counted as others.
func trafficOf(b *testing.B, ns *rig.Netns) (t traffic) {
	b.Helper()
	out, err := exec.Command(ns.Within()[0], append(ns.Within()[1:], "cat", "/proc/net/snmp", "/proc/net/netstat")...).Output()
	if err != nil {
		b.Fatal(err)
	}
	// Pairs of lines: the names, and what they stand for.
	counters := map[string]int64{}
	lines := strings.Split(string(out), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for k := 1; k < min(len(names), len(values)); k++ {
			counters[names[0]+names[k]], _ = strconv.ParseInt(values[k], 10, 64)
		}
	}
	count := func(name string) int64 {
		n, ok := counters[name]
		if !ok {
			b.Fatalf("the kernel does not count %s", name)
		}
		return n
	}
	t.packets = count("Ip:InReceives") + count("Ip:OutRequests")
	t.bytes = count("IpExt:InOctets") + count("IpExt:OutOctets")
	for _, way := range []string{"rx", "tx"} {
		text, err := os.ReadFile(filepath.Join("/sys/class/net", ns.Link(), "statistics", way+"_packets"))
		if err != nil {
			b.Fatal(err)
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		t.others += n
	}
	t.others -= t.packets
	return t
}

// BenchmarkIdle prints what an idle device with one health-checked task sends,
// receives and writes in BELAY_BENCH_IDLE, a duration, and what that is a day.
func BenchmarkIdle(b *testing.B) {
	within, err := time.ParseDuration(os.Getenv("BELAY_BENCH_IDLE"))
	if err != nil || os.Getuid() != 0 {
		b.Skip("takes ten minutes and root: run make bench-idle")
	}
	for b.Loop() {
		for _, transport := range []string{"quic", "tcp"} {
			b.Run(transport, func(b *testing.B) { idle(b, transport, within) })
		}
	}
}

func idle(b *testing.B, transport string, within time.Duration) {
	h := host(b) // for its registry
	ns, err := rig.NewNetns("belayidle", 178)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := ns.Close(); err != nil {
			b.Error(err)
		}
	})
	registry, err := ns.Forward(h.registry.Address)
	if err != nil {
		b.Fatal(err)
	}
	defer registry.Close()
	card := newFlash(b)
	// On a device the daemon's state is in /run, which is no disk.
	state := filepath.Join(card.dir, "containerd", "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		b.Fatal(err)
	}
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "mode=0700"); err != nil {
		b.Fatal(err)
	}
	// And what it logs is the journal's business.
	if err := os.Symlink(filepath.Join(tempDir(b), "containerd.log"), filepath.Join(card.dir, "containerd", "containerd.log")); err != nil {
		b.Fatal(err)
	}
	ctx := deadline(b, patience)
	containerd, err := rig.StartContainerd(ctx, filepath.Join(card.dir, "containerd"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := containerd.Close(); err != nil {
			b.Error(err)
		}
	})
	port, err := rig.FreePort()
	if err != nil {
		b.Fatal(err)
	}
	control, err := rig.StartControlAt(ctx, bin(b), tempDir(b), net.JoinHostPort(ns.Here, strconv.Itoa(port)))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(control.Kill)
	s := &site{Control: control, cli: control.CLI(), runtime: "containerd", dir: tempDir(b)}
	s.agent = newDevice(b, s.cli, filepath.Join(card.dir, "agent"), func(a *rig.Agent) {
		s.namespace = h.prepare(b, a, s.dir)
		a.ContainerdAddress, a.RunDir, a.Within = containerd.Address, filepath.Join(s.dir, "run"), ns.Within()
		a.Extra = append(a.Extra, "--transport", transport)
	})
	if _, err := s.cli.Connected(ctx, cluster, 1, "containerd"); err != nil {
		b.Fatal(err)
	}
	doc := s.document(b, "idle", container{"name": "c", "script": "trap 'exit 0' TERM; while :; do sleep 1; done", "stopTimeout": 2,
		"healthCheck": map[string]any{"command": []string{"CMD-SHELL", "true"}, "interval": 30, "timeout": 5, "retries": 3}})
	id, err := s.cli.RunTask(deadline(b, patience), cluster, doc)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := s.cli.Await(deadline(b, 2*patience), id, "the task to be healthy", 2*patience, func(t rig.Task) bool { return t.HealthStatus == "HEALTHY" }); err != nil {
		b.Fatal(err)
	}
	moment(30 * time.Second) // what the start wrote is written
	before := trafficOf(b, ns)
	wrote := card.written(b)
	since := time.Now()
	moment(within)
	after := trafficOf(b, ns)
	wroteAfter := card.written(b)
	if now, err := s.cli.Describe(deadline(b, patience), id); err != nil || now.HealthStatus != "HEALTHY" {
		b.Errorf("%+v, %v", now, err)
	}
	day := func(n int64) float64 { return float64(n) * float64(24*time.Hour) / float64(within) / 1e6 }
	bytes := after.bytes - before.bytes
	fmt.Printf("\nidle for %s over %s, one health-checked task\n", within, transport)
	fmt.Printf("  link, both ways: %d packets, %d bytes at IP level: %.3f MB a day (budget 0.5); %d frames of the kernel's own beside them\n",
		after.packets-before.packets, bytes, day(bytes), after.others-before.others)
	fmt.Printf("  disk: %d bytes written, containerd's included: %.3f MB a day (budget 1)\n", wroteAfter-wrote, day(wroteAfter-wrote))
	fmt.Printf("  written to: %s\n", strings.Join(card.changed(b, since), ", "))
	stop(b, s, id)
}
