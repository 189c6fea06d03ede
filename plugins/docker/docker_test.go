package docker

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk"
)

// A device without Docker: the plugin is up, says what is missing, and offers
// no network, so that the device is no candidate.
func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	p := New("test")
	socket := filepath.Join(dir, "no.sock")
	if err := p.Configure(t.Context(), sdk.Config{StateDir: dir, RunDir: dir, JSON: []byte(`{"address":"` + socket + `"}`)}); err != nil {
		t.Fatal(err)
	}
	rt := p.Runtime()
	_, info := rt.Info(t.Context())
	_, list := rt.List(t.Context())
	events := rt.Events(t.Context(), nil)
	for what, err := range map[string]error{"Info": info, "List": list, "Events": events} {
		if !errors.Is(err, sdk.Unavailable) || !strings.Contains(err.Error(), socket) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for _, bad := range []string{`{"adress":"/x"}`, `{"address":"x"}`, `{"network":"host"}`, `{"runtime":"a b"}`, `{"registries":{"h":{"username":"u"}}}`, `{} {}`} {
		if _, err := parseConfig([]byte(bad)); !errors.Is(err, sdk.Invalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
