package carrier

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belay-edge/belay/controlplane/wire"
)

// One port: HTTP/1.1, HTTP/2, Connect and gRPC beside the tunnels.
func TestHTTPOnThePortOfTheTunnel(t *testing.T) {
	r := newRig(t, nil)
	mux := http.NewServeMux()
	mux.HandleFunc("/proto", func(w http.ResponseWriter, q *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %d", q.Proto, len(q.TLS.PeerCertificates))
	})
	mux.Handle("/double", connect.NewBidiStreamHandler("/double",
		func(_ context.Context, s *connect.BidiStream[wrapperspb.Int64Value, wrapperspb.Int64Value]) error {
			for {
				v, err := s.Receive()
				if err != nil {
					return nil
				}
				if err := s.Send(wrapperspb.Int64(v.Value * 2)); err != nil {
					return err
				}
			}
		}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(r.l.HTTP()) }()

	roots := x509.NewCertPool()
	roots.AddCert(r.ca.Certificate)
	base := "https://" + r.l.Addr().String()
	client := func(h2 bool) *http.Client {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, Protocols: new(http.Protocols)}
		tr.Protocols.SetHTTP1(!h2)
		tr.Protocols.SetHTTP2(h2)
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr, Timeout: 10 * time.Second}
	}
	for h2, want := range map[bool]string{false: "HTTP/1.1 0", true: "HTTP/2.0 0"} {
		resp, err := client(h2).Get(base + "/proto")
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if string(got) != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for name, opts := range map[string][]connect.ClientOption{"connect": nil, "grpc": {connect.WithGRPC()}} {
		c := connect.NewClient[wrapperspb.Int64Value, wrapperspb.Int64Value](client(true), base+"/double", opts...)
		s := c.CallBidiStream(within(t, 10*time.Second))
		for i := range int64(3) {
			if err := s.Send(wrapperspb.Int64(i)); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			v, err := s.Receive()
			if err != nil || v.Value != 2*i {
				t.Fatalf("%s: %v, %v", name, v, err)
			}
		}
		_ = s.CloseRequest()
		_ = s.CloseResponse()
	}

	agent, control := r.pair(t, wire.TransportTCP)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != http.ErrServerClosed {
		t.Fatalf("Serve: %v", err)
	}
	echo(t, agent, control)
}
