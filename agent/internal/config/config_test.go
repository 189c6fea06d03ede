package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The shipped file is the documentation: it must hold every key, at its default.
func TestReferenceFileIsTheDefaults(t *testing.T) {
	const reference = "../../../packaging/agent.toml"
	text, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	var got Config
	if err := decode(reference, text, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("defaults (-) differ from the reference file (+):\n%s", diff)
	}
	d := Default()
	if err := d.Validate(); err != nil {
		t.Errorf("defaults are not valid: %v", err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// load writes agent.toml and plugins.d below a directory and loads them.
func load(t *testing.T, agent string, plugins map[string]string) (Config, error) {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "agent.toml"), "plugin_config_dir = \""+dir+"/plugins.d\"\n"+agent)
	for name, text := range plugins {
		write(t, filepath.Join(dir, "plugins.d", name), text)
	}
	return Load(filepath.Join(dir, "agent.toml"))
}

func TestLoad(t *testing.T) {
	got, err := load(t, `
transport = "tcp"
keep_stopped = "90s"
reserved_ports = ["53", "8080/udp"]
[reserve]
memory_mib = 64
[attributes]
rack = "7"
[plugins.process]
allow = ["/bin"]
nested = {a = 1}
`, map[string]string{"containerd.toml": "address = \"/run/c.sock\"\nunknown_to_the_agent = 2.5\n", "README": "not toml"})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.PluginConfigDir = got.PluginConfigDir
	want.Transport = "tcp"
	want.KeepStopped = Duration(90 * time.Second)
	want.ReservedPorts = []Ports{{Port: 53}, {Port: 8080, Protocol: "udp"}}
	want.Reserve.MemoryMiB = 64
	want.Attributes = map[string]string{"rack": "7"}
	want.Plugins = map[string]Table{"process": {"allow": []any{"/bin"}, "nested": map[string]any{"a": int64(1)}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"containerd", "process"}, got.PluginNames()); diff != "" {
		t.Error(diff)
	}
	got.SetPlugin("containerd", "address", "/x.sock")
	p, err := got.Plugin("containerd")
	if err != nil || string(p.JSON) != `{"address":"/x.sock","unknown_to_the_agent":2.5}` || !strings.HasSuffix(p.Source, "plugins.d/containerd.toml") {
		t.Errorf("plugin is handed %s of %s, %v", p.JSON, p.Source, err)
	}
	if p, err := got.Plugin("process"); string(p.JSON) != `{"allow":["/bin"],"nested":{"a":1}}` || p.Source != "[plugins.process]" || err != nil {
		t.Errorf("plugin is handed %s of %s, %v", p.JSON, p.Source, err)
	}
	if p, err := got.Plugin("absent"); p.JSON != nil || p.Source != "" || err != nil {
		t.Errorf("a plugin without configuration is handed %s, %v", p.JSON, err)
	}
	// The file is read when it is asked for.
	write(t, filepath.Join(got.PluginConfigDir, "containerd.toml"), "speed = 1\n")
	if p, err := got.Plugin("containerd"); string(p.JSON) != `{"address":"/x.sock","speed":1}` || err != nil {
		t.Errorf("plugin is handed %s, %v", p.JSON, err)
	}
}

func TestAgentsTable(t *testing.T) {
	sum := strings.Repeat("0a", 32)
	const file = "address = \"/x\"\n[belay]\nenabled = false\nmemory_max = \"64MiB\"\ncpu_max = \"150%\"\nprofile = \"device\"\nsha256 = "
	c, err := load(t, "[plugins.inline]\nx = 1\n[plugins.inline.belay]\nmemory_max = \"none\"\ncpu_max = \"none\"", map[string]string{"p.toml": file + "\"" + sum + "\""})
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Plugin("p")
	if err != nil {
		t.Fatal(err)
	}
	no, mem, cpu := false, Memory(64<<20), Percent(150)
	want := Plugin{Source: got.Source, JSON: []byte(`{"address":"/x"}`),
		Settings: Settings{Enabled: &no, SHA256: sum, MemoryMax: &mem, CPUMax: &cpu, Profile: ProfileDevice}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	got, err = c.Plugin("inline")
	if err != nil || string(got.JSON) != `{"x":1}` || got.MemoryMax == nil || *got.MemoryMax != 0 || got.CPUMax == nil || *got.CPUMax != 0 {
		t.Errorf("inline: %+v, %v", got, err)
	}
}

func TestPluginErrorsNameFileAndKey(t *testing.T) {
	for _, c := range []struct {
		name, agent, file string
		want              []string
	}{
		{"configured twice", "[plugins.p]\nx = 1", "x = 1", []string{"configured twice", "p.toml"}},
		{"broken file", "", "a = 1\na = 2", []string{"p.toml:2"}},
		{"unknown key of the agent's", "", "a = 1\n[belay]\nmemory = \"1GiB\"", []string{"p.toml:3: unknown key belay.memory"}},
		{"unknown key, inline", "[plugins.p.belay]\nmemory = \"1GiB\"", "", []string{"[plugins.p]", "unknown key belay.memory"}},
		{"belay is no table", "", "belay = 1", []string{"p.toml:1"}},
		{"memory", "", "[belay]\nmemory_max = \"much\"", []string{"p.toml:2", "\"much\" is not an amount of memory", "256MiB"}},
		{"memory without a unit", "", "[belay]\nmemory_max = \"64\"", []string{"p.toml:2", "\"64\" is not an amount"}},
		{"too little memory", "", "[belay]\nmemory_max = \"1MiB\"", []string{"p.toml", "8MiB"}},
		{"cpu", "", "[belay]\ncpu_max = \"0%\"", []string{"p.toml:2", "\"0%\" is not a share"}},
		{"profile", "", "[belay]\nprofile = \"root\"", []string{"p.toml", "belay.profile is \"root\"", "auto, device, none"}},
		{"checksum", "", "[belay]\nsha256 = \"00\"", []string{"p.toml", "belay.sha256"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			files := map[string]string{}
			if c.file != "" {
				files["p.toml"] = c.file
			}
			cfg, err := load(t, c.agent, files)
			if err != nil {
				t.Fatalf("the agent does not start: %v", err)
			}
			_, err = cfg.Plugin("p")
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
		})
	}
}

func TestLoadErrorsNameKeyAndLine(t *testing.T) {
	// agent.toml's own first line is plugin_config_dir.
	for _, c := range []struct {
		name, agent string
		plugins     map[string]string
		want        []string
	}{
		{"unknown key", "\ntransprot = \"tcp\"", nil, []string{"agent.toml:3: unknown key transprot"}},
		{"unknown keys, all at once", "x = 1\n[log]\nlevle = \"info\"", nil, []string{":2: unknown key x", ":4: unknown key log.levle"}},
		{"unknown table", "[logging]\nlevel=\"info\"", nil, []string{":2: unknown key logging"}},
		{"wrong type", "transport = 7", nil, []string{"agent.toml:2:", "transport"}},
		{"broken TOML", "transport = ", nil, []string{"agent.toml:2:"}},
		{"bad duration", "keep_stopped = \"soon\"", nil, []string{"\"soon\" is not a duration", "1h30m"}},
		{"bad port", "reserved_ports = [\"22/sctp\"]", nil, []string{"\"22/sctp\" is not a port"}},
		{"port zero", "reserved_ports = [\"0\"]", nil, []string{"\"0\" is not a port"}},
		{"every bad value", "transport = \"pigeon\"\nrun_dir = \"run\"\n[reserve]\ncpu_percent = 95", nil, []string{"transport is \"pigeon\"", "run_dir is \"run\": must be an absolute path", "cpu_percent is 95"}},
		{"negative memory", "[reserve]\nmemory_mib = -1", nil, []string{"agent.toml:3:"}},
		{"image policy", "[images]\nkeep_unused = \"-1s\"\nmin_age = \"-1s\"\nhigh_percent = 101", nil, []string{"images.keep_unused is -1s", "images.min_age is -1s", "images.high_percent is 101"}},
		{"marks upside down", "[images]\nhigh_percent = 50", nil, []string{"images.low_percent is 80: must be 0 to high_percent, which is 50"}},
		{"reserved attribute", "[attributes]\n\"belay.arch\" = \"z80\"", nil, []string{"belay.arch", "agent's own"}},
		{"no JSON for it", "[plugins.p]\nx = inf", nil, []string{"plugin p"}},
		{"plugin name", "[plugins.Nope]\nx = 1", nil, []string{"plugins.\"Nope\""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := load(t, c.agent, c.plugins)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
		})
	}
}

func TestLoadMissingFile(t *testing.T) {
	if _, err := Load(filepath.Join(t.TempDir(), "no.toml")); err == nil {
		t.Error("a file asked for by name may not be missing")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("transport = \"tcp\"\n[plugins.p]\nx = 1\n"))
	f.Add([]byte("[log]\nlevle = 1\n[[plugins]]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := Default()
		if decode("f", b, &c) == nil {
			_ = c.Validate()
		}
	})
}
