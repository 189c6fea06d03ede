package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/controlplane"
	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

func (c *cli) taskdef() *cobra.Command {
	return holder("taskdef", "What tasks are made of", c.taskdefRegister(), c.taskdefList(), c.taskdefDescribe(), c.taskdefDeregister())
}

func (c *cli) taskdefRegister() *cobra.Command {
	var token clientToken
	var file string
	cmd := &cobra.Command{
		Use:   "register -f FILE",
		Short: "Register a revision of a task definition, JSON or YAML",
		Long: `Register a revision of a task definition, in the JSON that
"aws ecs register-task-definition --cli-input-json" takes, or YAML of it.
A file is YAML when it is named so (.yaml, .yml), or does not begin with {.
Fields that are kept without effect are warned about on standard error.`,
		Example: "  belay taskdef register -f web.json\n  jq .family=\\\"web2\\\" web.json | belay taskdef register -f -",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return usagef("-f FILE is missing (- for standard input)")
			}
			doc, err := c.readDocument(file)
			if err != nil {
				return err
			}
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.RegisterTaskDefinition,
				&apiv1.RegisterTaskDefinitionRequest{ClientToken: token.value(), Document: string(doc)})
			if connect.CodeOf(err) == connect.CodeInvalidArgument {
				return refusedDocument(file, err)
			}
			if err != nil {
				return err
			}
			td := res.GetTaskDefinition()
			for _, w := range td.GetWarnings() {
				fmt.Fprintf(c.stderr, "warning: %s\n", w)
			}
			return c.showTaskdef(td, func() { fmt.Fprintf(c.stdout, "%s:%d registered\n", td.GetFamily(), td.GetRevision()) })
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "file to read, - for standard input")
	token.flag(cmd)
	return cmd
}

// refusedDocument puts the file's name before the problems, one a line.
func refusedDocument(file string, err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err
	}
	if file == "-" {
		file = "standard input"
	}
	problems := strings.Split(strings.TrimSpace(ce.Message()), "\n")
	return exitError{exitFailure, "the task definition in " + file + " is refused:\n  " + strings.Join(problems, "\n  ")}
}

// readDocument reads a definition as JSON whose lines are those of the file.
func (c *cli) readDocument(file string) ([]byte, error) {
	in, name := c.stdin, "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in, name = f, file
	}
	text, err := io.ReadAll(io.LimitReader(in, controlplane.MaxTaskDefinitionBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(text) > controlplane.MaxTaskDefinitionBytes {
		return nil, fmt.Errorf("%s has more than %d KiB: that is no task definition", name, controlplane.MaxTaskDefinitionBytes>>10)
	}
	start := strings.TrimSpace(string(text))
	ext := strings.ToLower(filepath.Ext(file))
	if ext == ".json" || start == "" || (ext != ".yaml" && ext != ".yml" && start[0] == '{') {
		return text, nil
	}
	doc, err := yamlToJSON(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return doc, nil
}

// showTaskdef prints a definition with its document as an object, not as text.
func (c *cli) showTaskdef(td *apiv1.TaskDefinition, table func()) error {
	if c.flags.output == "table" {
		table()
		return nil
	}
	raw, err := taskdefJSON(td)
	if err != nil {
		return err
	}
	return c.showRaw(raw)
}

func taskdefJSON(td *apiv1.TaskDefinition) ([]byte, error) {
	document := json.RawMessage(td.GetDocument())
	if len(document) == 0 || !json.Valid(document) {
		document = json.RawMessage("null")
	}
	warnings := td.GetWarnings()
	if warnings == nil {
		warnings = []string{}
	}
	return json.Marshal(struct {
		Family       string          `json:"family"`
		Revision     uint32          `json:"revision"`
		Status       string          `json:"status"`
		RegisteredAt string          `json:"registeredAt"`
		Warnings     []string        `json:"warnings"`
		Document     json.RawMessage `json:"document"`
	}{td.GetFamily(), td.GetRevision(), td.GetStatus(), td.GetRegisteredAt(), warnings, document})
}

func (c *cli) listTaskdefs(ctx context.Context, family string, inactive bool) (*apiv1.ListTaskDefinitionsResponse, error) {
	all := &apiv1.ListTaskDefinitionsResponse{}
	for {
		res, err := call(ctx, c, apiv1connect.BelayClient.ListTaskDefinitions, &apiv1.ListTaskDefinitionsRequest{
			Page: nextPage(all.GetNextToken()), Family: family, Inactive: inactive,
		})
		if err != nil {
			return nil, err
		}
		all.TaskDefinitions = append(all.TaskDefinitions, res.GetTaskDefinitions()...)
		all.NextToken, all.StoreRevision = res.GetNextToken(), res.GetStoreRevision()
		if all.NextToken == "" {
			return all, nil
		}
	}
}

func (c *cli) taskdefList() *cobra.Command {
	var family string
	var inactive bool
	cmd := &cobra.Command{
		Use: "list", Short: "List task definitions", Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := c.listTaskdefs(cmd.Context(), family, inactive)
			if err != nil {
				return err
			}
			return c.show(all, func() {
				var rows [][]string
				for _, td := range all.GetTaskDefinitions() {
					rows = append(rows, []string{fmt.Sprintf("%s:%d", td.GetFamily(), td.GetRevision()), td.GetStatus(),
						fmt.Sprint(len(td.GetWarnings())), c.age(td.GetRegisteredAt())})
				}
				c.table([]string{"TASK DEFINITION~", "STATUS", "WARNINGS", "AGE"}, rows)
			})
		},
	}
	cmd.Flags().StringVar(&family, "family", "", "only this family's")
	cmd.Flags().BoolVar(&inactive, "inactive", false, "list the deregistered ones instead")
	c.completeFlag(cmd, "family", c.families)
	return cmd
}

func (c *cli) taskdefDescribe() *cobra.Command {
	return &cobra.Command{
		Use: "describe FAMILY[:REVISION]", Short: "Describe a task definition; without revision, the latest active one",
		Args:              exactly("FAMILY[:REVISION]"),
		Example:           "  belay taskdef describe web:3 -o json | jq .document > web.json",
		ValidArgsFunction: c.completeArg(c.families),
		RunE: func(cmd *cobra.Command, args []string) error {
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DescribeTaskDefinition,
				&apiv1.DescribeTaskDefinitionRequest{TaskDefinition: args[0]})
			if err != nil {
				return err
			}
			td := res.GetTaskDefinition()
			return c.showTaskdef(td, func() {
				c.fields("task definition", fmt.Sprintf("%s:%d", td.GetFamily(), td.GetRevision()), "status", td.GetStatus(),
					"registered", c.since(td.GetRegisteredAt()))
				for _, w := range td.GetWarnings() {
					fmt.Fprintf(c.stdout, "warning: %s\n", w)
				}
				var doc any
				if json.Unmarshal([]byte(td.GetDocument()), &doc) == nil {
					fmt.Fprintln(c.stdout)
					was := c.flags.output
					c.flags.output = "json"
					_ = c.showRaw([]byte(td.GetDocument()))
					c.flags.output = was
				}
			})
		},
	}
}

func (c *cli) taskdefDeregister() *cobra.Command {
	var token clientToken
	cmd := &cobra.Command{
		Use: "deregister FAMILY:REVISION", Short: "Deregister a revision: nothing new runs from it",
		Args: exactly("FAMILY:REVISION"), ValidArgsFunction: c.completeArg(c.revisions),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !strings.Contains(args[0], ":") {
				return usagef("%q names no revision; say which, as in %s:1", args[0], args[0])
			}
			res, err := call(cmd.Context(), c, apiv1connect.BelayClient.DeregisterTaskDefinition,
				&apiv1.DeregisterTaskDefinitionRequest{ClientToken: token.value(), TaskDefinition: args[0]})
			if err != nil {
				return err
			}
			td := res.GetTaskDefinition()
			return c.showTaskdef(td, func() { fmt.Fprintf(c.stdout, "%s:%d deregistered\n", td.GetFamily(), td.GetRevision()) })
		},
	}
	token.flag(cmd)
	return cmd
}
