package main

import (
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

func (c *cli) activation() *cobra.Command {
	return holder("activation", "Keys by which devices enrol", c.activationCreate(), c.activationList(), c.activationDelete())
}

func (c *cli) activationCreate() *cobra.Command {
	var token clientToken
	var cluster, description string
	var limit uint32
	var expires time.Duration
	var attrs []string
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create an activation and show its code, once",
		Example: `  belay activation create --cluster lab --limit 10 --expires 1h
  belay-agent enroll --activation "$(belay activation create -o json | jq -r .code)"`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			attributes, err := parseAttributes(attrs)
			if err != nil {
				return err
			}
			if expires < time.Second || expires/time.Second > math.MaxUint32 {
				return usagef("--expires %s: must be at least 1s", expires)
			}
			if limit < 1 {
				return usagef("--limit 0: must be at least 1")
			}
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.CreateActivation, &apiv1.CreateActivationRequest{
				ClientToken: token.value(), Cluster: cluster, Limit: limit,
				ExpiresSeconds: uint32(expires / time.Second), Attributes: attributes, Description: description,
			})
			if err != nil {
				return err
			}
			return c.show(res, func() {
				a := res.GetActivation()
				fmt.Fprintln(c.stdout, res.GetCode())
				fmt.Fprintf(c.stderr, "Up to %d device(s) may enrol into cluster %s with this code; it ends %s.\n"+
					"It is not shown again. On a device: belay-agent enroll --activation CODE\n",
					a.GetLimit(), a.GetCluster(), c.until(a.GetExpiresAt()))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&cluster, "cluster", "default", "cluster the devices join")
	f.Uint32Var(&limit, "limit", 1, "how many devices may enrol, at most 1000")
	f.DurationVar(&expires, "expires", 24*time.Hour, "how long the code is good for, at most 720h")
	f.StringArrayVar(&attrs, "attribute", nil, "NAME=VALUE set on every device enrolled (repeat for more)")
	f.StringVar(&description, "description", "", "what it is for, shown in lists")
	token.flag(cmd)
	c.completeFlag(cmd, "cluster", c.clusterNames)
	return cmd
}

func (c *cli) activationList() *cobra.Command {
	var cluster string
	cmd := &cobra.Command{
		Use: "list", Short: "List activations", Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all := &apiv1.ListActivationsResponse{}
			for {
				res, err := call(cmd.Context(), c, apiv1connect.BelayClient.ListActivations, &apiv1.ListActivationsRequest{
					Page: nextPage(all.GetNextToken()), Cluster: cluster,
				})
				if err != nil {
					return err
				}
				all.Activations = append(all.Activations, res.GetActivations()...)
				all.NextToken, all.Revision = res.GetNextToken(), res.GetRevision()
				if all.NextToken == "" {
					break
				}
			}
			return c.show(all, func() {
				var rows [][]string
				for _, a := range all.GetActivations() {
					rows = append(rows, []string{shortID(a.GetId()), a.GetCluster(), fmt.Sprintf("%d/%d", a.GetUsed(), a.GetLimit()),
						c.until(a.GetExpiresAt()), attributes(a.GetAttributes()), a.GetDescription()})
				}
				c.table([]string{"ID", "CLUSTER~", "USED", "EXPIRES", "ATTRIBUTES~", "DESCRIPTION~"}, rows)
			})
		},
	}
	cmd.Flags().StringVar(&cluster, "cluster", "", "only this cluster's")
	c.completeFlag(cmd, "cluster", c.clusterNames)
	return cmd
}

func (c *cli) activationDelete() *cobra.Command {
	var token clientToken
	cmd := &cobra.Command{
		Use: "delete ID", Short: "Delete an activation: its code is no longer good", Args: exactly("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DeleteActivation,
				&apiv1.DeleteActivationRequest{ClientToken: token.value(), Id: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func() { fmt.Fprintf(c.stdout, "activation %s deleted\n", args[0]) })
		},
		ValidArgsFunction: c.completeArg(c.activationIDs),
	}
	token.flag(cmd)
	return cmd
}

// nextPage asks for the largest page: lists are shown whole.
func nextPage(token string) *apiv1.Page { return &apiv1.Page{Limit: 1000, Token: token} }
