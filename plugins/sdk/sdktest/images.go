package sdktest

import (
	"slices"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// images asks an image store what it has; runtimes that are none skip.
func (r *rig) images(t T) (sdk.ImageStore, sdk.ImageInventory) {
	t.Helper()
	store, ok := r.runtime.(sdk.ImageStore)
	if !ok || !r.info.Images {
		t.Skip("not supported")
	}
	inv, err := store.Images(r.ctx(t))
	if err != nil {
		t.Fatalf("Images: %v", err)
	}
	return store, inv
}

func stored(inv sdk.ImageInventory, digest string) (sdk.StoredImage, bool) {
	i := slices.IndexFunc(inv.Images, func(s sdk.StoredImage) bool { return s.Digest == digest })
	if i < 0 {
		return sdk.StoredImage{}, false
	}
	return inv.Images[i], true
}

func (r *rig) pullAgain(t T) {
	t.Helper()
	img, err := r.runtime.Pull(r.ctx(t), sdk.PullRequest{Task: newID(), Image: r.opts.Image, Credentials: r.opts.Credentials}, nil)
	if err != nil || img.Digest != r.image.Digest {
		t.Fatalf("Pull(%s): %+v, %v", r.opts.Image, img, err)
	}
}

func testImagesListed(t T, r *rig) {
	_, inv := r.images(t)
	img, ok := stored(inv, r.image.Digest)
	if !ok {
		t.Fatalf("Images has %+v, and not %s, which was pulled", inv.Images, r.image.Digest)
	}
	name, _, _ := strings.Cut(r.image.Reference, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	if !slices.Contains(img.References, name+"@"+r.image.Digest) {
		t.Errorf("Images has it as %q, want %s@%s among them", img.References, name, r.image.Digest)
	}
	if d := inv.Disk; d.TotalBytes == 0 || d.FreeBytes > d.TotalBytes {
		t.Errorf("of a disk of %d bytes %d are free", d.TotalBytes, d.FreeBytes)
	}
	if img.Bytes == 0 || img.Bytes > inv.Disk.TotalBytes {
		t.Errorf("it has %d bytes of %d", img.Bytes, inv.Disk.TotalBytes)
	}
}

func testImageInUse(t T, r *rig) {
	store, _ := r.images(t)
	req, c := r.start(t, stay)
	if _, inv := r.images(t); true {
		if img, ok := stored(inv, r.image.Digest); !ok || !img.InUse {
			t.Errorf("Images has %+v of the image of a running container, want it in use", img)
		}
	}
	wantKind(t, "RemoveImage of the image of a running container", store.RemoveImage(r.ctx(t), r.image.Digest), sdk.Conflict)
	if _, inv := r.images(t); !slices.ContainsFunc(inv.Images, func(s sdk.StoredImage) bool { return s.Digest == r.image.Digest }) {
		t.Error("after a refused RemoveImage the image is not listed any more")
	}
	if now, ok := r.find(t, req.Attempt); !ok || now.State != sdk.StateRunning || now.PID != c.PID {
		t.Errorf("after a refused RemoveImage the container is %+v, was %+v", now, c)
	}
}

func testImageRemoved(t T, r *rig) {
	store, _ := r.images(t)
	const unknown = "sha256:00000000000000000000000000000000000000000000000000000000feedbeef"
	if err := store.RemoveImage(r.ctx(t), unknown); err != nil {
		t.Errorf("RemoveImage of one that is not there: %v", err)
	}
	if err := store.RemoveImage(r.ctx(t), r.image.Digest); err != nil {
		t.Fatalf("RemoveImage: %v", err)
	}
	// The other rules need it.
	defer r.pullAgain(t)
	if _, inv := r.images(t); slices.ContainsFunc(inv.Images, func(s sdk.StoredImage) bool { return s.Digest == r.image.Digest }) {
		t.Errorf("Images has it still: %+v", inv.Images)
	}
	req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, r.spec("exit 0"))
	_, err := r.runtime.Start(r.ctx(t), req)
	wantKind(t, "Start from a removed image", err, sdk.NotFound)
	r.pullAgain(t)
	if _, err := r.runtime.Start(r.ctx(t), req); err != nil {
		t.Fatalf("Start after it was pulled again: %v", err)
	}
	r.wantExit(t, req.Attempt, 0)
}
