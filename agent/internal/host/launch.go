package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strconv"

	"github.com/belay-edge/belay/plugins/sdk"
	sdkhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// same tells whether two settings say the same.
func (s Settings) same(o Settings) bool {
	return reflect.DeepEqual(s, o)
}

// launch launches what the files say now. A new configuration that the plugin
// refuses does not take a working plugin down: the one before serves on.
func (p *plugin) launch(ctx context.Context) (*sdkhost.Plugin, error) {
	p.files.executable, _ = identify(p.path)
	settings, err := p.host.settings(p.name)
	p.files.consider(settings, err)
	if !validName(p.name) {
		return nil, sdk.Errorf(sdk.Invalid, "check plugin "+p.path, "a plugin's file name has only a-z, 0-9 and -, and at most 63 of them").
			WithHint("rename it, or move what is no plugin out of the plugin directory")
	}
	if err != nil && p.files.accepted == nil {
		return nil, err
	}
	if err == nil {
		var process *sdkhost.Plugin
		process, err = p.launchWith(ctx, settings)
		if err == nil {
			p.note(func(n *notes) { *n = notes{} })
			p.files.accepted = &settings
			return process, nil
		}
		before := p.files.accepted
		if before == nil || before.same(settings) || settings.Disabled || sdk.KindOf(err) != sdk.Invalid {
			return nil, err
		}
	}
	process, again := p.launchWith(ctx, *p.files.accepted)
	if again != nil {
		return nil, err
	}
	p.refuse(err)
	return process, nil
}

// launchWith launches the executable as it is now with these settings.
func (p *plugin) launchWith(ctx context.Context, settings Settings) (*sdkhost.Plugin, error) {
	p.files.running = settings
	if settings.Disabled {
		return nil, errDisabled
	}
	sum, err := p.check(settings)
	if err != nil {
		return nil, err
	}
	o, err := p.options(settings)
	if err != nil {
		return nil, err
	}
	p.update(func(s *Status) { s.SHA256 = sum })
	p.files.sum = sum
	// Sockets of an agent that was killed.
	sdkhost.RemoveSockets(o.SocketDir)
	if g := p.fence(settings); g != nil {
		o.Outlive = g.outlive()
		o.Place = func(_ context.Context, pid int) {
			err := g.join(pid)
			p.killed, _ = g.kills() // systemd's can only be counted with something in it
			if _, gone := os.Stat(filepath.Join("/proc", strconv.Itoa(pid))); gone != nil {
				g.joined = nil
			} else if err != nil {
				p.host.log.Warn("the plugin's limits do not hold", "plugin", p.name, "err", err)
			}
			p.sweep(pid) // what an agent that was killed has left
		}
	}
	if err := p.confine(ctx, &o, settings, sum); err != nil {
		return nil, err
	}
	return sdkhost.Launch(ctx, o)
}

// check looks at the executable and returns its checksum.
func (p *plugin) check(settings Settings) (string, error) {
	op := "check plugin " + p.path
	file, err := identify(p.path)
	p.files.executable = file
	if err != nil {
		kind := sdk.Unavailable
		if errors.Is(err, fs.ErrNotExist) {
			kind = sdk.Invalid
		}
		return "", sdk.Errorf(kind, op, "%w", err)
	}
	if err := checkTrust(p.path); err != nil {
		return "", err
	}
	if !file.mode.IsRegular() {
		return "", nil // Launch says what is wrong with it
	}
	sum, err := checksum(p.path)
	if err != nil {
		return "", sdk.Errorf(sdk.Unavailable, op, "%w", err)
	}
	if want := settings.SHA256; want != "" && want != sum {
		return "", sdk.Errorf(sdk.Invalid, op, "its SHA-256 is %s, its configuration wants %s", sum, want).
			WithHint("install the executable that " + settings.Source + " names, or correct belay.sha256 there")
	}
	return sum, nil
}

// private makes a directory that is for its owner alone. One that is so already
// is left alone: the disk may be read-only.
func private(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if st, err := os.Stat(dir); err == nil && st.Mode().Perm() == 0o700 {
		return nil
	}
	return os.Chmod(dir, 0o700)
}

// options for a launch, with the directories it needs made.
func (p *plugin) options(settings Settings) (sdkhost.Options, error) {
	c := sdk.Config{
		StateDir: filepath.Join(p.host.config.StateDir, p.name),
		RunDir:   filepath.Join(p.host.config.RunDir, p.name),
		JSON:     settings.JSON,
	}
	for _, d := range []string{c.StateDir, c.RunDir} {
		if err := private(d); err != nil {
			return sdkhost.Options{}, sdk.Errorf(sdk.Unavailable, "prepare plugin "+p.name, "%w", err)
		}
	}
	t := p.host.config.Timing
	return sdkhost.Options{
		Path: p.path, Name: p.name, SocketDir: c.RunDir, Config: c,
		Logger: p.host.log, StartTimeout: t.Start, CloseTimeout: t.Close,
	}, nil
}
