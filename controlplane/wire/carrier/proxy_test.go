package carrier_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

const (
	user     = "device"
	password = "p@ss/word"
)

// through dials a control plane that only the proxy can find.
func through(t *testing.T, control *wiretest.ControlPlane, p *carrier.Proxy) (wire.Session, error) {
	t.Helper()
	_, cert := wiretest.NewDevice(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	s, err := carrier.Dial(ctx, carrier.DialConfig{
		Address: "control.invalid:7443", Transport: wire.TransportTCP, Protocol: wire.ProtocolTunnel,
		Certificate: cert, Pins: []wire.Pin{control.CA.Pin()}, Proxy: p,
	})
	if err == nil {
		t.Cleanup(func() { s.Close("", "") })
	}
	return s, err
}

func TestTCPThroughAProxy(t *testing.T) {
	login := url.UserPassword(user, password)
	tests := []struct {
		name   string
		proxy  *wiretest.Proxy
		as     *url.Userinfo
		failed string // part of the error; "": none
	}{
		{"http", &wiretest.Proxy{Scheme: "http"}, nil, ""},
		{"http with a password", &wiretest.Proxy{Scheme: "http", User: user, Password: password}, login, ""},
		{"http, none given", &wiretest.Proxy{Scheme: "http", User: user, Password: password}, nil, "it wants a user and a password"},
		{"http, a wrong one", &wiretest.Proxy{Scheme: "http", User: user, Password: password}, url.UserPassword(user, "other"), "does not take this user"},
		{"http, not allowed", &wiretest.Proxy{Scheme: "http", Refuse: http.StatusForbidden}, nil, `"403 Forbidden"`},
		{"socks", &wiretest.Proxy{Scheme: "socks5"}, nil, ""},
		{"socks with a password", &wiretest.Proxy{Scheme: "socks5", User: user, Password: password}, login, ""},
		{"socks, a wrong one", &wiretest.Proxy{Scheme: "socks5", User: user, Password: password}, url.UserPassword(user, "other"), "authentication failed"},
		{"socks, not allowed", &wiretest.Proxy{Scheme: "socks5", Refuse: 2}, nil, "not allowed by ruleset"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			control := wiretest.NewControlPlane(t)
			tt.proxy.Hosts = map[string]string{"control.invalid:7443": control.Address()}
			server := tt.proxy.Start(t)
			p, err := carrier.NewProxy(server.URL(tt.as), nil)
			if err != nil {
				t.Fatal(err)
			}
			s, err := through(t, control, p)
			if tt.failed == "" {
				if err != nil {
					t.Fatal(err)
				}
				stream, err := s.OpenStream(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer stream.Close()
				agent := &wiretest.Peer{Session: s, Control: stream}
				if err := wire.WriteFrame(agent.Control, &wire.Frame{Body: &wire.Frame_Ping{Ping: &wire.Ping{Id: 3}}}); err != nil {
					t.Fatal(err)
				}
				if got := control.Next(t).Expect("ping").GetPing().Id; got != 3 {
					t.Errorf("ping %d", got)
				}
				if diff := cmp.Diff([]string{"control.invalid:7443"}, server.Seen()); diff != "" {
					t.Errorf("the proxy was asked for %s", diff)
				}
				return
			}
			if !errors.Is(err, carrier.ErrUnreachable) || !errors.Is(err, carrier.ErrProxy) {
				t.Errorf("error %v is not of the right sort", err)
			}
			text := err.Error()
			if !strings.Contains(text, tt.failed) || !strings.Contains(text, "through the proxy "+server.URL(nil)) {
				t.Errorf("error %q, want the proxy and %q in it", text, tt.failed)
			}
			for _, secret := range []string{password, url.QueryEscape(password), "other", user + ":"} {
				if strings.Contains(text, secret) {
					t.Errorf("the error shows %q: %s", secret, text)
				}
			}
		})
	}
}

func TestProxyThatIsNotThereOrSaysNothing(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close()
	for _, scheme := range []string{"http", "socks5"} {
		for address, want := range map[string]string{l.Addr().String(): "no answer in time", gone.Addr().String(): "connection refused"} {
			p, err := carrier.NewProxy(scheme+"://"+address, nil)
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			_, err = through(t, control, p)
			if !errors.Is(err, carrier.ErrUnreachable) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "through the proxy "+scheme) {
				t.Errorf("%s: %v, want %q", scheme, err, want)
			}
			if took := time.Since(began); took > 7*time.Second {
				t.Errorf("%s: it took %s", scheme, took)
			}
		}
	}
}

func TestWhichProxy(t *testing.T) {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy"} {
		t.Setenv(name, "")
	}
	if p, err := carrier.ProxyFromEnvironment(); p != nil || err != nil {
		t.Errorf("of an empty environment: %v, %v", p, err)
	}
	if got := (*carrier.Proxy)(nil).Describe("a:1"); got != "" {
		t.Errorf("no proxy is %q", got)
	}
	t.Setenv("ALL_PROXY", "socks5://u:p@all.example")
	t.Setenv("NO_PROXY", "inner.example,10.0.0.0/8")
	describe := func(address, want string) {
		t.Helper()
		p, err := carrier.ProxyFromEnvironment()
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Describe(address); got != want {
			t.Errorf("%s through %q, want %q", address, got, want)
		}
	}
	describe("control.example:7443", "socks5://all.example:1080")
	describe("inner.example:7443", "")
	describe("x.inner.example:7443", "")
	describe("10.1.2.3:7443", "")
	describe("127.0.0.1:7443", "")
	t.Setenv("https_proxy", "web.example:3128")
	describe("control.example:7443", "http://web.example:3128")
	describe("[2001:db8::1]:7443", "http://web.example:3128")
	for _, bad := range []string{"ftp://x:1", "http://", "http://u:se%cret@x:1", "http://u:secret@x:port", "socks5://"} {
		if _, err := carrier.NewProxy(bad, nil); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
