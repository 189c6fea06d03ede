package sdktest

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// raw is a process of the plugin without a host: nothing is called that the
// rule does not call.
type raw struct {
	bench    *bench
	cmd      *exec.Cmd
	lifeline *os.File // the end that only we hold
	conn     *grpc.ClientConn
	exited   chan struct{}
	once     sync.Once
}

// launchRaw starts the process and reads its handshake.
func (b *bench) launchRaw(t T) *raw {
	t.Helper()
	cmd := exec.Command(b.opts.executable)
	cmd.Env = append(b.plainEnv(), handshake.CookieKey+"="+handshake.CookieValue, handshake.VersionsKey+"=1,2",
		handshake.SocketDirKey+"="+b.sock, handshake.LifelineKey+"="+handshake.LifelineStdin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, lifeline, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, out, err := os.Pipe()
	if err != nil {
		lifeline.Close()
		t.Fatal(err)
	}
	defer out.Close()
	stderr, errout, err := os.Pipe()
	if err != nil {
		lifeline.Close()
		stdout.Close()
		t.Fatal(err)
	}
	defer errout.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, out, errout
	if err := cmd.Start(); err != nil {
		lifeline.Close()
		stdout.Close()
		stderr.Close()
		t.Fatalf("expected the plugin to start, but: %v", err)
	}
	r := &raw{bench: b, cmd: cmd, lifeline: lifeline, exited: make(chan struct{})}
	b.born(r)
	t.Cleanup(func() { b.over(r) })
	go func() {
		_ = cmd.Wait()
		close(r.exited)
	}()
	go func() {
		defer stderr.Close()
		for s := bufio.NewScanner(stderr); s.Scan(); {
			b.t.Logf("%s", s.Text())
		}
		_, _ = io.Copy(io.Discard, stderr)
	}()
	lines := make(chan string, 1)
	go func() {
		defer stdout.Close()
		buf := bufio.NewReader(stdout)
		line, _ := buf.ReadString('\n')
		lines <- strings.TrimSpace(line)
		_, _ = io.Copy(io.Discard, buf)
	}()
	var line string
	select {
	case line = <-lines:
	case <-time.After(b.patience(15 * time.Second)):
		t.Fatal("expected a handshake line on standard output, there was none")
	}
	parts := strings.Split(line, "|")
	if len(parts) < 5 || parts[0] != "1" || parts[1] != "2" || parts[2] != "unix" || parts[4] != "grpc" {
		t.Fatalf("expected the handshake line 1|2|unix|SOCKET|grpc|, got %.100q", line)
	}
	r.conn, err = grpc.NewClient("unix:"+parts[3], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// plainEnv is what a program started by hand has.
func (b *bench) plainEnv() []string {
	env := []string{b.mark}
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "TZ", "LANG"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// Kill ends the process and waits for that.
func (r *raw) Kill() {
	r.once.Do(func() {
		_ = r.cmd.Process.Kill()
		<-r.exited
		r.lifeline.Close()
		if r.conn != nil {
			r.conn.Close()
		}
	})
}

func (r *raw) describe(ctx context.Context) (bridge.Description, error) {
	m, err := pluginv2.NewPluginClient(r.conn).Describe(ctx, &pluginpb.DescribeRequest{})
	return bridge.FromDescription(m), bridge.FromStatus(ctx, "describe", err)
}

func (r *raw) configure(ctx context.Context, c sdk.Config) error {
	_, err := pluginv2.NewPluginClient(r.conn).Configure(ctx, bridge.ToConfig(c))
	return bridge.FromStatus(ctx, "configure", err)
}

// ends tells whether the process ends by itself in time.
func (r *raw) ends(within time.Duration) bool {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-r.exited:
		return true
	case <-timer.C:
		return false
	}
}
