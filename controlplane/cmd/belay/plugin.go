package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

func (c *cli) plugin() *cobra.Command {
	return holder("plugin", "Plugins of instances", c.pluginList())
}

func (c *cli) pluginList() *cobra.Command {
	var instance string
	cmd := &cobra.Command{
		Use: "list --instance ID", Short: "List the plugins of an instance", Args: exactly(),
		Example: "  belay plugin list --instance 3f2a",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if instance == "" {
				return usagef("--instance is missing: belay instance list shows them")
			}
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DescribeInstance, &apiv1.DescribeInstanceRequest{Id: instance})
			if err != nil {
				return err
			}
			i := res.GetInstance()
			return c.show(&apiv1.Instance{Id: i.GetId(), Plugins: i.GetPlugins()}, func() { c.pluginTable(i.GetPlugins()) })
		},
	}
	cmd.Flags().StringVar(&instance, "instance", "", "`id` of the instance")
	c.completeFlag(cmd, "instance", c.instanceIDs)
	return cmd
}

// pluginTable shows plugins; what is wrong with them follows, where a line has
// room for it.
func (c *cli) pluginTable(plugins []*apiv1.Plugin) {
	var rows [][]string
	for _, p := range plugins {
		memory := "-"
		if p.GetMemoryBytes() > 0 {
			memory = fmt.Sprintf("%d MiB", (p.GetMemoryBytes()+1<<20-1)>>20)
		}
		protocol := "-"
		if p.GetProtocolVersion() > 0 {
			protocol = fmt.Sprint(p.GetProtocolVersion())
		}
		rows = append(rows, []string{p.GetName(), strings.Join(p.GetKinds(), ","), p.GetVersion(), protocol,
			shortID(p.GetChecksum()), p.GetState(), fmt.Sprint(p.GetRestarts()), memory})
	}
	c.table([]string{"PLUGIN", "KINDS", "VERSION~", "PROTO", "CHECKSUM", "STATE", "RESTARTS", "MEMORY"}, rows)
	for _, p := range plugins {
		if p.GetLastError() != "" {
			fmt.Fprintf(c.stdout, "\n%s: %s\n", p.GetName(), p.GetLastError())
		}
		for _, m := range p.GetProtectionsMissing() {
			fmt.Fprintf(c.stdout, "\n%s: protection missing: %s\n", p.GetName(), m)
		}
	}
}
