package docker

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

// ourImage is an image that the daemon did not have until this plugin asked
// for it. Docker has no place for such a mark on an image, so it is a file
// here. What is removed is the reference alone, REPOSITORY@DIGEST: under any
// other name that somebody gave it the image stays.
type ourImage struct {
	Reference string
	Digest    string
}

func (r *Runtime) ourFile(ref string) string { return filepath.Join(r.pulledDir(), memoName(ref, "")) }

func (r *Runtime) noteOurs(ref, digest string) error {
	return save(r.ourFile(ref), ourImage{Reference: ref, Digest: digest})
}

// ours reads the marks. A damaged one is no image of ours.
func (r *Runtime) ours() ([]ourImage, error) {
	files, err := os.ReadDir(r.pulledDir())
	if err != nil {
		return nil, err
	}
	var all []ourImage
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(r.pulledDir(), f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		var i ourImage
		if json.Unmarshal(b, &i) == nil && i.Digest != "" && r.ourFile(i.Reference) == filepath.Join(r.pulledDir(), f.Name()) {
			all = append(all, i)
		}
	}
	return all, nil
}

// Images implements sdk.ImageStore.
func (r *Runtime) Images(ctx context.Context) (sdk.ImageInventory, error) {
	const op = "list images"
	d, err := r.daemon(ctx, false)
	if err != nil {
		return sdk.ImageInventory{}, r.fail(op, err)
	}
	still := r.fetching.Load() == 0
	marks, err := r.ours()
	if err != nil {
		return sdk.ImageInventory{}, r.fail(op, err)
	}
	used, err := r.engine.imagesInUse(ctx)
	if err != nil {
		return sdk.ImageInventory{}, r.fail(op, err)
	}
	inv := sdk.ImageInventory{Disk: diskOf(d.DockerRootDir)}
	at := map[string]int{}
	for _, mark := range marks {
		img, err := r.engine.image(ctx, mark.Reference)
		if err != nil {
			return sdk.ImageInventory{}, r.fail(op, err)
		}
		if img == nil {
			// Somebody removed it, or it never came. Not while it may be coming.
			if still && r.fetching.Load() == 0 {
				_ = os.Remove(r.ourFile(mark.Reference))
			}
			continue
		}
		i, ok := at[mark.Digest]
		if !ok {
			i, at[mark.Digest] = len(inv.Images), len(inv.Images)
			inv.Images = append(inv.Images, sdk.StoredImage{Digest: mark.Digest, Bytes: uint64(max(img.Size, 0))})
		}
		s := &inv.Images[i]
		s.References = append(s.References, mark.Reference)
		s.InUse = s.InUse || used[img.ID]
	}
	return inv, nil
}

// diskOf is the file system of the daemon's directory; nothing where that is
// not this machine's.
func diskOf(root string) sdk.Disk {
	var st unix.Statfs_t
	if root == "" || unix.Statfs(root, &st) != nil {
		return sdk.Disk{}
	}
	// As df counts: what is kept for root is neither used nor free.
	return sdk.Disk{
		TotalBytes: (st.Blocks - st.Bfree + st.Bavail) * uint64(st.Bsize),
		FreeBytes:  st.Bavail * uint64(st.Bsize),
	}
}

// RemoveImage implements sdk.ImageStore.
func (r *Runtime) RemoveImage(ctx context.Context, digest string) error {
	op := "remove image " + digest
	marks, err := r.ours()
	if err != nil {
		return r.fail(op, err)
	}
	marks = slices.DeleteFunc(marks, func(m ourImage) bool { return m.Digest != digest })
	if len(marks) == 0 {
		return nil
	}
	used, err := r.engine.imagesInUse(ctx)
	if err != nil {
		return r.fail(op, err)
	}
	for _, m := range marks {
		img, err := r.engine.image(ctx, m.Reference)
		if err != nil {
			return r.fail(op, err)
		}
		// The daemon itself would take a name away from an image in use.
		if img != nil && used[img.ID] {
			return sdk.Errorf(sdk.Conflict, op, "a container uses it")
		}
	}
	for _, m := range marks {
		if err := r.engine.removeImage(ctx, m.Reference); err != nil && !isStatus(err, http.StatusNotFound) {
			return r.fail(op, err)
		}
		if err := os.Remove(r.ourFile(m.Reference)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return r.fail(op, err)
		}
	}
	return r.fail(op, r.forgetMeanings(digest))
}

// forgetMeanings deletes what is remembered of references that meant a digest.
func (r *Runtime) forgetMeanings(digest string) error {
	files, err := os.ReadDir(r.imagesDir())
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(r.imagesDir(), f.Name())
		if m, ok := readMemo(path); ok && m.Digest == digest && strings.HasSuffix(path, ".json") {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}
