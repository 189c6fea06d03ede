package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// output is written by the server while the test reads it.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// control is a control plane in this process.
type control struct {
	addr   string
	stderr *output
	stop   func() error // ends it and waits
}

var readyLine = regexp.MustCompile(`(?m)^ready: listening on (\S+) `)

func start(t *testing.T, args ...string) *control {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var stdout output
	c := &control{stderr: &output{}}
	done := make(chan error, 1)
	go func() { done <- run(ctx, append([]string{"serve"}, args...), nil, &stdout, c.stderr) }()
	c.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(stopDeadline + 5*time.Second):
			return fmt.Errorf("did not stop")
		}
	})
	t.Cleanup(func() { _ = c.stop() })
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(30 * time.Second); ; {
		if m := readyLine.FindStringSubmatch(stdout.String()); m != nil {
			c.addr = m[1]
			return c
		}
		select {
		case err := <-done:
			done <- err
			t.Fatalf("ended before it was ready: %v\n%s", err, c.stderr)
		case <-deadline:
			t.Fatalf("not ready in time\n%s", c.stderr)
		case <-tick.C:
		}
	}
}

// call is one API call, trusting the CA and giving the token of the directory.
func (c *control) call(t *testing.T, dir, method, body string) (int, string) {
	t.Helper()
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(filepath.Join(dir, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+c.addr+"/belay.v1.Belay/"+method, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	answer, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(b)
}

func TestServeAndRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	c := start(t, "--data-dir", dir, "--listen", "127.0.0.1:0", "--advertise", "control.example")
	for name, mode := range map[string]os.FileMode{"admin.token": 0o600, "ca-key.pem": 0o600, "ca.pem": 0o644, "etcd": 0o700} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v; want mode %o", name, fi, err, mode)
		}
	}
	if status, body := c.call(t, dir, "CreateActivation", `{"cluster":"shop"}`); status != http.StatusOK || !strings.Contains(body, `"belay1.`) {
		t.Fatal(status, body)
	}
	token, err := os.ReadFile(filepath.Join(dir, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}

	t.Run("a second one on the same directory", func(t *testing.T) {
		err := run(t.Context(), []string{"serve", "--data-dir", dir, "--listen", "127.0.0.1:0"}, nil, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) || !strings.Contains(err.Error(), dir) {
			t.Errorf("error %v, want one naming the process and the directory", err)
		}
	})
	t.Run("a port already taken", func(t *testing.T) {
		err := run(t.Context(), []string{"serve", "--data-dir", t.TempDir(), "--listen", c.addr}, nil, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), c.addr) || !strings.Contains(err.Error(), "--listen") {
			t.Errorf("error %v, want one naming the port and what to do", err)
		}
	})

	if err := c.stop(); err != nil {
		t.Fatal(err)
	}
	c = start(t, "--data-dir", dir, "--listen", "127.0.0.1:0")
	if status, body := c.call(t, dir, "ListActivations", `{}`); status != http.StatusOK || !strings.Contains(body, `"shop"`) {
		t.Errorf("after a restart: %d %s", status, body)
	}
	if again, err := os.ReadFile(filepath.Join(dir, "admin.token")); err != nil || !bytes.Equal(again, token) {
		t.Errorf("the token changed in a restart: %v", err)
	}
	if log := c.stderr.String(); strings.Contains(log, "level=ERROR") || strings.Contains(log, "level=WARN") {
		t.Errorf("warnings in a quiet restart:\n%s", log)
	}
}

func TestLostCA(t *testing.T) {
	dir := t.TempDir()
	if err := start(t, "--data-dir", dir, "--listen", "127.0.0.1:0").stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "ca-key.pem")); err != nil {
		t.Fatal(err)
	}
	err := run(t.Context(), []string{"serve", "--data-dir", dir, "--listen", "127.0.0.1:0"}, nil, io.Discard, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "backup") {
		t.Errorf("error %v, want one that says what to do: a new CA would lock all devices out", err)
	}
}

// With an external store there is no etcd directory to tell that there were
// devices: a lost key was replaced by a new one without a word.
func TestLostCAKeyWithExternalStore(t *testing.T) {
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	if _, err := openCA(dir, log); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, caKeyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := openCA(dir, log); err == nil || !strings.Contains(err.Error(), "backup") {
		t.Errorf("error %v, want one that says to restore the key", err)
	}
	// A first start cut short between the two files is no loss.
	if err := os.Remove(filepath.Join(dir, caFile)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, caKeyFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openCA(dir, log); err != nil {
		t.Error(err)
	}
}

func TestBadCommandLines(t *testing.T) {
	file := filepath.Join(t.TempDir(), "control.toml")
	if err := os.WriteFile(file, []byte("listen = \":7443\"\n[api]\ncert = \"x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	negative := filepath.Join(t.TempDir(), "negative.toml")
	if err := os.WriteFile(negative, []byte("registrations_per_second = -1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "no command"},
		{[]string{"server"}, `unknown command "server"`},
		{[]string{"serve", "x"}, `unexpected argument "x"`},
		{[]string{"serve", "--lisen", ":1"}, "lisen"},
		{[]string{"serve", "--listen", "7443"}, "HOST:PORT"},
		{[]string{"serve", "--listen", ":99999"}, "65535"},
		{[]string{"serve", "--advertise", "a:b:c:d"}, "advertise"},
		{[]string{"serve", "--advertise", "host:0"}, "advertise"},
		{[]string{"serve", "--etcd-endpoints", "localhost:2379"}, "http://"},
		{[]string{"serve", "--log-level", "loud"}, "loud"},
		{[]string{"serve", "--config", file}, "api.cert (line 3)"},
		{[]string{"serve", "--config", file + "x"}, "no such file"},
		{[]string{"serve", "--config", negative}, "registrations_per_second: -1"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // should it serve
			defer cancel()
			err := run(ctx, c.args, nil, io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want it to say %q", err, c.want)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	var out output
	if err := run(t.Context(), []string{"version"}, nil, &out, io.Discard); err != nil || out.String() != "belay-control "+version+"\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestConfigFileAndFlags(t *testing.T) {
	file := filepath.Join(t.TempDir(), "control.toml")
	text := "data_dir = \"/d\"\nlisten = \"127.0.0.1:1\"\nadvertise = [\"a.example\", \"10.0.0.1:443\"]\nregistrations_per_second = 70\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := readConfig([]string{"--config", file, "--listen", "127.0.0.1:2"}, io.Discard)
	if err != nil || c.DataDir != "/d" || c.Listen != "127.0.0.1:2" || c.Registrations != 70 {
		t.Fatal(c, err)
	}
	at := addresses(c, fakeAddr("127.0.0.1:2"))
	if got := strings.Join(at, " "); got != "a.example:2 10.0.0.1:443" {
		t.Errorf("addresses %s", got)
	}
	all := strings.Join(names(c), " ")
	for _, n := range []string{"a.example", "10.0.0.1", "localhost", "127.0.0.1"} {
		if !strings.Contains(all, n) {
			t.Errorf("the certificate's names %s lack %s", all, n)
		}
	}
}

func TestWithPort(t *testing.T) {
	for addr, want := range map[string]string{
		"host": "host:7", "host:1": "host:1", "10.0.0.1": "10.0.0.1:7", "10.0.0.1:1": "10.0.0.1:1",
		"fd00::1": "[fd00::1]:7", "[fd00::1]": "[fd00::1]:7", "[fd00::1]:1": "[fd00::1]:1", "a:b:c:d:e": "a:b:c:d:e",
	} {
		if got := withPort(addr, "7"); got != want {
			t.Errorf("withPort(%q) = %q, want %q", addr, got, want)
		}
	}
}

type fakeAddr string

func (fakeAddr) Network() string  { return "tcp" }
func (a fakeAddr) String() string { return string(a) }
