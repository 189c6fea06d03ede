// Command belay-plugins is every first-party plugin that needs no cgo, in one
// binary: processes of one file share its pages. It is the plugin it is called
// as, so a plugin directory holds a link to it per plugin.
//
//	belay-plugins --list    print the names
//	belay-plugins NAME      be that plugin, as a link called NAME is
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/belay-edge/belay/plugins/containerd"
	"github.com/belay-edge/belay/plugins/docker"
	"github.com/belay-edge/belay/plugins/edgetpu"
	"github.com/belay-edge/belay/plugins/process"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "dev"

// entry is one plugin: a constructor, so that only the one in use is made.
type entry struct {
	name string
	make func(version string) sdk.Plugin
}

var plugins = []entry{
	{"containerd", func(v string) sdk.Plugin { return containerd.New(v) }},
	{docker.Name, func(v string) sdk.Plugin { return docker.New(v) }},
	{edgetpu.Name, func(v string) sdk.Plugin { return edgetpu.New(v) }},
	{process.Name, func(v string) sdk.Plugin { return process.New(v) }},
}

func main() {
	if filepath.Base(os.Args[0]) == docker.CopierName { // no plugin: what the plugin docker leaves behind
		os.Exit(docker.Copy(os.Args))
	}
	p, code := choose(os.Args, os.Stdout, os.Stderr)
	if p == nil {
		os.Exit(code)
	}
	serve.Main(p)
}

// choose finds the plugin to be; nil with an exit code when there is none.
func choose(args []string, stdout, stderr io.Writer) (sdk.Plugin, int) {
	name := ""
	if len(args) > 0 {
		name = filepath.Base(args[0])
	}
	if p := find(name); p != nil {
		return p, 0
	}
	if len(args) == 2 {
		switch args[1] {
		case "--list":
			for _, n := range names() {
				fmt.Fprintln(stdout, n)
			}
			return nil, 0
		case "--version":
			fmt.Fprintln(stdout, version)
			return nil, 0
		}
		if p := find(args[1]); p != nil {
			return p, 0
		}
		name = args[1]
	}
	fmt.Fprintf(stderr, "belay-plugins: no plugin %q here; there is: %s\n"+
		"Call it by a link with a plugin's name, or: belay-plugins NAME | --list | --version\n", name, strings.Join(names(), " "))
	return nil, 2
}

func find(name string) sdk.Plugin {
	for _, e := range plugins {
		if e.name == name {
			return e.make(version)
		}
	}
	return nil
}

func names() []string {
	var all []string
	for _, e := range plugins {
		all = append(all, e.name)
	}
	slices.Sort(all)
	return all
}
