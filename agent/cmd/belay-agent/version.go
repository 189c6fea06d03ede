package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// version is set by the linker for a release: -X main.version=1.2.3.
var version string

// agentVersion is the release, or the commit this was built from.
func agentVersion() string {
	if version != "" {
		return version
	}
	commit, dirty := "", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision" && len(s.Value) >= 12:
				commit = "+" + s.Value[:12]
			case s.Key == "vcs.modified" && s.Value == "true":
				dirty = ".dirty"
			}
		}
	}
	return "0.0.0-dev" + commit + dirty
}

func versionCommand(t terminal) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "version",
		Short: "Show the versions of this agent and of what it speaks",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version        string `json:"version"`
				WireVersion    int    `json:"wireVersion"`
				PluginProtocol int    `json:"pluginProtocol"`
				Go             string `json:"go"`
				Platform       string `json:"platform"`
			}{agentVersion(), wire.Version, sdk.ProtocolVersion, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
			return show(t, output, v, func() error {
				_, err := fmt.Fprintf(t.out, "belay-agent %s (tunnel protocol %d, plugin protocol %d, %s, %s)\n",
					v.Version, v.WireVersion, v.PluginProtocol, v.Go, v.Platform)
				return err
			})
		},
	}
	addOutput(c, &output)
	return c
}
