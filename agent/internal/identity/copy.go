package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
)

// A device that lost its identity needs somebody to go there. So there is a
// second copy of all of it in one file, with a checksum: it tells which of the
// two is damaged, and takes the place of files that are gone.
//
// Written before instance.json changes and removed before another identity
// comes, it is never older than what it stands beside, but for an identity
// made by an agent that knew of no copy.

const copyName = "copy.json"

type duplicate struct {
	Instance Instance `json:"instance"`
	Key      string   `json:"key"`
	Sum      string   `json:"sum"` // hex SHA-256 of the rest
}

func duplicateOf(id Identity) (duplicate, error) {
	d := duplicate{Instance: id.Instance, Key: string(id.Key)}
	b, err := json.Marshal(d)
	if err != nil {
		return d, fmt.Errorf("encode identity: %w", err)
	}
	sum := sha256.Sum256(b)
	d.Sum = hex.EncodeToString(sum[:])
	return d, nil
}

// readCopy reads the copy; false when there is none that checks out.
func readCopy(dir string) (Identity, bool) {
	b, err := os.ReadFile(filepath.Join(dir, copyName))
	if err != nil {
		return Identity{}, false
	}
	var d duplicate
	if json.Unmarshal(b, &d) != nil {
		return Identity{}, false
	}
	id := Identity{Instance: d.Instance, Key: []byte(d.Key)}
	want, err := duplicateOf(id)
	return id, err == nil && want.Sum == d.Sum && id.complete()
}

func writeCopy(dir string, id Identity) error {
	d, err := duplicateOf(id)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return fmt.Errorf("encode identity: %w", err)
	}
	return write(filepath.Join(dir, copyName), append(b, '\n'))
}

// settle decides between what the files say, or why they do not, and the copy.
func settle(dir string, id Identity, err error) (Identity, error) {
	c, ok := readCopy(dir)
	switch {
	case !ok:
		return id, err
	case err != nil:
		c.Damage = err.Error()
		return c, nil
	case c.ID != id.ID && string(c.Key) != string(id.Key):
		return id, nil // of an identity before this one
	case string(c.Key) != string(id.Key):
		c.Damage = filepath.Join(dir, keyName) + " is damaged"
		return c, nil
	case !reflect.DeepEqual(c.Instance, id.Instance):
		c.Damage = filepath.Join(dir, instanceName) + " is damaged or out of date"
		return c, nil
	}
	return id, nil
}

// Secure makes the files and their copy say what Load has read. It writes only
// what differs.
func Secure(stateDir string, id Identity) error {
	dir := filepath.Join(stateDir, dirName)
	text, err := encode(id.Instance)
	if err != nil {
		return err
	}
	var errs []error
	put := func(name string, want []byte) {
		if have, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(have) != string(want) {
			errs = append(errs, write(filepath.Join(dir, name), want))
		}
	}
	if id.Damage != "" {
		put(keyName, id.Key)
		put(instanceName, text)
	}
	if c, ok := readCopy(dir); !ok || string(c.Key) != string(id.Key) || !reflect.DeepEqual(c.Instance, id.Instance) {
		errs = append(errs, writeCopy(dir, id))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("secure identity: %w", err)
	}
	return nil
}

// syncParents makes the names of dir and of the state directory last.
func syncParents(dir string) error {
	state := filepath.Dir(dir)
	if err := syncDir(state); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(state)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil
}
