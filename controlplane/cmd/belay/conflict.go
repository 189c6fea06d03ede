package main

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

// instanceStatus is the status with what an operator has to see to.
func instanceStatus(i *apiv1.Instance) string {
	switch {
	case i.GetConflict() != nil:
		return "CONFLICT"
	case i.GetDuplicate() != nil:
		return "DUPLICATE"
	}
	return i.GetStatus()
}

// conflictTable says what is wrong with an instance and what to do about it.
func (c *cli) conflictTable(i *apiv1.Instance) {
	if d := i.GetDuplicate(); d != nil {
		fmt.Fprintf(c.stdout, `
DUPLICATE: another machine (%s, from %s) has a copy of this instance's identity. It was
refused, first %s, last %s. Enrol it by itself; if it is the one to stay:
  belay instance rebind %s
`, dash(d.GetHostname()), dash(d.GetAddress()), c.until(d.GetFirstSeenAt()), c.until(d.GetLastSeenAt()), shortID(i.GetId()))
	}
	k := i.GetConflict()
	if k == nil {
		return
	}
	fmt.Fprintf(c.stdout, `
CONFLICT since %s: the control plane was restored from a backup that lacks some of
what this device has. Its tasks go on as they are. Decide which side is right:
  belay instance adopt %s   # the device
  belay instance drop %[2]s    # the control plane
`, c.since(k.GetSince()), shortID(i.GetId()))
	if !k.GetReported() {
		fmt.Fprintln(c.stdout, "The device has not told yet what it holds.")
	}
	var rows [][]string
	add := func(tasks []*apiv1.ConflictTask, where string) {
		for _, t := range tasks {
			rows = append(rows, []string{shortID(t.GetId()), t.GetTaskDefinition(), t.GetLastStatus(), where})
		}
	}
	add(k.GetOnlyOnDevice(), "only on the device")
	add(k.GetOnlyInStore(), "only in the control plane")
	if len(rows) > 0 {
		fmt.Fprintln(c.stdout)
		c.table([]string{"TASK", "DEFINITION~", "STATUS", "KNOWN"}, rows)
	}
}

func (c *cli) instanceAdopt() *cobra.Command {
	return settle(c, "adopt ID", "Settle a conflict: take over what the device has", `Settle an instance's conflict after a restore by taking over what the device has:
tasks that only the device knows become tasks of the control plane, and tasks
that it has ended, or never had, are STOPPED. Nothing changes on the device.`,
		"adopted: the control plane has taken over what its device has",
		apiv1connect.BelayClient.AdoptInstance, func(token, id string) *apiv1.AdoptInstanceRequest {
			return &apiv1.AdoptInstanceRequest{ClientToken: token, Id: id}
		})
}

func (c *cli) instanceDrop() *cobra.Command {
	return settle(c, "drop ID", "Settle a conflict: make the device follow the control plane", `Settle an instance's conflict after a restore by making the device follow the
control plane: it stops the tasks that the control plane does not know, and
starts those that it should run.`,
		"dropped: its device is to follow the control plane",
		apiv1connect.BelayClient.DropInstance, func(token, id string) *apiv1.DropInstanceRequest {
			return &apiv1.DropInstanceRequest{ClientToken: token, Id: id}
		})
}

func (c *cli) instanceRebind() *cobra.Command {
	return settle(c, "rebind ID", "Let another machine take the place of an instance's", `Forget which machine an instance is on, and that a copy of its disk was refused:
the next machine that connects with its key is taken for it. The session it has
now ends. Switch off the machine that is not to be it first.`,
		"released for the machine that connects next",
		apiv1connect.BelayClient.RebindInstance, func(token, id string) *apiv1.RebindInstanceRequest {
			return &apiv1.RebindInstanceRequest{ClientToken: token, Id: id}
		})
}

// settle makes a command that changes one instance and prints it.
func settle[Q, A any, PA interface {
	*A
	GetInstance() *apiv1.Instance
}](c *cli, use, short, long, done string,
	m func(apiv1connect.BelayClient, context.Context, *connect.Request[Q]) (*connect.Response[A], error), request func(token, id string) *Q,
) *cobra.Command {
	var token clientToken
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Args: exactly("ID"),
		ValidArgsFunction: c.completeArg(c.instanceIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, m, request(token.value(), args[0]))
			if err != nil {
				return err
			}
			i := PA(res).GetInstance()
			return c.show(i, func() { fmt.Fprintf(c.stdout, "instance %s %s\n", i.GetId(), done) })
		},
	}
	token.flag(cmd)
	return cmd
}
