package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/agent/internal/system"
	"github.com/belay-edge/belay/agent/internal/watchdog"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// proxyOf is the proxy that the configuration or else the environment names;
// nil: none.
func proxyOf(cfg config.Config) (*carrier.Proxy, error) {
	switch cfg.Tunnel.Proxy {
	case config.ProxyNone:
		return nil, nil
	case "":
		return carrier.ProxyFromEnvironment()
	}
	p, err := carrier.NewProxy(string(cfg.Tunnel.Proxy), cfg.Tunnel.NoProxy)
	if err != nil {
		return nil, fmt.Errorf("tunnel.%w", err)
	}
	return p, nil
}

// watchReach has the tunnel built anew when it stays away for long, and ends
// the agent when that does not help although the control plane is there.
func (d *device) watchReach(ctx context.Context) error {
	if d.link == nil {
		<-ctx.Done()
		return nil
	}
	pulse, done := d.dog.Watch("reach", 2*time.Minute)
	defer done()
	return watchdog.Reach{
		Registered: func() bool {
			s := d.link.Status()
			return s.State == link.StateConnected || s.Refused
		},
		Answers: d.link.Answers, Rebuild: d.link.Rebuild, Logger: d.log,
	}.Run(ctx, pulse)
}

// watchAgain is how long to wait when the kernel does not tell of changes.
const watchAgain = time.Minute

// watchNetwork tells the link of changes. An agent that cannot watch works all
// the same: the link notices by itself, later.
func (d *device) watchNetwork(ctx context.Context) error {
	if d.link == nil {
		<-ctx.Done()
		return nil
	}
	busy, unwatch := d.dog.Mind("network changes", passOn)
	defer unwatch()
	for said := false; ; said = true {
		err := system.WatchNetwork(ctx, func() { d.link.NetworkChanged("addresses or routes have changed") }, busy)
		if ctx.Err() != nil {
			return nil
		}
		if !said {
			d.log.Warn("changes of the network are noticed late", "err", err)
		}
		t := time.NewTimer(watchAgain)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// resolvedName is the file of addresses that the control plane's names had: a
// boot without DNS is no reason to be offline. It can be removed at any time.
const resolvedName = "resolved.json"

// known reads it; what is wrong with it does not matter.
func known(stateDir string) map[string][]netip.Addr {
	out := map[string][]netip.Addr{}
	if text, err := os.ReadFile(filepath.Join(stateDir, resolvedName)); err == nil {
		if err := json.Unmarshal(text, &out); err != nil {
			return nil
		}
	}
	return out
}

// remember writes it.
func remember(stateDir string, log *slog.Logger) func(map[string][]netip.Addr) {
	return func(found map[string][]netip.Addr) {
		path := filepath.Join(stateDir, resolvedName)
		text, err := json.Marshal(found)
		if err == nil {
			err = os.WriteFile(path+".new", text, 0o600)
		}
		if err == nil {
			err = os.Rename(path+".new", path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			log.Warn("the control plane's addresses are not remembered for a boot without DNS", "err", err)
		}
	}
}
