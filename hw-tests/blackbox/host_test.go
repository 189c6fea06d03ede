package blackbox

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
)

// machine is what all tests share: one containerd, two registries, images.
// Each site has a namespace of its own in the containerd.
type machine struct {
	dir        string
	containerd *rig.Containerd
	registry   *rig.Registry
	locked     *rig.Registry // asks for credentials nobody here is given
	docker     *rig.Docker   // once somebody asked for it
	sites      int
}

var (
	theHost     *machine
	theHostErr  error
	theHostOnce sync.Once
)

func TestMain(m *testing.M) {
	code := m.Run()
	if theHost != nil {
		theHost.close()
	}
	os.Exit(code)
}

func host(t testing.TB) *machine {
	t.Helper()
	theHostOnce.Do(func() { theHost, theHostErr = startHost() })
	if theHostErr != nil {
		t.Fatal(theHostErr)
	}
	return theHost
}

func startHost() (h *machine, err error) {
	dir, err := os.MkdirTemp("", "belay-host")
	if err != nil {
		return nil, err
	}
	h = &machine{dir: dir}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if h.containerd, err = rig.StartContainerd(ctx, filepath.Join(dir, "containerd")); err != nil {
		return nil, err
	}
	if h.registry, err = rig.StartRegistry(ctx, filepath.Join(dir, "registry"), rig.RegistryOptions{}); err != nil {
		h.close()
		return nil, err
	}
	secret := rig.RegistryOptions{Username: "belay", Password: rand.Text()}
	if h.locked, err = rig.StartRegistry(ctx, filepath.Join(dir, "locked"), secret); err != nil {
		h.close()
		return nil, err
	}
	o := images.Options{Root: "../..", HostOnly: true}
	if _, err = images.Push(ctx, images.Target{Registry: h.registry.Address, PlainHTTP: true}, o, images.Shell, images.Workload, images.Foreign); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *machine) close() {
	for _, c := range []io.Closer{h.docker, h.containerd, h.registry, h.locked} {
		if c == io.Closer((*rig.Docker)(nil)) || c == io.Closer((*rig.Containerd)(nil)) || c == io.Closer((*rig.Registry)(nil)) {
			continue
		}
		if err := c.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bring the test machine down:", err)
		}
	}
	os.RemoveAll(h.dir)
}

// dockerd is the Docker daemon that sites share; containers outlive it.
func (h *machine) dockerd(t testing.TB) *rig.Docker {
	t.Helper()
	if h.docker == nil {
		d, err := rig.StartDocker(deadline(t, patience), filepath.Join(h.dir, "docker"), rig.DockerOptions{LiveRestore: true})
		if err != nil {
			t.Fatal(err)
		}
		h.docker = d
	}
	return h.docker
}

// dockerConfig points an agent at a Docker daemon.
func dockerConfig(t testing.TB, a *rig.Agent, dir, address string) {
	t.Helper()
	a.Config = filepath.Join(dir, "agent.toml")
	text := fmt.Sprintf("pull_give_up = \"12s\"\n[plugins.docker]\naddress = %q\ncgroup_parent = \"/belay-docker-test\"\n", address)
	if err := os.WriteFile(a.Config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// image names a pushed image.
func (h *machine) image(name string) string { return h.registry.Address + "/" + name + ":1" }

// prepare points an agent at the shared containerd, in a namespace of its own.
func (h *machine) prepare(t testing.TB, a *rig.Agent, dir string) (namespace string) {
	t.Helper()
	h.sites++
	namespace = fmt.Sprintf("site%d", h.sites)
	a.ContainerdAddress = h.containerd.Address
	a.Config = filepath.Join(dir, "agent.toml")
	text := fmt.Sprintf("pull_give_up = \"12s\"\n[plugins.containerd]\nnamespace = %q\n", namespace)
	if err := os.WriteFile(a.Config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return namespace
}

// containers lists what a namespace of the containerd holds.
func (h *machine) containers(t testing.TB, namespace string) []string {
	t.Helper()
	out, err := exec.CommandContext(deadline(t, patience), "ctr", "--address", h.containerd.Address, "--namespace", namespace, "containers", "list", "-q").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))
}

// freshImage pushes the shell image with a megabyte nobody has yet on top, so
// that it has to be pulled, and returns its name.
func (h *machine) freshImage(t testing.TB, i int) string {
	t.Helper()
	from, err := name.ParseReference(h.image("shell"), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	base, err := remote.Image(from)
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 1<<20)
	_, _ = rand.Read(noise)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "noise", Mode: 0o644, Size: int64(len(noise))}); err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(noise)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(base, l)
	if err != nil {
		t.Fatal(err)
	}
	to := fmt.Sprintf("%s/fresh:%d", h.registry.Address, i)
	ref, err := name.ParseReference(to, name.Insecure)
	if err == nil {
		err = remote.Write(ref, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	return to
}
