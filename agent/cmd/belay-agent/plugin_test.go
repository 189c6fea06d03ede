package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// agentCommand runs one command line of the agent.
func agentCommand(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = execute(t.Context(), args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

type testReport struct {
	Name   string    `json:"name"`
	Kinds  []string  `json:"kinds"`
	Passed bool      `json:"passed"`
	Rules  []verdict `json:"rules"`
}

// A plugin made by "plugin new" is a module of its own: it builds as it is,
// links little, and keeps every rule.
func TestPluginNewMakesAPluginThatPasses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	code, out, errs := agentCommand(t, "plugin", "new", "--kind", "device", "serial-ports", "--module", "hardware.example/ports", "--dir", dir)
	if code != 0 || !strings.Contains(out, "no release yet") {
		t.Fatalf("plugin new: status %d\n%s%s", code, out, errs)
	}
	file := filepath.Join(dir, "bin", "serial-ports")
	build := exec.Command("go", "build", "-tags=grpcnotrace", "-o", file, ".")
	build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	vet := exec.Command("go", "vet", ".") // its test too
	vet.Dir = dir
	if out, err := vet.CombinedOutput(); err != nil {
		t.Errorf("go vet: %v\n%s", err, out)
	}
	linksLittle(t, file)

	ports := t.TempDir()
	for name, node := range map[string]string{"usb-A": "/dev/null", "usb-B": "/dev/not-there"} {
		if err := os.Symlink(node, filepath.Join(ports, name)); err != nil {
			t.Fatal(err)
		}
	}
	conf := filepath.Join(t.TempDir(), "serial-ports.toml")
	if err := os.WriteFile(conf, []byte("directory = \""+ports+"\"\n[belay]\nprofile = \"none\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs = agentCommand(t, "plugin", "test", file, "--config", conf, "-o", "json")
	var r testReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("plugin test: status %d, %v\n%s%s", code, err, out, errs)
	}
	if code != 0 || !r.Passed || r.Name != "serial-ports" || len(r.Kinds) != 1 || len(r.Rules) < 20 {
		t.Errorf("plugin test: status %d, %+v", code, r)
	}
	may := map[string]bool{ // serial ports measure nothing, and the command plugs nothing in
		"stats are plausible": true, "stats asked of one device are of that device": true,
		"the stats of an unknown device are not found": true, "a change is reported within five seconds": true,
	}
	for _, v := range r.Rules {
		if v.Result != sdktest.Pass && !(v.Result == sdktest.Skip && may[v.Rule]) {
			t.Errorf("%s: %s: %q\n%s", v.Result, v.Rule, v.Messages, strings.Join(v.Log, "\n"))
		}
	}
}

// linksLittle holds a plugin's binary to what an author may be asked to carry.
func linksLittle(t *testing.T, file string) {
	t.Helper()
	out, err := exec.Command("go", "version", "-m", file).CombinedOutput()
	if err != nil {
		t.Fatalf("go version -m: %v\n%s", err, out)
	}
	n := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "dep" && f[0] != "mod" {
			continue
		}
		n++
		for _, heavy := range []string{"etcd", "containerd", "quic-go", "gopsutil", "go-plugin"} {
			if strings.Contains(f[1], heavy) {
				t.Errorf("a plugin links %s", f[1])
			}
		}
	}
	if n < 2 || n > 20 {
		t.Errorf("a plugin links %d modules, want at most 20:\n%s", n, out)
	}
}

func TestPluginTestSaysWhatIsWrong(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no program"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"/bin/true":       {"FAIL  it starts, under the name of its file", "ended before it was ready"},
		text:              {"FAIL", "not executable"},
		"/no/such/plugin": {"FAIL", "there is no such file"},
	} {
		code, out, _ := agentCommand(t, "plugin", "test", name)
		for _, w := range append(want, "1 rules: 0 passed, 1 failed") {
			if code != exitFailure || !strings.Contains(out, w) {
				t.Errorf("plugin test %s: status %d, want %q in\n%s", name, code, w, out)
			}
		}
	}
}

func TestPluginCommandsRefuseByName(t *testing.T) {
	used := t.TempDir()
	if err := os.WriteFile(filepath.Join(used, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		word string
	}{
		{"plugin nosuch", `unknown command "nosuch"`},
		{"plugin new", "takes the plugin's name"},
		{"plugin new x", `--kind is ""`},
		{"plugin new --kind camera x", `--kind is "camera"`},
		{"plugin new --kind runtime x", "no skeleton for runtimes"},
		{"plugin new --kind device Big", `plugin name "Big"`},
		{"plugin new --kind device x --sdk " + used, "no go.mod of"},
		{"plugin new --kind device x --dir " + used, "is not empty"},
		{"plugin new --kind device x --module github.com/belay-edge/belay/plugins/sdk", "no module path of yours"},
		{"plugin test", "takes the plugin's file"},
		{"plugin test x -o yaml", "must be table or json"},
		{"plugin test x --config /no/such.toml", "no such file"},
	} {
		code, _, errs := agentCommand(t, strings.Fields(c.args)...)
		if code != exitUsage || !strings.Contains(errs, c.word) {
			t.Errorf("belay-agent %s: status %d, want %q in\n%s", c.args, code, c.word, errs)
		}
	}
}
