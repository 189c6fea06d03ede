// Package process is the runtime plugin that runs programs of the host itself:
// no images, the host's network, each attempt in its own cgroup where the
// plugin may make one. A program and the record of its exit survive the death
// of the plugin and of the agent: its parent is either belay-supervise, a tiny
// process of its own, or systemd. What is known about an attempt is in files
// of its directory (package internal/record); no memory of this process is
// needed to tell what runs.
package process

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// Name is what task definitions call this runtime.
const Name = "process"

// Values of Options.SupervisorMode.
const (
	ModeAuto    = "auto"    // systemd where it is the init and answers, else own
	ModeSystemd = "systemd" // transient units
	ModeOwn     = "own"     // belay-supervise
)

// Options is the plugin's configuration table.
type Options struct {
	// Supervisor is the path of belay-supervise; "": looked for beside the
	// plugin's executable, one directory up, and in /usr/libexec/belay.
	Supervisor string `json:"supervisor"`
	// SupervisorMode is ModeAuto (default), ModeSystemd or ModeOwn.
	SupervisorMode string `json:"supervisor_mode"`
	// CgroupParent is the cgroup that attempts live below without systemd.
	CgroupParent string `json:"cgroup_parent"`
}

// Plugin is the process runtime as a plugin: an sdk.RuntimePlugin.
type Plugin struct{ runtime *Runtime }

// New makes the plugin; version is what Info says.
func New(version string) *Plugin { return &Plugin{runtime: &Runtime{version: version}} }

var (
	_ sdk.RuntimePlugin = (*Plugin)(nil)
	_ sdk.Runtime       = (*Runtime)(nil)
)

// Info names the plugin.
func (p *Plugin) Info() sdk.Info {
	return sdk.Info{Name: Name, Version: p.runtime.version, Kinds: []sdk.Kind{sdk.KindRuntime}}
}

// Configure makes the runtime ready.
func (p *Plugin) Configure(ctx context.Context, c sdk.Config) error {
	return p.runtime.configure(ctx, c)
}

// Runtime runs host programs.
func (p *Plugin) Runtime() sdk.Runtime { return p.runtime }

// Runtime runs host programs. All but version is set by configure and constant
// after it.
type Runtime struct {
	version   string
	log       *slog.Logger
	stateDir  string
	tag       string // tells this agent's cgroups and units from another's
	boot      string
	stagePath string // belay-supervise
	cgroups   *cgroups
	own       *ownSupervisor
	systemd   *systemdSupervisor // nil where there is no systemd
	mode      string             // of new attempts
	watch     *watcher
}

// configure finds the supervisor and the cgroups, and starts watching what
// runs already.
func (r *Runtime) configure(ctx context.Context, c sdk.Config) error {
	const op = "configure process"
	r.log = slog.Default()
	o, err := decodeOptions(c.JSON)
	if err != nil {
		return sdk.Errorf(sdk.Invalid, op, "%w", err)
	}
	if r.stagePath, err = findSupervisor(o.Supervisor); err != nil {
		return sdk.Errorf(sdk.Invalid, op, "%w", err).
			WithHint("install belay-supervise beside belay-plugins, or set supervisor to its path")
	}
	if r.boot = record.BootID(); r.boot == "" {
		return sdk.Errorf(sdk.Unsupported, op, "/proc/sys/kernel/random/boot_id cannot be read").
			WithHint("mount /proc")
	}
	// The real path, so that a state directory reached by another link is
	// still the same agent's.
	if r.stateDir, err = filepath.EvalSymlinks(c.StateDir); err != nil {
		return sdk.Errorf(sdk.Invalid, op, "state directory: %w", err)
	}
	if r.stateDir, err = filepath.Abs(r.stateDir); err != nil {
		return sdk.Errorf(sdk.Invalid, op, "state directory: %w", err)
	}
	sum := sha256.Sum256([]byte(r.stateDir))
	r.tag = hex.EncodeToString(sum[:4])
	if err := os.MkdirAll(r.tasksDir(), 0o700); err != nil {
		return sdk.Errorf(sdk.Internal, op, "%w", err)
	}
	r.cgroups = findCgroups(o.CgroupParent, r.tag)
	// What this process starts inherits it, see belay-supervise's smallPages.
	_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0)
	r.own = &ownSupervisor{path: r.stagePath, cgroups: r.cgroups, boot: r.boot}
	if err := r.chooseMode(ctx, o.SupervisorMode); err != nil {
		return err
	}
	r.watch = newWatcher(r.exited)
	r.watchAll(ctx)
	r.log.Info("process runtime ready", "supervisor", r.mode, "cgroups", r.cgroups.describe())
	return nil
}

func (r *Runtime) chooseMode(ctx context.Context, mode string) error {
	const op = "configure process"
	r.mode = ModeOwn
	var missing error
	switch {
	case os.Geteuid() != 0:
		missing = errors.New("system units need root")
	case !isDir("/run/systemd/system"):
		missing = errors.New("systemd is not the init of this system: no /run/systemd/system")
	default:
		r.systemd = newSystemd(r.stagePath, r.boot, r.tag)
		if mode != ModeOwn {
			_, missing = r.systemd.bus(ctx)
		}
	}
	if mode != ModeOwn && missing == nil {
		r.mode = ModeSystemd
	}
	if mode == ModeSystemd && missing != nil {
		return sdk.Errorf(sdk.Invalid, op, "supervisor_mode is %q, but %w", ModeSystemd, missing).
			WithHint("use supervisor_mode auto or own")
	}
	return nil
}

func decodeOptions(raw json.RawMessage) (Options, error) {
	o := Options{SupervisorMode: ModeAuto, CgroupParent: "belay/process"}
	if len(bytes.TrimSpace(raw)) > 0 {
		d := json.NewDecoder(bytes.NewReader(raw))
		d.DisallowUnknownFields()
		if err := d.Decode(&o); err != nil {
			return o, err
		}
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return o, errors.New("more than one value in the configuration")
		}
	}
	switch o.SupervisorMode {
	case ModeAuto, ModeSystemd, ModeOwn:
	case "":
		o.SupervisorMode = ModeAuto
	default:
		return o, errors.New("supervisor_mode must be auto, systemd or own, not " + o.SupervisorMode)
	}
	o.CgroupParent = strings.Trim(o.CgroupParent, "/")
	if o.CgroupParent == "" || filepath.Clean(o.CgroupParent) != o.CgroupParent || strings.HasPrefix(o.CgroupParent, "..") {
		return o, errors.New("cgroup_parent must be a relative path such as belay/process")
	}
	if o.Supervisor != "" && !filepath.IsAbs(o.Supervisor) {
		return o, errors.New("supervisor must be an absolute path")
	}
	return o, nil
}

// findSupervisor looks where an installation and a build tree put it.
func findSupervisor(configured string) (string, error) {
	candidates := []string{configured}
	if configured == "" {
		candidates = nil
		if exe, err := os.Executable(); err == nil {
			if real, err := filepath.EvalSymlinks(exe); err == nil {
				exe = real
			}
			dir := filepath.Dir(exe)
			candidates = append(candidates, filepath.Join(dir, "belay-supervise"), filepath.Join(filepath.Dir(dir), "belay-supervise"))
		}
		candidates = append(candidates, "/usr/libexec/belay/belay-supervise")
	}
	for _, path := range candidates {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", errors.New("no executable belay-supervise at " + strings.Join(candidates, " or "))
}

// Info says what this runtime can do here.
func (r *Runtime) Info(context.Context) (sdk.RuntimeInfo, error) {
	return sdk.RuntimeInfo{
		Version: r.version, Exec: true, Stats: true,
		Networks: []string{sdk.NetworkHost},
		Attributes: map[string]string{
			"process.supervisor": r.mode,
			"process.cgroups":    r.cgroups.describe(),
		},
	}, nil
}

func (r *Runtime) tasksDir() string { return filepath.Join(r.stateDir, "tasks") }

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
