package wiretest

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"testing"
)

// Proxy is an HTTP or SOCKS5 proxy on loopback. It alone knows the names in
// Hosts, as a proxy at the edge of a network does.
type Proxy struct {
	Scheme         string // "http", "https" or "socks5"
	User, Password string // wanted, unless empty
	Hosts          map[string]string
	TLS            *tls.Config // for https
	Refuse         int         // HTTP status or SOCKS reply to answer instead

	l    net.Listener
	mu   sync.Mutex
	seen []string
	open []net.Conn
}

// Start listens until the test ends.
func (p *Proxy) Start(t testing.TB) *Proxy {
	t.Helper()
	var err error
	if p.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := p.l.Accept()
			if err != nil {
				return
			}
			p.keep(c)
			work.Go(func() {
				defer c.Close()
				p.serve(c)
			})
		}
	})
	t.Cleanup(func() {
		_ = p.l.Close()
		p.mu.Lock()
		for _, c := range p.open {
			_ = c.Close()
		}
		p.mu.Unlock()
		work.Wait()
	})
	return p
}

// URL of the proxy, with this user information.
func (p *Proxy) URL(user *url.Userinfo) string {
	u := url.URL{Scheme: p.Scheme, Host: p.l.Addr().String(), User: user}
	return u.String()
}

// Seen is what was asked for, host:port each.
func (p *Proxy) Seen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.seen...)
}

func (p *Proxy) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = append(p.open, c)
}

func (p *Proxy) serve(c net.Conn) {
	if p.Scheme == "socks5" {
		p.socks(c)
		return
	}
	if p.Scheme == "https" {
		c = tls.Server(c, p.TLS)
	}
	q, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return
	}
	answer := func(status int) {
		r := http.Response{StatusCode: status, ProtoMajor: 1, ProtoMinor: 1}
		_ = r.Write(c)
	}
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(p.User+":"+p.Password))
	switch {
	case q.Method != http.MethodConnect:
		answer(http.StatusMethodNotAllowed)
		return
	case p.User != "" && q.Header.Get("Proxy-Authorization") != want:
		answer(http.StatusProxyAuthRequired)
		return
	case p.Refuse != 0:
		answer(p.Refuse)
		return
	}
	out, err := p.dial(q.Host)
	if err != nil {
		answer(http.StatusBadGateway)
		return
	}
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); err == nil {
		join(c, out)
	}
}

// socks is RFC 1928 and 1929, as much of it as is asked for here.
func (p *Proxy) socks(c net.Conn) {
	take := func(n int) []byte {
		b := make([]byte, n)
		if _, err := io.ReadFull(c, b); err != nil {
			return make([]byte, n) // zeros are good for nothing below
		}
		return b
	}
	field := func() []byte { return take(int(take(1)[0])) }
	take(1) // version
	field() // methods
	if p.User == "" {
		_, _ = c.Write([]byte{5, 0})
	} else {
		_, _ = c.Write([]byte{5, 2})
		take(1)
		user, password := string(field()), string(field())
		if user != p.User || password != p.Password {
			_, _ = c.Write([]byte{1, 1})
			return
		}
		_, _ = c.Write([]byte{1, 0})
	}
	q := take(4)
	host := ""
	switch q[3] {
	case 1:
		host = net.IP(take(4)).String()
	case 3:
		host = string(field())
	case 4:
		host = net.IP(take(16)).String()
	}
	port := take(2)
	reply := func(code byte) { _, _ = c.Write([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0}) }
	if p.Refuse != 0 {
		reply(byte(p.Refuse))
		return
	}
	out, err := p.dial(net.JoinHostPort(host, strconv.Itoa(int(port[0])<<8|int(port[1]))))
	if err != nil {
		reply(5)
		return
	}
	reply(0)
	join(c, out)
}

func (p *Proxy) dial(address string) (net.Conn, error) {
	p.mu.Lock()
	p.seen = append(p.seen, address)
	p.mu.Unlock()
	if real, ok := p.Hosts[address]; ok {
		address = real
	}
	out, err := net.Dial("tcp", address)
	if err == nil {
		p.keep(out)
	}
	return out, err
}

func join(a, b net.Conn) {
	defer b.Close()
	go func() {
		_, _ = io.Copy(a, b)
		_ = a.Close()
	}()
	_, _ = io.Copy(b, a)
}
