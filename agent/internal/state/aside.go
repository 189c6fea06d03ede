package state

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
)

// A device that damages its disk again and again must not fill it with copies.
const (
	mostAside      = 20
	mostAsideBytes = 8 << 20
)

// setAside keeps a copy of damaged content for a person to look at, and says
// where. It is best effort: a full disk must not stop the agent.
func (j *Journal) setAside(name string, content []byte) string {
	if len(content) == 0 {
		return "no place: there is nothing of it to copy"
	}
	to, kept, err := j.freeAside(name, content)
	switch {
	case err != nil:
		return "no place: " + err.Error()
	case kept:
		return to // as it was found at an earlier start
	}
	if err := j.write(to, content); err != nil {
		_ = j.fs.remove(to) // half of it is space lost
		return "no place: " + err.Error()
	}
	return to
}

// moveAside is for what is in the way.
func (j *Journal) moveAside(name string) error {
	to, _, err := j.freeAside(name, nil)
	if err != nil {
		return err
	}
	return j.fs.rename(name, to)
}

// freeAside finds a name below damagedDir; kept: the same is there already.
func (j *Journal) freeAside(name string, content []byte) (to string, kept bool, err error) {
	taken, err := j.fs.list(damagedDir)
	if errors.Is(err, fs.ErrNotExist) {
		err = j.fs.mkdir(damagedDir)
	}
	if err != nil {
		return "", false, err
	}
	flat := strings.ReplaceAll(filepath.ToSlash(name), "/", "-")
	bytesKept := len(content)
	for _, t := range taken {
		there, err := j.fs.read(filepath.Join(damagedDir, t))
		if err == nil && content != nil && bytes.Equal(there, content) && strings.HasPrefix(t, flat+".") {
			return filepath.Join(damagedDir, t), true, nil
		}
		bytesKept += len(there)
	}
	if len(taken) >= mostAside || bytesKept > mostAsideBytes {
		return "", false, fmt.Errorf("%s holds %d copies and must not grow past %d or %d MiB",
			damagedDir, len(taken), mostAside, mostAsideBytes>>20)
	}
	for n := 1; ; n++ {
		if to := fmt.Sprintf("%s.%d", flat, n); !slices.Contains(taken, to) {
			return filepath.Join(damagedDir, to), false, nil
		}
	}
}
