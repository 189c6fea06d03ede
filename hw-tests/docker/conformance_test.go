// Package docker holds the plugin docker to its contract with a real Docker
// daemon, private to the test.
package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
	plugin "github.com/belay-edge/belay/plugins/docker"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

var shared struct {
	once     sync.Once
	err      error
	dir      string
	docker   *rig.Docker
	registry *rig.Registry
}

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == plugin.CopierName {
		os.Exit(plugin.Copy(os.Args))
	}
	code := m.Run()
	if shared.docker != nil {
		if err := shared.docker.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "close Docker:", err)
			code = max(code, 1)
		}
	}
	if shared.registry != nil {
		_ = shared.registry.Close()
	}
	if shared.dir != "" {
		_ = os.RemoveAll(shared.dir)
	}
	os.Exit(code)
}

// daemons starts what all tests share, once. The daemon lets containers live
// when it ends.
func daemons(t *testing.T) (*rig.Docker, *rig.Registry) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a Docker daemon does")
	}
	shared.once.Do(func() {
		ctx := context.Background()
		if shared.dir, shared.err = os.MkdirTemp("", "belay-dk"); shared.err != nil {
			return
		}
		// A vendor's runtime, as far as Docker is concerned: runc by another name.
		vendors := filepath.Join(shared.dir, "vendors-runtime")
		if shared.err = os.WriteFile(vendors, []byte("#!/bin/sh\nexec runc \"$@\"\n"), 0o755); shared.err != nil {
			return
		}
		o := rig.DockerOptions{LiveRestore: true, Runtimes: map[string]string{"nvidia": vendors}}
		if shared.docker, shared.err = rig.StartDocker(ctx, filepath.Join(shared.dir, "d"), o); shared.err != nil {
			return
		}
		if shared.registry, shared.err = rig.StartRegistry(ctx, filepath.Join(shared.dir, "reg"), rig.RegistryOptions{}); shared.err != nil {
			return
		}
		_, shared.err = images.Push(ctx, images.Target{Registry: shared.registry.Address, PlainHTTP: true}, images.Options{Root: "../..", HostOnly: true},
			images.Configured, images.Foreign, images.ForeignSingle, images.Shell)
	})
	var missing *rig.Missing
	if errors.As(shared.err, &missing) {
		t.Fatal(missing)
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.docker, shared.registry
}

// ask reads one answer of the daemon's.
func ask(t *testing.T, d *rig.Docker, path string, v any) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.Address)
	}}}
	resp, err := c.Get("http://docker" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		t.Fatal(err)
	}
}

// leftovers are the containers and volumes the daemon has, and cgroups of tasks.
func leftovers(t *testing.T, d *rig.Docker) []string {
	t.Helper()
	var containers []struct{ Names []string }
	ask(t, d, "/containers/json?all=1", &containers)
	var volumes struct{ Volumes []struct{ Name string } }
	ask(t, d, "/volumes", &volumes)
	var left []string
	for _, c := range containers {
		left = append(left, "container "+strings.Join(c.Names, " "))
	}
	for _, v := range volumes.Volumes {
		left = append(left, "volume "+v.Name)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*/belay-docker-test/*", "/sys/fs/cgroup/belay-docker-test/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if i, err := os.Stat(f); err == nil && i.IsDir() {
				left = append(left, "cgroup "+f)
			}
		}
	}
	return left
}

// TestConformance runs the SDK's suite against the plugin as a process, in the
// first-party binary, on two network modes.
func TestConformance(t *testing.T) {
	d, reg := daemons(t)
	bin := filepath.Join(t.TempDir(), "docker")
	if out, err := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", bin, "../../plugins/cmd/belay-plugins").CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, out)
	}
	for _, network := range []string{sdk.NetworkNone, sdk.NetworkBridge} {
		t.Run(network, func(t *testing.T) {
			if network == sdk.NetworkBridge && os.Getenv("BELAY_TEST_DOCKER") == "" {
				t.Skip("takes a minute more: run make test-docker")
			}
			dir, err := os.MkdirTemp("", "bd") // short: sockets need short paths
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			t.Setenv("TMPDIR", dir)
			// What the daemon had before a plugin asked for it is the operator's.
			(&world{t: t, d: d}).operator(http.MethodPost, "/images/prune", url.Values{"filters": {`{"dangling":["false"]}`}})
			sdktest.Runtime(t, sdktest.RuntimeOptions{
				Executable: bin,
				Config:     json.RawMessage(fmt.Sprintf(`{"address":%q,"cgroup_parent":"/belay-docker-test"}`, d.Address)),
				Image:      reg.Address + "/" + images.Shell + ":1",
				Network:    network,
				User:       "1234:5678",
				HangUp:     10,
			})
			if left := leftovers(t, d); len(left) > 0 {
				t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "sdktest*", "run", "outputs", "*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	// The process that copies output ends by itself when there is nothing.
	deadline := time.Now().Add(30 * time.Second)
	for tick := time.NewTicker(100 * time.Millisecond); ; <-tick.C {
		if n := copiers(t, d.Address); n == 0 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d processes still copy output", n)
		}
	}
}

// copiers counts the processes that copy this daemon's output.
func copiers(t *testing.T, address string) (n int) {
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), plugin.CopierName+"\x00") && strings.Contains(string(b), address) {
			n++
		}
	}
	return n
}
