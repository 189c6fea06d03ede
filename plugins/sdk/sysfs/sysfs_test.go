package sysfs

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// plant makes a tree; a content of "-> x" is a link to x.
func plant(t *testing.T, files map[string]string) FS {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, link := strings.CutPrefix(content, "-> "); link {
			err = os.Symlink(target, p)
		} else {
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return New(root)
}

func TestValues(t *testing.T) {
	f := plant(t, map[string]string{
		"a/vendor": "0x8086\n", "a/bare": "1ac1\n", "a/temp": "45300\n", "a/neg": "-5000\n", "a/empty": "", "a/blank": "\n", "a/word": "ALIVE\n",
		"a/compatible": "nvidia,p3767-0005\x00nvidia,tegra234\x00", "a/model": "Raspberry Pi 5 Model B Rev 1.0\x00",
		"a/uevent": "DRIVER=apex\nDEVNAME=apex_0\nEMPTY=\n", "a/info": "Model: \t Tesla V100-SXM2-16GB\nBus Location: \t 0000:06:00.0\n", "a/dev": "120:1\n",
	})
	t.Run("strings", func(t *testing.T) {
		for name, want := range map[string]string{"/a/vendor": "0x8086", "/a/model": "Raspberry Pi 5 Model B Rev 1.0", "/a/empty": "", "/a/blank": "", "/a/none": "", "/a": "", "a/vendor": ""} {
			if got, ok := f.String(name); got != want || ok != (want != "") {
				t.Errorf("String(%s) = %q, %t; want %q", name, got, ok, want)
			}
		}
		if diff := cmp.Diff([]string{"nvidia,p3767-0005", "nvidia,tegra234"}, f.Strings("/a/compatible")); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("numbers", func(t *testing.T) {
		for name, want := range map[string]uint64{"/a/vendor": 0x8086, "/a/bare": 0x1ac1} {
			if got, ok := f.Hex(name); !ok || got != want {
				t.Errorf("Hex(%s) = %#x, %t; want %#x", name, got, ok, want)
			}
		}
		for name, want := range map[string]int64{"/a/temp": 45300, "/a/neg": -5000} {
			if got, ok := f.Int(name); !ok || got != want {
				t.Errorf("Int(%s) = %d, %t; want %d", name, got, ok, want)
			}
		}
		if major, minor, ok := f.Numbers("/a/dev"); !ok || major != 120 || minor != 1 {
			t.Errorf("Numbers = %d:%d, %t", major, minor, ok)
		}
	})
	t.Run("absent is never 0", func(t *testing.T) {
		for _, name := range []string{"/a/empty", "/a/blank", "/a/none", "/a/word", "/a"} {
			if n, ok := f.Int(name); ok {
				t.Errorf("Int(%s) = %d, want absent", name, n)
			}
			if n, ok := f.Hex(name); ok {
				t.Errorf("Hex(%s) = %d, want absent", name, n)
			}
			if _, _, ok := f.Numbers(name); ok {
				t.Errorf("Numbers(%s), want absent", name)
			}
		}
	})
	t.Run("fields", func(t *testing.T) {
		for key, want := range map[string]string{"DRIVER": "apex", "DEVNAME": "apex_0", "EMPTY": "", "NONE": ""} {
			if got, ok := f.Field("/a/uevent", key); got != want || ok != (want != "") {
				t.Errorf("Field(%s) = %q, %t; want %q", key, got, ok, want)
			}
		}
		if got, _ := f.Field("/a/info", "Bus Location"); got != "0000:06:00.0" {
			t.Errorf("a value may hold colons: got %q", got)
		}
	})
}

func TestReadsAreBounded(t *testing.T) {
	f := plant(t, map[string]string{"big": strings.Repeat("x", MaxRead+5)})
	if b, _ := f.Bytes("/big"); len(b) != MaxRead {
		t.Errorf("read %d bytes, want %d", len(b), MaxRead)
	}
	if err := syscall.Mkfifo(f.root+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ok := f.Bytes("/fifo"); ok { // and does not wait for a writer
		t.Error("read from a FIFO")
	}
}

func TestForbiddenIsAbsent(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root may read everything")
	}
	f := plant(t, map[string]string{"serial": "1\n"})
	if err := os.Chmod(f.root+"/serial", 0); err != nil {
		t.Fatal(err)
	}
	if _, ok := f.Int("/serial"); ok {
		t.Error("read what is forbidden")
	}
}

// Sensors of the machine itself answer EAGAIN, EINVAL and the like; one file
// that every Linux has does so too.
func TestErrorsOfReadAreAbsent(t *testing.T) {
	if _, ok := New("/").Bytes("/proc/self/mem"); ok { // EIO at address 0
		t.Error("read a file that answers with an error")
	}
}

func TestLinksStayInside(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, []byte("outside\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	f := plant(t, map[string]string{
		"sys/devices/pci0000:00/0000:01:00.0/vendor": "0x10de\n",
		"sys/bus/pci/devices/0000:01:00.0":           "-> ../../../devices/pci0000:00/0000:01:00.0",
		"sys/bus/pci/drivers/nvidia/x":               "",
		"sys/devices/pci0000:00/0000:01:00.0/driver": "-> ../../../bus/pci/drivers/nvidia",
		"absolute":  "-> /sys/bus/pci/devices/0000:01:00.0",
		"sys/up":    "-> ../../../../../../../../sys/devices",
		"out":       "-> " + outside,
		"up":        "-> ../../../../../../../.." + outside,
		"loop":      "-> loop",
		"proc/self": "-> /proc/self/root",
		"sys/devices/pci0000:00/0000:01:00.0/partner": "-> /absolute/../0000:02:00.0",
		"sys/devices/pci0000:00/0000:02:00.0/vendor":  "0x1ac1\n",
	})
	for name, want := range map[string]string{
		"/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de",
		"/absolute/vendor":                         "0x10de",
		"/sys/up/pci0000:00/0000:01:00.0/vendor":   "0x10de",
		"/absolute/partner/vendor":                 "0x1ac1", // .. of where the link led
		"/../../absolute/vendor":                   "0x10de",
		"/out":                                     "",
		"/up":                                      "",
		"/loop":                                    "",
		"/proc/self/etc/hostname":                  "",
		"/absolute/vendor/x":                       "",
	} {
		if got, _ := f.String(name); got != want {
			t.Errorf("String(%s) = %q, want %q", name, got, want)
		}
	}
	if got, err := f.Real("/absolute"); err != nil || got != "/sys/devices/pci0000:00/0000:01:00.0" {
		t.Errorf("Real = %q, %v", got, err)
	}
	if got, _ := f.LinkBase("/absolute/driver"); got != "nvidia" {
		t.Errorf("driver = %q", got)
	}
	if diff := cmp.Diff([]string{"/sys/bus/pci/devices/0000:01:00.0/vendor"}, f.Glob("/sys/bus/pci/devices/*/vendor")); diff != "" {
		t.Error(diff)
	}
	for _, pattern := range []string{"/sys/bus/pci/devices/[", "/none/*", "/out/*", "/sys/bus/*/nothing"} {
		if got := f.Glob(pattern); got != nil {
			t.Errorf("Glob(%s) = %v", pattern, got)
		}
	}
}

func TestRecordedNodes(t *testing.T) {
	f := plant(t, map[string]string{
		"etc/group": "root:x:0:\napex:x:1001:\n",
		"dev.list":  "# nodes\n\nc 120 0 0660 root apex /dev/apex_0\nc 189 5 0664 root 46 /dev/bus/usb/001/006\nc 195 0 0666 root root /dev/nvidia0\nbroken\nc 1 1 0660 root nobody-knows /dev/x\n",
	})
	want := Node{Path: "/dev/apex_0", Type: 'c', Major: 120, Perm: 0o660, GID: 1001}
	if got, ok := f.Node("/dev/apex_0"); !ok || got != want {
		t.Errorf("Node = %+v, %t", got, ok)
	}
	if got, ok := f.NodeOf('c', 189, 5); !ok || got.Path != "/dev/bus/usb/001/006" {
		t.Errorf("NodeOf = %+v, %t", got, ok)
	}
	if _, ok := f.NodeOf('b', 189, 5); ok {
		t.Error("found a block device")
	}
	if !f.Exists("/dev/nvidia0") || f.Exists("/dev/x") || f.Exists("/dev/null") {
		t.Error("want the nodes of the list and no others")
	}
	if diff := cmp.Diff([]string{"/dev/nvidia0"}, f.Glob("/dev/nvidia*")); diff != "" {
		t.Error(diff)
	}
}

func TestNodesOfThisMachine(t *testing.T) {
	f := New("/")
	n, ok := f.Node("/dev/null")
	if !ok || n.Type != 'c' || n.Major != 1 || n.Minor != 3 {
		t.Errorf("/dev/null = %+v, %t; want c 1:3", n, ok)
	}
	if f.Exists("/sys/dev/char/1:3/uevent") {
		if got, ok := f.NodeOf('c', 1, 3); !ok || got != n {
			t.Errorf("NodeOf(1:3) = %+v, %t; want %+v", got, ok, n)
		}
	}
	if _, ok := f.Node("/etc/passwd"); ok {
		t.Error("a file is no node")
	}
}

func TestGroup(t *testing.T) {
	for _, c := range []struct {
		node Node
		gid  uint32
	}{
		{Node{Perm: 0o660, GID: 44}, 44},
		{Node{Perm: 0o666, GID: 44}, 0}, // everybody may
		{Node{Perm: 0o660, GID: 0}, 0},  // root's group is not given away
		{Node{Perm: 0o600, GID: 44}, 0}, // would not help
		{Node{Perm: 0o664, GID: 46}, 46},
	} {
		if gid, ok := c.node.Group(); gid != c.gid || ok != (c.gid != 0) {
			t.Errorf("%+v: group %d, %t; want %d", c.node, gid, ok, c.gid)
		}
	}
}
