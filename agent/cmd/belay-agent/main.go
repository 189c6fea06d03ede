// Command belay-agent runs on a device: it holds the tunnel to the control
// plane and keeps the device's tasks running, with or without it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/agent/internal/host"
	"github.com/belay-edge/belay/agent/internal/system"
)

// stageArg makes this program what becomes a confined plugin. It is for the
// agent itself: a plugin needs no other program installed, and an agent that
// was upgraded on disk still runs its own.
const stageArg = "plugin-stage"

func main() {
	if len(os.Args) > 1 && os.Args[1] == stageArg {
		os.Exit(host.Stage(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "run" {
		system.SmallPages()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// Exit codes beside 0.
const (
	exitFailure = 1
	exitUsage   = 2 // wrong flags, arguments or configuration
)

// execute runs one command line and tells its exit code.
func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	err := run(ctx, args, stdin, stdout, stderr)
	var u usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errReported):
		return exitFailure
	case errors.As(err, &u):
		fmt.Fprintf(stderr, "belay-agent: %v\n", err)
		return exitUsage
	}
	fmt.Fprintf(stderr, "belay-agent: %v\n", err)
	return exitFailure
}

// errReported ends a command whose failure has been told in its output.
var errReported = errors.New("failed")

// usageError is the caller's to correct.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// terminal is what a command reads and writes.
type terminal struct {
	in       io.Reader
	out, err io.Writer
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	t := terminal{stdin, stdout, stderr}
	root := &cobra.Command{
		Use:   "belay-agent",
		Short: "Keep the tasks of a Belay control plane running on this device",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q: belay-agent --help lists them", args[0])}
			}
			return nil
		},
		RunE:              func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w: see %s --help", err, c.CommandPath())}
	})
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(runCommand(t), enrollCommand(t), statusCommand(t), tasksCommand(t),
		pluginsCommand(t), pluginCommand(t), doctorCommand(t), versionCommand(t))
	return root.ExecuteContext(ctx)
}

// noArgs refuses arguments, naming the first.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no argument, got %q: see %s --help", c.CommandPath(), args[0], c.CommandPath())}
	}
	return nil
}
