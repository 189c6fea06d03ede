// Package serve is the plugin's side of the plugin protocol. A plugin's main
// function is one line:
//
//	func main() { serve.Main(myplugin.New()) }
//
// What the plugin can do is found by asserting the optional interfaces of
// package sdk on it (sdk.RuntimePlugin, sdk.DevicePlugin, sdk.Configurable),
// which must agree with its Info. Handlers run concurrently; their context ends
// with the call, with the host, and when the process is asked to end.
//
// It speaks go-plugin's protocol on bare gRPC, without go-plugin itself, which
// costs every plugin process megabytes it has no use for.
package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
	"github.com/belay-edge/belay/plugins/sdk/internal/idle"
)

// drain is how long handlers get to notice that their context ended before
// the process does: enough to undo half a Start, and less than the host waits
// before it kills.
const drain = 3 * time.Second

// versions of the protocol this module can serve, newest first.
var versions = []int{2, 1}

// Main serves p until the host says stop or is gone, and exits. It makes
// slog's default logger write to stderr in the form the host reads levels
// and attributes from. Started by hand it says what it is and exits 1.
func Main(p sdk.Plugin) {
	os.Exit(run(p, os.Stdout, os.Stderr))
}

func run(p sdk.Plugin, stdout, stderr *os.File) int {
	info := p.Info()
	if os.Getenv(handshake.CookieKey) != handshake.CookieValue {
		fmt.Fprintf(stderr, "%s %s is a Belay plugin: it is started by belay-agent, not by hand. "+
			"Put it in the agent's plugin directory as %q and restart the agent.\n", info.Name, info.Version, info.Name)
		return 1
	}
	// Without a handler, a write to stderr after the host died would end the
	// process in the middle of what it is doing. Notify and not Ignore: an
	// ignored SIGPIPE would be inherited by every program the plugin starts.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGINT, syscall.SIGHUP)
	slog.SetDefault(slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: slog.LevelDebug})))
	useOneProcessor()

	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go watchParent(stop)
	go idle.Run(ctx, nil)

	// The host reads one line from stdout. What the plugin or a library of
	// its prints there later goes where logs go.
	announce := func(line string) error {
		if _, err := fmt.Fprintln(stdout, line); err != nil {
			return err
		}
		return unix.Dup3(int(stderr.Fd()), int(stdout.Fd()), 0)
	}
	err := Run(ctx, p, Options{Dir: os.Getenv(handshake.SocketDirKey), HostVersions: os.Getenv(handshake.VersionsKey), Announce: announce})
	if err != nil {
		fmt.Fprintf(stderr, "%s %s: %v\n", info.Name, info.Version, err)
		return 1
	}
	return 0
}

// Options of Run. The zero value serves on a socket in the temp directory and
// prints the handshake line to stdout.
type Options struct {
	// Dir is where the socket is made; "" is a new one below the temp
	// directory. Nobody else may be able to reach it.
	Dir string
	// HostVersions are those the host speaks, "1,2"; "" when it did not say.
	HostVersions string
	// Announce hands over the handshake line once the socket accepts.
	Announce func(line string) error
}

// Run serves p until ctx ends or the host asks it to stop, then lets handlers
// finish for a few seconds. It returns nil after an orderly end. Main is what
// plugins want; Run is for tests and for programs with their own idea of main.
func Run(ctx context.Context, p sdk.Plugin, o Options) error {
	if err := checkInfo(p); err != nil {
		return err
	}
	if o.Announce == nil {
		o.Announce = func(line string) error { _, err := fmt.Println(line); return err }
	}
	dir := o.Dir
	if dir == "" {
		var err error
		if dir, err = os.MkdirTemp("", "belay"); err != nil {
			return fmt.Errorf("make the socket's directory: %w", err)
		}
		defer os.RemoveAll(dir)
	}
	path := handshake.SocketPath(dir, os.Getpid())
	if err := handshake.CheckSocketPath(path); err != nil {
		return err
	}
	// Of a process with our id that was killed.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("make room for the socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen for the host: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s := newServer(ctx, stop, p)

	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(hostOnly{l}) }()
	line := handshake.Line(pickVersion(o.HostVersions), "unix", path)
	if err := o.Announce(line); err != nil {
		s.grpc.Stop()
		return fmt.Errorf("tell the host the socket: %w", err)
	}

	select {
	case err := <-served:
		return fmt.Errorf("serve the host: %w", err)
	case <-ctx.Done():
	}
	stopped := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(drain):
		slog.Warn("calls still running at exit", "plugin", p.Info().Name, "waited", drain)
		s.grpc.Stop()
	}
	return nil
}

func checkInfo(p sdk.Plugin) error {
	info := p.Info()
	if !handshake.ValidName(info.Name) {
		return fmt.Errorf("plugin name %q: want 1 to 63 of a-z, 0-9 and -", info.Name)
	}
	_, runtime := p.(sdk.RuntimePlugin)
	_, device := p.(sdk.DevicePlugin)
	for _, c := range []struct {
		kind sdk.Kind
		can  bool
	}{{sdk.KindRuntime, runtime}, {sdk.KindDevice, device}} {
		if says := slices.Contains(info.Kinds, c.kind); says != c.can {
			return fmt.Errorf("plugin %s: that its kinds are %v and whether it implements the interface of kind %s (%t) must agree", info.Name, info.Kinds, c.kind, c.can)
		}
	}
	return nil
}

// pickVersion is the newest version both sides speak; when there is none it is
// our newest, for the host to refuse with both named.
func pickVersion(host string) int {
	offered := map[int]bool{}
	for v := range strings.SplitSeq(host, ",") {
		if n, err := strconv.Atoi(strings.TrimSpace(v)); err == nil {
			offered[n] = true
		}
	}
	for _, v := range versions {
		if offered[v] {
			return v
		}
	}
	return versions[0]
}

// useOneProcessor lets Go code run on one processor at a time, unless the
// plugin or its environment has asked for a number. A plugin waits for others
// nearly always, and for each further processor, whether it is used or not, Go
// keeps partly used memory of every size of object: hundreds of KiB.
func useOneProcessor() {
	if os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) == runtime.NumCPU() {
		runtime.GOMAXPROCS(1)
	}
}

// watchParent calls stop when the host is gone: when the pipe it holds on our
// stdin closes, which the kernel does however it died. Hosts without such a
// pipe are noticed by their process id.
func watchParent(stop func()) {
	defer stop()
	if os.Getenv(handshake.LifelineKey) == handshake.LifelineStdin {
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	parent := os.Getppid()
	for os.Getppid() == parent {
		time.Sleep(2 * time.Second)
	}
}
