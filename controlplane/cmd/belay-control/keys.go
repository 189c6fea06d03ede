package main

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// The data directory:
//
//	lock         held by the process that serves from it; its text names it
//	admin.token  0600, the administrator's bearer token
//	ca.pem       what API clients trust
//	ca-key.pem   0600, what devices pin: losing it means enrolling all anew
//	etcd/        0700, the embedded store
//	peers        0600, where devices are connected from; may be deleted
//
// Server certificates are made anew at every start, from the names of the
// day; what clients trust is the CA.
const (
	lockFile  = "lock"
	tokenFile = "admin.token"
	caFile    = "ca.pem"
	caKeyFile = "ca-key.pem"
	etcdDir   = "etcd"
	peersFile = "peers"
)

// openDataDir makes the directory and takes it for this process alone.
func openDataDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the data directory: %w", err)
	}
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("locking the data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		holder := "another process"
		if b, err := os.ReadFile(path); err == nil && len(strings.TrimSpace(string(b))) > 0 {
			holder = "process " + strings.TrimSpace(string(b))
		}
		return nil, fmt.Errorf("another control plane (%s) is using the data directory %s: stop it, or choose another with --data-dir", holder, dir)
	}
	pid := fmt.Appendf(nil, "%d\n", os.Getpid())
	if _, err = f.WriteAt(pid, 0); err == nil {
		err = f.Truncate(int64(len(pid)))
	}
	// The number is for people; a full disk is no reason not to serve reads.
	if err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// openCA reads the CA, or makes it at the first start.
func openCA(dir string, log *slog.Logger) (*carrier.CA, error) {
	certPath, keyPath := filepath.Join(dir, caFile), filepath.Join(dir, caKeyFile)
	cert, certErr := os.ReadFile(certPath)
	key, keyErr := os.ReadFile(keyPath)
	for _, err := range []error{certErr, keyErr} {
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("reading the CA: %w", err)
		}
	}
	if certErr == nil && keyErr == nil {
		ca, err := carrier.ParseCA(cert, key)
		if err != nil {
			return nil, fmt.Errorf("the CA in %s cannot be used, restore %s and %s from a backup: %w", dir, caFile, caKeyFile, err)
		}
		warnReadable(keyPath, log)
		return ca, nil
	}
	// A first start cut short leaves the key alone, which comes first, and no
	// store. Anything else had devices, and they rely on the key that is gone.
	if _, err := os.Stat(filepath.Join(dir, etcdDir)); err == nil || certErr == nil {
		return nil, fmt.Errorf("%s and %s must both be in %s, whose devices pin that key: restore them from a backup, or start with an empty data directory", caFile, caKeyFile, dir)
	}
	ca, err := carrier.NewCA()
	if err != nil {
		return nil, fmt.Errorf("making the CA: %w", err)
	}
	if cert, key, err = ca.Encode(); err != nil {
		return nil, fmt.Errorf("making the CA: %w", err)
	}
	if err := writeFile(keyPath, key, 0o600); err != nil {
		return nil, fmt.Errorf("storing the CA's key: %w", err)
	}
	if err := writeFile(certPath, cert, 0o644); err != nil {
		return nil, fmt.Errorf("storing the CA: %w", err)
	}
	log.Info("made a CA", "certificate", certPath)
	return ca, nil
}

// openToken reads the administrator's token, or makes it when there is none:
// deleting the file and starting again is how it is replaced.
func openToken(dir string, log *slog.Logger) (string, error) {
	path := filepath.Join(dir, tokenFile)
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		secret := make([]byte, 32)
		if _, err := rand.Read(secret); err != nil {
			return "", err
		}
		token := base64.RawURLEncoding.EncodeToString(secret)
		if err := writeFile(path, []byte(token+"\n"), 0o600); err != nil {
			return "", fmt.Errorf("storing the admin token: %w", err)
		}
		log.Info("made an admin token", "file", path)
		return token, nil
	case err != nil:
		return "", fmt.Errorf("reading the admin token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if len(token) < 16 || strings.ContainsAny(token, " \t\r\n") {
		return "", fmt.Errorf("%s does not hold a token of at least 16 characters: delete it to have a new one made", path)
	}
	warnReadable(path, log)
	return token, nil
}

func warnReadable(path string, log *slog.Logger) {
	if fi, err := os.Stat(path); err == nil && fi.Mode().Perm()&0o077 != 0 {
		log.Warn("a secret can be read by others: chmod 600 it", "file", path, "mode", fi.Mode().Perm().String())
	}
}

// apiCertificate is the configured certificate of the API; zero: none is.
func apiCertificate(c config) (tls.Certificate, error) {
	if c.API.Certificate == "" {
		return tls.Certificate{}, nil
	}
	cert, err := tls.LoadX509KeyPair(c.API.Certificate, c.API.Key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("reading the API's certificate: %w", err)
	}
	return cert, nil
}

// writeFile replaces a file so that it is there whole or not at all.
func writeFile(path string, b []byte, mode os.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(b); err != nil {
		return err
	}
	if err = f.Chmod(mode); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
