// Command belay-images builds the images under images/ and pushes them to a
// registry or writes them as an OCI layout.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/belay-edge/belay/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "belay-images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fl := flag.NewFlagSet("belay-images", flag.ContinueOnError)
	fl.SetOutput(stderr)
	fl.Usage = func() {
		fmt.Fprintf(stderr, "usage: belay-images [-push HOST:PORT | -layout DIR] [flags] [IMAGE]...\nimages: %s (default: workload)\n", strings.Join(images.Names(), ", "))
		fl.PrintDefaults()
	}
	push := fl.String("push", "", "push to this registry, e.g. 127.0.0.1:5000")
	dir := fl.String("layout", "", "write an OCI layout into this directory")
	plain := fl.Bool("plain-http", false, "the registry speaks plain HTTP")
	tag := fl.String("tag", "1", "tag to push")
	user := fl.String("user", "", "user name; the password is read from BELAY_REGISTRY_PASSWORD")
	root := fl.String("root", ".", "root of the repository")
	host := fl.Bool("host-only", false, "only this machine's platform")
	if err := fl.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	names := fl.Args()
	if len(names) == 0 {
		names = []string{images.Workload}
	}
	o := images.Options{Root: *root, HostOnly: *host}
	var digests map[string]v1.Hash
	var err error
	switch {
	case (*push == "") == (*dir == ""):
		return errors.New("give either -push or -layout")
	case *push != "":
		digests, err = images.Push(ctx, images.Target{Registry: *push, PlainHTTP: *plain, Tag: *tag,
			Username: *user, Password: os.Getenv("BELAY_REGISTRY_PASSWORD")}, o, names...)
	default:
		digests, err = images.Layout(ctx, *dir, o, names...)
	}
	if err != nil {
		return err
	}
	for _, n := range names {
		if *push != "" {
			fmt.Fprintf(stdout, "%s/%s:%s@%s\n", *push, n, *tag, digests[n])
		} else {
			fmt.Fprintf(stdout, "%s@%s\n", n, digests[n])
		}
	}
	return nil
}
