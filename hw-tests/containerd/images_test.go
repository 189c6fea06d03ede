package containerd

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// ctr runs containerd's own tool in the plugin's namespace.
func (w *world) ctr(args ...string) string {
	w.t.Helper()
	out, err := exec.Command("ctr", append([]string{"-a", w.ctd.Address, "-n", w.namespace()}, args...)...).CombinedOutput()
	if err != nil {
		w.t.Fatalf("ctr %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (w *world) namespace() string {
	if _, after, ok := strings.Cut(w.json, `"namespace":"`); ok {
		name, _, _ := strings.Cut(after, `"`)
		return name
	}
	return "belay"
}

func (w *world) digests() []string {
	w.t.Helper()
	inv, err := w.rt.(sdk.ImageStore).Images(w.ctx())
	if err != nil {
		w.t.Fatal(err)
	}
	var all []string
	for _, i := range inv.Images {
		all = append(all, i.Digest)
	}
	return all
}

// Removing an image frees what it alone held; what the operator put there,
// and what another agent in the same namespace uses, stays.
func TestImagesAreRemovedForThisAgentAlone(t *testing.T) {
	w := newWorldWith(t, `,"namespace":"imagestest"`)
	store := w.rt.(sdk.ImageStore)
	theirs := w.reg.Address + "/" + images.Configured + ":1"
	w.ctr("images", "pull", "--plain-http", "--platform", "linux/amd64", theirs)
	t.Cleanup(func() { w.ctr("images", "rm", "--sync", theirs) })
	before, unpacked := len(strings.Split(w.ctr("content", "ls", "-q"), "\n")), w.ctr("snapshots", "ls")

	img := w.pull(images.Shell)
	if got := w.digests(); !slices.Equal(got, []string{img.Digest}) {
		t.Fatalf("Images has %q, want what was pulled, %q", got, img.Digest)
	}

	// The operator runs a container of it: it is in use.
	name := w.reg.Address + "/" + images.Shell + "@" + img.Digest
	w.ctr("containers", "create", name, "somebodys", "true")
	wantError(t, store.RemoveImage(w.ctx(), img.Digest), sdk.Conflict, "a container uses it")
	w.ctr("containers", "rm", "somebodys")

	// Another agent has it as well, whichever of them came first.
	other := newWorldWith(t, `,"namespace":"imagestest"`)
	if again := other.pull(images.Shell); again.Digest != img.Digest {
		t.Fatalf("digest %s, want %s", again.Digest, img.Digest)
	}
	if err := store.RemoveImage(w.ctx(), img.Digest); err != nil {
		t.Fatal(err)
	}
	if mine, others := w.digests(), other.digests(); len(mine) != 0 || !slices.Equal(others, []string{img.Digest}) {
		t.Errorf("Images has %q and the other agent's %q, want only the other's", mine, others)
	}
	w.pull(images.Shell)
	if err := other.rt.(sdk.ImageStore).RemoveImage(w.ctx(), img.Digest); err != nil {
		t.Fatal(err)
	}
	if mine, others := w.digests(), other.digests(); !slices.Equal(mine, []string{img.Digest}) || len(others) != 0 {
		t.Errorf("Images has %q and the other agent's %q, want only this one's", mine, others)
	}
	if err := store.RemoveImage(w.ctx(), img.Digest); err != nil {
		t.Fatal(err)
	}
	if after := len(strings.Split(w.ctr("content", "ls", "-q"), "\n")); after != before {
		t.Errorf("containerd has %d blobs, had %d before the pull", after, before)
	}
	if left := w.ctr("images", "ls", "-q"); strings.TrimSpace(left) != theirs {
		t.Errorf("images left: %q, want the operator's %q", left, theirs)
	}
	if d := cmp.Diff(unpacked, w.ctr("snapshots", "ls")); d != "" {
		t.Errorf("snapshots (-before the pull +after):\n%s", d)
	}
}
