// Command belay-sim is a fleet of simulated devices in one process: each
// enrols and holds a tunnel of its own, by the code of the agent, and says of
// every task that it runs. It is for measuring control planes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var c config
	flag.Func("activation", "activation `code`; several for more than 1000 devices, used up one after the other", func(s string) error {
		c.codes = append(c.codes, s)
		return nil
	})
	flag.IntVar(&c.devices, "devices", 100, "how many devices")
	flag.StringVar(&c.transport, "transport", "auto", "auto, quic or tcp")
	flag.IntVar(&c.enrolling, "enrolling", 32, "how many enrol at the same time")
	flag.DurationVar(&c.summary, "summary", time.Second, "how often to print how many are connected, to stderr")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), `belay-sim --activation CODE --devices N

A line of JSON on stdout for every session that begins or ends:
  {"at":1763721000123456789,"device":17,"up":true,"transport":"quic"}
at is nanoseconds of Unix time. "enrolled" and "connected" lines tell how many
there were when all had enrolled, and when all were connected for the first time.

`)
		flag.PrintDefaults()
	}
	flag.Parse()
	if err := check(c, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "belay-sim:", err)
		os.Exit(2)
	}
	if err := newFleet(c, os.Stdout, os.Stderr).run(ctx); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "belay-sim:", err)
		os.Exit(1)
	}
}

func check(c config, args []string) error {
	switch {
	case len(args) > 0:
		return fmt.Errorf("takes no argument, got %q", args[0])
	case len(c.codes) == 0:
		return errors.New("no --activation: make one with: belay activation create --limit 1000")
	case c.devices < 1 || c.devices > 100_000:
		return fmt.Errorf("%d devices: want 1 to 100000", c.devices)
	case c.enrolling < 1 || c.enrolling > 1000:
		return fmt.Errorf("%d enrolling: want 1 to 1000", c.enrolling)
	case c.summary <= 0:
		return errors.New("--summary must be more than 0")
	}
	return nil
}
