package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// CopierName is what the process is called that copies output: one for all
// containers, which the plugin starts and which outlives it. It ends when
// there is nothing to copy. To be one is for the program the plugin is in: it
// calls Copy when it is called by this name.
const CopierName = "belay-docker-output"

// copier is the plugin's side of that process.
type copier struct {
	runDir, socket string
	log            *slog.Logger

	mu       sync.Mutex
	children []int // started and not reaped
}

func (c *copier) outputs() string           { return filepath.Join(c.runDir, "outputs") }
func (c *copier) dir(name string) string    { return filepath.Join(c.outputs(), name) }
func lockPath(runDir string) string         { return filepath.Join(runDir, "output.lock") }
func wakePath(runDir string) string         { return filepath.Join(runDir, "output.wake") }
func (c *copier) forget(name string) error  { return os.RemoveAll(c.dir(name)) }
func (c *copier) has(name string) bool      { _, err := os.Stat(c.dir(name)); return err == nil }
func (c *copier) finished(name string) bool { return isDone(c.dir(name)) }

// plan notes where an attempt's output goes. The copier is woken by ensure.
func (c *copier) plan(j job) error {
	if err := os.MkdirAll(c.dir(j.Name), 0o700); err != nil {
		return err
	}
	return save(filepath.Join(c.dir(j.Name), jobFile), j)
}

// unfinished tells whether there is anything to copy.
func unfinished(outputs string) bool {
	entries, _ := os.ReadDir(outputs)
	for _, e := range entries {
		if !isDone(filepath.Join(outputs, e.Name())) {
			return true
		}
	}
	return false
}

// ensure sees to it that a copier runs and looks at what there is to do.
func (c *copier) ensure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	lock, err := os.OpenFile(lockPath(c.runDir), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); err == nil {
		_ = syscall.Flock(int(lock.Fd()), syscall.LOCK_UN)
		return c.spawn()
	}
	f, err := os.OpenFile(wakePath(c.runDir), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil // it is just coming up and will look anyway
	}
	defer f.Close()
	_, _ = f.Write([]byte{1}) // full: it is awake
	return nil
}

func (c *copier) spawn() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	// Our own program, even where an upgrade has replaced the file. Nobody
	// waits for this child in a thread: it is reaped on SIGCHLD, see watch.
	pid, err := syscall.ForkExec("/proc/self/exe", []string{CopierName, c.runDir, c.socket}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"GOMAXPROCS=1", serve.OutliveKey + "=" + os.Getenv(serve.OutliveKey)}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start the process that copies output: %w", err)
	}
	c.children = append(c.children, pid)
	return nil
}

// watch keeps a copier running while there is something to copy, for the life
// of this process.
func (c *copier) watch() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	go func() {
		tick := time.NewTicker(5 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-children:
				c.reap()
			case <-tick.C:
			}
			if unfinished(c.outputs()) {
				if err := c.ensure(); err != nil {
					c.log.Warn("output is not copied", "err", err)
				}
			}
		}
	}()
}

// reap takes the ends of copiers, and of nobody else's children.
func (c *copier) reap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.children = slices.DeleteFunc(c.children, func(pid int) bool {
		got, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		return got == pid || errors.Is(err, syscall.ECHILD)
	})
}

// complete waits until all output of an exited attempt is copied, and copies
// it itself if nobody does. What cannot be written is given up.
func (c *copier) complete(ctx context.Context, e *engine, name string) error {
	if !c.has(name) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		if c.finished(name) {
			return nil
		}
		err := c.once(ctx, e, name)
		var lost *lostError
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		case errors.As(err, &lost), errors.Is(err, context.DeadlineExceeded):
			c.log.Warn("the end of a container's output is lost", "container", name, "err", err)
			return nil
		case !errors.Is(err, errBusy):
			return err
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			c.log.Warn("the end of a container's output is lost: it is still being written", "container", name)
			return nil
		}
	}
}

func (c *copier) once(ctx context.Context, e *engine, name string) error {
	x, err := take(e, c.dir(name), false)
	if err != nil {
		return err
	}
	defer x.close()
	return x.copyAll(ctx, false)
}

// Copy is the process that copies output, called with the arguments that the
// plugin gave it. It returns an exit code.
func Copy(args []string) int {
	if len(args) != 3 {
		fmt.Fprintf(os.Stderr, "%s: started by the plugin %s, not by hand\n", CopierName, Name)
		return 2
	}
	if err := serve.Outlive(); err != nil { // nobody reads this but in a test
		fmt.Fprintf(os.Stderr, "%s: it ends with its plugin: %v\n", CopierName, err)
	}
	runDir := args[1]
	lock, err := os.OpenFile(lockPath(runDir), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 1
	}
	if err := syscall.Mkfifo(wakePath(runDir), 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		return 1
	}
	for {
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			return 0 // there is one
		}
		if err := copyUntilIdle(runDir, newEngine(args[2])); err != nil {
			return 1
		}
		_ = syscall.Flock(int(lock.Fd()), syscall.LOCK_UN)
		// Whoever came just now saw the lock held and started nobody.
		if !unfinished(filepath.Join(runDir, "outputs")) {
			return 0
		}
	}
}

// linger is how long a copier stays without anything to do.
const linger = 10 * time.Second

func copyUntilIdle(runDir string, e *engine) error {
	wake, err := os.OpenFile(wakePath(runDir), os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer wake.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	outputs := filepath.Join(runDir, "outputs")
	ended := make(chan string)
	busy := map[string]bool{}
	woken := make(chan struct{}, 1)
	go func() {
		b := make([]byte, 64)
		for {
			if _, err := wake.Read(b); err != nil {
				return
			}
			select {
			case woken <- struct{}{}:
			default:
			}
		}
	}()
	for {
		entries, err := os.ReadDir(outputs)
		if err != nil {
			return nil // the run directory is gone
		}
		for _, entry := range entries {
			name := entry.Name()
			if dir := filepath.Join(outputs, name); !busy[name] && !isDone(dir) {
				busy[name] = true
				go func() {
					follow(ctx, e, dir)
					ended <- name
				}()
			}
		}
		var idle <-chan time.Time
		if len(busy) == 0 {
			idle = time.After(linger)
		}
		select {
		case <-woken:
		case name := <-ended:
			delete(busy, name)
		case <-idle:
			return nil
		}
	}
}

// follow copies one attempt's output until it is complete or the attempt gone.
func follow(ctx context.Context, e *engine, dir string) {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		begun := time.Now()
		x, err := take(e, dir, true)
		if err == nil {
			err = x.copyAll(ctx, true)
			x.close()
		}
		if err == nil || errors.Is(err, fs.ErrNotExist) && !isAway(err) {
			return
		}
		if _, gone := os.Stat(dir); gone != nil {
			return
		}
		if time.Since(begun) > 10*time.Second {
			wait = 50 * time.Millisecond
		}
		if pause(ctx, wait) != nil {
			return
		}
	}
}

func isAway(err error) bool {
	var away *awayError
	return errors.As(err, &away)
}

// jobOf reads from a container's labels where its output goes.
func jobOf(name string, labels map[string]string) job {
	return job{Name: name, Stdout: targetFrom(labels[labelStdout]), Stderr: targetFrom(labels[labelStderr])}
}
