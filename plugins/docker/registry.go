package docker

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/belay-edge/belay/plugins/sdk"
)

// registry asks one registry for manifests, the way the daemon would reach it.
type registry struct {
	host  string // as in references
	bases []string
	creds *sdk.Credentials
	http  *http.Client
	token string // the Authorization header, once it is known
}

const mostManifest = 4 << 20

const accepted = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, " +
	"application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"

func newRegistry(d *daemonInfo, host string, creds *sdk.Credentials) *registry {
	insecure := insecure(d, host)
	config := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: insecure}
	// Where the daemon looks for CAs.
	if files, _ := filepath.Glob(filepath.Join("/etc/docker/certs.d", host, "*.crt")); len(files) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, f := range files {
			if pem, err := os.ReadFile(f); err == nil {
				pool.AppendCertsFromPEM(pem)
			}
		}
		config.RootCAs = pool
	}
	r := &registry{host: host, creds: creds, http: &http.Client{Timeout: 60 * time.Second, Transport: &http.Transport{
		Proxy:               proxy(d),
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSClientConfig:     config,
		TLSHandshakeTimeout: 15 * time.Second,
		IdleConnTimeout:     5 * time.Second,
		ForceAttemptHTTP2:   true,
	}}}
	if host == "docker.io" {
		for _, m := range d.RegistryConfig.Mirrors {
			r.bases = append(r.bases, strings.TrimSuffix(m, "/"))
		}
		host = "registry-1.docker.io"
	}
	r.bases = append(r.bases, "https://"+host)
	if insecure {
		r.bases = append(r.bases, "http://"+host)
	}
	return r
}

// insecure tells whether the daemon does without TLS, or its proof, for a host.
func insecure(d *daemonInfo, host string) bool {
	if c, ok := d.RegistryConfig.IndexConfigs[host]; ok {
		return !c.Secure
	}
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if name == "localhost" {
		name = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(name)
	if err != nil {
		return false
	}
	for _, cidr := range d.RegistryConfig.InsecureRegistryCIDRs {
		if p, err := netip.ParsePrefix(cidr); err == nil && p.Contains(addr) {
			return true
		}
	}
	return false
}

// proxy is the daemon's.
func proxy(d *daemonInfo) func(*http.Request) (*url.URL, error) {
	return func(q *http.Request) (*url.URL, error) {
		via := d.HTTPSProxy
		if q.URL.Scheme == "http" {
			via = d.HTTPProxy
		}
		host := q.URL.Hostname()
		if via == "" || host == "localhost" || strings.HasPrefix(host, "127.") {
			return nil, nil
		}
		for _, no := range strings.Split(d.NoProxy, ",") {
			if no = strings.TrimPrefix(strings.TrimSpace(no), "."); no != "" && (host == no || strings.HasSuffix(host, "."+no) || no == "*") {
				return nil, nil
			}
		}
		return url.Parse(via)
	}
}

// statusError is a registry's answer that is no success.
type statusError struct {
	code   int
	status string
}

func (e *statusError) Error() string { return e.status }

// resolve finds the platform's manifest of a reference.
func (r *registry) resolve(ctx context.Context, named reference.Named, want ocispec.Platform) (resolved, error) {
	defer r.http.CloseIdleConnections()
	ref := "latest"
	switch x := named.(type) {
	case reference.Digested:
		ref = x.Digest().String()
	case reference.Tagged:
		ref = x.Tag()
	}
	var err error
	for i, base := range r.bases {
		var m resolved
		if m, err = r.at(ctx, base, reference.Path(named), ref, want); err == nil {
			return m, nil
		}
		var known *sdk.Error
		var answered *statusError
		last := i == len(r.bases)-1
		if errors.As(err, &known) || ctx.Err() != nil || !last && errors.As(err, &answered) && strings.HasPrefix(base, "https://"+r.host) {
			break
		}
	}
	if cause := context.Cause(ctx); cause != nil {
		return resolved{}, cause
	}
	return resolved{}, err
}

func (r *registry) at(ctx context.Context, base, path, ref string, want ocispec.Platform) (resolved, error) {
	match := platforms.Only(want)
	raw, err := r.get(ctx, base, path, "manifests/"+ref)
	if err != nil {
		return resolved{}, err
	}
	var m struct {
		Config    *ocispec.Descriptor
		Layers    []ocispec.Descriptor
		Manifests []ocispec.Descriptor
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return resolved{}, sdk.Errorf(sdk.Invalid, "", "the manifest is not JSON: %w", err)
	}
	if m.Config == nil {
		chosen, err := choose(m.Manifests, match, want)
		if err != nil {
			return resolved{}, err
		}
		m.Config = nil
		if raw, err = r.get(ctx, base, path, "manifests/"+chosen.Digest.String()); err != nil {
			return resolved{}, err
		}
		if err := json.Unmarshal(raw, &m); err != nil || m.Config == nil {
			return resolved{}, sdk.Errorf(sdk.Invalid, "", "not a container image")
		}
	} else {
		body, err := r.get(ctx, base, path, "blobs/"+m.Config.Digest.String())
		if err != nil {
			return resolved{}, err
		}
		var has ocispec.Platform
		if err := json.Unmarshal(body, &has); err != nil {
			return resolved{}, sdk.Errorf(sdk.Invalid, "", "the image's configuration is not JSON: %w", err)
		}
		if has = platforms.Normalize(has); has.Architecture != "" && !match.Match(has) {
			return resolved{}, noPlatform(want, []string{platforms.FormatAll(has)})
		}
	}
	sum := sha256.Sum256(raw)
	out := resolved{Digest: "sha256:" + hex.EncodeToString(sum[:]), Bytes: uint64(max(m.Config.Size, 0)), Layers: uint64(len(m.Layers))}
	for _, l := range m.Layers {
		out.Bytes += uint64(max(l.Size, 0))
	}
	return out, nil
}

// choose picks the best manifest of an index for the platform.
func choose(all []ocispec.Descriptor, match platforms.MatchComparer, want ocispec.Platform) (ocispec.Descriptor, error) {
	var fit []ocispec.Descriptor
	var have []string
	for _, d := range all {
		if d.Platform == nil || d.Annotations["vnd.docker.reference.type"] != "" {
			continue
		}
		have = append(have, platforms.FormatAll(*d.Platform))
		if match.Match(*d.Platform) {
			fit = append(fit, d)
		}
	}
	if len(fit) == 0 {
		return ocispec.Descriptor{}, noPlatform(want, have)
	}
	return slices.MinFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case match.Less(*a.Platform, *b.Platform):
			return -1
		case match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	}), nil
}

func noPlatform(want ocispec.Platform, have []string) error {
	slices.Sort(have)
	there := strings.Join(slices.Compact(have), ", ")
	if there == "" {
		there = "no platform"
	}
	return sdk.Errorf(sdk.NotFound, "", "the image is not built for %s: there is %s", platforms.FormatAll(want), there).
		WithHint("build the image for this platform, or place the task on a device that has another")
}

// get reads a manifest or a small blob, and holds it to its digest.
func (r *registry) get(ctx context.Context, base, path, what string) ([]byte, error) {
	for try := 0; ; try++ {
		q, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v2/"+path+"/"+what, nil)
		if err != nil {
			return nil, err
		}
		q.Header.Set("Accept", accepted)
		if r.token != "" {
			q.Header.Set("Authorization", r.token)
		}
		resp, err := r.http.Do(q)
		if err != nil {
			return nil, err
		}
		raw, err := io.ReadAll(io.LimitReader(resp.Body, mostManifest+1))
		resp.Body.Close()
		switch {
		case resp.StatusCode == http.StatusUnauthorized && try == 0:
			if err := r.authorize(ctx, base, resp.Header.Get("WWW-Authenticate")); err != nil {
				return nil, err
			}
			continue
		case resp.StatusCode != http.StatusOK:
			return nil, &statusError{resp.StatusCode, resp.Status}
		case err != nil:
			return nil, err
		case len(raw) > mostManifest:
			return nil, sdk.Errorf(sdk.Invalid, "", "the manifest is longer than %d bytes", mostManifest)
		}
		if _, digest, ok := strings.Cut(what, "sha256:"); ok {
			if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != digest {
				return nil, sdk.Errorf(sdk.Invalid, "", "the registry sent %s other than asked for", what).WithHint("the registry or a proxy before it damages content")
			}
		}
		return raw, nil
	}
}

// authorize does what a challenge asks: basic, or a token from its realm. The
// credentials go to the registry of the reference, never to a mirror of it.
func (r *registry) authorize(ctx context.Context, base, challenge string) error {
	ours := r.creds != nil && !r.isMirror(base)
	scheme, rest, _ := strings.Cut(challenge, " ")
	if strings.EqualFold(scheme, "basic") {
		if !ours {
			return &statusError{http.StatusUnauthorized, "401 Unauthorized"}
		}
		q := &http.Request{Header: http.Header{}}
		q.SetBasicAuth(r.creds.Username, r.creds.Password)
		r.token = q.Header.Get("Authorization")
		return nil
	}
	params := map[string]string{}
	for rest != "" {
		var key, val string
		key, rest, _ = strings.Cut(strings.TrimLeft(rest, ", "), "=")
		if strings.HasPrefix(rest, `"`) {
			val, rest, _ = strings.Cut(rest[1:], `"`)
		} else {
			val, rest, _ = strings.Cut(rest, ",")
		}
		params[key] = val
	}
	realm, err := url.Parse(params["realm"])
	if !strings.EqualFold(scheme, "bearer") || err != nil || realm.Host == "" || strings.HasPrefix(base, "https:") && realm.Scheme != "https" {
		return &statusError{http.StatusUnauthorized, "401 Unauthorized"}
	}
	v := realm.Query()
	for _, k := range []string{"service", "scope"} {
		if params[k] != "" {
			v.Set(k, params[k])
		}
	}
	realm.RawQuery = v.Encode()
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
	if err != nil {
		return err
	}
	if ours {
		q.SetBasicAuth(r.creds.Username, r.creds.Password)
	}
	resp, err := r.http.Do(q)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return &statusError{resp.StatusCode, resp.Status}
	}
	var t struct {
		Token  string `json:"token"`
		Access string `json:"access_token"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 256<<10)).Decode(&t); err != nil {
		return fmt.Errorf("read the registry's token: %w", err)
	}
	if t.Token == "" {
		t.Token = t.Access
	}
	r.token = "Bearer " + t.Token
	return nil
}

// isMirror tells that a base is not of the registry itself.
func (r *registry) isMirror(base string) bool {
	host := r.host
	if host == "docker.io" {
		host = "registry-1.docker.io"
	}
	return base != "https://"+host && base != "http://"+host
}

// failPull sorts what a registry, or the daemon about it, said.
func (r *Runtime) failPull(op, host string, hadCredentials bool, err error) error {
	with := func(kind sdk.ErrorKind, hint, format string, args ...any) error {
		return sdk.Errorf(kind, op, format, args...).WithHint(hint)
	}
	var known *sdk.Error
	var away *awayError
	var answer *statusError
	if errors.As(err, &known) || errors.As(err, &away) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return r.fail(op, err)
	}
	code, msg := 0, err.Error()
	if errors.As(err, &answer) {
		code = answer.code
	}
	has := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(p string) bool { return strings.Contains(msg, p) })
	}
	switch {
	case has("no space left on device", "disk quota exceeded"):
		return r.fail(op, err)
	case code == http.StatusUnauthorized, code == http.StatusForbidden, has("unauthorized", "denied", "no basic auth credentials"):
		if hadCredentials {
			return with(sdk.Unauthorized, "check the user name, the password and what they may pull", "registry %s refuses the credentials: %w", host, err)
		}
		return with(sdk.Unauthorized, "give repositoryCredentials, or set username and password for this registry", "registry %s wants credentials: %w", host, err)
	case code == http.StatusNotFound, has("manifest unknown", "not found"):
		return with(sdk.NotFound, "check the name and the tag", "registry %s has no such image", host)
	case code == http.StatusTooManyRequests, has("toomanyrequests"):
		return with(sdk.Unavailable, "the registry limits how much may be pulled: credentials or a mirror may help", "registry %s answers %s", host, msg)
	case has("connection refused"):
		return with(sdk.Unavailable, "check that the registry is up and the port is right", "registry %s refuses connections", host)
	case has("HTTP response to HTTPS client"):
		return with(sdk.Unavailable, "if it speaks plain HTTP, add it to insecure-registries in /etc/docker/daemon.json", "registry %s does not speak TLS", host)
	case has("x509:", "certificate"):
		return with(sdk.Unavailable, fmt.Sprintf("put its CA into /etc/docker/certs.d/%s/ca.crt, and check this device's clock", host), "the certificate of registry %s is not valid: %w", host, err)
	}
	return with(sdk.Unavailable, "check the network between this device and the registry, and its DNS", "registry %s: %w", host, err)
}
