package faults

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

const registryName = "registry." + domain + ":5000"

// proxy stands before the registry, sees who pulls what, and can make a pull
// wait in its middle.
type proxy struct {
	server *http.Server
	done   chan struct{}

	mu    sync.Mutex
	holds map[string]*hold // by repository
}

// hold is a pull that is made to wait.
type hold struct {
	asked    chan struct{} // closed when a layer was asked for
	released chan struct{}
	once     sync.Once
}

func newProxy(address, registry string) (*proxy, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	p := &proxy{holds: map[string]*hold{}, done: make(chan struct{})}
	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	forward.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	p.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if repo, blob, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/"); ok && blob != "" {
			p.mu.Lock()
			h := p.holds[repo]
			p.mu.Unlock()
			if h != nil {
				h.once.Do(func() { close(h.asked) })
				select {
				case <-h.released:
				case <-r.Context().Done():
					return
				}
			}
		}
		forward.ServeHTTP(w, r)
	})}
	go func() {
		defer close(p.done)
		_ = p.server.Serve(l) // ends with close
	}()
	return p, nil
}

// hold makes pulls from a repository wait at their first blob.
func (p *proxy) hold(repo string) *hold {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := &hold{asked: make(chan struct{}), released: make(chan struct{})}
	p.holds[repo] = h
	return h
}

// release lets a repository's pulls go on.
func (p *proxy) release(repo string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h := p.holds[repo]; h != nil {
		close(h.released)
		delete(p.holds, repo)
	}
}

func (p *proxy) close() {
	_ = p.server.Close()
	<-p.done
}

// freshImage pushes the shell image with something on top that nobody has yet,
// so that it has to be pulled, and returns its repository.
func (s *site) freshImage() (repo string, err error) {
	s.fresh++
	repo = fmt.Sprintf("fresh/%d", s.fresh)
	from, err := name.ParseReference(s.registry.Address+"/shell:1", name.Insecure)
	if err != nil {
		return "", err
	}
	base, err := remote.Image(from)
	if err != nil {
		return "", err
	}
	noise := make([]byte, 64<<10)
	_, _ = rand.Read(noise)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "noise", Mode: 0o644, Size: int64(len(noise))}); err != nil {
		return "", err
	}
	_, err = w.Write(noise)
	if err := errors.Join(err, w.Close()); err != nil {
		return "", err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return "", err
	}
	img, err := mutate.AppendLayers(base, l)
	if err != nil {
		return "", err
	}
	to, err := name.ParseReference(s.registry.Address+"/"+repo+":1", name.Insecure)
	if err != nil {
		return "", err
	}
	return repo, remote.Write(to, img)
}
