package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/internal/api"
	"github.com/belay-edge/belay/controlplane/internal/etcd"
	"github.com/belay-edge/belay/controlplane/internal/hub"
	"github.com/belay-edge/belay/controlplane/internal/peers"
	"github.com/belay-edge/belay/controlplane/internal/scheduler"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

const (
	// stopDeadline is how long all of a shutdown may take.
	stopDeadline = 15 * time.Second
	// drain is how long calls under way may take to finish in a shutdown.
	drain = 5 * time.Second
)

func serveCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	cfg, err := readConfig(args, stderr)
	if err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	return serve(ctx, cfg, log, stdout)
}

// serve runs a control plane until ctx ends, or one of its parts fails.
func serve(ctx context.Context, cfg config, log *slog.Logger, stdout io.Writer) (err error) {
	unlock, err := openDataDir(cfg.DataDir)
	if err != nil {
		return err
	}
	defer unlock()
	ca, err := openCA(cfg.DataDir, log)
	if err != nil {
		return err
	}
	token, err := openToken(cfg.DataDir, log)
	if err != nil {
		return err
	}
	// The port first: when it is taken, that is what to say, at once.
	listener, err := listen(cfg, ca, log)
	if err != nil {
		return err
	}
	defer listener.Close()
	store, err := openStore(ctx, cfg, log)
	if ctx.Err() != nil {
		err = nil // told to stop before it had begun
		if store != nil {
			err = store.Close()
		}
		return err
	}
	if err != nil {
		return err
	}
	parts := &parts{log: log}
	parts.onStop("store", func() error { return store.Close() })

	book := peers.Open(filepath.Join(cfg.DataDir, peersFile), log)
	plane, hub, err := open(ctx, cfg, store, ca, book, addresses(cfg, listener.Addr()), log)
	if err != nil {
		return parts.stop(err)
	}
	parts.run("state", plane.Run)
	parts.run("peers", book.Run)
	parts.run("tunnels", func(ctx context.Context) error { return hub.Serve(ctx, listener) })
	serveHTTP(parts, plane, token, listener.HTTP(), log)

	ready := fmt.Sprintf("ready: listening on %s (TCP and UDP), advertised as %s", listener.Addr(), strings.Join(addresses(cfg, listener.Addr()), ", "))
	log.Info("ready", "version", version, "listen", listener.Addr().String(), "incarnation", plane.Incarnation())
	if _, err := fmt.Fprintln(stdout, ready); err != nil {
		log.Warn("cannot write to stdout", "error", err)
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS="+ready); err != nil {
		log.Warn("telling systemd failed", "error", err)
	}
	select {
	case <-ctx.Done():
		log.Info("shutting down")
		_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
		err = nil
	case err = <-parts.failed():
		log.Error("a part failed, shutting down", "error", err)
	case err = <-store.Err():
		err = fmt.Errorf("the store ended by itself: %w", err)
	}
	return parts.stop(err)
}

func listen(cfg config, ca *carrier.CA, log *slog.Logger) (*carrier.Listener, error) {
	leaf, err := ca.Leaf(names(cfg))
	if err != nil {
		return nil, fmt.Errorf("making the server's certificate: %w", err)
	}
	own, err := apiCertificate(cfg)
	if err != nil {
		return nil, err
	}
	reset, err := ca.Secret("quic stateless reset")
	if err != nil {
		return nil, err
	}
	return carrier.Listen(carrier.ListenConfig{Address: cfg.Listen, Tunnel: leaf, API: own, ResetKey: reset, Logger: log})
}

func openStore(ctx context.Context, cfg config, log *slog.Logger) (*etcd.Store, error) {
	if len(cfg.EtcdEndpoints) > 0 {
		return etcd.Connect(ctx, cfg.EtcdEndpoints, log)
	}
	return etcd.Open(ctx, filepath.Join(cfg.DataDir, etcdDir), log)
}

// open joins the domain and the hub over the store.
func open(ctx context.Context, cfg config, store controlplane.Store, ca *carrier.CA, book *peers.Book, advertise []string, log *slog.Logger) (*controlplane.Plane, *hub.Hub, error) {
	pepper, err := ca.Secret("activation codes")
	if err != nil {
		return nil, nil, err
	}
	plane, err := controlplane.Open(ctx, controlplane.Config{
		Store: store, Now: time.Now, Rand: rand.Reader, Place: scheduler.Place, Logger: log,
		Pepper: pepper[:], Addresses: advertise, Pin: ca.Pin(),
	})
	if err != nil {
		return nil, nil, err
	}
	h := hub.New(hub.Config{Devices: plane, Version: version, Advertise: advertise, Logger: log, Peers: book, Registrations: cfg.Registrations})
	plane.SetTunnels(h)
	return plane, h, nil
}

func serveHTTP(parts *parts, plane *controlplane.Plane, token string, l net.Listener, log *slog.Logger) {
	stopping := make(chan struct{})
	server := &http.Server{
		Handler:           api.NewHandler(api.Config{Plane: plane, Token: token, Logger: log, Stopping: stopping}),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	parts.run("API", func(ctx context.Context) error {
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		select {
		case err := <-served:
			return err
		case <-ctx.Done():
		}
		close(stopping)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			log.Warn("calls under way were cut off", "error", err)
			_ = server.Close()
		}
		if err := <-served; !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
}
