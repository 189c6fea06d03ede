package docker

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// operator makes a call to the daemon as `docker` would, and reads its answer.
func (w *world) operator(method, path string, query url.Values) string {
	w.t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", w.d.Address)
	}}}
	q, err := http.NewRequestWithContext(w.ctx(), method, "http://docker"+path+"?"+query.Encode(), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	resp, err := c.Do(q)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode >= 300 || strings.Contains(string(b), `"error"`) {
		w.t.Fatalf("%s %s: %s: %s, %v", method, path, resp.Status, b, err)
	}
	return string(b)
}

func (w *world) digests() []string {
	w.t.Helper()
	inv, err := w.rt.(sdk.ImageStore).Images(w.ctx())
	if err != nil {
		w.t.Fatal(err)
	}
	if inv.Disk.TotalBytes == 0 {
		w.t.Errorf("the disk is %+v", inv.Disk)
	}
	var all []string
	for _, i := range inv.Images {
		all = append(all, i.Digest)
	}
	return all
}

// has tells whether the daemon has an image under a name.
func (w *world) has(name string) bool {
	w.t.Helper()
	var found []struct{ RepoTags, RepoDigests []string }
	ask(w.t, w.d, "/images/json", &found)
	for _, i := range found {
		if slices.Contains(append(i.RepoTags, i.RepoDigests...), name) {
			return true
		}
	}
	return false
}

func (w *world) pull(name string) sdk.Image {
	w.t.Helper()
	img, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: name}, func(sdk.PullProgress) {})
	if err != nil {
		w.t.Fatal(err)
	}
	return img
}

// Only what Belay itself had the daemon fetch is Belay's to remove.
func TestOperatorsImagesStay(t *testing.T) {
	w := newWorld(t, "")
	store := w.rt.(sdk.ImageStore)
	repo := w.reg.Address + "/" + images.Configured
	create := func(tag string) {
		w.operator(http.MethodPost, "/images/create", url.Values{"fromImage": {repo}, "tag": {tag}})
	}
	remove := func(name string) {
		w.operator(http.MethodDelete, "/images/"+name, url.Values{"force": {"1"}})
	}

	// The operator has it under its tag: Belay adds a name, and takes that away.
	create("1")
	img := w.pull(repo + ":1")
	for _, d := range w.digests() {
		if err := store.RemoveImage(w.ctx(), d); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.digests(); len(got) != 0 {
		t.Errorf("Images has %q after all was removed", got)
	}
	if !w.has(repo + ":1") {
		t.Fatal("the operator's image went with Belay's name of it")
	}
	remove(repo + ":1")

	// The operator has exactly what Belay would fetch: it is the operator's.
	create(img.Digest)
	if again := w.pull(repo + ":1"); again.Digest != img.Digest {
		t.Fatalf("digest %s, want %s", again.Digest, img.Digest)
	}
	if got := w.digests(); len(got) != 0 {
		t.Errorf("Images has %q, which the operator pulled", got)
	}
	if err := store.RemoveImage(w.ctx(), img.Digest); err != nil || !w.has(repo+"@"+img.Digest) {
		t.Errorf("RemoveImage: %v; the operator's image is there: %t", err, w.has(repo+"@"+img.Digest))
	}
	remove(repo + "@" + img.Digest)

	// Nobody has it: it is Belay's, until the operator runs a container of it.
	w.pull(repo + ":1")
	if got := w.digests(); !slices.Equal(got, []string{img.Digest}) {
		t.Fatalf("Images has %q, want %s", got, img.Digest)
	}
	q := w.request(sdk.TaskSpec{}, images.Configured)
	if _, err := w.rt.Start(w.ctx(), q); err != nil {
		t.Fatal(err)
	}
	if err := store.RemoveImage(w.ctx(), img.Digest); !errors.Is(err, sdk.Conflict) {
		t.Errorf("RemoveImage of an image in use: %v", err)
	}
	w.clear()
	if err := store.RemoveImage(w.ctx(), img.Digest); err != nil || w.has(repo+"@"+img.Digest) {
		t.Errorf("RemoveImage: %v; it is there: %t", err, w.has(repo+"@"+img.Digest))
	}

	// The operator was faster: nothing is left to remove, and nobody complains.
	w.pull(repo + ":1")
	remove(repo + "@" + img.Digest)
	if got := w.digests(); len(got) != 0 {
		t.Errorf("Images has %q, which is gone", got)
	}
}
