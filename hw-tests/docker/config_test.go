package docker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// TestRegistriesAndPlatforms: credentials are the plugin's configuration's or
// the request's; an image for another processor is pulled when asked for.
func TestRegistriesAndPlatforms(t *testing.T) {
	daemons(t)
	locked, err := rig.StartRegistry(t.Context(), filepath.Join(t.TempDir(), "locked"), rig.RegistryOptions{Username: "belay", Password: "se$ret"})
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Close()
	_, err = images.Push(t.Context(), images.Target{Registry: locked.Address, PlainHTTP: true, Username: "belay", Password: "se$ret"}, images.Options{Root: "../..", HostOnly: true}, images.Workload)
	if err != nil {
		t.Fatal(err)
	}
	image := locked.Address + "/" + images.Workload + ":1"
	entry := func(password string) string {
		return fmt.Sprintf(`,"registries":{%q:{"username":"belay","password":%q}}`, locked.Address, password)
	}
	for _, c := range []struct {
		name, config string
		credentials  *sdk.Credentials
		ok           bool
	}{
		{name: "none", config: ""},
		{name: "wrong", config: entry("guess")},
		{name: "the request's", credentials: &sdk.Credentials{Username: "belay", Password: "se$ret"}, ok: true},
		{name: "configured", config: entry("se$ret"), ok: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.config)
			_, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: image, Credentials: c.credentials}, func(sdk.PullProgress) {})
			switch {
			case c.ok && err != nil:
				t.Error(err)
			case !c.ok && (!errors.Is(err, sdk.Unauthorized) || !strings.Contains(err.Error(), locked.Address)):
				t.Errorf("got %v, want unauthorized naming %s", err, locked.Address)
			case err != nil && (strings.Contains(err.Error(), "guess") || strings.Contains(err.Error(), "se$ret")):
				t.Errorf("the password is in %q", err)
			}
		})
	}
	t.Run("platform", func(t *testing.T) {
		w := newWorld(t, "")
		foreign := w.reg.Address + "/" + images.Foreign + ":1"
		if _, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: foreign}, func(sdk.PullProgress) {}); !errors.Is(err, sdk.NotFound) || !strings.Contains(err.Error(), "s390x") {
			t.Errorf("an image without this platform: %v", err)
		}
		_, err = w.rt.Pull(w.ctx(), sdk.PullRequest{Image: foreign, Platform: sdk.Platform{OS: "linux", Architecture: "s390x"}}, func(sdk.PullProgress) {})
		if err != nil {
			t.Fatal(err)
		}
	})
}

// TestConfiguration: the daemon's own names of a runtime and of a network, and
// a socket written as Docker does.
func TestConfiguration(t *testing.T) {
	d, _ := daemons(t)
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.Address)
	}}}
	call := func(method, path, body string) {
		t.Helper()
		r, err := http.NewRequest(method, "http://docker"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode >= 300 {
			t.Fatalf("%s %s: %s", method, path, resp.Status)
		}
	}
	call(http.MethodPost, "/networks/create", `{"Name":"shelf","Driver":"bridge"}`)
	t.Cleanup(func() { call(http.MethodDelete, "/networks/shelf", "") })

	w := newWorld(t, fmt.Sprintf(`,"address":%q,"runtime":"nvidia","network":"shelf"`, "unix://"+d.Address))
	q := w.request(sdk.TaskSpec{Network: sdk.NetworkBridge}, images.Shell, "/bin/sh", "-c", "sleep 600")
	started, err := w.rt.Start(w.ctx(), q)
	if err != nil {
		t.Fatal(err)
	}
	var found struct {
		HostConfig      struct{ Runtime, NetworkMode string }
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress string }
		}
	}
	askDaemon(t, w, q.Attempt, &found)
	if found.HostConfig.Runtime != "nvidia" || found.HostConfig.NetworkMode != "shelf" || started.IP == "" || found.NetworkSettings.Networks["shelf"].IPAddress != started.IP {
		t.Errorf("the daemon has %+v, the plugin says %q", found, started.IP)
	}
	info, err := w.rt.Info(w.ctx())
	if err != nil || info.Attributes["docker.runtime"] != "nvidia" {
		t.Errorf("Info: %+v, %v", info, err)
	}

	w = newWorld(t, `,"network":"nowhere"`)
	if info, err := w.rt.Info(w.ctx()); err != nil || slices.Contains(info.Networks, sdk.NetworkBridge) {
		t.Errorf("without the network: %+v, %v", info.Networks, err)
	}
	err = w.rt.PrepareTask(w.ctx(), sdk.TaskSpec{ID: strings.Repeat("0", 32), Network: sdk.NetworkBridge})
	if !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("a task on it: %v", err)
	}
	w = newWorld(t, `,"runtime":"nothing"`)
	q = w.request(sdk.TaskSpec{}, images.Shell, "/bin/sh", "-c", "exit 0")
	if _, err := w.rt.Start(w.ctx(), q); !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), "nothing") {
		t.Errorf("a runtime that is not there: %v", err)
	}
}
