// Command belay is the operator's command line for a Belay control plane.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// Exit codes. `task run --wait` exits with the container's code, or with
// exitNotRun when there is none to have.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitNotRun      = 125
	exitInterrupted = 130
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second Ctrl-C ends the program the hard way.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &cli{stdin: stdin, stdout: stdout, stderr: stderr, now: time.Now}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	return c.report(ctx, cmd, err)
}

// report prints an error for a person and chooses the exit code.
func (c *cli) report(ctx context.Context, cmd *cobra.Command, err error) int {
	var exit exitError
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		if exit.message != "" {
			fmt.Fprintf(c.stderr, "belay: %s\n", exit.message)
		}
		return exit.code
	case errors.As(err, &usage), strings.HasPrefix(err.Error(), "unknown command"):
		fmt.Fprintf(c.stderr, "belay: %s\nRun '%s --help' for usage.\n", err, cmd.CommandPath())
		return exitUsage
	case ctx.Err() != nil:
		fmt.Fprintln(c.stderr, "belay: interrupted")
		return exitInterrupted
	}
	fmt.Fprintf(c.stderr, "belay: %s\n", c.explain(err))
	return exitFailure
}

// exitError ends the program with a code of its own.
type exitError struct {
	code    int
	message string
}

func (e exitError) Error() string { return e.message }

// usageError is a command line that cannot be meant.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// cli is what the commands of one invocation share.
type cli struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	now            func() time.Time
	flags          globalFlags
	conn           *connection // made by the first call of connect
}

type globalFlags struct {
	addr, tokenFile, ca, context string
	output                       string
	timeout                      time.Duration
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "belay",
		Short: "Run containers and processes on devices that live elsewhere",
		Long: `Run containers and processes on devices that live elsewhere.

belay talks to a control plane. It finds it, most important first, by the flags
--addr, --token-file and --ca; by the context named with --context; by the
environment, BELAY_ADDR, BELAY_TOKEN and BELAY_CA (a file); and by the current
context of the context file, $XDG_CONFIG_HOME/belay/config.toml
(~/.config/belay/config.toml), or the file that BELAY_CONFIG names:

    current = "lab"

    [contexts.lab]
    addr = "lab.example.com:7443"
    token-file = "lab.token"          # or token = "..."
    ca = "lab-ca.pem"

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. "task run --wait"
exits with the container's exit code, or 125 when the task never started.`,
		Example: `  belay activation create --cluster lab --limit 10
  belay taskdef register -f web.json
  belay task run --cluster lab --taskdef web --wait
  belay logs 3f2a`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE:          group,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			switch c.flags.output {
			case "table", "json", "yaml":
			default:
				return usagef("-o %q: must be table, json or yaml", c.flags.output)
			}
			if c.flags.timeout <= 0 {
				return usagef("--timeout %s: must be more than 0", c.flags.timeout)
			}
			return nil
		},
	}
	f := root.PersistentFlags()
	f.StringVar(&c.flags.addr, "addr", "", "control plane, host:port (default $BELAY_ADDR, else 127.0.0.1:7443)")
	f.StringVar(&c.flags.tokenFile, "token-file", "", "file with the API token (default $BELAY_TOKEN, the token itself)")
	f.StringVar(&c.flags.ca, "ca", "", "file with the control plane's CA (default $BELAY_CA)")
	f.StringVar(&c.flags.context, "context", "", "context of the context file to use")
	f.StringVarP(&c.flags.output, "output", "o", "table", "output: table, json or yaml")
	f.DurationVar(&c.flags.timeout, "timeout", 30*time.Second, "give up on a call after this long")
	c.complete(root, "output", "table", "json", "yaml")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(c.activation(), c.cluster(), c.instance(), c.taskdef(), c.task(), c.logs(), c.plugin(), c.version())
	return root
}

// group is the action of a command that only holds others.
func group(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		hint := ""
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = fmt.Sprintf(", did you mean %q?", near[0])
		}
		return usagef("unknown command %q for %q%s", args[0], cmd.CommandPath(), hint)
	}
	if err := cmd.Help(); err != nil {
		return err
	}
	return exitError{code: exitUsage}
}

// holder makes a command that only holds others.
func holder(use, short string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: group}
	cmd.SuggestionsMinimumDistance = 2
	cmd.AddCommand(children...)
	return cmd
}

// exactly makes a wrong number of arguments a usage error that names them.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef("%s is missing", strings.Join(names[len(args):], " and "))
		case len(args) > len(names):
			return usagef("unexpected argument %q", args[len(names)])
		}
		return nil
	}
}
