package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

func (c *cli) instance() *cobra.Command {
	return holder("instance", "Enrolled devices", c.instanceList(), c.instanceDescribe(), c.instanceDeregister(),
		c.instanceAdopt(), c.instanceDrop(), c.instanceRebind())
}

func (c *cli) listInstances(ctx context.Context, cluster string) (*apiv1.ListInstancesResponse, error) {
	all := &apiv1.ListInstancesResponse{}
	for {
		res, err := call(ctx, c, apiv1connect.BelayClient.ListInstances,
			&apiv1.ListInstancesRequest{Page: nextPage(all.GetNextToken()), Cluster: cluster})
		if err != nil {
			return nil, err
		}
		all.Instances = append(all.Instances, res.GetInstances()...)
		all.NextToken, all.Revision = res.GetNextToken(), res.GetRevision()
		if all.NextToken == "" {
			return all, nil
		}
	}
}

func (c *cli) instanceList() *cobra.Command {
	var cluster string
	cmd := &cobra.Command{
		Use: "list", Short: "List instances", Args: exactly(),
		Example: "  belay instance list --cluster lab\n  belay instance list -o json | jq '.instances[] | select(.connected | not) | .id'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := c.listInstances(cmd.Context(), cluster)
			if err != nil {
				return err
			}
			return c.show(all, func() {
				var rows [][]string
				for _, i := range all.GetInstances() {
					rows = append(rows, []string{shortID(i.GetId()), i.GetCluster(), i.GetHostname(), instanceStatus(i), c.link(i),
						fmt.Sprint(i.GetRunningTasks()), c.age(i.GetRegisteredAt())})
				}
				c.table([]string{"ID", "CLUSTER~", "HOSTNAME~", "STATUS", "LINK", "TASKS", "AGE"}, rows)
			})
		},
	}
	cmd.Flags().StringVar(&cluster, "cluster", "", "only this cluster's")
	c.completeFlag(cmd, "cluster", c.clusterNames)
	return cmd
}

// link says how an instance is connected, or since when it is not.
func (c *cli) link(i *apiv1.Instance) string {
	switch {
	case i.GetConnected():
		return dash(i.GetTransport())
	case i.GetLastSeenAt() != "":
		return "lost " + c.age(i.GetLastSeenAt())
	}
	return "none"
}

func (c *cli) instanceDescribe() *cobra.Command {
	return &cobra.Command{
		Use: "describe ID", Short: "Describe an instance", Args: exactly("ID"),
		Example:           "  belay instance describe 3f2a",
		ValidArgsFunction: c.completeArg(c.instanceIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DescribeInstance, &apiv1.DescribeInstanceRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return c.show(res.GetInstance(), func() { c.instanceTable(res.GetInstance()) })
		},
	}
}

func (c *cli) instanceTable(i *apiv1.Instance) {
	registered, remaining := i.GetResources().GetRegistered(), i.GetResources().GetRemaining()
	connected := "no"
	if i.GetConnected() {
		connected = "yes, by " + i.GetTransport() + ", since " + c.since(i.GetConnectedAt())
	}
	c.fields(
		"id", i.GetId(), "cluster", i.GetCluster(), "hostname", i.GetHostname(), "status", instanceStatus(i),
		"connected", connected, "last seen", c.since(i.GetLastSeenAt()),
		"registered", c.since(i.GetRegisteredAt()), "activation", shortID(i.GetActivationId()), "agent", i.GetAgentVersion(),
		"cpu", fmt.Sprintf("%s cores, %s free", cpuCores(registered.GetCpu()), cpuCores(remaining.GetCpu())),
		"memory", fmt.Sprintf("%d MiB, %d MiB free", registered.GetMemory(), remaining.GetMemory()),
		"ports taken", strings.Join(remaining.GetPorts(), ", "),
		"tasks", fmt.Sprintf("%d running, %d pending", i.GetRunningTasks(), i.GetPendingTasks()))
	c.conflictTable(i)
	if len(i.GetAttributes()) > 0 {
		fmt.Fprintln(c.stdout, "\nattributes:")
		for _, a := range i.GetAttributes() {
			fmt.Fprintf(c.stdout, "  %s = %s\n", a.GetName(), a.GetValue())
		}
	}
	if len(i.GetDevices()) > 0 {
		fmt.Fprintln(c.stdout)
		var rows [][]string
		for _, d := range i.GetDevices() {
			state := "ready"
			switch {
			case !d.GetReady():
				state = "not ready: " + d.GetReason()
			case d.GetHealth() == "unhealthy":
				state = "unhealthy: " + d.GetReason()
			}
			var by []string
			for _, u := range d.GetUsedBy() {
				by = append(by, shortID(u.GetTask())+"/"+u.GetContainer())
			}
			rows = append(rows, []string{d.GetKind(), d.GetPlugin(), d.GetId(), fmt.Sprintf("%d of %d", len(by), d.GetShares()), strings.Join(by, ","), state})
		}
		c.table([]string{"DEVICE", "PLUGIN", "ID~", "USED", "BY~", "STATE~"}, rows)
	}
	if len(i.GetPlugins()) > 0 {
		fmt.Fprintln(c.stdout)
		var rows [][]string
		for _, p := range i.GetPlugins() {
			rows = append(rows, []string{p.GetName(), p.GetVersion(), strings.Join(p.GetKinds(), ","), p.GetState(),
				fmt.Sprint(p.GetRestarts()), p.GetLastError()})
		}
		c.table([]string{"PLUGIN", "VERSION~", "KINDS", "STATE", "RESTARTS", "LAST ERROR~"}, rows)
	}
}

func (c *cli) instanceDeregister() *cobra.Command {
	var token clientToken
	var force bool
	cmd := &cobra.Command{
		Use: "deregister ID", Short: "Deregister an instance: its session ends at once", Args: exactly("ID"),
		ValidArgsFunction: c.completeArg(c.instanceIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DeregisterInstance,
				&apiv1.DeregisterInstanceRequest{ClientToken: token.value(), Id: args[0], Force: force})
			if err != nil {
				return err
			}
			return c.show(res.GetInstance(), func() { fmt.Fprintf(c.stdout, "instance %s deregistered\n", res.GetInstance().GetId()) })
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "although tasks run on it")
	token.flag(cmd)
	return cmd
}
