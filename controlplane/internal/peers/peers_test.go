package peers

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var (
	one   = netip.MustParseAddrPort("192.0.2.1:4001")
	two   = netip.MustParseAddrPort("192.0.2.2:4002")
	six   = netip.MustParseAddrPort("[2001:db8::6]:4006")
	none  netip.AddrPort
	quiet = slog.New(slog.DiscardHandler)
)

// run starts a book that ends with the test.
func run(t *testing.T, path string) *Book {
	t.Helper()
	b := Open(path, quiet)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return b
}

// says waits for the file to say what a process started now would nudge.
func says(t *testing.T, path string, want map[string]netip.AddrPort) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		got := Open(path, quiet).Left()
		if cmp.Equal(got, want, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })) {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("the file says %v, want %v", got, want)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestFileSaysWhoIsConnected(t *testing.T) {
	path := filepath.Join(t.TempDir(), "peers")
	b := run(t, path)
	b.Put("a", one)
	says(t, path, map[string]netip.AddrPort{"a": one})
	b.Put("b", six)
	b.Put("c", two)
	says(t, path, map[string]netip.AddrPort{"a": one, "b": six, "c": two})
	b.Put("a", two)  // has a new address
	b.Put("b", none) // is gone
	b.Put("d", none) // never was
	says(t, path, map[string]netip.AddrPort{"a": two, "c": two})
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
}

func TestNextProcessKeepsWhoIsNotBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "peers")
	if err := os.WriteFile(path, []byte("a 192.0.2.1:4001\nb 192.0.2.2:4002\nc 192.0.2.2:4002\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := run(t, path)
	b.Put("a", six)  // back
	b.Put("c", none) // back, over TCP
	says(t, path, map[string]netip.AddrPort{"a": six, "b": two})
	if diff := cmp.Diff([]string{"b"}, keys(b.Left())); diff != "" {
		t.Error(diff)
	}
	b.Forget()
	says(t, path, map[string]netip.AddrPort{"a": six})
}

func keys(m map[string]netip.AddrPort) (out []string) {
	for k := range m {
		out = append(out, k)
	}
	return out
}

func TestDamagedFileIsReadAsFarAsItMakesSense(t *testing.T) {
	for name, tt := range map[string]struct {
		text string
		want []string
	}{
		"nothing":            {"", nil},
		"no text":            {"\x00\xff\x00\x00\n\x80", nil},
		"half a line":        {"a 192.0.2.1:4001\nb 192.0.", []string{"a"}},
		"a line too long":    {strings.Repeat("x", 10000) + " 192.0.2.1:4001\na 192.0.2.1:4001\n", []string{"a"}},
		"too long, no end":   {"a 192.0.2.1:4001\n" + strings.Repeat("x", 10000), []string{"a"}},
		"addresses of many":  {"a 224.0.0.1:1\nb 255.255.255.255:1\nc 0.0.0.0:1\nd [ff02::1]:1\n", nil},
		"no port":            {"a 192.0.2.1:0\n", nil},
		"an id with control": {"a\x01 192.0.2.1:4001\n", nil},
		"only removals":      {"a -\nb -\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "peers")
			if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, keys(Open(path, quiet).Left())); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestFileStaysSmall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "peers")
	b := Open(path, quiet)
	for i := range 20 * slack {
		b.Put("a", netip.AddrPortFrom(one.Addr(), uint16(1+i%1000)))
		if err := b.write(); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if lines := bytes.Count(text, []byte("\n")); err != nil || lines > slack+10 {
		t.Errorf("%d lines for one peer, %v", lines, err)
	}
	for i := range maxPeers + 10 {
		b.Put(fmt.Sprint("i", i), two)
	}
	if n := len(b.peers); n != maxPeers {
		t.Errorf("%d peers are remembered", n)
	}
	if err := b.write(); err != nil {
		t.Fatal(err)
	}
	if n := len(Open(path, quiet).Left()); n != maxPeers {
		t.Errorf("%d peers are read", n)
	}
	_ = b.file.Close()
}

func TestDiskThatTakesNothingIsSurvived(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	path := filepath.Join(dir, "peers")
	b := Open(path, quiet)
	b.Put("a", one)
	if err := b.write(); err == nil {
		t.Fatal("written into a directory that is not there")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b.Put("b", two)
	if err := b.write(); err != nil {
		t.Fatal(err)
	}
	says(t, path, map[string]netip.AddrPort{"a": one, "b": two})
	// An append that fails is made good by the next write, too.
	_ = b.file.Close()
	b.Put("c", two)
	if err := b.write(); err == nil {
		t.Fatal("appended to a closed file")
	}
	b.Put("d", two)
	if err := b.write(); err != nil {
		t.Fatal(err)
	}
	says(t, path, map[string]netip.AddrPort{"a": one, "b": two, "c": two, "d": two})
	_ = b.file.Close()
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("a 192.0.2.1:4001\nb -\nc [fe80::1%eth0]:7\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for instance, addr := range parse(bytes.NewReader(b)) {
			if !validID(instance) || !usable(addr) {
				t.Errorf("%q at %s", instance, addr)
			}
		}
	})
}
