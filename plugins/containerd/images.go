package containerd

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

// ours lists the images that Pull made for this agent: it puts the owner on
// each. What others have in the namespace is theirs.
func (r *Runtime) ours(ctx context.Context) ([]images.Image, error) {
	return r.client.ImageService().List(ctx, labelIs(labelOwner, r.owner), labelIs(labelAlso+r.owner, "true"))
}

// share takes a part in an image that another agent in the namespace pulled.
// What nobody of us pulled stays out of it.
func (r *Runtime) share(ctx context.Context, img images.Image) error {
	if first := img.Labels[labelOwner]; first == "" || first == r.owner || img.Labels[labelAlso+r.owner] != "" {
		return nil
	}
	img.Labels = map[string]string{labelAlso + r.owner: "true"}
	_, err := r.client.ImageService().Update(ctx, img, "labels."+labelAlso+r.owner)
	return err
}

// leave gives up this agent's part in an image; false when it was the only one.
func (r *Runtime) leave(ctx context.Context, img images.Image) (bool, error) {
	labels := map[string]string{}
	heir := ""
	for _, key := range slices.Sorted(maps.Keys(img.Labels)) {
		owner, also := strings.CutPrefix(key, labelAlso)
		switch {
		case key == labelOwner && img.Labels[key] == r.owner, owner == r.owner:
		case also && img.Labels[labelOwner] == r.owner && heir == "":
			heir = owner
		default:
			labels[key] = img.Labels[key]
		}
	}
	if heir != "" {
		labels[labelOwner] = heir
	}
	if labels[labelOwner] == "" {
		return false, nil
	}
	img.Labels = labels
	_, err := r.client.ImageService().Update(ctx, img, "labels")
	return true, err
}

// users tells which images containers of the namespace were made from, by
// digest and by name: also those of others.
func (r *Runtime) users(ctx context.Context) (map[string]bool, error) {
	records, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return nil, err
	}
	used := make(map[string]bool, 2*len(records))
	for _, c := range records {
		used[c.Image], used[c.Labels[labelDigest]] = true, true
	}
	return used, nil
}

// Images implements sdk.ImageStore.
func (r *Runtime) Images(ctx context.Context) (sdk.ImageInventory, error) {
	const op = "list images"
	ctx = r.in(ctx)
	snapshotter, err := r.chooseSnapshotter(ctx)
	if err != nil {
		return sdk.ImageInventory{}, r.fail(op, err)
	}
	kept, err := r.ours(ctx)
	if err != nil {
		return sdk.ImageInventory{}, r.fail(op, err)
	}
	used, err := r.users(ctx)
	if err != nil {
		return sdk.ImageInventory{}, r.fail(op, err)
	}
	inv := sdk.ImageInventory{Disk: r.disk()}
	at := map[digest.Digest]int{}
	for _, img := range kept {
		d := img.Target.Digest
		i, ok := at[d]
		if !ok {
			bytes, err := r.onDisk(ctx, snapshotter, img)
			if err != nil {
				return sdk.ImageInventory{}, r.fail(op, err)
			}
			i, at[d] = len(inv.Images), len(inv.Images)
			inv.Images = append(inv.Images, sdk.StoredImage{Digest: d.String(), Bytes: bytes, InUse: used[d.String()]})
		}
		s := &inv.Images[i]
		s.References = append(s.References, img.Name)
		s.InUse = s.InUse || used[img.Name]
	}
	return inv, nil
}

// onDisk is what an image takes: its blobs, and its layers as unpacked. That
// does not change, so it is asked for once.
func (r *Runtime) onDisk(ctx context.Context, snapshotter string, img images.Image) (uint64, error) {
	about, err := r.know(ctx, img.Target)
	if errdefs.IsNotFound(err) {
		return 0, nil // somebody took its blobs away: it is still to be removed
	} else if err != nil {
		return 0, err
	}
	if about.unpacked > 0 || about.chain == "" {
		return about.bytes + about.unpacked, nil
	}
	sum := uint64(0)
	service := r.client.SnapshotService(snapshotter)
	for name := about.chain; name != ""; {
		info, err := service.Stat(ctx, name)
		if errdefs.IsNotFound(err) {
			return about.bytes, nil
		} else if err != nil {
			return 0, err
		}
		usage, err := service.Usage(ctx, name)
		if err != nil && !errdefs.IsNotFound(err) {
			return 0, err
		}
		sum += uint64(max(usage.Size, 0))
		name = info.Parent
	}
	r.known.note(img.Target.Digest, func(i *known) { i.unpacked = sum })
	return about.bytes + sum, nil
}

// disk is the file system of the snapshots, which take the most; nothing when
// containerd does not say where they are.
func (r *Runtime) disk() sdk.Disk {
	r.mu.Lock()
	root := r.snapshots
	r.mu.Unlock()
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

// RemoveImage implements sdk.ImageStore. containerd's garbage collector then
// takes what no image and no container holds any more; the last deletion
// waits for it.
func (r *Runtime) RemoveImage(ctx context.Context, d string) error {
	op := "remove image " + d
	ctx = r.in(ctx)
	kept, err := r.ours(ctx)
	if err != nil {
		return r.fail(op, err)
	}
	kept = slices.DeleteFunc(kept, func(i images.Image) bool { return i.Target.Digest.String() != d })
	if len(kept) == 0 {
		return nil
	}
	used, err := r.users(ctx)
	if err != nil {
		return r.fail(op, err)
	}
	if used[d] || slices.ContainsFunc(kept, func(i images.Image) bool { return used[i.Name] }) {
		return sdk.Errorf(sdk.Conflict, op, "a container uses it")
	}
	for i, img := range kept {
		if shared, err := r.leave(ctx, img); err != nil && !errdefs.IsNotFound(err) {
			return r.fail(op, err)
		} else if shared {
			continue
		}
		var how []images.DeleteOpt
		if i == len(kept)-1 {
			how = append(how, images.SynchronousDelete())
		}
		if err := r.client.ImageService().Delete(ctx, img.Name, how...); err != nil && !errdefs.IsNotFound(err) {
			return r.fail(op, err)
		}
	}
	r.known.forget(digest.Digest(d))
	return nil
}
