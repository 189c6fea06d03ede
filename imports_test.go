package belay

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/belay-edge/belay"
)

// pkg is what `go list -json` tells of a package.
type pkg struct {
	ImportPath                         string
	GoFiles                            []string
	Name, Doc                          string
	Imports, TestImports, XTestImports []string
}

func (p pkg) rel() string { return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/") }

// rule bans imports. An import of "from" that matches "to" breaks it unless
// "except" matches either side.
type rule struct {
	why      string
	from, to func(rel string) bool
	except   func(from, to string) bool
	tests    bool // test files must obey too
}

func under(prefixes ...string) func(string) bool {
	return func(p string) bool {
		return slices.ContainsFunc(prefixes, func(x string) bool { return p == x || strings.HasPrefix(p, x+"/") })
	}
}

func exactly(paths ...string) func(string) bool {
	return func(p string) bool { return slices.Contains(paths, p) }
}

// ours matches every package of this repository, by its path inside it.
func ours(p string) bool { return strings.HasPrefix(p, "@") }

// local names an import: "@path/in/repo" for ours, the import path for others.
func local(path string) string {
	if path == module || strings.HasPrefix(path, module+"/") {
		return "@" + strings.TrimPrefix(strings.TrimPrefix(path, module), "/")
	}
	return path
}

func anywhere(string) bool { return true }

func rules() []rule {
	sibling := func(root string) rule {
		return rule{
			why:  root + "'s internal packages are joined by cmd only: siblings never import each other",
			from: under(root + "/internal"), to: under("@" + root + "/internal"), tests: true,
			except: func(from, to string) bool {
				// A package and what lies below it are one adapter; generated API code,
				// and the conformance suite of the store, are for everyone beside them.
				top := func(p string) string { return strings.SplitN(strings.TrimPrefix(p, root+"/internal/"), "/", 2)[0] }
				return top(from) == top(strings.TrimPrefix(to, "@")) || to == "@controlplane/internal/storetest"
			},
		}
	}
	return []rule{
		{why: "the SDK is what plugin authors link: it imports nothing else of this repository",
			from: under("plugins/sdk"), to: ours, tests: true,
			except: func(_, to string) bool { return under("@plugins/sdk")(to) }},
		{why: "the wire is shared by both ends: it imports nothing else of this repository",
			from: under("controlplane/wire"), to: ours, tests: true,
			except: func(_, to string) bool { return under("@controlplane/wire")(to) }},
		{why: "first-party plugins use exactly what outsiders get: the SDK's plugin side",
			from: func(p string) bool { return under("plugins")(p) && !under("plugins/sdk", "plugins/cmd")(p) }, to: ours,
			except: func(from, to string) bool {
				own := "@" + strings.Join(strings.SplitN(from, "/", 3)[:2], "/")
				return exactly("@plugins/sdk", "@plugins/sdk/serve", "@plugins/sdk/sysfs")(to) || under(own)(to)
			}},
		{why: "the agent knows plugins and the control plane only through the SDK and the wire",
			from: under("agent"), to: ours,
			except: func(from, to string) bool {
				return under("@agent", "@controlplane/wire")(to) || exactly("@plugins/sdk", "@plugins/sdk/host")(to) ||
					from == "agent/cmd/belay-agent" && to == "@plugins/sdk/sdktest" // plugin test
			}},
		{why: "the control plane never imports agent or plugins: plugin configuration crosses it as opaque JSON",
			from: under("controlplane"), to: under("@agent", "@plugins"), tests: true},
		{why: "the root decides, its subpackages do: a root never imports its own subpackages",
			from: exactly("agent"), to: under("@agent/internal", "@agent/cmd")},
		{why: "the root decides, its subpackages do: a root never imports its own subpackages",
			from: exactly("controlplane"), to: under("@controlplane/internal", "@controlplane/cmd", "@controlplane/wire/carrier")},
		sibling("agent"), sibling("controlplane"),
		{why: "go-plugin and grpc are how the SDK is carried; nobody else may come to depend on them",
			from: anywhere, to: under("github.com/hashicorp/go-plugin", "google.golang.org/grpc"),
			except: func(from, _ string) bool { return under("plugins/sdk")(from) }},
		{why: "QUIC and yamux stay behind the carrier seam",
			from: anywhere, to: under("github.com/quic-go/quic-go", "github.com/hashicorp/yamux"),
			except: func(from, _ string) bool {
				return under("controlplane/wire/carrier", "controlplane/wire/wiretest")(from)
			}},
		{why: "etcd stays behind the Store",
			from: anywhere, to: under("go.etcd.io"),
			except: func(from, _ string) bool { return under("controlplane/internal/etcd")(from) }},
		{why: "containerd stays inside its plugin",
			from: anywhere, to: under("github.com/containerd/containerd"),
			except: func(from, _ string) bool { return under("plugins/containerd")(from) }},
		{why: "decisions take time, randomness and I/O as arguments",
			from: exactly("agent", "controlplane"), to: exactly("os", "net", "net/http", "os/exec", "syscall", "golang.org/x/sys/unix")},
		{why: "gopsutil reads the host: one package does that",
			from: anywhere, to: under("github.com/shirou/gopsutil"),
			except: func(from, _ string) bool { return under("agent/internal/system")(from) }},
	}
}

// list asks the go command for every package of the module in dir.
func list(t *testing.T, dir string) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Doc,GoFiles,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list in %s: %v\n%s", dir, err, stderr.String())
	}
	var all []pkg
	for d := json.NewDecoder(bufio.NewReader(bytes.NewReader(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func broken(rs []rule, p pkg) []string {
	var bad []string
	for _, r := range rs {
		if !r.from(p.rel()) {
			continue
		}
		imports := p.Imports
		if r.tests {
			imports = slices.Concat(p.Imports, p.TestImports, p.XTestImports)
		}
		for _, i := range imports {
			to := local(i)
			if r.to(to) && (r.except == nil || !r.except(p.rel(), to)) {
				bad = append(bad, p.ImportPath+" imports "+i+": "+r.why)
			}
		}
	}
	return bad
}

func TestImportRules(t *testing.T) {
	rs := rules()
	for _, p := range append(list(t, "."), list(t, "plugins/sdk")...) {
		for _, b := range broken(rs, p) {
			t.Error(b)
		}
	}
}

// The rules themselves are held to catching what they are for.
func TestImportRulesBite(t *testing.T) {
	for _, c := range []struct{ from, to string }{
		{"plugins/sdk/serve", module + "/agent"},
		{"controlplane/wire", module + "/controlplane"},
		{"plugins/process", module + "/plugins/containerd"},
		{"plugins/process", module + "/plugins/sdk/host"},
		{"agent/internal/link", module + "/controlplane"},
		{"controlplane/internal/api", module + "/plugins/sdk"},
		{"agent", module + "/agent/internal/state"},
		{"agent/internal/link", module + "/agent/internal/state"},
		{"controlplane/internal/hub", module + "/controlplane/internal/etcd"},
		{"agent/internal/host", "github.com/hashicorp/go-plugin"},
		{"agent/internal/link", "github.com/quic-go/quic-go"},
		{"controlplane", "go.etcd.io/etcd/client/v3"},
		{"agent", "github.com/containerd/containerd/v2/client"},
		{"agent", "os"},
		{"agent/cmd/belay-agent", "github.com/shirou/gopsutil/v3/mem"},
	} {
		if len(broken(rules(), pkg{ImportPath: module + "/" + c.from, Imports: []string{c.to}})) == 0 {
			t.Errorf("%s may import %s, and should not", c.from, c.to)
		}
	}
}

func TestPackageNamesAndComments(t *testing.T) {
	empty := []string{"util", "utils", "common", "helper", "helpers", "manager", "types", "interfaces", "mock", "mocks"}
	for _, p := range append(list(t, "."), list(t, "plugins/sdk")...) {
		if slices.Contains(empty, p.Name) {
			t.Errorf("%s: the name %q says nothing", p.ImportPath, p.Name)
		}
		if p.Doc == "" && len(p.GoFiles) > 0 && p.Name != "pluginpb" && p.Name != "pluginv2" && p.Name != "apiv1" && p.Name != "apiv1connect" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

func TestRootsReadNoClock(t *testing.T) {
	out, err := exec.Command("grep", "-nE", `time\.(Now|Sleep|After|NewTimer|NewTicker|Since)\(`, "-r", "--include=*.go", "--exclude=*_test.go", "--exclude-dir=internal", "--exclude-dir=cmd", "--exclude-dir=wire", "agent", "controlplane").Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		t.Fatal(err)
	}
	if len(out) > 0 {
		t.Errorf("time is an argument in the packages agent and controlplane:\n%s", out)
	}
}
