package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

// connection is a client of one control plane.
type connection struct {
	endpoint
	api apiv1connect.BelayClient
}

// connect makes the client; nothing is sent yet.
func (c *cli) connect() (*connection, error) {
	if c.conn != nil {
		return c.conn, nil
	}
	e, err := c.flags.resolve(os.Getenv)
	if err != nil {
		return nil, err
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS13}
	if e.ca != nil {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(e.ca) {
			return nil, fmt.Errorf("the control plane's CA, %s, has no certificate in PEM", e.caWas)
		}
	}
	// Pings find out about a control plane that went without a word while a
	// stream waits.
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSClientConfig:     conf,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		Proxy:               http.ProxyFromEnvironment,
	}
	client := &http.Client{
		Transport: transport,
		// Whatever redirects is no control plane, and must not get the token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect },
	}
	c.conn = &connection{
		endpoint: e,
		api: apiv1connect.NewBelayClient(client, "https://"+e.addr,
			connect.WithInterceptors(bearer(e.token)), connect.WithReadMaxBytes(64<<20)),
	}
	return c.conn, nil
}

var errRedirect = errors.New("it answers with a redirect")

// bearer adds the API token to every call.
type bearer string

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		r.Header().Set("Authorization", "Bearer "+string(b))
		return next(ctx, r)
	}
}

func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, s connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, s)
		conn.RequestHeader().Set("Authorization", "Bearer "+string(b))
		return conn
	}
}

func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// method is one unary method of the API, as a method expression.
type method[Q, A any] func(apiv1connect.BelayClient, context.Context, *connect.Request[Q]) (*connect.Response[A], error)

const callAttempts = 4

// call makes one call, within --timeout. A control plane that is away for a
// moment is tried again: every mutating request carries a client token, so an
// answer that got lost changes nothing twice.
func call[Q, A any](ctx context.Context, c *cli, m method[Q, A], q *Q) (*A, error) {
	conn, err := c.connect()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.flags.timeout)
	defer cancel()
	wait := 200 * time.Millisecond
	for attempt := 1; ; attempt++ {
		res, err := m(conn.api, ctx, connect.NewRequest(q))
		if err == nil {
			return res.Msg, nil
		}
		if attempt == callAttempts || !momentary(err) || !pause(ctx, wait) {
			return nil, err
		}
		wait *= 2
	}
}

// momentary tells an absence that may be over soon.
func momentary(err error) bool {
	var dns *net.DNSError
	if isTLSProblem(err) || errors.Is(err, errRedirect) || (errors.As(err, &dns) && dns.IsNotFound) {
		return false
	}
	return connect.CodeOf(err) == connect.CodeUnavailable || broken(err)
}

// broken tells a connection that ended while it was in use, as it does when a
// control plane is killed. The client has no code for that.
func broken(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// pause waits for about d, spread so that many clients do not return as one;
// false: the context ended first.
func pause(ctx context.Context, d time.Duration) bool {
	if n, err := rand.Int(rand.Reader, big.NewInt(int64(d))); err == nil {
		d = d/2 + time.Duration(n.Int64())
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// clientToken is the flag by which a caller makes its own retries safe.
type clientToken string

func (t *clientToken) flag(cmd *cobra.Command) {
	cmd.Flags().StringVar((*string)(t), "client-token", "", "repeat a call with the same token and it is done once (default random)")
}

func (t clientToken) value() string {
	if t != "" {
		return string(t)
	}
	var b [16]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}
