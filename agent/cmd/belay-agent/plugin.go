package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// pluginCommand is what authors of plugins use; no agent needs to run.
func pluginCommand(t terminal) *cobra.Command {
	c := &cobra.Command{
		Use:   "plugin",
		Short: "Make and test plugins of your own",
		Args:  noSubcommand,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(pluginNewCommand(t), pluginTestCommand(t))
	return c
}

func noSubcommand(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unknown command %q: %s --help lists them", args[0], c.CommandPath())}
	}
	return nil
}

type pluginTest struct {
	config, image, output string
	slow                  int
}

func pluginTestCommand(t terminal) *cobra.Command {
	var o pluginTest
	c := &cobra.Command{
		Use:   "test FILE",
		Short: "Try a plugin against every rule for its kinds",
		Long: `Try a plugin against every rule for its kinds.

FILE is the plugin's executable, under the plugin's name. It is started, asked,
killed and started again as an agent does it, with directories of its own, and
there is a verdict for every rule. A rule that cannot be tried here, for want of
a device for instance, is skipped and says why.

Exit status: 0 no rule is broken, 1 some rule is.`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("%s takes the plugin's file, got %d arguments: see %s --help", c.CommandPath(), len(args), c.CommandPath())}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), t, args[0]) },
	}
	c.Flags().StringVar(&o.config, "config", "", "the plugin's configuration, a `file` such as plugins.d/NAME.toml")
	c.Flags().StringVar(&o.image, "image", "", "image `reference` with a shell in it, for runtimes that have images")
	c.Flags().IntVar(&o.slow, "slow", 0, "stretch the patience of every rule by this `factor`")
	addOutput(c, &o.output)
	return c
}

// verdict is sdktest's, as JSON shows it.
type verdict struct {
	Kind     sdk.Kind       `json:"kind,omitempty"`
	Rule     string         `json:"rule"`
	Result   sdktest.Result `json:"result"`
	Seconds  float64        `json:"seconds"`
	Messages []string       `json:"messages,omitempty"`
	Log      []string       `json:"log,omitempty"`
}

func (o pluginTest) run(ctx context.Context, t terminal, file string) error {
	if o.output != "table" && o.output != "json" {
		return usageError{fmt.Errorf("--output is %q: must be table or json", o.output)}
	}
	check := sdktest.CheckOptions{Executable: file, Image: o.image, Slow: o.slow}
	if o.config != "" {
		var err error
		if check.Config, err = config.ReadPluginFile(o.config); err != nil {
			return usageError{err}
		}
	}
	if o.output == "table" {
		check.OnInfo = func(i sdk.Info) {
			fmt.Fprintf(t.out, "%s %s, of kind %s\n", i.Name, i.Version, kindList(i.Kinds))
		}
		check.OnVerdict = func(v sdktest.Verdict) { showVerdict(t, v) }
	}
	report, err := sdktest.Check(ctx, check)
	if errors.Is(err, context.Canceled) {
		return errors.New("the test was interrupted")
	}
	if err != nil {
		return err
	}
	passed, failed, skipped := report.Count(sdktest.Pass), report.Count(sdktest.Fail), report.Count(sdktest.Skip)
	if o.output == "json" {
		out := struct {
			Name    string     `json:"name"`
			Version string     `json:"version"`
			Kinds   []sdk.Kind `json:"kinds"`
			Passed  bool       `json:"passed"`
			Rules   []verdict  `json:"rules"`
		}{report.Info.Name, report.Info.Version, report.Info.Kinds, report.Passed(), []verdict{}}
		for _, v := range report.Verdicts {
			out.Rules = append(out.Rules, verdict{v.Kind, v.Rule, v.Result, v.Duration.Seconds(), v.Messages, v.Log})
		}
		if err := show(t, "json", out, nil); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(t.out, "%d rules: %d passed, %d failed, %d could not be tried here\n", len(report.Verdicts), passed, failed, skipped)
	}
	if !report.Passed() {
		return errReported
	}
	return nil
}

func kindList(kinds []sdk.Kind) string {
	var s []string
	for _, k := range kinds {
		s = append(s, string(k))
	}
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, " and ")
}

func showVerdict(t terminal, v sdktest.Verdict) {
	fmt.Fprintf(t.out, "%s  %s (%s)\n", v.Result, v.Rule, v.Duration.Round(10*time.Millisecond))
	for _, m := range v.Messages {
		fmt.Fprintf(t.out, "      %s\n", strings.ReplaceAll(m, "\n", "\n      "))
	}
	for _, l := range v.Log {
		fmt.Fprintf(t.out, "      log: %s\n", l)
	}
}
