package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notify tells systemd something; without systemd nobody listens.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd was not notified", "state", state, "error", err)
	}
}

// watchdog shows systemd that the agent's loop answers, for as long as it
// does. Without WatchdogSec= in the unit it only waits.
func watchdog(ctx context.Context, log *slog.Logger, alive func(context.Context) error) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("systemd's watchdog: %w", err)
	}
	if interval == 0 {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(interval / 3)
	defer tick.Stop()
	for {
		asked, cancel := context.WithTimeout(ctx, interval/3)
		err := alive(asked)
		cancel()
		switch {
		case err == nil:
			notify(log, daemon.SdNotifyWatchdog)
		case ctx.Err() == nil:
			log.Error("the agent's loop does not answer: systemd will restart the agent; tasks go on", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
