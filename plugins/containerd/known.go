package containerd

import (
	"context"
	"encoding/json"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/belay-edge/belay/plugins/sdk"
)

// known is what an image's blobs say, which its digest fixes for ever. That the
// image is there is not in it: containerd's record of it tells, each time.
type known struct {
	platform ocispec.Platform // normalized; no architecture: the image does not say
	config   ocispec.ImageConfig
	chain    string           // name of the snapshot of all its layers; empty without layers
	bytes    uint64           // of its blobs
	unpacked uint64           // of its snapshots; 0: not asked yet
	layers   sdk.PullProgress // what is said of a pull that found them all
	read     bool             // the above is there

	// whole: the blobs were all seen once. Unlike the rest it can end, by a
	// blob deleted under its record. What runs needs the snapshot alone, and
	// that is looked for each time.
	whole bool
	users map[string]specs.User // as resolved in its own files
}

// manifestKey is a digest that was asked for, with the platform it was for.
type manifestKey struct {
	asked    digest.Digest
	platform string
}

// knowledge spares reading the same blobs from containerd at every pull and
// start: a dozen calls of it. The zero value is ready.
type knowledge struct {
	mu        sync.Mutex
	images    map[digest.Digest]known // by manifest
	manifests map[manifestKey]digest.Digest
}

// mostKnown bounds what is remembered: a device runs few images again and again.
const mostKnown = 32

func (k *knowledge) image(d digest.Digest) (known, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	i, ok := k.images[d]
	return i, ok
}

// note changes what is remembered of an image.
func (k *knowledge) note(d digest.Digest, change func(*known)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	i, ok := k.images[d]
	if !ok && len(k.images) >= mostKnown {
		k.images = nil // rare, and all of it can be read again
	}
	if k.images == nil {
		k.images = map[digest.Digest]known{}
	}
	change(&i)
	k.images[d] = i
}

// forget drops what is remembered of an image that was removed.
func (k *knowledge) forget(d digest.Digest) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.images, d)
	for asked, manifest := range k.manifests {
		if manifest == d {
			delete(k.manifests, asked)
		}
	}
}

func (k *knowledge) user(d digest.Digest, name string) (specs.User, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	u, ok := k.images[d].users[name]
	u.AdditionalGids = slices.Clone(u.AdditionalGids) // specs are edited
	return u, ok
}

func (k *knowledge) noteUser(d digest.Digest, name string, u specs.User) {
	k.note(d, func(i *known) {
		if i.users == nil || len(i.users) >= mostKnown {
			i.users = map[string]specs.User{}
		}
		i.users[name] = u
	})
}

func (k *knowledge) manifest(asked digest.Digest, p ocispec.Platform) (digest.Digest, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d, ok := k.manifests[manifestKey{asked, platforms.FormatAll(p)}]
	return d, ok
}

func (k *knowledge) noteManifest(asked digest.Digest, p ocispec.Platform, d digest.Digest) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.manifests == nil || len(k.manifests) >= mostKnown {
		k.manifests = map[manifestKey]digest.Digest{}
	}
	k.manifests[manifestKey{asked, platforms.FormatAll(p)}] = d
}

// know reads what is to be known of an image by its manifest, unless that was
// done before.
func (r *Runtime) know(ctx context.Context, manifest ocispec.Descriptor) (known, error) {
	if i, ok := r.known.image(manifest.Digest); ok && i.read {
		return i, nil
	}
	cs := r.client.ContentStore()
	var m ocispec.Manifest
	var c ocispec.Image
	for _, read := range []struct {
		desc func() ocispec.Descriptor
		into any
	}{
		{func() ocispec.Descriptor { return manifest }, &m},
		{func() ocispec.Descriptor { return m.Config }, &c},
	} {
		raw, err := content.ReadBlob(ctx, cs, read.desc())
		if err != nil {
			return known{}, err
		}
		if err := json.Unmarshal(raw, read.into); err != nil {
			return known{}, sdk.Errorf(sdk.Invalid, "", "the image's manifest or configuration is not JSON: %w", err)
		}
	}
	var found known
	r.known.note(manifest.Digest, func(i *known) {
		i.platform, i.config = platforms.Normalize(c.Platform), c.Config
		i.config.Labels = nil // of no use here, and can be long
		i.chain = identity.ChainID(c.RootFS.DiffIDs).String()
		i.bytes, i.read = uint64(manifest.Size+m.Config.Size), true
		n := uint64(len(m.Layers))
		i.layers = sdk.PullProgress{Layers: n, LayersDone: n}
		for _, l := range m.Layers {
			i.layers.Bytes += uint64(l.Size)
		}
		i.layers.BytesDone = i.layers.Bytes
		i.bytes += i.layers.Bytes
		found = *i
	})
	return found, nil
}

// unpacked tells whether the snapshot that containers of the image start from
// is there.
func (r *Runtime) unpacked(ctx context.Context, snapshotter string, i known) (bool, error) {
	if i.chain == "" {
		return true, nil
	}
	_, err := r.client.SnapshotService(snapshotter).Stat(ctx, i.chain)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}
