package main

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// A control plane that was killed in the middle of a call resets the
// connection; the client library gives that no code, and it was told as "does
// not answer as a control plane does" instead of being tried again.
func TestAConnectionThatIsResetIsTriedAgain(t *testing.T) {
	var calls atomic.Int32
	plane := newFakePlane().handler()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if calls.Add(1) > 1 {
			plane.ServeHTTP(w, r)
			return
		}
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		// No linger: the peer gets a reset, not an end.
		if err := conn.(*tls.Conn).NetConn().(interface{ SetLinger(int) error }).SetLinger(0); err != nil {
			t.Error(err)
		}
		conn.(*tls.Conn).NetConn().Close()
	}))
	s.Config.ErrorLog = quiet
	s.StartTLS()
	defer s.Close()

	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("BELAY_ADDR", s.Listener.Addr().String())
	t.Setenv("BELAY_TOKEN", fakeToken)
	t.Setenv("BELAY_CA", ca)
	var stdout, stderr strings.Builder
	code := run(context.Background(), []string{"cluster", "create", "lab"}, strings.NewReader(""), &stdout, &stderr)
	if code != exitOK || calls.Load() != 2 {
		t.Errorf("exit code %d after %d calls: %s", code, calls.Load(), stderr.String())
	}
}
