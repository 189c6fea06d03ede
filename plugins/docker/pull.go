package docker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	progressEvery = 250 * time.Millisecond
	stallAfter    = 90 * time.Second
)

var errStalled = errors.New("nothing has arrived for 90 seconds")

// resolved is what a reference meant when it was pulled.
type resolved struct {
	Digest string // of the platform's manifest
	Bytes  uint64
	Layers uint64
}

// Pull implements sdk.Runtime. The daemon keeps of an index only the image it
// chose, not which manifest that was: so the plugin asks the registry for the
// platform's manifest, and the daemon for exactly that.
func (r *Runtime) Pull(ctx context.Context, q sdk.PullRequest, progress func(sdk.PullProgress)) (sdk.Image, error) {
	op := "pull " + q.Image
	named, err := reference.ParseDockerRef(q.Image)
	if err != nil {
		return sdk.Image{}, sdk.Errorf(sdk.Invalid, op, "%w", err).WithHint("an image is [REGISTRY/]NAME[:TAG][@DIGEST]")
	}
	normal := named.String()
	if tagged, err := reference.ParseNormalizedNamed(q.Image); err == nil && strings.Contains(q.Image, "@") {
		normal = tagged.String() // with the tag beside the digest: the operator reads it
	}
	want := platforms.DefaultSpec()
	if q.Platform.Architecture != "" {
		want = platforms.Normalize(ocispec.Platform{OS: q.Platform.OS, Architecture: q.Platform.Architecture, Variant: q.Platform.Variant})
		if want.OS == "" {
			want.OS = "linux"
		}
	}
	// One pull of one image at a time: the second finds everything here.
	unlock, err := r.pulls.lock(ctx, named.String())
	if err != nil {
		return sdk.Image{}, r.fail(op, err)
	}
	defer unlock()
	memo := filepath.Join(r.imagesDir(), memoName(named.String(), platforms.FormatAll(want)))
	if _, ok := named.(reference.Digested); ok {
		if m, ok := readMemo(memo); ok {
			here, err := r.engine.imageExists(ctx, pinned(named.String(), m.Digest))
			if err != nil {
				return sdk.Image{}, r.fail(op, err)
			}
			if here {
				return sdk.Image{Reference: normal, Digest: m.Digest, Bytes: m.Bytes}, nil
			}
		}
	}
	creds := q.Credentials
	if c, ok := r.cfg.Registries[reference.Domain(named)]; ok && (creds == nil || creds.Username == "") {
		creds = &sdk.Credentials{Username: c.Username, Password: c.Password}
	}
	d, err := r.daemon(ctx, false)
	if err != nil {
		return sdk.Image{}, r.fail(op, err)
	}
	m, err := newRegistry(d, reference.Domain(named), creds).resolve(ctx, named, want)
	if err != nil {
		return sdk.Image{}, r.failPull(op, reference.Domain(named), creds != nil, err)
	}
	ref := pinned(named.String(), m.Digest)
	here, err := r.engine.imageExists(ctx, ref)
	if err != nil {
		return sdk.Image{}, r.fail(op, err)
	}
	if !here {
		// It is ours from now on, and if the plugin dies as the daemon gets it.
		r.fetching.Add(1)
		defer r.fetching.Add(-1)
		if err := r.noteOurs(ref, m.Digest); err != nil {
			return sdk.Image{}, r.fail(op, err)
		}
		if err := r.fetch(ctx, ref, creds, m, progress); err != nil {
			return sdk.Image{}, r.failPull(op, reference.Domain(named), creds != nil, err)
		}
		// Images that looked in between may have taken the mark for stale.
		if err := r.noteOurs(ref, m.Digest); err != nil {
			return sdk.Image{}, r.fail(op, err)
		}
	}
	// By its digest it needs no network any more, nor does what it was asked as.
	for _, known := range []string{named.String(), ref} {
		if strings.Contains(known, "@") {
			if err := save(filepath.Join(r.imagesDir(), memoName(known, platforms.FormatAll(want))), m); err != nil {
				return sdk.Image{}, r.fail(op, err)
			}
		}
	}
	return sdk.Image{Reference: normal, Digest: m.Digest, Bytes: m.Bytes}, nil
}

// pinned is the repository of a reference at a digest.
func pinned(ref, digest string) string {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref + "@" + digest
	}
	return reference.TrimNamed(named).String() + "@" + digest
}

func memoName(ref, platform string) string {
	sum := sha256.Sum256([]byte(ref + " " + platform))
	return hex.EncodeToString(sum[:16]) + ".json"
}

func readMemo(path string) (m resolved, ok bool) {
	b, err := os.ReadFile(path)
	return m, err == nil && json.Unmarshal(b, &m) == nil && m.Digest != ""
}

// pullError is what the daemon says in the stream of a pull.
type pullError struct{ msg string }

func (e *pullError) Error() string { return e.msg }

// fetch has the daemon pull, and reads what it says of it.
func (r *Runtime) fetch(ctx context.Context, ref string, creds *sdk.Credentials, m resolved, progress func(sdk.PullProgress)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	header := http.Header{}
	if creds != nil {
		named, err := reference.ParseDockerRef(ref)
		if err != nil {
			return err
		}
		auth, err := json.Marshal(map[string]string{"username": creds.Username, "password": creds.Password, "serveraddress": reference.Domain(named)})
		if err != nil {
			return err
		}
		header.Set("X-Registry-Auth", base64.URLEncoding.EncodeToString(auth))
	}
	name, digest, _ := strings.Cut(ref, "@")
	resp, err := r.engine.send(ctx, request{method: http.MethodPost, path: "/images/create", header: header,
		query: url.Values{"fromImage": {name}, "tag": {digest}}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	// Ends the pull when the daemon has said nothing for long.
	stalled := time.AfterFunc(stallAfter, func() { cancel(errStalled) })
	defer stalled.Stop()

	type layer struct {
		current, total uint64
		done           bool
	}
	layers := map[string]*layer{}
	last := time.Time{}
	report := func(force bool) {
		if progress == nil || !force && time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		p := sdk.PullProgress{Layers: m.Layers, Bytes: m.Bytes}
		for _, l := range layers {
			if l.done {
				p.LayersDone++
				p.BytesDone += max(l.total, l.current)
			} else {
				p.BytesDone += l.current
			}
		}
		p.Layers, p.BytesDone = max(p.Layers, p.LayersDone), min(p.BytesDone, p.Bytes)
		progress(p)
	}
	in := json.NewDecoder(&boundedLines{r: resp.Body})
	for {
		var e struct {
			ID, Status, Error string
			ProgressDetail    struct{ Current, Total uint64 }
			ErrorDetail       struct{ Message string }
		}
		if err := in.Decode(&e); err == io.EOF {
			break
		} else if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				if errors.Is(cause, errStalled) {
					return sdk.Errorf(sdk.Unavailable, "", "%w", errStalled).WithHint("check the network between this device and the registry")
				}
				return cause
			}
			return &awayError{err}
		}
		stalled.Reset(stallAfter)
		if msg := e.ErrorDetail.Message; msg != "" || e.Error != "" {
			if msg == "" {
				msg = e.Error
			}
			return &pullError{clip(msg)}
		}
		if e.ID == "" || len(layers) > 1000 {
			continue
		}
		l := layers[e.ID]
		if l == nil {
			l = &layer{}
		}
		switch e.Status {
		case "Downloading":
			l.current, l.total = e.ProgressDetail.Current, e.ProgressDetail.Total
		case "Pulling fs layer", "Waiting", "Verifying Checksum", "Extracting":
		case "Download complete", "Pull complete", "Already exists":
			l.done = true
		default:
			continue
		}
		layers[e.ID] = l
		report(false)
	}
	report(true)
	return nil
}

// boundedLines ends a stream of which one value never ends.
type boundedLines struct {
	r    io.Reader
	line int
}

func (b *boundedLines) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if i := bytes.LastIndexByte(p[:n], '\n'); i >= 0 {
		b.line = n - i
	} else if b.line += n; b.line > 1<<20 {
		return 0, errors.New("the Docker daemon's answer has no end")
	}
	return n, err
}
