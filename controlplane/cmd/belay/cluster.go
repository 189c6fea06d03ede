package main

import (
	"fmt"

	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

func (c *cli) cluster() *cobra.Command {
	return holder("cluster", "Named groups of instances", c.clusterCreate(), c.clusterList(), c.clusterDescribe(), c.clusterDelete())
}

func (c *cli) clusterCreate() *cobra.Command {
	var token clientToken
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Create a cluster", Example: "  belay cluster create lab", Args: exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.CreateCluster,
				&apiv1.CreateClusterRequest{ClientToken: token.value(), Name: args[0]})
			if err != nil {
				return err
			}
			return c.show(res.GetCluster(), func() { fmt.Fprintf(c.stdout, "cluster %s created\n", res.GetCluster().GetName()) })
		},
	}
	token.flag(cmd)
	return cmd
}

func (c *cli) clusterList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List clusters", Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all := &apiv1.ListClustersResponse{}
			for {
				res, err := call(cmd.Context(), c, apiv1connect.BelayClient.ListClusters,
					&apiv1.ListClustersRequest{Page: nextPage(all.GetNextToken())})
				if err != nil {
					return err
				}
				all.Clusters = append(all.Clusters, res.GetClusters()...)
				all.NextToken, all.Revision = res.GetNextToken(), res.GetRevision()
				if all.NextToken == "" {
					break
				}
			}
			return c.show(all, func() {
				var rows [][]string
				for _, cl := range all.GetClusters() {
					rows = append(rows, []string{cl.GetName(), cl.GetStatus(),
						fmt.Sprintf("%d/%d", cl.GetConnectedInstances(), cl.GetRegisteredInstances()),
						fmt.Sprint(cl.GetRunningTasks()), fmt.Sprint(cl.GetPendingTasks()), c.age(cl.GetCreatedAt())})
				}
				c.table([]string{"NAME~", "STATUS", "CONNECTED", "RUNNING", "PENDING", "AGE"}, rows)
			})
		},
	}
}

func (c *cli) clusterDescribe() *cobra.Command {
	return &cobra.Command{
		Use: "describe NAME", Short: "Describe a cluster", Args: exactly("NAME"),
		ValidArgsFunction: c.completeArg(c.clusterNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DescribeCluster, &apiv1.DescribeClusterRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return c.show(res.GetCluster(), func() {
				cl := res.GetCluster()
				c.fields("name", cl.GetName(), "status", cl.GetStatus(), "created", c.since(cl.GetCreatedAt()),
					"instances", fmt.Sprintf("%d, %d connected", cl.GetRegisteredInstances(), cl.GetConnectedInstances()),
					"tasks", fmt.Sprintf("%d running, %d pending", cl.GetRunningTasks(), cl.GetPendingTasks()))
			})
		},
	}
}

func (c *cli) clusterDelete() *cobra.Command {
	var token clientToken
	cmd := &cobra.Command{
		Use: "delete NAME", Short: "Delete an empty cluster", Args: exactly("NAME"),
		ValidArgsFunction: c.completeArg(c.clusterNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DeleteCluster,
				&apiv1.DeleteClusterRequest{ClientToken: token.value(), Name: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func() { fmt.Fprintf(c.stdout, "cluster %s deleted\n", args[0]) })
		},
	}
	token.flag(cmd)
	return cmd
}
