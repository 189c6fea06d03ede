// Package images builds OCI images without a container engine: small
// workloads for tests and the demo, and later the product's own. The same
// source, Go version and options give the same digests.
package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Names of the images Build knows.
const (
	// Workload is an index with linux amd64, arm64 and arm/v7: /workload is
	// the entry point, "info" the command.
	Workload = "workload"
	// Configured is Workload with everything else an image can set: the
	// named user app (1234:5678, groups 5678 and 777), WORKDIR /srv/data,
	// ENV, LABEL, EXPOSE and STOPSIGNAL SIGUSR1; its command traps SIGUSR1
	// and exits 7.
	Configured = "configured"
	// Foreign is an index with platforms no device of ours has.
	Foreign = "foreign"
	// ForeignSingle is one manifest, no index, for such a platform.
	ForeignSingle = "foreign-single"
	// Shell is busybox with its applets, for the building machine's own
	// architecture; it needs a static busybox.
	Shell = "shell"
)

// Names lists every image Build knows.
func Names() []string { return []string{Workload, Configured, Foreign, ForeignSingle, Shell} }

// Options say where Build finds what it needs.
type Options struct {
	// Root is the repository's root; images are compiled from its source.
	Root string
	// HostOnly builds multi-platform images for this machine's platform
	// only: seconds instead of a minute on a cold cache.
	HostOnly bool
	// Built is a directory of workloads compiled before, named as
	// BuiltName says, for machines without Go; empty: they are compiled.
	Built string
	// Busybox is a static busybox; empty: looked up in the usual places.
	Busybox string

	compiled map[string][]byte // by platform, within one delivery
}

// created is every image's and every file's time: builds must not differ by it.
var created = time.Unix(0, 0).UTC()

// Build makes one image by name, as an index whatever the number of platforms.
func Build(ctx context.Context, name string, o Options) (v1.ImageIndex, error) {
	switch name {
	case Workload, Configured:
		return o.workload(ctx, name)
	case Foreign:
		return foreignIndex()
	case ForeignSingle:
		return nil, fmt.Errorf("image %s is no index: use BuildSingle", name)
	case Shell:
		img, err := o.shell()
		if err != nil {
			return nil, err
		}
		return index(platformed{v1.Platform{OS: "linux", Architecture: runtime.GOARCH}, img})
	}
	return nil, fmt.Errorf("no image %q (there are %s)", name, strings.Join(Names(), ", "))
}

// BuildSingle makes an image that is one manifest without an index.
func BuildSingle() (v1.Image, error) { return foreign(v1.Platform{OS: "linux", Architecture: "s390x"}) }

type platformed struct {
	platform v1.Platform
	image    v1.Image
}

func index(images ...platformed) (v1.ImageIndex, error) {
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range images {
		size, err := p.image.Size()
		if err != nil {
			return nil, err
		}
		digest, err := p.image.Digest()
		if err != nil {
			return nil, err
		}
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: p.image, Descriptor: v1.Descriptor{
			MediaType: types.OCIManifestSchema1, Size: size, Digest: digest, Platform: &p.platform,
		}})
	}
	return idx, nil
}

func (o Options) workload(ctx context.Context, name string) (v1.ImageIndex, error) {
	all := []v1.Platform{
		{OS: "linux", Architecture: "amd64"},
		{OS: "linux", Architecture: "arm64"},
		{OS: "linux", Architecture: "arm", Variant: "v7"},
	}
	var built []platformed
	for _, p := range all {
		if o.HostOnly && p.Architecture != runtime.GOARCH {
			continue
		}
		bin, err := o.compile(ctx, p)
		if err != nil {
			return nil, err
		}
		files := []file{{name: "workload", mode: 0o755, body: bin}, {name: "tmp/", mode: 0o1777}}
		cfg := v1.Config{Entrypoint: []string{"/workload"}, Cmd: []string{"info"}, Env: []string{"PATH=/"}, WorkingDir: "/"}
		if name == Configured {
			files, cfg = configured(files)
		}
		img, err := image(p, cfg, files)
		if err != nil {
			return nil, err
		}
		built = append(built, platformed{p, img})
	}
	if built == nil {
		return nil, fmt.Errorf("image %s has no platform linux/%s", name, runtime.GOARCH)
	}
	return index(built...)
}

func configured(files []file) ([]file, v1.Config) {
	files = append(files,
		file{name: "etc/", mode: 0o755},
		file{name: "etc/passwd", mode: 0o644, body: []byte("root:x:0:0:root:/:/workload\napp:x:1234:5678:app:/srv/data:/workload\n")},
		file{name: "etc/group", mode: 0o644, body: []byte("root:x:0:\napp:x:5678:\nextra:x:777:app\n")},
		file{name: "srv/", mode: 0o755},
		file{name: "srv/data/", mode: 0o755, uid: 1234, gid: 5678},
	)
	return files, v1.Config{
		Entrypoint: []string{"/workload"}, Cmd: []string{"trap", "USR1", "7"},
		Env: []string{"PATH=/", "FROM_IMAGE=yes", "OVERRIDE=image"}, WorkingDir: "/srv/data", User: "app",
		StopSignal: "SIGUSR1", Labels: map[string]string{"org.example.kind": "test"},
		ExposedPorts: map[string]struct{}{"8080/tcp": {}},
	}
}

// BuiltName is the file name of a platform's workload in Options.Built.
func BuiltName(goarch string) string { return "workload-" + goarch }

// compile builds the workload for a platform, reproducibly.
func (o Options) compile(ctx context.Context, p v1.Platform) ([]byte, error) {
	if b, ok := o.compiled[p.String()]; ok {
		return b, nil
	}
	if o.Built != "" {
		return os.ReadFile(filepath.Join(o.Built, BuiltName(p.Architecture)))
	}
	dir, err := os.MkdirTemp("", "belay-images")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "workload")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", out, "./images/workload")
	cmd.Dir = o.Root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOOS="+p.OS, "GOARCH="+p.Architecture, "GOARM="+strings.TrimPrefix(p.Variant, "v"))
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile workload for %s/%s: %w\n%s", p.OS, p.Architecture, err, b)
	}
	b, err := os.ReadFile(out)
	if err == nil && o.compiled != nil {
		o.compiled[p.String()] = b
	}
	return b, err
}

func foreignIndex() (v1.ImageIndex, error) {
	var built []platformed
	for _, arch := range []string{"ppc64le", "s390x"} {
		p := v1.Platform{OS: "linux", Architecture: arch}
		img, err := foreign(p)
		if err != nil {
			return nil, err
		}
		built = append(built, platformed{p, img})
	}
	return index(built...)
}

func foreign(p v1.Platform) (v1.Image, error) {
	return image(p, v1.Config{Entrypoint: []string{"/program"}}, []file{{name: "program", mode: 0o755, body: []byte("for " + p.Architecture + "\n")}})
}

// shell is the busybox found on this machine and a link for every applet.
func (o Options) shell() (v1.Image, error) {
	candidates := []string{o.Busybox}
	if o.Busybox == "" {
		candidates = []string{"/bin/busybox", "/usr/bin/busybox"}
	}
	var path string
	for _, c := range candidates {
		if _, err := os.Stat(c); err == nil {
			path = c
			break
		}
	}
	if path == "" {
		return nil, fmt.Errorf("image %s needs a static busybox (install busybox-static)", Shell)
	}
	body, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets of %s: %w", path, err)
	}
	files := []file{{name: "bin/", mode: 0o755}, {name: "bin/busybox", mode: 0o755, body: body},
		{name: "tmp/", mode: 0o1777}, {name: "etc/", mode: 0o755},
		{name: "etc/passwd", mode: 0o644, body: []byte("root:x:0:0:root:/:/bin/sh\n")},
		{name: "etc/group", mode: 0o644, body: []byte("root:x:0:\n")}}
	applets := strings.Fields(string(list))
	slices.Sort(applets)
	for _, a := range applets {
		if a != "busybox" && filepath.Base(a) == a {
			files = append(files, file{name: "bin/" + a, link: "busybox"})
		}
	}
	return image(v1.Platform{OS: "linux", Architecture: runtime.GOARCH},
		v1.Config{Cmd: []string{"/bin/sh"}, Env: []string{"PATH=/bin"}}, files)
}

// file is one entry of a layer; a name ending in "/" is a directory.
type file struct {
	name     string
	mode     int64
	body     []byte
	link     string
	uid, gid int
}

// image is one layer with a configuration.
func image(p v1.Platform, cfg v1.Config, files []file) (v1.Image, error) {
	data, err := layer(files)
	if err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err = mutate.Append(img, mutate.Addendum{Layer: l, History: v1.History{Created: v1.Time{Time: created}, CreatedBy: "belay-images"}})
	if err != nil {
		return nil, err
	}
	old, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	f := old.DeepCopy()
	f.Created, f.Author = v1.Time{Time: created}, ""
	f.OS, f.Architecture, f.Variant = p.OS, p.Architecture, p.Variant
	f.Config = cfg
	return mutate.ConfigFile(img, f)
}

func layer(files []file) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.body)), ModTime: created, Uid: f.uid, Gid: f.gid, Typeflag: tar.TypeReg, Format: tar.FormatPAX}
		switch {
		case f.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		case strings.HasSuffix(f.name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.body); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
