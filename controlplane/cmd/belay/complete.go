package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

// completionTimeout: nobody waits longer for a Tab.
const completionTimeout = 2 * time.Second

// source lists what could be meant, each "value\tdescription".
type source func(context.Context) ([]string, error)

func (c *cli) complete(cmd *cobra.Command, flag string, values ...string) {
	c.must(cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)))
}

func (c *cli) completeFlag(cmd *cobra.Command, flag string, s source) {
	c.must(cmd.RegisterFlagCompletionFunc(flag, c.completion(s)))
}

// must holds for flags that the line before declared.
func (c *cli) must(err error) {
	if err != nil {
		panic(err)
	}
}

// completeArg completes the first argument only.
func (c *cli) completeArg(s source) cobra.CompletionFunc {
	complete := c.completion(s)
	return func(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return complete(cmd, args, part)
	}
}

func (c *cli) completion(s source) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, part string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
		defer cancel()
		all, err := s(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveError
		}
		var out []string
		for _, v := range all {
			if strings.HasPrefix(v, part) {
				out = append(out, v)
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

func (c *cli) clusterNames(ctx context.Context) ([]string, error) {
	res, err := call(ctx, c, apiv1connect.BelayClient.ListClusters, &apiv1.ListClustersRequest{Page: nextPage("")})
	var out []string
	for _, cl := range res.GetClusters() {
		out = append(out, cl.GetName())
	}
	return out, err
}

func (c *cli) activationIDs(ctx context.Context) ([]string, error) {
	res, err := call(ctx, c, apiv1connect.BelayClient.ListActivations, &apiv1.ListActivationsRequest{Page: nextPage("")})
	var out []string
	for _, a := range res.GetActivations() {
		out = append(out, a.GetId()+"\t"+a.GetCluster()+" "+a.GetDescription())
	}
	return out, err
}

func (c *cli) instanceIDs(ctx context.Context) ([]string, error) {
	res, err := call(ctx, c, apiv1connect.BelayClient.ListInstances, &apiv1.ListInstancesRequest{Page: nextPage("")})
	var out []string
	for _, i := range res.GetInstances() {
		out = append(out, i.GetId()+"\t"+i.GetHostname())
	}
	return out, err
}

func (c *cli) taskIDs(ctx context.Context) ([]string, error) {
	res, err := call(ctx, c, apiv1connect.BelayClient.ListTasks, &apiv1.ListTasksRequest{Page: nextPage(""), All: true})
	var out []string
	for _, t := range res.GetTasks() {
		out = append(out, t.GetId()+"\t"+t.GetTaskDefinition()+" "+t.GetLastStatus())
	}
	return out, err
}

func (c *cli) families(ctx context.Context) ([]string, error) {
	res, err := call(ctx, c, apiv1connect.BelayClient.ListTaskDefinitions, &apiv1.ListTaskDefinitionsRequest{Page: nextPage("")})
	var out []string
	seen := map[string]bool{}
	for _, td := range res.GetTaskDefinitions() {
		if !seen[td.GetFamily()] {
			seen[td.GetFamily()] = true
			out = append(out, td.GetFamily())
		}
	}
	return out, err
}

func (c *cli) revisions(ctx context.Context) ([]string, error) {
	res, err := call(ctx, c, apiv1connect.BelayClient.ListTaskDefinitions, &apiv1.ListTaskDefinitionsRequest{Page: nextPage("")})
	var out []string
	for _, td := range res.GetTaskDefinitions() {
		out = append(out, fmt.Sprintf("%s:%d", td.GetFamily(), td.GetRevision()))
	}
	return out, err
}
