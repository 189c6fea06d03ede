package images

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Target is where images go.
type Target struct {
	Registry           string // host:port, and a path prefix if wanted
	PlainHTTP          bool
	Username, Password string
	Tag                string // empty: "1"
	CA                 []byte // PEM of the CA that signed the registry's certificate; nil: the system's
}

// Push builds images and pushes them as REGISTRY/NAME:TAG. It returns the
// digest of each: of the index, or of the manifest where there is no index.
func Push(ctx context.Context, t Target, o Options, names ...string) (map[string]v1.Hash, error) {
	if t.Tag == "" {
		t.Tag = "1"
	}
	var nopts []name.Option
	if t.PlainHTTP {
		nopts = append(nopts, name.Insecure)
	}
	ropts := []remote.Option{remote.WithContext(ctx)}
	if t.CA != nil {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(t.CA) {
			return nil, errors.New("the registry's CA is no PEM certificate")
		}
		tr := remote.DefaultTransport.(*http.Transport).Clone()
		tr.TLSClientConfig = &tls.Config{RootCAs: pool}
		defer tr.CloseIdleConnections()
		ropts = append(ropts, remote.WithTransport(tr))
	}
	if t.Username != "" {
		ropts = append(ropts, remote.WithAuth(&authn.Basic{Username: t.Username, Password: t.Password}))
	}
	digests := map[string]v1.Hash{}
	o.compiled = map[string][]byte{}
	for _, n := range names {
		ref, err := name.ParseReference(fmt.Sprintf("%s/%s:%s", t.Registry, n, t.Tag), nopts...)
		if err != nil {
			return nil, err
		}
		var digest v1.Hash
		if n == ForeignSingle {
			img, err := BuildSingle()
			if err != nil {
				return nil, err
			}
			if err := remote.Write(ref, img, ropts...); err != nil {
				return nil, fmt.Errorf("push %s: %w", ref, err)
			}
			digest, err = img.Digest()
			if err != nil {
				return nil, err
			}
		} else {
			idx, err := Build(ctx, n, o)
			if err != nil {
				return nil, err
			}
			if err := remote.WriteIndex(ref, idx, ropts...); err != nil {
				return nil, fmt.Errorf("push %s: %w", ref, err)
			}
			digest, err = idx.Digest()
			if err != nil {
				return nil, err
			}
		}
		digests[n] = digest
	}
	return digests, nil
}

// Layout builds images into one OCI layout directory, each under its name in
// the annotation org.opencontainers.image.ref.name.
func Layout(ctx context.Context, dir string, o Options, names ...string) (map[string]v1.Hash, error) {
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return nil, err
	}
	digests := map[string]v1.Hash{}
	o.compiled = map[string][]byte{}
	for _, n := range names {
		opt := layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": n})
		if n == ForeignSingle {
			img, err := BuildSingle()
			if err != nil {
				return nil, err
			}
			if err := path.AppendImage(img, opt); err != nil {
				return nil, err
			}
			if digests[n], err = img.Digest(); err != nil {
				return nil, err
			}
			continue
		}
		idx, err := Build(ctx, n, o)
		if err != nil {
			return nil, err
		}
		if err := path.AppendIndex(idx, opt); err != nil {
			return nil, err
		}
		if digests[n], err = idx.Digest(); err != nil {
			return nil, err
		}
	}
	return digests, nil
}
