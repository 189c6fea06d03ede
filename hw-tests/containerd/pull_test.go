package containerd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

func noProgress(sdk.PullProgress) {}

func TestPullResult(t *testing.T) {
	w := newWorld(t)
	idx, err := images.Build(t.Context(), images.Workload, options)
	if err != nil {
		t.Fatal(err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var want string
	for _, d := range m.Manifests {
		if d.Platform.Architecture == runtime.GOARCH {
			want = d.Digest.String()
		}
	}
	var last sdk.PullProgress
	img, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: w.reg.Address + "/workload:1"}, func(p sdk.PullProgress) { last = p })
	if err != nil {
		t.Fatal(err)
	}
	if img.Digest != want {
		t.Errorf("digest %s, want that of this platform's manifest %s", img.Digest, want)
	}
	if img.Reference != w.reg.Address+"/workload:1" || img.Bytes < 100_000 {
		t.Errorf("image %+v", img)
	}
	if last.Layers != 1 || last.LayersDone != 1 || last.Bytes == 0 || last.BytesDone != last.Bytes {
		t.Errorf("the last progress was %+v", last)
	}
	t.Run("for another platform", func(t *testing.T) {
		other, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: w.reg.Address + "/workload:1", Platform: sdk.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}}, noProgress)
		if err != nil {
			t.Fatal(err)
		}
		if other.Digest == img.Digest || !strings.HasPrefix(other.Digest, "sha256:") {
			t.Errorf("digest %s", other.Digest)
		}
	})
}

func TestPullErrors(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		image string
		kind  sdk.ErrorKind
		says  []string
	}{
		"no such tag":        {w.reg.Address + "/workload:none", sdk.NotFound, []string{"no such image", "workload:none"}},
		"no such image":      {w.reg.Address + "/nothing:1", sdk.NotFound, []string{"no such image"}},
		"no such digest":     {w.reg.Address + "/workload@sha256:" + strings.Repeat("0", 64), sdk.NotFound, nil},
		"not a reference":    {"UPPER/case:x y", sdk.Invalid, []string{"reference"}},
		"registry down":      {"127.0.0.1:1/workload:1", sdk.Unavailable, []string{"127.0.0.1:1", "refuses connections"}},
		"no such host":       {"registry.invalid/workload:1", sdk.Unavailable, []string{"registry.invalid"}},
		"other platforms":    {w.reg.Address + "/foreign:1", sdk.NotFound, []string{"linux/" + runtime.GOARCH, "linux/ppc64le", "linux/s390x"}},
		"one other platform": {w.reg.Address + "/foreign-single:1", sdk.NotFound, []string{"linux/" + runtime.GOARCH, "linux/s390x"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: c.image}, noProgress)
			wantError(t, err, c.kind, c.says...)
		})
	}
}

func TestPullByDigestNeedsNoNetwork(t *testing.T) {
	w := newWorld(t)
	reg, err := rig.StartRegistry(t.Context(), filepath.Join(t.TempDir(), "r"), rig.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	digests, err := images.Push(t.Context(), images.Target{Registry: reg.Address, PlainHTTP: true}, hostOnly, images.Configured)
	if err != nil {
		t.Fatal(err)
	}
	tagged, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: reg.Address + "/configured:1"}, noProgress)
	if err != nil {
		t.Fatal(err)
	}
	reg.Stop()
	for _, d := range []string{tagged.Digest, digests[images.Configured].String()} {
		again, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: reg.Address + "/configured@" + d}, noProgress)
		if err != nil {
			t.Errorf("with the registry down: %v", err)
		} else if again.Digest != tagged.Digest {
			t.Errorf("digest %s, want %s", again.Digest, tagged.Digest)
		}
	}
	_, err = w.rt.Pull(w.ctx(), sdk.PullRequest{Image: reg.Address + "/configured:1"}, noProgress)
	wantError(t, err, sdk.Unavailable)
}

// TestPullAgain: what is remembered of an image does not stand for what
// somebody has deleted since.
func TestPullAgain(t *testing.T) {
	w := newWorld(t)
	first := w.pull(images.Workload)
	ctr := func(args ...string) []string {
		t.Helper()
		out, err := exec.CommandContext(w.ctx(), "ctr", append([]string{"-a", w.ctd.Address, "-n", "belay"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.Fields(string(out))
	}
	runs := func(when string) {
		t.Helper()
		if again := w.pull(images.Workload); again != first {
			t.Errorf("%s: %+v, want %+v", when, again, first)
		}
		if c, _ := w.exits(sdk.TaskSpec{Network: sdk.NetworkNone}, images.Workload, nil, "info"); c.ExitCode == nil || *c.ExitCode != 0 {
			t.Errorf("%s: %+v", when, c)
		}
	}
	runs("nothing changed")
	kept := strings.TrimSuffix(first.Reference, ":1") + "@" + first.Digest
	ctr("images", "rm", "--sync", kept)
	runs("image record deleted")
	for _, key := range ctr("snapshots", "ls") {
		if strings.HasPrefix(key, "sha256:") {
			// Those of other images are still used or not, as it may be.
			_ = exec.CommandContext(w.ctx(), "ctr", "-a", w.ctd.Address, "-n", "belay", "snapshots", "rm", key).Run()
		}
	}
	runs("snapshots deleted")
}

// TestPullGoesByTheIndex: build tools put images of one platform into indexes
// that say another. The index counts, at the first pull and at later ones.
func TestPullGoesByTheIndex(t *testing.T) {
	w := newWorld(t)
	at := func(image string) name.Reference {
		r, err := name.ParseReference(w.reg.Address+"/"+image, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	foreign, err := remote.Image(at("foreign-single:1"))
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
		Add: foreign, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}},
	})
	if err := remote.WriteIndex(at("mislabelled:1"), index); err != nil {
		t.Fatal(err)
	}
	want := w.pull("mislabelled")
	if again := w.pull("mislabelled"); again != want {
		t.Errorf("the second pull says %+v, want %+v", again, want)
	}
	if _, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: w.reg.Address + "/mislabelled@" + want.Digest}, noProgress); err != nil {
		t.Errorf("by digest: %v", err)
	}
}

func TestPullAuthorization(t *testing.T) {
	daemons(t)
	reg, err := rig.StartRegistry(t.Context(), filepath.Join(t.TempDir(), "r"), rig.RegistryOptions{Username: "jo", Password: "s3cret-word"})
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	if _, err := images.Push(t.Context(), images.Target{Registry: reg.Address, PlainHTTP: true, Username: "jo", Password: "s3cret-word"}, hostOnly, images.Workload); err != nil {
		t.Fatal(err)
	}
	image := reg.Address + "/workload:1"
	w := newWorld(t)
	_, err = w.rt.Pull(w.ctx(), sdk.PullRequest{Image: image}, noProgress)
	wantError(t, err, sdk.Unauthorized, "wants credentials")
	_, err = w.rt.Pull(w.ctx(), sdk.PullRequest{Image: image, Credentials: &sdk.Credentials{Username: "jo", Password: "wrong-word"}}, noProgress)
	wantError(t, err, sdk.Unauthorized, "refuses the credentials")
	if strings.Contains(err.Error(), "wrong-word") {
		t.Error("the error quotes the password")
	}
	if _, err = w.rt.Pull(w.ctx(), sdk.PullRequest{Image: image, Credentials: &sdk.Credentials{Username: "jo", Password: "s3cret-word"}}, noProgress); err != nil {
		t.Error(err)
	}
	configured := newWorldWith(t, fmt.Sprintf(`,"registries":{%q:{"username":"jo","password":"s3cret-word","plain_http":true}}`, reg.Address))
	if _, err := configured.rt.Pull(configured.ctx(), sdk.PullRequest{Image: image}, noProgress); err != nil {
		t.Error(err)
	}
}

func TestPullTLS(t *testing.T) {
	daemons(t)
	dir := t.TempDir()
	reg, err := rig.StartRegistry(t.Context(), filepath.Join(dir, "r"), rig.RegistryOptions{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	if err := pushTLS(t, reg); err != nil {
		t.Fatal(err)
	}
	image := reg.Address + "/workload:1"
	for name, c := range map[string]struct {
		settings string
		kind     sdk.ErrorKind // "" for none
		says     string
	}{
		"unknown authority":    {`{}`, sdk.Unavailable, "set ca"},
		"its authority":        {fmt.Sprintf(`{"ca":%q}`, reg.CA), "", ""},
		"not verified":         {`{"skip_verify":true}`, "", ""},
		"plain HTTP to TLS":    {`{"plain_http":true}`, sdk.Unavailable, "plain_http"},
		"plain HTTP forbidden": {`{"plain_http":false}`, sdk.Unavailable, "set ca"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorldWith(t, fmt.Sprintf(`,"registries":{%q:%s}`, reg.Address, c.settings))
			_, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: image}, noProgress)
			if c.kind == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, c.kind, c.says)
		})
	}
	t.Run("TLS to plain HTTP", func(t *testing.T) {
		_, plain := daemons(t)
		w := newWorldWith(t, fmt.Sprintf(`,"registries":{%q:{"plain_http":false}}`, plain.Address))
		_, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: plain.Address + "/workload:1"}, noProgress)
		wantError(t, err, sdk.Unavailable, "does not speak TLS", "plain_http")
	})
	t.Run("a mirror", func(t *testing.T) {
		_, plain := daemons(t)
		w := newWorldWith(t, fmt.Sprintf(`,"registries":{"nowhere.invalid":{"mirrors":[%q]}}`, plain.Address))
		img, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: "nowhere.invalid/workload:1"}, noProgress)
		if err != nil {
			t.Fatal(err)
		}
		if img.Reference != "nowhere.invalid/workload:1" {
			t.Errorf("reference %s", img.Reference)
		}
	})
}

func TestPullGivenUp(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	_, err := w.rt.Pull(ctx, sdk.PullRequest{Image: w.reg.Address + "/shell:1"}, noProgress)
	wantError(t, err, sdk.Deadline)
}

func TestStartWithoutImage(t *testing.T) {
	w := newWorld(t)
	a := w.attempt(sdk.TaskSpec{})
	q := w.request(a, sdk.NetworkNone, images.Workload, "info")
	q.Spec.Digest = "sha256:" + strings.Repeat("1", 64)
	_, err := w.rt.Start(w.ctx(), q)
	wantError(t, err, sdk.NotFound, "not on this device", "pull")
}

func pushTLS(t *testing.T, reg *rig.Registry) error {
	pem, err := os.ReadFile(reg.CA)
	if err != nil {
		return err
	}
	_, err = images.Push(t.Context(), images.Target{Registry: reg.Address, CA: pem}, hostOnly, images.Workload)
	return err
}
