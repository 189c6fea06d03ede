package carrier

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/net/http/httpproxy"
	"golang.org/x/net/proxy"
)

// maxProxyAnswer bounds what a proxy may say before it connects.
const maxProxyAnswer = 64 << 10

// Proxy says through which proxy a control plane is reached over TCP. UDP, and
// with it QUIC, never goes through one. The nil Proxy means directly.
type Proxy struct {
	choose func(*url.URL) (*url.URL, error)
}

// NewProxy makes one of a URL: http, https, socks5 or socks5h, with user and
// password where the proxy asks for them. except lists hosts that are reached
// directly: names with their subdomains, IP addresses, networks, as in
// NO_PROXY; loopback always is.
func NewProxy(address string, except []string) (*Proxy, error) {
	return newProxy(address, strings.Join(except, ","), "proxy")
}

// ProxyFromEnvironment makes one of HTTPS_PROXY, else ALL_PROXY, and NO_PROXY,
// in upper or lower case; nil when they name none.
func ProxyFromEnvironment() (*Proxy, error) {
	env := httpproxy.FromEnvironment()
	name := "HTTPS_PROXY"
	if env.HTTPSProxy == "" {
		name = "ALL_PROXY"
		if env.HTTPSProxy = os.Getenv("ALL_PROXY"); env.HTTPSProxy == "" {
			env.HTTPSProxy = os.Getenv("all_proxy")
		}
	}
	if env.HTTPSProxy == "" {
		return nil, nil
	}
	return newProxy(env.HTTPSProxy, env.NoProxy, "environment variable "+name)
}

func newProxy(address, except, from string) (*Proxy, error) {
	// A host without a scheme is taken for an HTTP proxy, as everywhere.
	if !strings.Contains(address, "://") {
		address = "http://" + address
	}
	u, err := url.Parse(address)
	if err != nil {
		// What url.Parse says quotes the whole of it, password included.
		return nil, fmt.Errorf("%s: not a URL: want http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT, with USER:PASSWORD@ before HOST where it asks for them, percent-encoded", from)
	}
	switch u.Scheme {
	case "http", "https", "socks5", "socks5h":
	default:
		return nil, fmt.Errorf("%s: scheme %q: want http, https or socks5", from, u.Scheme)
	}
	if u.Hostname() == "" {
		return nil, fmt.Errorf("%s: it names no host", from)
	}
	c := httpproxy.Config{HTTPSProxy: u.String(), NoProxy: except}
	return &Proxy{choose: c.ProxyFunc()}, nil
}

// Describe names the proxy that address is reached through, without user and
// password; "" when it is reached directly.
func (p *Proxy) Describe(address string) string {
	if u := p.of(address); u != nil {
		return describe(u)
	}
	return ""
}

func describe(u *url.URL) string { return u.Scheme + "://" + proxyAddress(u) }

func (p *Proxy) of(address string) *url.URL {
	if p == nil {
		return nil
	}
	u, err := p.choose(&url.URL{Scheme: "https", Host: address})
	if err != nil { // newProxy has seen that it can be parsed
		return nil
	}
	return u
}

// proxyAddress is host:port.
func proxyAddress(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if port == "" {
		port = "1080"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// proxyError says that the way to address led through a proxy. What has failed
// may lie before, in or behind it.
type proxyError struct {
	proxy string
	err   error
}

func (e *proxyError) Error() string { return "through the proxy " + e.proxy + ": " + e.err.Error() }
func (e *proxyError) Unwrap() error { return e.err }

// ErrProxy: the proxy answered, but did not connect.
var ErrProxy = errors.New("the proxy did not connect")

// dialProxy asks the proxy for a connection to address, whose name the proxy
// looks up.
func dialProxy(ctx context.Context, u *url.URL, address string, r *Resolver) (net.Conn, error) {
	switch u.Scheme {
	case "http", "https":
		conn, err := dialDirect(ctx, proxyAddress(u), r)
		if err != nil {
			return nil, err
		}
		if u.Scheme == "https" {
			secure := tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname()})
			if err := secure.HandshakeContext(ctx); err != nil {
				_ = conn.Close()
				return nil, fmt.Errorf("%w: TLS to the proxy itself: %w", ErrProxy, err)
			}
			conn = secure
		}
		if err := httpConnect(ctx, conn, u, address); err != nil {
			_ = conn.Close()
			return nil, err
		}
		return conn, nil
	default:
		return dialSOCKS(ctx, u, address, r)
	}
}

// httpConnect is RFC 9110, 9.3.6.
func httpConnect(ctx context.Context, conn net.Conn, u *url.URL, address string) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	q := &http.Request{
		Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address,
		Header: http.Header{"User-Agent": {"belay-agent"}},
	}
	if name := u.User.Username(); name != "" {
		password, _ := u.User.Password()
		q.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(name+":"+password)))
	}
	if err := q.Write(conn); err != nil {
		return fmt.Errorf("ask it to CONNECT: %w", err)
	}
	in := bufio.NewReader(io.LimitReader(conn, maxProxyAnswer))
	a, err := http.ReadResponse(in, q)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("wait for its answer to CONNECT: %w", ctx.Err())
	case err != nil:
		return fmt.Errorf("%w: its answer to CONNECT is not HTTP: %w", ErrProxy, err)
	}
	_ = a.Body.Close()
	switch {
	case a.StatusCode == http.StatusProxyAuthRequired && u.User == nil:
		return fmt.Errorf("%w: it answered CONNECT %s with %q: it wants a user and a password", ErrProxy, address, a.Status)
	case a.StatusCode == http.StatusProxyAuthRequired:
		return fmt.Errorf("%w: it answered CONNECT %s with %q: it does not take this user and password, or not by the method Basic", ErrProxy, address, a.Status)
	case a.StatusCode/100 != 2:
		return fmt.Errorf("%w: it answered CONNECT %s with %q", ErrProxy, address, a.Status)
	case in.Buffered() > 0:
		return fmt.Errorf("%w: it sent data of its own after its answer to CONNECT", ErrProxy)
	}
	if !stop() { // the deadline is set or about to be
		return ctx.Err()
	}
	return nil
}

// dialSOCKS is RFC 1928 and 1929.
func dialSOCKS(ctx context.Context, u *url.URL, address string, r *Resolver) (net.Conn, error) {
	var auth *proxy.Auth
	if name := u.User.Username(); name != "" {
		password, _ := u.User.Password()
		auth = &proxy.Auth{User: name, Password: password}
	}
	forward := &forwarder{resolver: r}
	d, err := proxy.SOCKS5("tcp", proxyAddress(u), auth, forward)
	if err != nil {
		return nil, err
	}
	conn, err := d.(proxy.ContextDialer).DialContext(ctx, "tcp", address)
	if err != nil {
		if forward.err != nil {
			return nil, forward.err
		}
		// ctx's deadline is that of the connection, which may see it first.
		late := ctx.Err()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			late = context.DeadlineExceeded
		}
		if late != nil {
			return nil, fmt.Errorf("wait for its answer: %w", late)
		}
		return nil, fmt.Errorf("%w: %w", ErrProxy, err)
	}
	return conn, nil
}

// forwarder reaches the proxy itself, and keeps why it could not.
type forwarder struct {
	resolver *Resolver
	err      error
}

func (f *forwarder) Dial(network, address string) (net.Conn, error) {
	return f.DialContext(context.Background(), network, address)
}

func (f *forwarder) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	conn, err := dialDirect(ctx, address, f.resolver)
	f.err = err
	return conn, err
}
