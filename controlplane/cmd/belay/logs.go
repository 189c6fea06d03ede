package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
)

func (c *cli) logs() *cobra.Command {
	var q apiv1.TaskLogsRequest
	cmd := &cobra.Command{
		Use:   "logs TASK",
		Short: "Show the output of a task's container, read from its device",
		Long: `Show the output of a task's container, read from its device, which must be
connected. Standard output and standard error of the container go to those of
this program. With -o json each line is an object {"stream", "line"}, with
-o yaml a document of the same.`,
		Example: "  belay logs 3f2a --tail 50\n  belay logs 3f2a --container sidecar 2>/dev/null",
		Args:    exactly("TASK"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
			return c.completeArg(c.taskIDs)(cmd, args, part)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Id = args[0]
			return c.readLogs(cmd.Context(), &q)
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.Container, "container", "", "container to read (default the only one, or the first essential one)")
	f.Uint32Var(&q.Tail, "tail", 0, "only the last N lines of each stream (default all that is kept)")
	f.Uint32Var(&q.Attempt, "attempt", 0, "attempt to read (default the latest)")
	return cmd
}

func (c *cli) readLogs(ctx context.Context, q *apiv1.TaskLogsRequest) error {
	conn, err := c.connect()
	if err != nil {
		return err
	}
	// --timeout bounds silence, not the length of the whole: a long log over
	// a slow link takes its time.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(c.flags.timeout, func() { cancel(context.DeadlineExceeded) })
	defer silence.Stop()
	stream, err := conn.api.TaskLogs(ctx, connect.NewRequest(q))
	if err == nil {
		defer stream.Close()
		lines := lineSplitter{c: c}
		for stream.Receive() {
			silence.Reset(c.flags.timeout)
			if err := lines.write(stream.Msg().GetStream(), stream.Msg().GetData()); err != nil {
				return fmt.Errorf("write the log: %w", err)
			}
		}
		if err = stream.Err(); err == nil {
			return lines.flush()
		}
		if ferr := lines.flush(); ferr != nil {
			return fmt.Errorf("write the log: %w", ferr)
		}
	}
	if cause := context.Cause(ctx); cause == context.DeadlineExceeded {
		return cause
	}
	return err
}

// lineSplitter puts chunks where they belong: as they are to the standard
// streams, or line by line as objects.
type lineSplitter struct {
	c       *cli
	partial map[string][]byte
}

const longestLine = 1 << 20 // a longer one is shown in parts

func (l *lineSplitter) write(stream string, data []byte) error {
	if l.c.flags.output == "table" {
		out := l.c.stdout
		if stream == "stderr" {
			out = l.c.stderr
		}
		_, err := out.Write(data)
		return err
	}
	if l.partial == nil {
		l.partial = map[string][]byte{}
	}
	rest := append(l.partial[stream], data...)
	for {
		end := bytes.IndexByte(rest, '\n')
		if end < 0 && len(rest) < longestLine {
			l.partial[stream] = rest
			return nil
		}
		line := rest
		if end >= 0 {
			line = rest[:end]
		}
		if err := l.object(stream, line); err != nil {
			return err
		}
		rest = rest[min(len(line)+1, len(rest)):]
	}
}

func (l *lineSplitter) flush() error {
	for _, stream := range []string{"stdout", "stderr"} {
		if rest := l.partial[stream]; len(rest) > 0 {
			if err := l.object(stream, rest); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *lineSplitter) object(stream string, line []byte) error {
	raw, err := json.Marshal(struct {
		Stream string `json:"stream"`
		Line   string `json:"line"`
	}{stream, string(line)})
	if err != nil {
		return err
	}
	if l.c.flags.output == "yaml" {
		if _, err := fmt.Fprintln(l.c.stdout, "---"); err != nil {
			return err
		}
		return l.c.showRaw(raw)
	}
	_, err = fmt.Fprintf(l.c.stdout, "%s\n", raw)
	return err
}
