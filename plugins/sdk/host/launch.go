package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	hclog "github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/bridge"
	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// Launch starts the executable, checks what it is and configures it. When it
// fails nothing is left running. ctx bounds the launch, not the plugin.
func Launch(ctx context.Context, o Options) (*Plugin, error) {
	return launch(ctx, o, (*Plugin).introduce)
}

// Description is what a plugin says before it is configured.
type Description struct {
	Info            sdk.Info
	ProtocolVersion int
	Options         []sdk.Option
	OptionsKnown    bool // false: it does not say what its configuration may hold
}

// Describe starts the executable, asks what it is, checks that the
// configuration fits its options, and ends it. It never configures it: a
// process of the same plugin may run beside it.
func Describe(ctx context.Context, o Options) (Description, error) {
	p, err := launch(ctx, o, (*Plugin).identify)
	if err != nil {
		return Description{}, err
	}
	p.Kill() // it has done nothing yet
	return Description{Info: p.info, ProtocolVersion: p.version, Options: p.options, OptionsKnown: p.optionsKnown}, nil
}

func launch(ctx context.Context, o Options, introduce func(*Plugin, context.Context) error) (*Plugin, error) {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.StartTimeout == 0 {
		o.StartTimeout = 10 * time.Second
	}
	if o.CloseTimeout == 0 {
		o.CloseTimeout = 4 * time.Second
	}
	if err := checkFile(o.Path); err != nil {
		return nil, err
	}
	if err := checkSocketDir(o.SocketDir); err != nil {
		return nil, failed(sdk.Invalid, err, o.Path, "", "%v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, o.StartTimeout)
	defer cancel()

	argv := slices.Concat(o.Wrap, []string{o.Path}, o.Args)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(environment(os.Environ()), o.Env...)
	if len(o.Outlive) > 0 {
		cmd.Env = append(cmd.Env, handshake.OutliveKey+"="+strings.Join(o.Outlive, ":"))
	}
	stderr := newStderrLog(o.Logger.With("plugin", pluginName(o)))
	p := &Plugin{
		opts:   o,
		proc:   &process{cmd: cmd, wrapped: o.Wrap != nil, place: o.Place, keep: o.KeepLeftovers, more: stderr, exited: make(chan struct{}), swept: make(chan struct{}), heard: make(chan struct{})},
		stderr: stderr,
		closed: make(chan struct{}),
	}
	if err := p.connect(ctx); err != nil {
		return nil, err
	}
	if err := introduce(p, ctx); err != nil {
		p.Kill()
		return nil, err
	}
	return p, nil
}

// Bounds of what is taken from a plugin.
const (
	maxMessage = 16 << 20 // a List of everything a device can hold has less
	maxHeader  = 64 << 10 // where errors travel
	window     = 64 << 10 // in flight, of one call and of all together
	maxKinds   = 16
	maxWords   = 256 // bytes of each of a plugin's last lines, in an error
)

func pluginName(o Options) string {
	if o.Name != "" {
		return o.Name
	}
	return o.Path[strings.LastIndexByte(o.Path, '/')+1:]
}

func checkSocketDir(dir string) error {
	st, err := os.Stat(dir)
	switch {
	case err != nil:
		return fmt.Errorf("socket directory: %w", err)
	case !st.IsDir():
		return fmt.Errorf("socket directory %s is not a directory", dir)
	case st.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("socket directory %s has mode %04o, want 0700: others could talk to the plugin", dir, st.Mode().Perm())
	}
	return handshake.CheckSocketPath(handshake.SocketPath(dir, 1<<22)) // the kernel's largest pid
}

// RemoveSockets removes what plugins of a host that was killed left in a
// socket directory.
func RemoveSockets(dir string) {
	for _, pattern := range []string{handshake.SocketPrefix + "*", "plugin-dir*"} {
		old, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, path := range old {
			_ = os.RemoveAll(path)
		}
	}
}

// environment keeps what programs need and drops what is the host's own
// affair: its systemd sockets and watchdog, its tokens.
func environment(host []string) []string {
	keep := []string{"PATH", "HOME", "TMPDIR", "TZ", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR",
		"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
		"GODEBUG", "GOTRACEBACK", "GOCOVERDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"}
	var env []string
	for _, kv := range host {
		if name, _, _ := strings.Cut(kv, "="); slices.Contains(keep, name) {
			env = append(env, kv)
		}
	}
	return env
}

// connect brings the process up to the point where it answers calls.
func (p *Plugin) connect(ctx context.Context) error {
	alive, ended := context.WithCancel(context.Background())
	p.alive = alive
	dispensed := &connection{}
	p.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  goplugin.HandshakeConfig{MagicCookieKey: handshake.CookieKey, MagicCookieValue: handshake.CookieValue},
		VersionedPlugins: versions(dispensed),
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, _ string) (runner.Runner, error) {
			// Our directory instead of the one go-plugin makes in it: paths
			// of sockets must be short.
			p.proc.cmd.Env = append(append(p.proc.cmd.Env, cmd.Env...), handshake.SocketDirKey+"="+p.opts.SocketDir)
			return p.proc, nil
		},
		SkipHostEnv:      true,
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: p.opts.SocketDir},
		StartTimeout:     p.opts.StartTimeout + time.Minute, // ctx is what counts
		Stderr:           p.stderr,
		Logger:           hclog.NewNullLogger(), // every failure is in our own errors
		// It would keep 64 KiB for each plugin; longer lines come in pieces.
		PluginLogBufferSize: 2 << 10,
		GRPCDialOptions: []grpc.DialOption{
			grpc.WithContextDialer(p.dial),
			grpc.WithReadBufferSize(4 << 10), grpc.WithWriteBufferSize(4 << 10),
			// What a plugin may make us hold: go-plugin would take any message.
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
			grpc.WithMaxHeaderListSize(maxHeader),
			grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
		},
	})

	unhook := context.AfterFunc(ctx, func() { _ = p.proc.Kill(context.Background()) })
	defer unhook()
	go func() {
		<-p.proc.exited
		ended()
		_ = os.Remove(handshake.SocketPath(p.opts.SocketDir, p.proc.pid())) // it may have had no time to
		time.AfterFunc(lingering, p.stderr.end)
	}()

	addr, err := p.client.Start()
	if err == nil {
		p.addr = addr
		var rpc goplugin.ClientProtocol
		if rpc, err = p.client.Client(); err == nil {
			_, err = rpc.Dispense("belay")
		}
	}
	if err == nil {
		p.conn, p.version = dispensed.conn, p.client.NegotiatedVersion()
		return nil
	}
	if p.proc.pid() == 0 {
		p.client.Kill()
		close(p.proc.exited) // nothing will
		close(p.proc.swept)
		return explainExec(p.opts.Path, err)
	}
	timedOut := ctx.Err()
	// A plugin that just exited is given a moment, so that its own exit and
	// words are reported and not our kill.
	if p.proc.firstLine() == "" && timedOut == nil {
		select {
		case <-p.proc.exited:
		case <-time.After(lingering):
		}
	}
	explained := p.explainStart(err, timedOut)
	p.Kill()
	if errors.Is(explained, ErrExited) {
		explained = p.explainStart(err, timedOut) // now with all of stderr
	}
	return explained
}

// explainStart says why there was no usable handshake.
func (p *Plugin) explainStart(err, ctxErr error) error {
	path, line := p.opts.Path, p.proc.firstLine()
	version, isHandshake := handshake.ParseVersion(line)
	switch {
	case isHandshake && (version < sdk.OldestProtocolVersion || version > sdk.ProtocolVersion):
		return failed(sdk.Invalid, ErrVersion, path, "install a plugin and an agent of versions that fit",
			"the plugin speaks plugin protocol %d, this agent speaks %d to %d", version, sdk.OldestProtocolVersion, sdk.ProtocolVersion)
	case isHandshake:
		return failed(sdk.Unavailable, err, path, "", "no connection to the plugin's socket: %v", err)
	case line != "":
		return failed(sdk.Invalid, ErrNotPlugin, path, "it is a program, but not a Belay plugin", "the first line it printed is not a plugin's: %.100q", line)
	case errors.Is(ctxErr, context.Canceled):
		return failed(sdk.Canceled, ctxErr, path, "", "given up by the caller")
	case ctxErr != nil:
		return failed(sdk.Deadline, ErrTimeout, path, "it may be no plugin, or hang", "no handshake within %s%s", p.opts.StartTimeout, p.said())
	case p.hasExited():
		return failed(sdk.Unavailable, ErrExited, path, "", "it ended before it was ready: %s%s", p.exitStatus(), p.said())
	}
	return failed(sdk.Invalid, ErrNotPlugin, path, "it is a program, but not a Belay plugin", "it closed its output without a handshake%s", p.said())
}

// said is what it last wrote. The end of a process is often seen before its
// last words, and those say why.
func (p *Plugin) said() string {
	if p.hasExited() {
		select {
		case <-p.proc.heard:
		case <-time.After(2 * lingering):
		}
	}
	lines := p.stderr.tail()
	if len(lines) == 0 {
		return "; it wrote nothing to stderr"
	}
	for i, l := range lines {
		if len(l) > maxWords {
			lines[i] = strings.ToValidUTF8(l[:maxWords], "") + "..."
		}
	}
	return "; its last words: " + strings.Join(lines, " / ")
}

// versions are those the host speaks; the connection is the same for all.
func versions(c *connection) map[int]goplugin.PluginSet {
	m := map[int]goplugin.PluginSet{}
	for v := sdk.OldestProtocolVersion; v <= sdk.ProtocolVersion; v++ {
		m[v] = goplugin.PluginSet{"belay": c}
	}
	return m
}

// describe asks who it is.
func (p *Plugin) describe(ctx context.Context) error {
	if p.version == 1 {
		d, err := pluginpb.NewPluginClient(p.conn).Describe(ctx, &pluginpb.DescribeRequest{})
		p.info = bridge.FromInfo(d)
		return err
	}
	m, err := pluginv2.NewPluginClient(p.conn).Describe(ctx, &pluginpb.DescribeRequest{})
	d := bridge.FromDescription(m)
	p.info, p.optionsKnown, p.options = d.Info, d.OptionsKnown, d.Options
	p.abilities = d.Abilities
	return err
}

func (p *Plugin) configure(ctx context.Context) error {
	m := bridge.ToConfig(p.opts.Config)
	var err error
	if p.version == 1 {
		_, err = pluginpb.NewPluginClient(p.conn).Configure(ctx, m)
	} else {
		_, err = pluginv2.NewPluginClient(p.conn).Configure(ctx, m)
	}
	return err
}

// introduce asks who it is, checks its configuration and hands it over.
func (p *Plugin) introduce(ctx context.Context) error {
	if err := p.identify(ctx); err != nil {
		return err
	}
	cctx, done := p.call(ctx)
	defer done()
	if err := p.configure(cctx); err != nil {
		return p.explainCall(ctx, "configure", err)
	}
	return nil
}

// identify asks who it is and checks its configuration.
func (p *Plugin) identify(ctx context.Context) error {
	cctx, done := p.call(ctx)
	defer done()
	if err := p.describe(cctx); err != nil {
		return p.explainCall(ctx, "describe", err)
	}
	if want := p.opts.Name; want != "" && p.info.Name != want {
		return failed(sdk.Invalid, ErrName, p.opts.Path, fmt.Sprintf("rename the file to %q", p.info.Name),
			"the file is called %q, the plugin in it %q: they must be the same", want, p.info.Name)
	}
	if !handshake.ValidName(p.info.Name) {
		return failed(sdk.Invalid, ErrName, p.opts.Path, "", "the plugin calls itself %q: want 1 to 63 of a-z, 0-9 and -", p.info.Name)
	}
	if len(p.info.Version) > sdk.MaxRuntimeText || len(p.info.Kinds) > maxKinds || slices.ContainsFunc(p.info.Kinds, func(k sdk.Kind) bool { return len(k) > 32 }) {
		return failed(sdk.Invalid, ErrNonsense, p.opts.Path, "this is a defect of the plugin",
			"it describes itself with a version of %d bytes and %d kinds, want at most %d, and %d of at most 32 bytes", len(p.info.Version), len(p.info.Kinds), sdk.MaxRuntimeText, maxKinds)
	}
	if p.optionsKnown {
		if err := sdk.CheckConfig(p.options, p.opts.Config.JSON); err != nil {
			return failed(sdk.Invalid, errors.Join(ErrConfig, err), p.opts.Path, "correct the plugin's configuration", "%v", err)
		}
	}
	return nil
}

func (p *Plugin) explainCall(ctx context.Context, op string, err error) error {
	op = op + " plugin " + pluginName(p.opts)
	select {
	case <-p.proc.exited:
	case <-time.After(20 * time.Millisecond): // a broken connection is seen before the exit that broke it
	}
	e := p.explain(ctx, op, err)
	var se *sdk.Error
	if errors.As(e, &se) && se.Kind == sdk.Unavailable && !p.hasExited() && isGarbage(err) {
		return failed(sdk.Unavailable, ErrGarbage, p.opts.Path, "this is a defect of the plugin", "what it sends on its socket is not the plugin protocol (%s)", se.Message)
	}
	if p.hasExited() && errors.As(e, &se) {
		return failed(sdk.Unavailable, ErrExited, p.opts.Path, "", "it ended during %s: %s%s", op, p.exitStatus(), p.said())
	}
	if errors.As(e, &se) {
		if se.Op == "" {
			se.Op = op
		}
		if se.Kind == sdk.Deadline {
			se.Err = errors.Join(ErrTimeout, se.Err)
		}
	}
	return e
}

// dial connects to the plugin's socket and checks who listens there.
func (p *Plugin) dial(ctx context.Context, _ string) (net.Conn, error) {
	if p.alive.Err() != nil {
		return nil, errors.New("the plugin has ended")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, p.addr.Network(), p.addr.String())
	if err != nil {
		return nil, err
	}
	// The kernel closes it too, unless a program the plugin started inherited
	// the other end: then every call would wait for ever.
	context.AfterFunc(p.alive, func() { c.Close() })
	if u, ok := c.(*net.UnixConn); ok {
		if err := p.checkPeer(u); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

// connection is the go-plugin "plugin" that hands out its gRPC connection.
type connection struct {
	goplugin.NetRPCUnsupportedPlugin
	conn *grpc.ClientConn
}

// GRPCServer is the plugin side's; never called here.
func (*connection) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error {
	return errors.New("not served from here")
}

// GRPCClient implements goplugin.GRPCPlugin.
func (c *connection) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	c.conn = conn
	return c, nil
}
