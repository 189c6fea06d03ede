package blackbox

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
	"github.com/belay-edge/belay/hw-tests/rig"
)

// TestProxies: only the proxy knows where the control plane is, and it asks for
// a password.
func TestProxies(t *testing.T) {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"} {
		t.Setenv(name, "")
	}
	const user, password = "device", "s3cr3t/of@proxy"
	login := url.UserPassword(user, password)
	for _, scheme := range []string{"http", "https", "socks5"} {
		t.Run(scheme, func(t *testing.T) {
			p := &wiretest.Proxy{Scheme: scheme, User: user, Password: password, Hosts: map[string]string{}}
			if scheme == "https" {
				ca, err := carrier.NewCA()
				if err != nil {
					t.Fatal(err)
				}
				leaf, err := ca.Leaf([]string{"127.0.0.1"})
				if err != nil {
					t.Fatal(err)
				}
				p.TLS = &tls.Config{Certificates: []tls.Certificate{leaf}, MinVersion: tls.VersionTLS12}
				file := filepath.Join(tempDir(t), "ca.pem")
				text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw})
				if err := os.WriteFile(file, text, 0o600); err != nil {
					t.Fatal(err)
				}
				t.Setenv("SSL_CERT_FILE", file)
			}
			control := newControl(t, "--advertise", "control.invalid")
			_, port, err := net.SplitHostPort(control.Addr)
			if err != nil {
				t.Fatal(err)
			}
			p.Hosts["control.invalid:"+port] = control.Addr
			p.Start(t)
			s := &site{Control: control, runtime: "process", dir: tempDir(t), cli: control.CLI()}
			code, err := s.cli.Activate(deadline(t, patience), cluster, 1)
			if err != nil {
				t.Fatal(err)
			}
			// Enrolment by the environment, the agent by its configuration.
			t.Setenv("ALL_PROXY", p.URL(login))
			a, err := rig.Enroll(deadline(t, patience), bin(t), s.dir, code)
			if err != nil {
				t.Fatal(err)
			}
			t.Setenv("ALL_PROXY", "")
			a.Config, a.Extra = filepath.Join(s.dir, "agent.toml"), []string{"--log-level", "debug"}
			text := fmt.Sprintf("[tunnel]\nproxy = %q\n", p.URL(login))
			if err := os.WriteFile(a.Config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := a.Restart(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if _, err := a.Stop(20 * time.Second); err != nil {
					t.Error(err)
				}
				log := a.Tail(1 << 20)
				for _, secret := range []string{password, url.PathEscape(password), url.QueryEscape(password), "s3cr3t"} {
					if strings.Contains(log, secret) {
						t.Errorf("the agent's log has the proxy's password in it")
					}
				}
				if t.Failed() {
					t.Logf("agent's last words:\n%s", a.Tail(8000))
				}
			})
			over(t, a, "tcp")
			for command, want := range map[string]string{
				"status --run-dir " + a.RunDir:                            "through the proxy " + p.URL(nil),
				"doctor --config " + a.Config + " --state-dir " + a.State: "through the proxy " + p.URL(nil),
			} {
				out, _ := exec.CommandContext(deadline(t, patience), bin(t).Path("belay-agent"), strings.Fields(command)...).CombinedOutput()
				if !strings.Contains(string(out), want) || strings.Contains(string(out), "s3cr3t") {
					t.Errorf("belay-agent %s says\n%s", command, out)
				}
			}
		})
	}
}
