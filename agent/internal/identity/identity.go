// Package identity keeps who this device is: the private key that is its
// identity and the instance that a control plane made of it. A device is
// enrolled exactly when instance.json exists, and that file is written last.
//
//	S/identity/key.pem            private key, 0600
//	S/identity/instance.json      which instance of which control plane
//	S/identity/copy.json          both once more, with a checksum
//	S/identity/pending-PIN.pem    key of an enrolment whose answer is not known yet
package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// ErrNotEnrolled means that the state directory belongs to no instance.
var ErrNotEnrolled = errors.New("this device is not enrolled")

// Instance is what the control plane made of this device.
type Instance struct {
	ID        string   `json:"id"`
	Cluster   string   `json:"cluster"`
	Pin       string   `json:"pin"` // of the control plane's CA key
	Addresses []string `json:"addresses"`
	// KeyFingerprint says which key belongs to it: hex SHA-256 of the
	// public key's SubjectPublicKeyInfo.
	KeyFingerprint string `json:"keyFingerprint"`
}

// Identity is an instance and the key that proves it.
type Identity struct {
	Instance
	Key []byte // PEM; never logged
	// Damage is what is wrong with the files that Load did without.
	Damage string
}

func (i Identity) complete() bool {
	return i.ID != "" && i.Pin != "" && len(i.Addresses) > 0 && len(i.Key) > 0
}

const (
	dirName      = "identity"
	keyName      = "key.pem"
	instanceName = "instance.json"
)

// Load reads the identity in a state directory. What is damaged is taken from
// the copy, if that checks out. Errors: ErrNotEnrolled.
func Load(stateDir string) (Identity, error) {
	dir := filepath.Join(stateDir, dirName)
	id, err := load(dir)
	return settle(dir, id, err)
}

func load(dir string) (Identity, error) {
	text, err := os.ReadFile(filepath.Join(dir, instanceName))
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{}, ErrNotEnrolled
	}
	if err != nil {
		return Identity{}, fmt.Errorf("read identity: %w", err)
	}
	var id Identity
	if err := json.Unmarshal(text, &id.Instance); err != nil {
		return Identity{}, fmt.Errorf("read identity: %s is damaged: %w: enrol again with --force", filepath.Join(dir, instanceName), err)
	}
	if id.ID == "" || id.Pin == "" || len(id.Addresses) == 0 {
		return Identity{}, fmt.Errorf("read identity: %s is damaged: id, pin or addresses are missing: enrol again with --force", filepath.Join(dir, instanceName))
	}
	if id.Key, err = os.ReadFile(filepath.Join(dir, keyName)); err != nil {
		return Identity{}, fmt.Errorf("read identity: the key is missing or unreadable: %w: restore it or enrol again with --force", err)
	}
	if len(id.Key) == 0 {
		return Identity{}, fmt.Errorf("read identity: %s is empty: restore it or enrol again with --force", filepath.Join(dir, keyName))
	}
	return id, nil
}

// SetAddresses remembers where the control plane says it can be reached. It
// writes only when something changed.
func SetAddresses(stateDir string, addresses []string) error {
	id, err := Load(stateDir)
	if err != nil {
		return err
	}
	if len(addresses) == 0 || slices.Equal(id.Addresses, addresses) {
		return nil
	}
	id.Addresses = addresses
	if err := writeCopy(filepath.Join(stateDir, dirName), id); err != nil {
		return fmt.Errorf("remember the control plane's addresses: %w", err)
	}
	text, err := encode(id.Instance)
	if err != nil {
		return err
	}
	if err := write(filepath.Join(stateDir, dirName, instanceName), text); err != nil {
		return fmt.Errorf("remember the control plane's addresses: %w", err)
	}
	return nil
}

func encode(i Instance) ([]byte, error) {
	b, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode identity: %w", err)
	}
	return append(b, '\n'), nil
}

// write replaces a file so that after a crash it is the old or the new one, whole.
func write(path string, text []byte) error {
	temp, err := writeTemp(path, text)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return syncDir(filepath.Dir(path))
}

// writeTemp writes and syncs what a rename will put at path.
func writeTemp(path string, text []byte) (temp string, err error) {
	temp = path + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = os.Remove(temp)
		return "", err
	}
	return temp, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
