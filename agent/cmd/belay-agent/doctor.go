package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/agent/internal/system"
)

// Results of a check.
const (
	resultOK   = "OK"
	resultWarn = "WARN" // something will not work as well as it could
	resultFail = "FAIL" // tasks cannot run, or the agent cannot
)

// finding is what one check found.
type finding struct {
	Check  string `json:"check"`
	Result string `json:"result"`
	Found  string `json:"found"`
	Advice string `json:"advice,omitempty"` // what to do; with WARN and FAIL
}

// patient is the device as the checks see it.
type patient struct {
	cfg   config.Config
	root  string // of the file system, "/" but in tests
	euid  int
	facts system.Facts
}

func ok(format string, args ...any) finding {
	return finding{Result: resultOK, Found: fmt.Sprintf(format, args...)}
}

func warn(advice, format string, args ...any) finding {
	return finding{Result: resultWarn, Found: fmt.Sprintf(format, args...), Advice: advice}
}

func fail(advice, format string, args ...any) finding {
	return finding{Result: resultFail, Found: fmt.Sprintf(format, args...), Advice: advice}
}

// checks in the order they are shown: what others depend on first.
var checks = []struct {
	name  string
	check func(context.Context, patient) []finding
}{
	{"user", checkUser},
	{"cgroups", checkCgroups},
	{"state directory", checkState},
	{"disk space", checkDisk},
	{"clock", checkClock},
	{"plugins", checkPlugins},
	{"containerd", checkContainerd},
	{"CNI plugins", checkCNI},
	{"iptables", checkIptables},
	{"control plane", checkControlPlane},
}

func doctorCommand(t terminal) *cobra.Command {
	var o options
	var output string
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Check what the agent needs on this device and say what to do",
		Long: `Check what the agent needs on this device and say what to do.

Nothing is changed. The exit code is 1 when a check fails.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			p, err := newPatient(c.Context(), cfg)
			if err != nil {
				return err
			}
			return examine(c.Context(), t, p, output)
		},
	}
	o.addConfig(c.Flags())
	o.addStateDir(c.Flags())
	o.addRunDir(c.Flags())
	o.addPlugins(c.Flags())
	o.addTransport(c.Flags())
	addOutput(c, &output)
	return c
}

// examine runs every check and shows what it found.
func examine(ctx context.Context, t terminal, p patient, output string) error {
	findings := []finding{}
	failed := 0
	for _, c := range checks {
		for _, f := range c.check(ctx, p) {
			f.Check = c.name
			findings = append(findings, f)
			if f.Result == resultFail {
				failed++
			}
		}
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
	}
	err := show(t, output, map[string]any{"checks": findings, "failed": failed}, func() error {
		w := tabwriter.NewWriter(t.out, 0, 8, 2, ' ', 0)
		for _, f := range findings {
			fmt.Fprintf(w, "%s\t%s\t%s\n", f.Result, f.Check, f.Found)
			if f.Advice != "" {
				fmt.Fprintf(w, "\t\t-> %s\n", f.Advice)
			}
		}
		return w.Flush()
	})
	if err != nil {
		return err
	}
	if failed > 0 {
		return errReported
	}
	return nil
}
