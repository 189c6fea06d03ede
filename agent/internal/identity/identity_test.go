package identity

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const pin = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

func key(s string) func() ([]byte, error) { return func() ([]byte, error) { return []byte(s), nil } }

func begin(t *testing.T, dir, p, k string) *Enrolment {
	t.Helper()
	e, err := Begin(dir, p, key(k))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func instance(id string) Instance {
	return Instance{ID: id, Cluster: "c", Pin: pin, Addresses: []string{"h:1"}, KeyFingerprint: "f"}
}

// files lists everything below dir.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if p != dir {
			all = append(all, strings.TrimPrefix(p, dir+"/"))
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return all
}

func TestEnrolment(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "state")
	if _, err := Load(dir); !errors.Is(err, ErrNotEnrolled) {
		t.Fatalf("missing state directory: %v", err)
	}
	e := begin(t, dir, pin, "k1")
	if _, err := Load(dir); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("half enrolled: %v", err)
	}
	if err := e.Commit(instance("i1")); err != nil {
		t.Fatal(err)
	}
	got, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Identity{Instance: instance("i1"), Key: []byte("k1")}, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"identity", "identity/copy.json", "identity/instance.json", "identity/key.pem"}, files(t, dir)); diff != "" {
		t.Error(diff)
	}
	for path, want := range map[string]fs.FileMode{dir: 0o700, dir + "/identity": 0o700, dir + "/identity/key.pem": 0o600, dir + "/identity/instance.json": 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v (%v)", path, st.Mode().Perm(), want, err)
		}
	}

	again := begin(t, dir, pin, "k2")
	if string(again.Key) != "k2" {
		t.Errorf("a second identity uses the key of the first: %s", again.Key)
	}
	if got, err := Load(dir); err != nil || got.ID != "i1" || string(got.Key) != "k1" {
		t.Errorf("the identity in force changed before Commit: %v", err)
	}
	if err := again.Commit(instance("i2")); err != nil {
		t.Fatal(err)
	}
	if got, err := Load(dir); err != nil || got.ID != "i2" || string(got.Key) != "k2" {
		t.Errorf("not replaced: %v %v", got.Instance, err)
	}
}

func TestRefusedEnrolmentLeavesNothing(t *testing.T) {
	parent := t.TempDir()
	begin(t, filepath.Join(parent, "a", "state"), pin, "k").Discard()
	if got := files(t, parent); got != nil {
		t.Errorf("left behind: %v", got)
	}
	had := filepath.Join(parent, "mine")
	if err := os.Mkdir(had, 0o755); err != nil {
		t.Fatal(err)
	}
	begin(t, had, pin, "k").Discard()
	if diff := cmp.Diff([]string{"mine"}, files(t, parent)); diff != "" {
		t.Errorf("only what it made may go: %s", diff)
	}
}

func TestLostAnswerIsRetriedWithTheSameKey(t *testing.T) {
	dir := t.TempDir()
	begin(t, dir, pin, "k1").Keep()
	other := begin(t, dir, strings.Repeat("B", 43), "k2")
	if string(other.Key) != "k2" {
		t.Errorf("another control plane is shown the same key")
	}
	other.Keep()
	retry := begin(t, dir, pin, "k3")
	if string(retry.Key) != "k1" {
		t.Fatalf("retried with %s", retry.Key)
	}
	// Refused this time, say because the code was copied wrongly: the first
	// attempt may still have been taken.
	retry.Discard()
	retry = begin(t, dir, pin, "k3")
	if string(retry.Key) != "k1" {
		t.Fatalf("a refusal lost the key of an earlier attempt, now %s", retry.Key)
	}
	if err := retry.Commit(instance("i")); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"identity", "identity/copy.json", "identity/instance.json", "identity/key.pem"}, files(t, dir)); diff != "" {
		t.Error(diff)
	}

	dir = t.TempDir()
	begin(t, dir, pin, "k1").Keep()
	begin(t, dir, pin, "k2").Reject()
	if e := begin(t, dir, pin, "k3"); string(e.Key) != "k3" {
		t.Errorf("a rejected key is offered again: %s", e.Key)
	}
}

// A crash between the two renames of Commit leaves the key without an instance.
func TestCrashInCommitKeepsTheKey(t *testing.T) {
	dir := t.TempDir()
	e := begin(t, dir, pin, "k1")
	if err := os.Rename(e.pending, filepath.Join(dir, "identity", "key.pem")); err != nil {
		t.Fatal(err)
	}
	e.release()
	if _, err := Load(dir); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("half enrolled: %v", err)
	}
	if e := begin(t, dir, pin, "k2"); string(e.Key) != "k1" {
		t.Errorf("retried with %s", e.Key)
	}
}

func TestOneEnrolmentAtATime(t *testing.T) {
	dir := t.TempDir()
	e := begin(t, dir, pin, "k")
	if _, err := Begin(dir, pin, key("k2")); err == nil || !strings.Contains(err.Error(), "another enrolment") {
		t.Errorf("two at once: %v", err)
	}
	e.Discard()
	begin(t, dir, pin, "k").Discard()
}

func TestBeginFailsWhereNothingCanBeWritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Begin(filepath.Join(file, "state"), pin, key("k")); err == nil {
		t.Error("a file was taken for a directory")
	}
	dir := filepath.Join(t.TempDir(), "state")
	broken := errors.New("no randomness")
	if _, err := Begin(dir, pin, func() ([]byte, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left a state directory behind: %v", err)
	}
}

func TestLoadDamaged(t *testing.T) {
	for name, text := range map[string]string{"cut off": `{"id":"x`, "empty": "", "incomplete": `{"id":"x"}`} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := begin(t, dir, pin, "k").Commit(instance("i")); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "identity", "instance.json"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if id, err := Load(dir); err != nil || id.ID != "i" || id.Damage == "" {
				t.Errorf("with a copy: %+v, %v", id, err)
			}
			if err := os.Remove(filepath.Join(dir, "identity", "copy.json")); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "--force") {
				t.Errorf("error must say what to do: %v", err)
			}
		})
	}
}

func TestSetAddressesWritesOnlyChanges(t *testing.T) {
	dir := t.TempDir()
	if err := begin(t, dir, pin, "k").Commit(instance("i")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "identity", "instance.json")
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range [][]string{{"h:1"}, nil} {
		if err := SetAddresses(dir, a); err != nil {
			t.Fatal(err)
		}
	}
	after, err := os.Stat(path)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("written although nothing changed (%v)", err)
	}
	if err := SetAddresses(dir, []string{"h:2", "h:3"}); err != nil {
		t.Fatal(err)
	}
	got, err := Load(dir)
	if err != nil || !cmp.Equal(got.Addresses, []string{"h:2", "h:3"}) {
		t.Errorf("%v %v", got.Addresses, err)
	}
}

// Whatever is damaged in one of the files, the device knows who it is, and
// after Secure all of them say so again.
func TestEveryDamageOfOneFileOfAnIdentityIsMadeGood(t *testing.T) {
	dir := t.TempDir()
	if err := begin(t, dir, pin, "a key in PEM").Commit(instance("i")); err != nil {
		t.Fatal(err)
	}
	want, err := Load(dir)
	if err != nil || want.Damage != "" {
		t.Fatal(want, err)
	}
	for _, name := range []string{"instance.json", "key.pem", "copy.json"} {
		path := filepath.Join(dir, "identity", name)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		try := func(what string, damage func() error) {
			t.Helper()
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			got, err := Load(dir)
			if err != nil {
				t.Fatalf("%s %s: %v", name, what, err)
			}
			if err := Secure(dir, got); err != nil {
				t.Fatal(err)
			}
			got.Damage = ""
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("%s %s: %s", name, what, diff)
			}
			if again, err := Load(dir); err != nil || again.Damage != "" {
				t.Fatalf("%s %s: not made good: %q, %v", name, what, again.Damage, err)
			}
		}
		try("gone", func() error { return os.Remove(path) })
		for at := 0; at < len(good); at += 5 {
			bad := append([]byte{}, good...)
			bad[at] ^= 1 << (at % 8)
			try("flipped", func() error { return os.WriteFile(path, bad, 0o600) })
		}
		for size := 0; size < len(good); size += 5 {
			try("cut", func() error { return os.WriteFile(path, good[:size], 0o600) })
		}
	}
}

// An agent that knows no copies enrolled the device anew: its word counts.
func TestCopyOfAnIdentityBeforeIsNotBelieved(t *testing.T) {
	dir := t.TempDir()
	if err := begin(t, dir, pin, "k1").Commit(instance("i1")); err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(filepath.Join(dir, "identity", "copy.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := begin(t, dir, pin, "k2").Commit(instance("i2")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "identity", "copy.json"), old, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Load(dir)
	if err != nil || got.ID != "i2" || string(got.Key) != "k2" || got.Damage != "" {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := Secure(dir, got); err != nil {
		t.Fatal(err)
	}
	if c, ok := readCopy(filepath.Join(dir, "identity")); !ok || c.ID != "i2" {
		t.Errorf("the copy is still of %s", c.ID)
	}
}
