package containerd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"

	"github.com/belay-edge/belay/plugins/sdk"
)

// transports are connections to registries that the next pull can use: a
// task's images are often in one registry, and a handshake costs more than
// asking what a tag means. The zero value is ready.
type transports struct {
	mu  sync.Mutex
	all map[string]transport
}

type transport struct {
	http.RoundTripper
	made time.Time
	idle func() // closes connections that nobody uses
}

const (
	// transportLife bounds how long it is remembered how a registry is
	// reached: it may change from plain HTTP to TLS.
	transportLife  = time.Minute
	mostTransports = 16
)

// get returns the transport of this name, made if there is none.
func (ts *transports) get(name string, make func() transport) http.RoundTripper {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if t, ok := ts.all[name]; ok && time.Since(t.made) < transportLife {
		return t
	}
	for n, t := range ts.all {
		if n == name || time.Since(t.made) >= transportLife || len(ts.all) >= mostTransports {
			t.idle()
			delete(ts.all, n)
		}
	}
	t := make()
	t.made = time.Now()
	if ts.all == nil {
		ts.all = map[string]transport{}
	}
	ts.all[name] = t
	return t
}

// resolver reaches the registry of one pull. The task's own credentials go to
// the registry the reference names, never to a mirror of it.
func (ts *transports) resolver(c Config, creds *sdk.Credentials) remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Hosts: func(host string) ([]docker.RegistryHost, error) {
			var all []docker.RegistryHost
			for _, m := range c.Registries[host].Mirrors {
				name, path, _ := strings.Cut(m, "/")
				h, err := ts.host(c, name, nil)
				if err != nil {
					return nil, err
				}
				if path != "" {
					h.Path = "/v2/" + strings.Trim(path, "/")
				}
				all = append(all, h)
			}
			h, err := ts.host(c, host, creds)
			if err != nil {
				return nil, err
			}
			return append(all, h), nil
		},
	})
}

// host says how one registry is reached.
func (ts *transports) host(c Config, name string, creds *sdk.Credentials) (docker.RegistryHost, error) {
	reg := c.Registries[name]
	var pem []byte
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: reg.SkipVerify}
	if reg.CA != "" {
		var err error
		if pem, err = os.ReadFile(reg.CA); err != nil {
			return docker.RegistryHost{}, sdk.Errorf(sdk.Invalid, "", "read the CA of registry %s: %w", name, err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return docker.RegistryHost{}, sdk.Errorf(sdk.Invalid, "", "the CA of registry %s holds no certificate: %s", name, reg.CA)
		}
		tlsConfig.RootCAs = pool
	}
	scheme := "https"
	if reg.PlainHTTP != nil && *reg.PlainHTTP {
		scheme = "http"
	}
	client := &http.Client{Transport: ts.get(name+"\x00"+string(pem), func() transport {
		t := &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			TLSClientConfig:       tlsConfig,
			TLSHandshakeTimeout:   15 * time.Second,
			ResponseHeaderTimeout: 60 * time.Second,
			IdleConnTimeout:       10 * time.Second,
			ForceAttemptHTTP2:     true,
		}
		if reg.PlainHTTP == nil && reg.CA == "" && docker.IsLocalhost(name) {
			return transport{RoundTripper: docker.NewHTTPFallback(t), idle: t.CloseIdleConnections}
		}
		return transport{RoundTripper: t, idle: t.CloseIdleConnections}
	})}
	user, pass := reg.Username, reg.Password
	if creds != nil && creds.Username != "" {
		user, pass = creds.Username, creds.Password
	}
	host, err := docker.DefaultHost(name)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	return docker.RegistryHost{
		Client: client,
		Authorizer: docker.NewDockerAuthorizer(docker.WithAuthClient(client),
			docker.WithAuthCreds(func(asking string) (string, string, error) {
				if asking != host { // redirected elsewhere: not theirs
					return "", "", nil
				}
				return user, pass, nil
			})),
		Host:         host,
		Scheme:       scheme,
		Path:         "/v2",
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
	}, nil
}

// failPull sorts what a registry answered from what containerd did.
func (r *Runtime) failPull(op, registry string, hadCredentials bool, err error) error {
	var known *sdk.Error
	if errors.As(err, &known) {
		return r.fail(op, err)
	}
	with := func(kind sdk.ErrorKind, hint, format string, args ...any) error {
		return sdk.Errorf(kind, op, format, args...).WithHint(hint)
	}
	refused := func(why error) error {
		if hadCredentials {
			return with(sdk.Unauthorized, "check the user name, the password and what they may pull", "registry %s refuses the credentials: %w", registry, why)
		}
		return with(sdk.Unauthorized, "give repositoryCredentials, or set username and password for this registry", "registry %s wants credentials: %w", registry, why)
	}
	var (
		answered  remoteerrors.ErrUnexpectedStatus
		unknownCA x509.UnknownAuthorityError
		hostname  x509.HostnameError
		badCert   x509.CertificateInvalidError
		record    tls.RecordHeaderError
		asked     *url.Error
		dns       *net.DNSError
	)
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return refused(errors.New("401 Unauthorized"))
	case errors.As(err, &answered):
		switch code := answered.StatusCode; {
		case code == http.StatusUnauthorized, code == http.StatusForbidden:
			return refused(errors.New(answered.Status))
		case code == http.StatusNotFound:
			return with(sdk.NotFound, "check the name and the tag", "registry %s has no such image", registry)
		case code == http.StatusTooManyRequests:
			return with(sdk.Unavailable, "the registry limits how much may be pulled: credentials or a mirror may help", "registry %s answers %s", registry, answered.Status)
		case code >= 500:
			return with(sdk.Unavailable, "the registry is in trouble: it will be tried again", "registry %s answers %s", registry, answered.Status)
		default:
			return with(sdk.Unavailable, "check that this is an image registry, and whether it speaks TLS: plain_http says", "registry %s answers %s", registry, answered.Status)
		}
	case errors.As(err, &unknownCA):
		return with(sdk.Unavailable, "set ca for this registry to the PEM file of its CA", "the certificate of registry %s is signed by nobody this device trusts: %w", registry, unknownCA)
	case errors.As(err, &hostname), errors.As(err, &badCert):
		return with(sdk.Unavailable, "check the registry's certificate and this device's clock", "the certificate of registry %s is not valid: %v", registry, rootCause(err))
	case errors.As(err, &record), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return with(sdk.Unavailable, "if it speaks plain HTTP, set plain_http for this registry", "registry %s does not speak TLS", registry)
	case strings.Contains(err.Error(), "malformed HTTP response"):
		return with(sdk.Unavailable, "if it speaks TLS, unset plain_http for this registry", "registry %s does not speak plain HTTP", registry)
	case errors.As(err, &dns):
		return with(sdk.Unavailable, "check the name and this device's DNS", "registry %s: %w", registry, dns)
	case errors.Is(err, syscall.ECONNREFUSED):
		return with(sdk.Unavailable, "check that the registry is up and the port is right", "registry %s refuses connections", registry)
	case errors.As(err, &asked):
		return with(sdk.Unavailable, "check the network between this device and the registry", "registry %s cannot be reached: %v", registry, rootCause(asked))
	case errdefs.IsNotFound(err):
		return with(sdk.NotFound, "check the name and the tag", "registry %s has no such image", registry)
	}
	return r.fail(op, err)
}

// rootCause is the innermost error: what is around it repeats the URL.
func rootCause(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
