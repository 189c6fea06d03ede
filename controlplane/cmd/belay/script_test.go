package main

import (
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"belay": main})
}

// The scripts run the program itself against a stand-in for a control plane:
// they are about arguments, formats and errors, not about what tasks do.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			plane := startTLS(newFakePlane().handler())
			env.Defer(plane.Close)
			web := startTLS(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprintln(w, "<html>a router's web page</html>")
			}))
			env.Defer(web.Close)
			moved := startTLS(http.RedirectHandler("https://example.com/", http.StatusFound))
			env.Defer(moved.Close)
			plain := httptest.NewServer(http.NotFoundHandler())
			env.Defer(plain.Close)
			closed, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			closed.Close()
			mute, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			env.Defer(func() { mute.Close() })

			ca := filepath.Join(env.WorkDir, "ca.pem")
			block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: plane.Certificate().Raw})
			if err := os.WriteFile(ca, block, 0o600); err != nil {
				return err
			}
			other, err := otherCA()
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(env.WorkDir, "other.pem"), other, 0o600); err != nil {
				return err
			}
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("BELAY_ADDR", plane.Listener.Addr().String())
			env.Setenv("BELAY_TOKEN", fakeToken)
			env.Setenv("BELAY_CA", ca)
			env.Setenv("WEB", web.Listener.Addr().String())
			env.Setenv("MOVED", moved.Listener.Addr().String())
			env.Setenv("PLAIN", plain.Listener.Addr().String())
			env.Setenv("CLOSED", closed.Addr().String())
			env.Setenv("MUTE", mute.Addr().String())
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"rc":        runForCode,
			"interrupt": interrupt,
			"narrow":    narrow,
			"plain":     plainText,
		},
	})
}

func startTLS(h http.Handler) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = true
	s.Config.ErrorLog = quiet
	s.StartTLS()
	return s
}
