package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/agent/internal/localapi"
)

func addOutput(c *cobra.Command, output *string) {
	c.Flags().StringVarP(output, "output", "o", "table", "table or json")
}

// show prints v as JSON or lets table print it.
func show(t terminal, output string, v any, table func() error) error {
	switch output {
	case "table":
		return table()
	case "json":
		e := json.NewEncoder(t.out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	return usageError{fmt.Errorf("--output is %q: must be table or json", output)}
}

// inspector makes a command that asks the running agent.
func inspector(t terminal, use, short string, ask func(c *cobra.Command, api *localapi.Client, output string) error) *cobra.Command {
	var o options
	var output string
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			api, err := localapi.NewClient(cfg.RunDir)
			if err != nil {
				return err
			}
			return ask(c, api, output)
		},
	}
	o.addConfig(c.Flags())
	o.addRunDir(c.Flags())
	addOutput(c, &output)
	return c
}

func statusCommand(t terminal) *cobra.Command {
	return inspector(t, "status", "Show what the running agent is and whether it hears its control plane",
		func(c *cobra.Command, api *localapi.Client, output string) error {
			s, err := api.Status(c.Context())
			if err != nil {
				return err
			}
			return show(t, output, s, func() error { return statusTable(t, s) })
		})
}

func statusTable(t terminal, s localapi.Status) error {
	w := tabwriter.NewWriter(t.out, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s:\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("Instance", "%s in cluster %s", s.Instance, s.Cluster)
	row("Agent", "%s, process %d, since %s", s.Version, s.PID, s.StartedAt.Format(time.RFC3339))
	l := s.Link
	switch {
	case l.Connected:
		row("Link", "connected to %s over %s since %s", l.Address, l.Transport, l.Since.Format(time.RFC3339))
	case l.Since.IsZero():
		row("Link", "not connected yet")
	default:
		row("Link", "not connected since %s", l.Since.Format(time.RFC3339))
	}
	if !l.Connected && l.LastError != "" {
		row("Last error", "%s", l.LastError)
	}
	var tasks []string
	for _, status := range slices.Sorted(maps.Keys(s.Tasks)) {
		tasks = append(tasks, fmt.Sprintf("%d %s", s.Tasks[status], status))
	}
	if len(tasks) == 0 {
		tasks = []string{"none"}
	}
	row("Tasks", "%s", strings.Join(tasks, ", "))
	row("Offers", "%d CPU shares, %d MiB of memory", s.CPU, s.MemoryMiB)
	for _, name := range slices.Sorted(maps.Keys(s.Images)) {
		i := s.Images[name]
		disk, removed := "", ""
		if i.DiskTotalBytes > 0 {
			disk = fmt.Sprintf("; disk %d %% used", usedPercent(i.DiskTotalBytes, i.DiskFreeBytes))
		}
		if i.Removed > 0 {
			removed = fmt.Sprintf("; %d removed, %d MiB freed", i.Removed, mib(i.FreedBytes))
		}
		row("Images", "%s: %d of %d MiB, %d of them (%d MiB) unused%s%s", name, i.Count, mib(i.Bytes), i.Unused, mib(i.UnusedBytes), disk, removed)
	}
	for _, p := range s.Problems {
		row("Problem", "%s", p)
	}
	return w.Flush()
}

func tasksCommand(t terminal) *cobra.Command {
	return inspector(t, "tasks", "List the tasks the running agent holds",
		func(c *cobra.Command, api *localapi.Client, output string) error {
			tasks, err := api.Tasks(c.Context())
			if err != nil {
				return err
			}
			return show(t, output, map[string]any{"tasks": tasks}, func() error {
				w := tabwriter.NewWriter(t.out, 0, 8, 2, ' ', 0)
				fmt.Fprintln(w, "TASK\tDEFINITION\tSTATUS\tDESIRED\tNOTE")
				for _, task := range tasks {
					note := task.Note
					if task.StoppedReason != "" {
						note = task.StoppedReason
					}
					fmt.Fprintf(w, "%s\t%s:%d\t%s\t%s\t%s\n", task.ID, task.Family, task.Revision, task.LastStatus, task.DesiredStatus, note)
				}
				if err := w.Flush(); err != nil {
					return err
				}
				for _, task := range tasks {
					for _, c := range task.Containers {
						if len(c.Devices) > 0 {
							fmt.Fprintf(t.out, "\n%s: container %s has %s\n", task.ID, c.Name, strings.Join(c.Devices, ", "))
						}
					}
				}
				return nil
			})
		})
}

func pluginsCommand(t terminal) *cobra.Command {
	return inspector(t, "plugins", "List the plugins of the running agent",
		func(c *cobra.Command, api *localapi.Client, output string) error {
			plugins, err := api.Plugins(c.Context())
			if err != nil {
				return err
			}
			return show(t, output, map[string]any{"plugins": plugins}, func() error {
				w := tabwriter.NewWriter(t.out, 0, 8, 2, ' ', 0)
				fmt.Fprintln(w, "PLUGIN\tKINDS\tVERSION\tPROTO\tCHECKSUM\tSTATE\tRESTARTS\tMEMORY")
				for _, p := range plugins {
					memory := "-"
					if p.MemoryBytes > 0 {
						memory = fmt.Sprintf("%d MiB", (p.MemoryBytes+1<<20-1)>>20)
					}
					protocol := "-"
					if p.Protocol > 0 {
						protocol = strconv.Itoa(p.Protocol)
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%.12s\t%s\t%d\t%s\n", p.Name, cmp.Or(strings.Join(p.Kinds, ","), "-"), cmp.Or(p.Version, "-"),
						protocol, cmp.Or(p.Checksum, "-"), p.State, p.Restarts, memory)
				}
				if err := w.Flush(); err != nil {
					return err
				}
				for _, p := range plugins {
					if p.LastError != "" {
						fmt.Fprintf(t.out, "\n%s: %s\n", p.Name, p.LastError)
					} else if p.LastDown != "" {
						fmt.Fprintf(t.out, "\n%s: up again after: %s\n", p.Name, p.LastDown)
					}
					for _, m := range p.ProtectionsMissing {
						fmt.Fprintf(t.out, "\n%s: protection missing: %s\n", p.Name, m)
					}
				}
				return nil
			})
		})
}

// mib rounds up: what is there at all is not nothing.
func mib(bytes uint64) uint64 { return (bytes + 1<<20 - 1) >> 20 }
