package containerd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	passwdFile = "# people\nroot:x:0:0:root:/root:/bin/sh\n\nbroken:x:none:0\nhuge:x:4294967296:1::/:\nshort:x:5\n" +
		"app:x:1234:5678:An App:/srv:/bin/sh\ntwin:x:1234:9::/:\n7:x:70:71::/:\n"
	groupFile = "root:x:0:root\nwheel:x:10:root,app\napp:x:5678:app\nextra:x:777:app,twin\nodd:x:many:app\nbare:x:12\n"
)

func TestResolveUser(t *testing.T) {
	root := t.TempDir()
	put(t, root, "etc/passwd", passwdFile)
	put(t, root, "etc/group", groupFile)
	user := func(uid, gid uint32, additional ...uint32) specs.User {
		return specs.User{UID: uid, GID: gid, AdditionalGids: additional}
	}
	for name, want := range map[string]specs.User{
		"":           user(0, 0, 0, 10),
		"root":       user(0, 0, 0, 10),
		"0":          user(0, 0, 0, 10),
		"app":        user(1234, 5678, 5678, 10, 777),
		"1234":       user(1234, 5678, 5678, 10, 777),
		"twin":       user(1234, 9, 9, 777),
		"app:extra":  user(1234, 777, 10, 777),
		"app:0":      user(1234, 0, 0, 10, 777),
		"app:":       user(1234, 5678, 5678, 10, 777),
		":bare":      user(0, 12, 12, 10),
		"42":         user(42, 0, 0),
		"42:43":      user(42, 43, 43),
		"42:bare":    user(42, 12, 12),
		"2147483647": user(2147483647, 0, 0),
	} {
		got, err := resolveUser(root, name)
		if err != nil {
			t.Errorf("%q: %v", name, err)
		} else if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%q (-want +got):\n%s", name, d)
		}
	}
	for name, want := range map[string]string{
		"nobody":                 "/etc/passwd does not name",
		"broken":                 "/etc/passwd does not name",
		"huge":                   "/etc/passwd does not name",
		"app:nothing":            `/etc/group does not name "nothing"`,
		"app:odd":                `/etc/group does not name "odd"`,
		"2147483648":             "out of range",
		"-1":                     "out of range",
		"1:99999999999999999999": "out of range",
		"a:b:c":                  "want user",
	} {
		if _, err := resolveUser(root, name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
}

func TestResolveUserWithoutFiles(t *testing.T) {
	for name, root := range map[string]string{"no etc": t.TempDir(), "etc is a file": t.TempDir()} {
		if name == "etc is a file" {
			put(t, root, "etc", "")
		}
		got, err := resolveUser(root, "42:43")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(specs.User{UID: 42, GID: 43, AdditionalGids: []uint32{43}}, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if _, err := resolveUser(root, "app"); err == nil {
			t.Errorf("%s: a name was found", name)
		}
	}
}

// What links name is inside the image, whatever the host has there.
func TestResolveUserLinksStayInside(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "outside/passwd", "app:x:1:1::/:\n")
	put(t, dir, "root/nix/store/passwd", "app:x:1234:5678::/:\n")
	root := filepath.Join(dir, "root")
	for name, c := range map[string]struct {
		link  string
		found bool
	}{
		"absolute":          {"/nix/store/passwd", true},
		"relative":          {"../nix/store/passwd", true},
		"more up than deep": {"../../../../nix/store/passwd", true},
		"out, relative":     {"../../outside/passwd", false},
		"out, absolute":     {filepath.Join(dir, "outside/passwd"), false},
		"to the host's":     {"/proc/self/root" + filepath.Join(dir, "outside/passwd"), false},
		"round and round":   {"passwd", false},
	} {
		t.Run(name, func(t *testing.T) {
			link := filepath.Join(root, "etc/passwd")
			_ = os.Remove(link)
			if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(c.link, link); err != nil {
				t.Fatal(err)
			}
			u, err := resolveUser(root, "app")
			if c.found && (err != nil || u.UID != 1234) || !c.found && err == nil {
				t.Errorf("%+v, %v; want it found: %t", u, err, c.found)
			}
		})
	}
	t.Run("directory", func(t *testing.T) {
		root := filepath.Join(dir, "other")
		put(t, dir, "outside/etc/passwd", "app:x:1:1::/:\n")
		if err := os.MkdirAll(root, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../outside/etc", filepath.Join(root, "etc")); err != nil {
			t.Fatal(err)
		}
		if u, err := resolveUser(root, "app"); err == nil {
			t.Errorf("read outside of the image: %+v", u)
		}
	})
}

func TestResolveUserBadFiles(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"fifo":      func(p string) error { return unix.Mkfifo(p, 0o644) },
		"directory": func(p string) error { return os.Mkdir(p, 0o755) },
		"huge":      func(p string) error { return os.WriteFile(p, []byte(strings.Repeat("# no\n", maxUserFile/5+1)), 0o644) },
		"long line": func(p string) error { return os.WriteFile(p, []byte(strings.Repeat("x", 2<<20)), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := make(filepath.Join(root, "etc/passwd")); err != nil {
				t.Fatal(err)
			}
			if _, err := resolveUser(root, "app"); err == nil || !strings.Contains(err.Error(), "the image's /etc/passwd") {
				t.Errorf("%v, want one about the image's /etc/passwd", err)
			}
		})
	}
}

func FuzzResolveUser(f *testing.F) {
	f.Add(passwdFile, groupFile, "app:extra")
	f.Fuzz(func(t *testing.T, passwd, group, name string) {
		root := t.TempDir()
		put(t, root, "etc/passwd", passwd)
		put(t, root, "etc/group", group)
		u, err := resolveUser(root, name)
		if err == nil && (u.UID > 1<<31-1 || u.GID > 1<<31-1 || len(u.AdditionalGids) == 0) {
			t.Error(fmt.Sprint(u))
		}
	})
}

func put(t *testing.T, root, name, content string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}
