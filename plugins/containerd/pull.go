package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Pull implements sdk.Runtime. The image is kept under the name
// REPOSITORY@DIGEST of the platform's manifest, which holds its content
// against containerd's garbage collection; a tag that moves later changes
// nothing for tasks that resolved it before.
func (r *Runtime) Pull(ctx context.Context, q sdk.PullRequest, progress func(sdk.PullProgress)) (sdk.Image, error) {
	ctx = r.in(ctx)
	op := "pull " + q.Image
	named, err := reference.ParseDockerRef(q.Image)
	if err != nil {
		return sdk.Image{}, sdk.Errorf(sdk.Invalid, op, "%w", err).WithHint("an image is [REGISTRY/]NAME[:TAG][@DIGEST]")
	}
	normal := named.String()
	if q.Image != normal && strings.Contains(q.Image, "@") {
		// ParseDockerRef drops a tag beside a digest; the operator reads it.
		if tagged, err := reference.ParseNormalizedNamed(q.Image); err == nil {
			normal = tagged.String()
		}
	}
	want := platforms.DefaultSpec()
	if q.Platform.Architecture != "" {
		want = platforms.Normalize(ocispec.Platform{OS: q.Platform.OS, Architecture: q.Platform.Architecture, Variant: q.Platform.Variant})
		if want.OS == "" {
			want.OS = "linux"
		}
	}
	p := &pull{Runtime: r, op: op, named: named, normal: normal, want: want, match: platforms.Only(want), progress: progress, creds: q.Credentials}
	if p.snapshotter, err = r.chooseSnapshotter(ctx); err != nil {
		return sdk.Image{}, r.fail(op, err)
	}
	// One pull of one image at a time: the second finds everything here.
	unlock, err := r.pulls.lock(ctx, named.String())
	if err != nil {
		return sdk.Image{}, r.fail(op, err)
	}
	defer unlock()
	if d, ok := named.(reference.Digested); ok {
		img, found, err := p.local(ctx, d.Digest())
		if err != nil {
			return sdk.Image{}, r.fail(op, err)
		}
		if found {
			return img, nil
		}
	}
	img, err := p.remote(ctx)
	if err != nil {
		registry := reference.Domain(named)
		had := q.Credentials != nil && q.Credentials.Username != "" || r.cfg.Registries[registry].Username != ""
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return sdk.Image{}, r.failPull(op, registry, had, err)
	}
	return img, nil
}

// pull is one pull under way.
type pull struct {
	*Runtime
	op          string
	named       reference.Named
	normal      string
	want        ocispec.Platform
	match       platforms.MatchComparer
	creds       *sdk.Credentials
	snapshotter string
	progress    func(sdk.PullProgress)
}

// keptName is how an image is named in containerd.
func keptName(repository reference.Named, d digest.Digest) string {
	return reference.TrimNamed(repository).String() + "@" + d.String()
}

// local finds an image by digest without the network: that of a manifest, or
// of an index whose manifest for the platform is here.
func (p *pull) local(ctx context.Context, d digest.Digest) (sdk.Image, bool, error) {
	manifest, err := p.localManifest(ctx, d)
	if manifest == "" || err != nil {
		return sdk.Image{}, false, err
	}
	rec, err := p.client.ImageService().Get(ctx, keptName(p.named, manifest))
	if errdefs.IsNotFound(err) {
		return sdk.Image{}, false, nil
	} else if err != nil {
		return sdk.Image{}, false, err
	}
	about, err := p.know(ctx, rec.Target)
	if errdefs.IsNotFound(err) {
		return sdk.Image{}, false, nil
	} else if err != nil {
		return sdk.Image{}, false, err
	}
	if !about.whole {
		complete, _, _, missing, err := images.Check(ctx, p.client.ContentStore(), rec.Target, platforms.All)
		if err != nil {
			return sdk.Image{}, false, err
		}
		if !complete || len(missing) > 0 {
			return sdk.Image{}, false, nil
		}
		p.known.note(manifest, func(i *known) { i.whole = true })
	}
	unpacked, err := p.unpacked(ctx, p.snapshotter, about)
	if err != nil {
		return sdk.Image{}, false, err
	}
	if !unpacked {
		// Whoever removed the snapshot may have removed more.
		p.known.note(manifest, func(i *known) { i.whole = false })
		if about.whole {
			return p.local(ctx, d)
		}
		img := client.NewImageWithPlatform(p.client, rec, platforms.All)
		if err := img.Unpack(ctx, p.snapshotter); err != nil {
			return sdk.Image{}, false, err
		}
	}
	if err := p.share(ctx, rec); err != nil && !errdefs.IsNotFound(err) {
		return sdk.Image{}, false, err
	}
	p.progress(about.layers)
	return p.image(rec.Target, about), true, nil
}

func (p *pull) image(manifest ocispec.Descriptor, about known) sdk.Image {
	return sdk.Image{Reference: p.normal, Digest: manifest.Digest.String(), Bytes: about.bytes}
}

// localManifest reads from what is here which manifest a digest means; none
// when that is not here.
func (p *pull) localManifest(ctx context.Context, d digest.Digest) (digest.Digest, error) {
	if m, ok := p.known.manifest(d, p.want); ok {
		return m, nil
	}
	cs := p.client.ContentStore()
	info, err := cs.Info(ctx, d)
	if errdefs.IsNotFound(err) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	raw, err := content.ReadBlob(ctx, cs, ocispec.Descriptor{Digest: d, Size: info.Size})
	if errdefs.IsNotFound(err) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	var m struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if json.Unmarshal(raw, &m) != nil {
		return "", nil
	}
	manifest := d
	if m.Config == nil {
		chosen, err := p.choose(m.Manifests)
		if err != nil {
			return "", err
		}
		manifest = chosen.Digest
		// An index that nothing holds is fetched as if it were not here, which
		// ends with its being held.
		switch about, err := cs.Info(ctx, manifest); {
		case errdefs.IsNotFound(err):
			return "", nil
		case err != nil:
			return "", err
		case about.Labels[holds(d)] == "":
			return "", nil
		}
	}
	p.known.noteManifest(d, p.want, manifest)
	return manifest, nil
}

// fits checks the platform of an image that is known, and not by an index:
// what an index says counts more than what the image says itself.
func (p *pull) fits(ctx context.Context, manifest ocispec.Descriptor) error {
	about, err := p.know(ctx, manifest)
	if err != nil {
		return err
	}
	if has := about.platform; has.Architecture != "" && !p.match.Match(has) {
		return p.noPlatform([]string{platforms.FormatAll(has)})
	}
	return nil
}

// remote asks the registry what the reference means, chooses the platform and
// fetches what is missing.
func (p *pull) remote(ctx context.Context) (sdk.Image, error) {
	resolver := p.registries.resolver(p.cfg, p.creds)
	name, desc, err := resolver.Resolve(ctx, p.named.String())
	if err != nil {
		return sdk.Image{}, err
	}
	// Most often the tag means what it meant before.
	if img, found, err := p.local(ctx, desc.Digest); found || err != nil {
		if err == nil && !images.IsIndexType(desc.MediaType) {
			err = p.fits(ctx, desc)
		}
		return img, err
	}
	// Everything fetched is held by a lease until the image record holds it.
	ctx, release, err := p.client.WithLease(ctx)
	if err != nil {
		return sdk.Image{}, err
	}
	defer func() {
		ctx, cancel := after(ctx)
		defer cancel()
		_ = release(ctx)
	}()
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return sdk.Image{}, err
	}
	manifest, err := p.manifest(ctx, fetcher, desc)
	if err != nil {
		return sdk.Image{}, err
	}
	kept := keptName(p.named, manifest.Digest)
	t := newTracker(p.client.ContentStore(), p.progress)
	watched, stop := t.watch(ctx)
	img, err := p.client.Pull(watched, kept,
		client.WithResolver(resolver),
		client.WithPlatformMatcher(platforms.All), // one manifest, chosen above
		client.WithPullUnpack,
		client.WithPullSnapshotter(p.snapshotter),
		client.WithMaxConcurrentDownloads(p.cfg.PullConcurrency),
		client.WithImageHandlerWrapper(t.wrap),
		client.WithPullLabels(map[string]string{labelOwner: p.owner}),
	)
	stalled := context.Cause(watched)
	stop()
	if err != nil {
		if errors.Is(stalled, errStalled) {
			return sdk.Image{}, sdk.Errorf(sdk.Unavailable, p.op, "%w", errStalled).WithHint("check the network between this device and the registry")
		}
		return sdk.Image{}, err
	}
	if desc.Digest != manifest.Digest {
		// Hold the index too: a reference by its digest then needs no network.
		if err := p.holdIndex(ctx, img, desc.Digest); err != nil {
			return sdk.Image{}, err
		}
	}
	about, err := p.know(ctx, img.Target())
	if err != nil {
		return sdk.Image{}, err
	}
	p.known.note(manifest.Digest, func(i *known) { i.whole = true })
	p.known.noteManifest(desc.Digest, p.want, manifest.Digest)
	return p.image(img.Target(), about), nil
}

// holds is the label of a manifest that holds an index against containerd's
// garbage collection.
func holds(index digest.Digest) string {
	return "containerd.io/gc.ref.content.belay.index." + index.Encoded()[:12]
}

// holdIndex ties the index's blob to the manifest's, which the image holds.
func (p *pull) holdIndex(ctx context.Context, img client.Image, index digest.Digest) error {
	_, err := p.client.ContentStore().Update(ctx, content.Info{
		Digest: img.Target().Digest, Labels: map[string]string{holds(index): index.String()},
	}, "labels."+holds(index))
	return err
}

// manifest returns the descriptor of the platform's manifest.
func (p *pull) manifest(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor) (ocispec.Descriptor, error) {
	raw, err := p.small(ctx, fetcher, desc)
	if err != nil {
		return desc, err
	}
	if images.IsIndexType(desc.MediaType) {
		var idx ocispec.Index
		if err := json.Unmarshal(raw, &idx); err != nil {
			return desc, sdk.Errorf(sdk.Invalid, p.op, "the image's index is not JSON: %w", err)
		}
		return p.choose(idx.Manifests)
	}
	var m ocispec.Manifest
	if !images.IsManifestType(desc.MediaType) || json.Unmarshal(raw, &m) != nil || m.Config.Digest == "" {
		return desc, sdk.Errorf(sdk.Invalid, p.op, "not a container image: it is %q", desc.MediaType)
	}
	raw, err = p.small(ctx, fetcher, m.Config)
	if err != nil {
		return desc, err
	}
	var cfg ocispec.Image
	if err := json.Unmarshal(raw, &cfg); err != nil {
		return desc, sdk.Errorf(sdk.Invalid, p.op, "the image's configuration is not JSON: %w", err)
	}
	has := platforms.Normalize(cfg.Platform)
	if has.Architecture != "" && !p.match.Match(has) {
		return desc, p.noPlatform([]string{platforms.FormatAll(has)})
	}
	return desc, nil
}

// choose picks the best manifest of an index for the platform.
func (p *pull) choose(all []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var fit []ocispec.Descriptor
	var have []string
	for _, d := range all {
		switch {
		case !images.IsManifestType(d.MediaType), d.Annotations["vnd.docker.reference.type"] != "":
			continue // attestations and the like
		case d.Platform == nil:
			fit = append(fit, d)
			continue
		}
		have = append(have, platforms.FormatAll(*d.Platform))
		if p.match.Match(*d.Platform) {
			fit = append(fit, d)
		}
	}
	if len(fit) == 0 {
		return ocispec.Descriptor{}, p.noPlatform(have)
	}
	return slices.MinFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case a.Platform == nil && b.Platform == nil:
			return 0
		case a.Platform == nil:
			return 1
		case b.Platform == nil:
			return -1
		case p.match.Less(*a.Platform, *b.Platform):
			return -1
		case p.match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	}), nil
}

func (p *pull) noPlatform(have []string) error {
	slices.Sort(have)
	there := strings.Join(slices.Compact(have), ", ")
	if there == "" {
		there = "no platform"
	}
	return sdk.Errorf(sdk.NotFound, p.op, "the image is not built for %s: there is %s", platforms.FormatAll(p.want), there).
		WithHint("build the image for this platform, or place the task on a device that has another")
}

// small fetches a manifest, index or configuration into containerd's content
// store, where the pull proper finds it again.
func (p *pull) small(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor) ([]byte, error) {
	const most = 8 << 20
	if desc.Size > most {
		return nil, sdk.Errorf(sdk.Invalid, p.op, "%s of %d bytes is too large", desc.MediaType, desc.Size)
	}
	cs := p.client.ContentStore()
	if raw, err := content.ReadBlob(ctx, cs, desc); err == nil {
		return raw, nil
	} else if !errdefs.IsNotFound(err) {
		return nil, err
	}
	body, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, desc.Size+1))
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(raw) != desc.Digest {
		return nil, sdk.Errorf(sdk.Invalid, p.op, "the registry sent %s other than asked for", desc.MediaType).WithHint("the registry or a proxy before it damages content")
	}
	if err := content.WriteBlob(ctx, cs, remotes.MakeRefKey(ctx, desc), strings.NewReader(string(raw)), desc); err != nil {
		return nil, err
	}
	if h, err := docker.AppendDistributionSourceLabel(cs, p.named.String()); err == nil {
		_, _ = h(ctx, desc)
	}
	return raw, nil
}

// image finds what Pull made for Start.
func (r *Runtime) image(ctx context.Context, s sdk.ContainerSpec) (images.Image, error) {
	named, err := reference.ParseDockerRef(s.Image)
	if err != nil {
		return images.Image{}, sdk.Errorf(sdk.Invalid, "", "image %q: %w", s.Image, err)
	}
	d, err := digest.Parse(s.Digest)
	if err != nil {
		return images.Image{}, sdk.Errorf(sdk.Invalid, "", "image digest %q: %w", s.Digest, err).WithHint("start with the digest that Pull returned")
	}
	rec, err := r.client.ImageService().Get(ctx, keptName(named, d))
	if errdefs.IsNotFound(err) {
		return images.Image{}, sdk.Errorf(sdk.NotFound, "", "image %s is not on this device", fmt.Sprintf("%s@%s", s.Image, d)).WithHint("pull it first")
	}
	return rec, err
}
