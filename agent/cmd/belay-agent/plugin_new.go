package main

import (
	"bufio"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/plugins/sdk"
)

//go:embed scaffold/device
var scaffold embed.FS

// sdkModule is what a plugin's module requires.
const sdkModule = "github.com/belay-edge/belay/plugins/sdk"

func isPluginName(s string) bool {
	return s != "" && len(s) <= 63 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

type pluginNew struct{ kind, module, dir, sdk string }

func pluginNewCommand(t terminal) *cobra.Command {
	var o pluginNew
	c := &cobra.Command{
		Use:   "new --kind device NAME",
		Short: "Make a Go module with a plugin that works",
		Long: `Make a Go module with a plugin that works: it builds, keeps every rule and is
installed by copying one file. As it is made it finds serial ports.

Until the plugin SDK has a release, the module refers to a checkout of Belay: the
one named by --sdk, else the one this program or the working directory is in.`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("%s takes the plugin's name, got %d arguments: see %s --help", c.CommandPath(), len(args), c.CommandPath())}
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return o.run(t, args[0]) },
	}
	c.Flags().StringVar(&o.kind, "kind", "", "device")
	c.Flags().StringVar(&o.module, "module", "", "module `path` (default example.com/NAME)")
	c.Flags().StringVar(&o.dir, "dir", "", "new or empty `directory` (default NAME)")
	c.Flags().StringVar(&o.sdk, "sdk", "", "`directory` plugins/sdk of a checkout of Belay")
	return c
}

func (o pluginNew) run(t terminal, name string) error {
	switch {
	case o.kind == string(sdk.KindRuntime):
		return usageError{errors.New("--kind runtime: there is no skeleton for runtimes, one that keeps the contract is a program of its own: read plugins/process in Belay's sources, and try yours with belay-agent plugin test")}
	case o.kind != string(sdk.KindDevice):
		return usageError{fmt.Errorf("--kind is %q: must be device", o.kind)}
	case !isPluginName(name):
		return usageError{fmt.Errorf("plugin name %q: want 1 to 63 of a-z, 0-9 and -", name)}
	}
	if o.module == "" {
		o.module = "example.com/" + name
	}
	if strings.ContainsAny(o.module, " \t\n\"'`\\") || strings.HasPrefix(o.module, sdkModule) {
		return usageError{fmt.Errorf("--module %q is no module path of yours: want one like example.com/%s", o.module, name)}
	}
	if o.dir == "" {
		o.dir = name
	}
	source, err := o.findSDK()
	if err != nil {
		return usageError{err}
	}
	files, err := o.files(name, source)
	if err != nil {
		return err
	}
	if err := writeNew(o.dir, files); err != nil {
		return err
	}
	fmt.Fprintf(t.out, `made the plugin %s in %s: it finds serial ports, hardware.go is where your hardware goes
the SDK has no release yet: go.mod refers to it at %s
next:
  cd %s
  make                # bin/%s
  make test           # every rule for detectors, over made-up hardware
  sudo make install   # one file in %s
`, name, o.dir, source, o.dir, name, config.Default().PluginDir)
	return nil
}

// findSDK returns the absolute directory of the SDK's sources.
func (o pluginNew) findSDK() (string, error) {
	if o.sdk != "" {
		dir, err := filepath.Abs(o.sdk)
		if err != nil {
			return "", fmt.Errorf("--sdk %s: %w", o.sdk, err)
		}
		for _, d := range []string{dir, filepath.Join(dir, "plugins", "sdk")} {
			if isSDK(d) {
				return d, nil
			}
		}
		return "", fmt.Errorf("--sdk %s: no go.mod of %s is there or in its plugins/sdk", o.sdk, sdkModule)
	}
	var from []string
	if wd, err := os.Getwd(); err == nil {
		from = append(from, wd)
	}
	if exe, err := os.Executable(); err == nil {
		from = append(from, filepath.Dir(exe))
	}
	for _, dir := range from {
		for {
			if d := filepath.Join(dir, "plugins", "sdk"); isSDK(d) {
				return d, nil
			}
			parent := filepath.Dir(dir)
			if parent == dir {
				break
			}
			dir = parent
		}
	}
	return "", errors.New("the plugin SDK has no release yet, so a checkout of Belay is needed: name its directory plugins/sdk with --sdk")
}

func isSDK(dir string) bool {
	text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	return err == nil && strings.HasPrefix(string(text), "module "+sdkModule+"\n")
}

// files are the contents of the module by name.
func (o pluginNew) files(name, source string) (map[string][]byte, error) {
	values := strings.NewReplacer("@NAME@", name, "@MODULE@", o.module, "@PLUGIN_DIR@", config.Default().PluginDir)
	files := map[string][]byte{}
	for from, to := range map[string]string{
		"main.go.txt": "main.go", "detector.go.txt": "detector.go", "main_test.go.txt": "main_test.go",
		"hardware.go.txt": "hardware.go", "hardware_test.go.txt": "hardware_test.go",
		"Makefile.txt": "Makefile", "README.md.txt": "README.md", "config.toml.txt": name + ".toml", "gitignore.txt": ".gitignore",
	} {
		text, err := scaffold.ReadFile("scaffold/device/" + from)
		if err != nil {
			return nil, err
		}
		files[to] = []byte(values.Replace(string(text)))
	}
	goMod, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return nil, fmt.Errorf("read the SDK's requirements: %w", err)
	}
	files["go.mod"] = []byte(moduleFile(o.module, source, string(goMod)))
	if files["go.sum"], err = os.ReadFile(filepath.Join(source, "go.sum")); err != nil {
		return nil, fmt.Errorf("read the checksums of the SDK's requirements: %w", err)
	}
	return files, nil
}

// onlyTests are modules that nothing but the SDK's own tests needs.
var onlyTests = []string{"github.com/google/go-cmp", "pgregory.net/rapid"}

// moduleFile requires what the SDK requires, at its versions: it builds without
// go mod tidy, and without a network where those modules are there.
func moduleFile(module, source, sdkMod string) string {
	var b strings.Builder
	goVersion, requires := "", []string{}
	for s, in := bufio.NewScanner(strings.NewReader(sdkMod)), false; s.Scan(); {
		fields := strings.Fields(s.Text())
		switch {
		case len(fields) == 2 && fields[0] == "go":
			goVersion = fields[1]
		case len(fields) == 2 && fields[0] == "require" && fields[1] == "(":
			in = true
		case len(fields) == 1 && fields[0] == ")":
			in = false
		case in && len(fields) >= 2 && fields[0] != onlyTests[0] && fields[0] != onlyTests[1]:
			requires = append(requires, fields[0]+" "+fields[1])
		}
	}
	slices.Sort(requires)
	fmt.Fprintf(&b, "module %s\n\ngo %s\n\nrequire %s v0.0.0\n\n", module, goVersion, sdkModule)
	fmt.Fprintf(&b, "// The SDK has no release yet. Once it has: go mod edit -dropreplace %s\n// and go get %s@latest.\n", sdkModule, sdkModule)
	fmt.Fprintf(&b, "replace %s => %s\n\nrequire (\n", sdkModule, quoteModPath(source))
	for _, r := range requires {
		fmt.Fprintf(&b, "\t%s // indirect\n", r)
	}
	b.WriteString(")\n")
	return b.String()
}

// quoteModPath writes a directory as go.mod wants it.
func quoteModPath(path string) string {
	if strings.ContainsAny(path, " ()[]{},\"'`") {
		return fmt.Sprintf("%q", path)
	}
	return path
}

// writeNew fills a directory that is new or empty.
func writeNew(dir string, files map[string][]byte) error {
	entries, err := os.ReadDir(dir)
	switch {
	case err == nil && len(entries) > 0:
		return usageError{fmt.Errorf("directory %s is not empty: name another with --dir", dir)}
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return usageError{err}
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o666); err != nil {
			return err
		}
	}
	return nil
}
