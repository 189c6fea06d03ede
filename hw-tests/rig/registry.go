package rig

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// RegistryOptions choose how a registry is reached. The zero value is plain
// HTTP for everyone.
type RegistryOptions struct {
	Username, Password string // both or none: basic authentication
	TLS                bool   // HTTPS with a certificate of its own: see Registry.CA
}

// Registry is Debian's docker-registry on a loopback port.
type Registry struct {
	Address string // 127.0.0.1:PORT, the host part of image references
	CA      string // path of the CA's PEM, with TLS

	dir    string
	config string
	opts   RegistryOptions

	mu sync.Mutex
	p  *Process
}

// StartRegistry starts a registry that stores its images under dir. The error
// is a *Missing when the machine lacks the program.
func StartRegistry(ctx context.Context, dir string, opts RegistryOptions) (*Registry, error) {
	if err := lookUp("docker-registry"); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o700); err != nil {
		return nil, err
	}
	r := &Registry{dir: dir, config: filepath.Join(dir, "registry.yml"), opts: opts}
	if opts.TLS {
		if err := r.writeCertificates(); err != nil {
			return nil, err
		}
	}
	if opts.Username != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(opts.Password), bcrypt.MinCost)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "htpasswd"), fmt.Appendf(nil, "%s:%s\n", opts.Username, hash), 0o600); err != nil {
			return nil, err
		}
	}
	if err := r.start(ctx, "127.0.0.1:0"); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// Stop ends the registry; Restart brings it back on the same port.
func (r *Registry) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.p != nil {
		// One that had to be killed is ended too: its data is thrown away.
		_, _ = r.p.Stop(5 * time.Second)
	}
}

// Restart starts the registry again where it was.
func (r *Registry) Restart(ctx context.Context) error { return r.start(ctx, r.Address) }

// Close ends the registry and deletes its directory.
func (r *Registry) Close() error {
	r.Stop()
	return os.RemoveAll(r.dir)
}

func (r *Registry) start(ctx context.Context, listen string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := os.WriteFile(r.config, []byte(r.yaml(listen)), 0o600); err != nil {
		return err
	}
	log := filepath.Join(r.dir, "registry.log")
	// The port is read from the log, which must not be that of an earlier run.
	if err := os.RemoveAll(log); err != nil {
		return err
	}
	p, err := start(r.dir, "registry", nil, "docker-registry", "serve", r.config)
	if err != nil {
		return err
	}
	r.p = p
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := Until(ctx, p, "the registry to listen", func() error {
		addr, err := listeningOn(log)
		if err != nil {
			return err
		}
		r.Address = addr
		return nil
	}); err != nil {
		return err
	}
	return Until(ctx, p, "the registry to answer", func() error { return r.ping(ctx) })
}

func (r *Registry) yaml(listen string) string {
	q := strconv.Quote
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: 0.1\nlog:\n  accesslog:\n    disabled: true\n  level: info\n")
	fmt.Fprintf(&b, "storage:\n  filesystem:\n    rootdirectory: %s\n  delete:\n    enabled: true\n", q(filepath.Join(r.dir, "data")))
	fmt.Fprintf(&b, "http:\n  addr: %s\n", q(listen))
	if r.opts.TLS {
		fmt.Fprintf(&b, "  tls:\n    certificate: %s\n    key: %s\n", q(filepath.Join(r.dir, "tls.pem")), q(filepath.Join(r.dir, "tls-key.pem")))
	}
	if r.opts.Username != "" {
		fmt.Fprintf(&b, "auth:\n  htpasswd:\n    realm: rig\n    path: %s\n", q(filepath.Join(r.dir, "htpasswd")))
	}
	return b.String()
}

var listening = regexp.MustCompile(`listening on ([0-9.]+:[0-9]+)`)

func listeningOn(log string) (string, error) {
	b, err := os.ReadFile(log)
	if err != nil {
		return "", err
	}
	m := listening.FindSubmatch(b)
	if m == nil {
		return "", errNotYet
	}
	return string(m[1]), nil
}

// ping asks for the API's base, which answers 200, or 401 with authentication.
func (r *Registry) ping(ctx context.Context) error {
	scheme, client := "http", &http.Client{Timeout: 5 * time.Second}
	if r.opts.TLS {
		scheme = "https"
		pool := x509.NewCertPool()
		b, err := os.ReadFile(r.CA)
		if err != nil {
			return err
		}
		pool.AppendCertsFromPEM(b)
		client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+r.Address+"/v2/", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized {
		return fmt.Errorf("registry answers %s", resp.Status)
	}
	return nil
}

// writeCertificates makes a CA and a certificate for 127.0.0.1 under it.
func (r *Registry) writeCertificates() error {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "rig registry CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "rig registry"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	r.CA = filepath.Join(r.dir, "ca.pem")
	return errors.Join(
		writePEM(r.CA, "CERTIFICATE", caDER),
		writePEM(filepath.Join(r.dir, "tls.pem"), "CERTIFICATE", leafDER),
		writePEM(filepath.Join(r.dir, "tls-key.pem"), "EC PRIVATE KEY", keyDER),
	)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
