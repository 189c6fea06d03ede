package main

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/agent/internal/config"
)

func TestResolvedNamesOutliveTheAgent(t *testing.T) {
	dir := t.TempDir()
	if got := known(dir); len(got) != 0 {
		t.Errorf("a new device knows %v", got)
	}
	want := map[string][]netip.Addr{"control.example": {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}}
	remember(dir, slog.New(slog.DiscardHandler))(want)
	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if diff := cmp.Diff(want, known(dir), same); diff != "" {
		t.Error(diff)
	}
	for _, text := range []string{"", "{", `{"a":["x"]}`, "[]"} {
		if err := os.WriteFile(filepath.Join(dir, resolvedName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, addrs := range known(dir) {
			for _, a := range addrs {
				if !a.IsValid() {
					t.Errorf("of %q it takes %v", text, addrs)
				}
			}
		}
	}
	remember(filepath.Join(dir, "gone"), slog.New(slog.DiscardHandler))(want) // no more than a warning
}

func TestWhichProxyIsUsed(t *testing.T) {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "all_proxy", "NO_PROXY", "no_proxy"} {
		t.Setenv(name, "")
	}
	t.Setenv("ALL_PROXY", "socks5://env.example")
	cfg := config.Default()
	for given, want := range map[config.Secret]string{
		"":                            "socks5://env.example:1080",
		config.ProxyNone:              "",
		"http://u:p@own.example:3128": "http://own.example:3128",
	} {
		cfg.Tunnel.Proxy = given
		p, err := proxyOf(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Describe("control.example:7443"); got != want {
			t.Errorf("through %q, want %q", got, want)
		}
	}
	cfg.Tunnel.Proxy, cfg.Tunnel.NoProxy = "http://own.example", []string{"control.example"}
	if p, err := proxyOf(cfg); err != nil || p.Describe("control.example:7443") != "" {
		t.Errorf("no_proxy does not count: %v", err)
	}
}
