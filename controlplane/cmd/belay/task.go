package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

func (c *cli) task() *cobra.Command {
	return holder("task", "Running copies of task definitions", c.taskRun(), c.taskList(), c.taskDescribe(), c.taskStop())
}

func (c *cli) taskRun() *cobra.Command {
	var token clientToken
	var q apiv1.RunTaskRequest
	var wait bool
	cmd := &cobra.Command{
		Use:   "run --taskdef FAMILY[:REVISION]",
		Short: "Run tasks, and wait for their end with --wait",
		Long: `Run tasks of a task definition, the latest active revision unless one is named.

With --wait, states and image pulls are shown on standard error until every
task has stopped. The exit code is then that of the first essential container
that did not exit 0, 0 when all did, and 125 when a task never started or its
exit code was lost; the reason is on standard error. Ctrl-C stops waiting,
not the task.`,
		Example: "  belay task run --taskdef web --cluster lab --count 2\n  belay task run --taskdef backup:3 --instance 3f2a --wait",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if q.TaskDefinition == "" {
				return usagef("--taskdef FAMILY[:REVISION] is missing")
			}
			if q.Count < 1 || q.Count > 10 {
				return usagef("--count %d: must be from 1 to 10", q.Count)
			}
			q.ClientToken = token.value()
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.RunTask, &q)
			if err != nil && wait && cmd.Context().Err() == nil {
				return exitError{exitNotRun, c.explain(err)}
			}
			if err != nil {
				return err
			}
			for _, f := range res.GetFailures() {
				fmt.Fprintf(c.stderr, "not placed: %s\n", placement(f))
			}
			code := exitFailure
			var notRun error
			if wait {
				code = exitNotRun
			}
			if missing := int(q.Count) - len(res.GetTasks()); missing > 0 || len(res.GetFailures()) > 0 {
				notRun = exitError{code, fmt.Sprintf("%d of %d tasks could not be placed", max(missing, len(res.GetFailures())), q.Count)}
			}
			if wait && len(res.GetTasks()) > 0 {
				ended, err := c.wait(cmd.Context(), res.GetTasks())
				if err != nil {
					return err
				}
				res.Tasks = ended
				if code, why := outcome(ended); code != exitOK {
					notRun = exitError{code, why}
				}
			}
			table := func() {
				if len(res.GetTasks()) > 0 { // why there are none is said already
					c.taskTable(res.GetTasks())
				}
			}
			if err := c.show(res, table); err != nil {
				return err
			}
			return notRun
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.TaskDefinition, "taskdef", "", "task definition, FAMILY or FAMILY:REVISION")
	f.StringVar(&q.Cluster, "cluster", "default", "cluster to run in")
	f.Uint32Var(&q.Count, "count", 1, "how many, at most 10")
	f.StringVar(&q.Instance, "instance", "", "instance to run on (default any with room)")
	f.StringVar(&q.Group, "group", "", "group of the task (default family:FAMILY)")
	f.StringVar(&q.StartedBy, "started-by", "", "who or what starts it, shown in descriptions")
	f.BoolVar(&wait, "wait", false, "wait until it has stopped and exit with its exit code")
	token.flag(cmd)
	c.completeFlag(cmd, "cluster", c.clusterNames)
	c.completeFlag(cmd, "taskdef", c.families)
	c.completeFlag(cmd, "instance", c.instanceIDs)
	return cmd
}

// placement says why an instance did not take a task.
func placement(p *apiv1.Placement) string {
	where := ""
	if p.GetInstance() != "" {
		where = " on " + shortID(p.GetInstance())
	}
	if p.GetDetail() == "" {
		return p.GetReason() + where
	}
	return p.GetReason() + where + ": " + p.GetDetail()
}

func (c *cli) taskTable(tasks []*apiv1.Task) {
	var rows [][]string
	for _, t := range tasks {
		status := t.GetLastStatus()
		if t.GetDesiredStatus() == "STOPPED" && status != "STOPPED" {
			status += " (stop)"
		}
		if !t.GetInstanceConnected() && status != "STOPPED" {
			status += " ?"
		}
		rows = append(rows, []string{shortID(t.GetId()), t.GetTaskDefinition(), t.GetCluster(), shortID(t.GetInstance()), status, c.age(t.GetCreatedAt())})
	}
	c.table([]string{"ID", "TASK DEFINITION~", "CLUSTER~", "INSTANCE", "STATUS", "AGE"}, rows)
}

func (c *cli) taskList() *cobra.Command {
	var q apiv1.ListTasksRequest
	cmd := &cobra.Command{
		Use: "list", Short: "List tasks: those that should run, unless told otherwise", Args: exactly(),
		Long: `List tasks: those that should run, unless told otherwise.

In the table, "(stop)" marks tasks told to stop, and "?" those whose instance is
not connected: what is shown is the last that was heard.`,
		Example: "  belay task list --cluster lab\n  belay task list --status STOPPED",
		RunE: func(cmd *cobra.Command, _ []string) error {
			q.DesiredStatus, q.LastStatus = strings.ToUpper(q.DesiredStatus), strings.ToUpper(q.LastStatus)
			all := &apiv1.ListTasksResponse{}
			for {
				q.Page = nextPage(all.GetNextToken())
				res, err := call(cmd.Context(), c, apiv1connect.BelayClient.ListTasks, &q)
				if err != nil {
					return err
				}
				all.Tasks = append(all.Tasks, res.GetTasks()...)
				all.NextToken, all.Revision = res.GetNextToken(), res.GetRevision()
				if all.NextToken == "" {
					break
				}
			}
			return c.show(all, func() { c.taskTable(all.GetTasks()) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.Cluster, "cluster", "", "only this cluster's")
	f.StringVar(&q.Instance, "instance", "", "only those on this instance")
	f.StringVar(&q.Family, "family", "", "only of this family")
	f.StringVar(&q.DesiredStatus, "status", "", "only those that should be RUNNING or STOPPED")
	f.StringVar(&q.LastStatus, "last-status", "", "only those last seen so, e.g. PENDING")
	f.BoolVarP(&q.All, "all", "a", false, "the stopped ones too")
	c.completeFlag(cmd, "cluster", c.clusterNames)
	c.completeFlag(cmd, "instance", c.instanceIDs)
	c.completeFlag(cmd, "family", c.families)
	c.complete(cmd, "status", "RUNNING", "STOPPED")
	return cmd
}

func (c *cli) describe(ctx context.Context, id string) (*apiv1.Task, error) {
	res, err := call(ctx, c, apiv1connect.BelayClient.DescribeTask, &apiv1.DescribeTaskRequest{Id: id})
	return res.GetTask(), err
}

func (c *cli) taskDescribe() *cobra.Command {
	return &cobra.Command{
		Use: "describe ID", Short: "Describe a task and its containers", Args: exactly("ID"),
		Example:           "  belay task describe 3f2a\n  belay task describe 3f2a -o json | jq '.containers[].exitCode'",
		ValidArgsFunction: c.completeArg(c.taskIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := c.describe(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.show(t, func() { c.taskFields(t) })
		},
	}
}

func (c *cli) taskFields(t *apiv1.Task) {
	instance := t.GetInstance()
	if !t.GetInstanceConnected() && t.GetLastStatus() != "STOPPED" {
		instance += " (not connected: this is the last that was heard)"
	}
	stop := t.GetStoppedReason()
	if t.GetStopCode() != "" {
		stop = strings.TrimSuffix(t.GetStopCode()+": "+stop, ": ")
	}
	c.fields("id", t.GetId(), "task definition", t.GetTaskDefinition(), "cluster", t.GetCluster(), "instance", instance,
		"runtime", t.GetRuntime(), "group", t.GetGroup(), "started by", t.GetStartedBy(),
		"status", t.GetLastStatus(), "desired", t.GetDesiredStatus(), "health", t.GetHealthStatus(), "note", t.GetNote(),
		"stopped because", stop, "created", c.since(t.GetCreatedAt()), "started", c.since(t.GetStartedAt()),
		"stopping", c.since(t.GetStoppingAt()), "stopped", c.since(t.GetStoppedAt()))
	for _, ct := range t.GetContainers() {
		exit := ""
		if ct.ExitCode != nil {
			exit = fmt.Sprint(ct.GetExitCode())
		}
		essential := ""
		if ct.GetEssential() {
			essential = " (essential)"
		}
		var ports []string
		for _, p := range ct.GetNetworkBindings() {
			ports = append(ports, fmt.Sprintf("%d->%d/%s", p.GetHostPort(), p.GetContainerPort(), p.GetProtocol()))
		}
		var devices []string
		for _, d := range ct.GetDevices() {
			devices = append(devices, d.GetPlugin()+" "+d.GetId())
		}
		fmt.Fprintf(c.stdout, "\ncontainer %s%s\n", ct.GetName(), essential)
		c.fields("  status", ct.GetLastStatus(), "  exit code", exit, "  reason", ct.GetReason(), "  health", ct.GetHealthStatus(),
			"  image", ct.GetImage(), "  digest", ct.GetImageDigest(), "  pull", pulling(ct), "  runtime id", ct.GetRuntimeId(),
			"  pid", positive(ct.GetPid()), "  attempt", positive(ct.GetAttempt()), "  restarts", positive(ct.GetRestarts()),
			"  ip", ct.GetIp(), "  ports", strings.Join(ports, ", "), "  devices", strings.Join(devices, ", "))
	}
}

func positive(n uint32) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func (c *cli) taskStop() *cobra.Command {
	var token clientToken
	var reason string
	var wait bool
	cmd := &cobra.Command{
		Use: "stop ID", Short: "Stop a task", Args: exactly("ID"),
		Example:           "  belay task stop 3f2a --reason 'new firmware' --wait",
		ValidArgsFunction: c.completeArg(c.taskIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.StopTask,
				&apiv1.StopTaskRequest{ClientToken: token.value(), Id: args[0], Reason: reason})
			if err != nil {
				return err
			}
			t := res.GetTask()
			if wait {
				ended, err := c.wait(cmd.Context(), []*apiv1.Task{t})
				if err != nil {
					return err
				}
				t = ended[0]
			}
			return c.show(t, func() {
				if t.GetLastStatus() == "STOPPED" {
					fmt.Fprintf(c.stdout, "task %s has stopped\n", t.GetId())
				} else {
					fmt.Fprintf(c.stdout, "task %s is told to stop\n", t.GetId())
				}
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, shown in the task's description")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until it has stopped")
	token.flag(cmd)
	return cmd
}
