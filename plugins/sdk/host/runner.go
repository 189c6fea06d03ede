package host

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
)

// process is one run of a plugin's executable. It implements go-plugin's
// runner.Runner instead of its default one because that waits for the end of
// stdout and stderr before it notices that the process ended, and programs the
// plugin started may hold those open for days.
type process struct {
	cmd      *exec.Cmd
	wrapped  bool                       // cmd becomes the plugin once it is told to
	place    func(context.Context, int) // may be nil
	keep     bool                       // what it leaves
	more     io.Writer                  // gets stdout after the handshake
	stdout   *os.File
	stderr   *os.File
	lifeline *os.File // closed with us: the plugin's stdin ends

	exited chan struct{} // closed once err is set
	swept  chan struct{} // closed once what it left is killed
	heard  chan struct{} // closed once stderr has been read to its end
	err    error         // of Wait; nil for status 0

	mu      sync.Mutex
	running *os.Process // nil until it was started
	doomed  bool        // killed, perhaps before it was started
	first   string      // line of stdout, which should be the handshake
	lacks   []string    // protections
}

// lingering is how long output is still read once the process has ended.
const lingering = 200 * time.Millisecond

// Start implements runner.Runner.
func (p *process) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var childEnds []*os.File
	defer func() {
		for _, f := range childEnds {
			f.Close()
		}
	}()
	pipe := func(childWrites bool) (ours, theirs *os.File, err error) {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, nil, err
		}
		if !childWrites {
			r, w = w, r
		}
		childEnds = append(childEnds, w)
		return r, w, nil
	}
	var in, out, err2, toldGo, tellStatus *os.File // theirs
	var tellGo, status *os.File                    // ours, with a wrapper
	var err error
	if p.lifeline, in, err = pipe(false); err != nil {
		return err
	}
	if p.stdout, out, err = pipe(true); err != nil {
		p.closePipes()
		return err
	}
	if p.stderr, err2, err = pipe(true); err != nil {
		p.closePipes()
		return err
	}
	if p.wrapped {
		tellGo, toldGo, err = pipe(false)
		if err == nil {
			defer tellGo.Close()
			status, tellStatus, err = pipe(true)
		}
		if err != nil {
			p.closePipes()
			return err
		}
		defer status.Close()
		p.cmd.ExtraFiles = []*os.File{toldGo, tellStatus} // WrapGo, WrapStatus
	}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = in, out, err2
	p.cmd.Env = append(p.cmd.Env, handshake.LifelineKey+"="+handshake.LifelineStdin)
	// Its own session: Ctrl-C in the agent's terminal is not for it, and what it
	// leaves behind is known by it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.start(ctx); err != nil {
		p.closePipes()
		return err
	}
	p.mu.Lock()
	p.running = p.cmd.Process
	if p.doomed {
		_ = p.running.Kill()
	}
	p.mu.Unlock()
	if p.place != nil {
		p.place(ctx, p.cmd.Process.Pid)
	}
	if p.wrapped {
		tellStatus.Close() // or its end would never be seen
		if err := p.release(tellGo, status); err != nil {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
			p.mu.Lock()
			p.running = nil
			p.mu.Unlock()
			p.closePipes()
			return err
		}
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
		_ = p.stdout.SetReadDeadline(time.Now().Add(lingering))
		_ = p.stderr.SetReadDeadline(time.Now().Add(lingering))
		p.lifeline.Close()
		if !p.keep {
			endSession(p.cmd.Process.Pid)
		}
		close(p.swept)
	}()
	return nil
}

// start repeats what fails because some other thread forked while the
// executable was still open for writing: whoever installed it is done by then.
func (p *process) start(ctx context.Context) error {
	for range 50 {
		err := p.cmd.Start()
		if !errors.Is(err, syscall.ETXTBSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
		// A Cmd that failed to start cannot be started again.
		again := exec.Command(p.cmd.Path, p.cmd.Args[1:]...)
		again.Env, again.Dir, again.SysProcAttr = p.cmd.Env, p.cmd.Dir, p.cmd.SysProcAttr
		again.Stdin, again.Stdout, again.Stderr, again.ExtraFiles = p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr, p.cmd.ExtraFiles
		*p.cmd = *again
	}
	return syscall.ETXTBSY
}

func (p *process) closePipes() {
	for _, f := range []*os.File{p.lifeline, p.stdout, p.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

// Wait implements runner.Runner.
func (p *process) Wait(context.Context) error {
	<-p.exited
	p.closePipes()
	return p.err
}

// Kill implements runner.Runner.
func (p *process) Kill(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doomed = true
	if p.running == nil {
		return nil
	}
	if err := p.running.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Stdout implements runner.Runner: the first line, then nothing until the end.
func (p *process) Stdout() io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		buf := bufio.NewReaderSize(io.LimitReader(ending{p.stdout}, 64<<10), 2<<10)
		line, _ := buf.ReadString('\n')
		p.mu.Lock()
		p.first = strings.TrimSpace(line)
		p.mu.Unlock()
		_, _ = io.WriteString(w, line)
		// Whatever follows is for the log. A full pipe would stop the plugin,
		// and a line without end would stop go-plugin's reader.
		_, _ = io.Copy(p.more, buf)
		_, _ = io.CopyBuffer(p.more, ending{p.stdout}, make([]byte, 2<<10)) // kept while the plugin lives
		w.Close()
	}()
	return r
}

func (p *process) firstLine() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.first
}

// Stderr implements runner.Runner.
func (p *process) Stderr() io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{&told{Reader: ending{p.stderr}, end: sync.OnceFunc(func() { close(p.heard) })}, p.stderr}
}

// told calls end at the end of what is read.
type told struct {
	io.Reader
	end func()
}

func (t *told) Read(b []byte) (int, error) {
	n, err := t.Reader.Read(b)
	if err != nil {
		t.end()
	}
	return n, err
}

// ending makes any failure of a pipe its end: after the process there is
// nothing to complain to.
type ending struct{ io.Reader }

func (e ending) Read(b []byte) (int, error) {
	n, err := e.Reader.Read(b)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

// Name implements runner.Runner.
func (p *process) Name() string { return p.cmd.Path }

// ID implements runner.Runner.
func (p *process) ID() string { return strconv.Itoa(p.pid()) }

func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running == nil {
		return 0
	}
	return p.running.Pid
}

// Diagnose implements runner.Runner. Launch explains failures itself.
func (p *process) Diagnose(context.Context) string { return "" }

// PluginToHost implements runner.Runner.
func (p *process) PluginToHost(network, address string) (string, string, error) {
	return network, address, nil
}

// HostToPlugin implements runner.Runner.
func (p *process) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}
