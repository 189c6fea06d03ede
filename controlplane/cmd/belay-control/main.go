// Command belay-control is Belay's control plane: the operator API, the
// scheduler, and the end of every device's tunnel, on one port.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker.
var version = "dev"

const usage = `belay-control is Belay's control plane.

usage:
  belay-control serve [--data-dir DIR] [--listen HOST:PORT] [--advertise ADDR[,ADDR]]
                      [--config FILE] [--etcd-endpoints URL[,URL]] [--log-level LEVEL]
  belay-control version

Run "belay-control serve --help" for what the options mean.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// After the first signal a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	var u *usageError
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(0)
	case errors.As(err, &u):
		fmt.Fprintln(os.Stderr, "belay-control:", err)
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "belay-control:", err)
	os.Exit(1)
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

func run(ctx context.Context, args []string, _ io.Reader, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return &usageError{errors.New("no command given")}
	}
	switch args[0] {
	case "serve":
		return serveCommand(ctx, args[1:], stdout, stderr)
	case "version", "--version":
		_, err := fmt.Fprintln(stdout, "belay-control", version)
		return err
	case "help", "--help", "-h":
		_, err := fmt.Fprint(stdout, usage)
		return err
	}
	fmt.Fprint(stderr, usage)
	return &usageError{fmt.Errorf("unknown command %q", args[0])}
}
