// Demo runs the whole of Belay on this machine in a throwaway directory: a
// control plane, a device enrolled with an activation code, a container from
// a registry (as root) or a host process (otherwise), until Ctrl-C.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is what is up, in the order it came up.
type demo struct {
	out   io.Writer
	began time.Time
	undo  []func() error
}

func (d *demo) step(format string, args ...any) {
	fmt.Fprintf(d.out, "%5.1fs  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

// later registers what brings something down again.
func (d *demo) later(f func() error) { d.undo = append(d.undo, f) }

func (d *demo) down() (errs error) {
	for i := len(d.undo) - 1; i >= 0; i-- {
		errs = errors.Join(errs, d.undo[i]())
	}
	return errs
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	binDir := fs.String("bin", "bin", "directory with the built binaries")
	if err := fs.Parse(args); err != nil {
		return err
	}
	abs, err := filepath.Abs(*binDir)
	if err != nil {
		return err
	}
	bin := rig.Binaries(abs)
	dir, err := os.MkdirTemp("", "belay-demo")
	if err != nil {
		return err
	}
	d := &demo{out: out, began: time.Now()}
	defer func() {
		d.step("taking everything down")
		if e := d.down(); e != nil {
			err = errors.Join(err, e)
		}
		if err != nil {
			fmt.Fprintf(out, "the logs are kept in %s\n", dir)
			return
		}
		err = os.RemoveAll(dir)
	}()
	up, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()

	control, err := rig.StartControl(up, bin, dir)
	if err != nil {
		return err
	}
	d.later(func() error { _, err := control.Stop(15 * time.Second); return err })
	d.step("control plane   belay-control serve --listen %s (TCP and UDP)", control.Addr)
	cli := control.CLI()

	code, err := cli.Activate(up, "demo", 1)
	if err != nil {
		return err
	}
	d.step("activation      belay activation create --cluster demo: %.16s...", code)
	agent, err := rig.Enroll(up, bin, filepath.Join(dir, "device"), code)
	if err != nil {
		return err
	}
	d.step("device          belay-agent enroll: registered")

	document, err := d.workload(up, dir, bin, agent)
	if err != nil {
		return err
	}
	runtime := "containerd"
	if agent.ContainerdAddress == "" {
		runtime = "process"
	}
	if err := agent.Restart(); err != nil {
		return err
	}
	d.later(func() error { _, err := agent.Stop(20 * time.Second); return err })
	ids, err := cli.Connected(up, "demo", 1, runtime)
	if err != nil {
		return errors.Join(err, errors.New(agent.Tail(4096)))
	}
	d.step("tunnel          belay-agent run: instance %s connected, plugin %s ready", ids[0], runtime)

	id, err := cli.RunTask(up, "demo", document)
	if err != nil {
		return err
	}
	d.later(func() error { return stopTask(cli, id) })
	d.step("task            belay task run --taskdef hello: %s", id)
	task, err := cli.Await(up, id, "the task to run", time.Minute, func(t rig.Task) bool { return t.LastStatus == "RUNNING" || t.LastStatus == "STOPPED" })
	if err != nil {
		return err
	}
	if task.LastStatus != "RUNNING" {
		return fmt.Errorf("the task did not run: %s", task.StoppedReason)
	}
	d.step("running         pid %d, image %s", task.Container("hello").PID, orNone(task.Container("hello").ImageDigest))
	if err := rig.Until(up, nil, "the task's output", func() error {
		logs, err := cli.Run(up, "logs", id, "--tail", "3")
		if err == nil && len(logs) == 0 {
			err = errors.New("no output yet")
		}
		if err == nil {
			fmt.Fprintf(out, "\n$ belay logs %s --tail 3\n%s", id, logs)
		}
		return err
	}); err != nil {
		return err
	}
	for _, show := range [][]string{{"instance", "list", "--cluster", "demo"}, {"task", "describe", id}} {
		text, err := cli.Run(up, show...)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "\n$ belay %s\n%s", strings.Join(show, " "), text)
	}
	if os.Getenv("DEMO_EXIT") == "1" {
		fmt.Fprintln(out, "\nThe task really ran: done (DEMO_EXIT=1).")
		return nil
	}
	fmt.Fprintf(out, "\nIt stays up until Ctrl-C. In another shell:\n\n")
	for _, e := range cli.Env {
		fmt.Fprintf(out, "  export %s\n", e)
	}
	fmt.Fprintf(out, "  export PATH=%s:$PATH\n  belay task list --cluster demo\n  belay logs %s\n\n", bin, id)
	select {
	case <-ctx.Done():
		fmt.Fprintln(out)
		return nil
	case <-control.Done():
		return fmt.Errorf("the control plane ended by itself:\n%s", control.Tail(4096))
	case <-agent.Done():
		return fmt.Errorf("the agent ended by itself:\n%s", agent.Tail(4096))
	}
}

// workload decides what runs: as root a container, pulled from a registry of
// our own and run by a containerd of our own; otherwise a host process.
func (d *demo) workload(ctx context.Context, dir string, bin rig.Binaries, agent *rig.Agent) (document string, err error) {
	if os.Getuid() != 0 {
		d.step("runtime         not root, so no containers: the task is a host process (run as root for containerd)")
		return `{"family":"hello","belay":{"runtime":"process"},"containerDefinitions":[{"name":"hello",
			"command":["/bin/sh","-c","while :; do echo hello from $BELAY_CONTAINER_NAME, a process; sleep 1; done"]}]}`, nil
	}
	registry, err := rig.StartRegistry(ctx, filepath.Join(dir, "registry"), rig.RegistryOptions{})
	if err != nil {
		return "", err
	}
	d.later(registry.Close)
	containerd, err := rig.StartContainerd(ctx, filepath.Join(dir, "containerd"))
	if err != nil {
		return "", err
	}
	d.later(containerd.Close)
	d.step("runtime         a containerd of our own, and a registry at %s", registry.Address)
	digests, err := images.Push(ctx, images.Target{Registry: registry.Address, PlainHTTP: true}, images.Options{Root: ".", HostOnly: true}, images.Workload)
	if err != nil {
		return "", err
	}
	image := registry.Address + "/workload:1"
	d.step("image           %s built and pushed, %.19s...", image, digests[images.Workload])
	agent.ContainerdAddress = containerd.Address
	return fmt.Sprintf(`{"family":"hello","containerDefinitions":[{"name":"hello","image":%q,"memory":32,"command":["tick","1s"]}]}`, image), nil
}

func stopTask(cli *rig.CLI, id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 45*time.Second)
	defer cancel()
	if _, err := cli.Run(ctx, "task", "stop", id, "--reason", "the demo ends"); err != nil {
		return err
	}
	_, err := cli.Await(ctx, id, "the task to stop", 40*time.Second, func(t rig.Task) bool { return t.LastStatus == "STOPPED" })
	return err
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
