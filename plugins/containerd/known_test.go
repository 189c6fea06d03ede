package containerd

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestKnowledge(t *testing.T) {
	var k knowledge
	one := digest.FromString("one")
	if _, ok := k.image(one); ok {
		t.Error("it knows an image from the start")
	}
	k.note(one, func(i *known) { i.chain = "c" })
	k.note(one, func(i *known) { i.whole = true })
	if i, ok := k.image(one); !ok || i.chain != "c" || !i.whole {
		t.Errorf("it knows %+v, %v", i, ok)
	}

	want := specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{2}}
	k.noteUser(one, "app", want)
	u, ok := k.user(one, "app")
	u.AdditionalGids[0] = 3 // as an edit of one container's spec may
	again, _ := k.user(one, "app")
	if _, other := k.user(one, "root"); !ok || other || !cmp.Equal(again, want) {
		t.Errorf("users: %+v %v %v", again, ok, other)
	}

	arm, amd := ocispec.Platform{OS: "linux", Architecture: "arm"}, ocispec.Platform{OS: "linux", Architecture: "amd64"}
	k.noteManifest("index", arm, "for arm")
	_, ok = k.manifest("index", amd)
	if m, _ := k.manifest("index", arm); m != "for arm" || ok {
		t.Errorf("manifest %q; one of another platform: %v", m, ok)
	}

	for n := range 10 * mostKnown {
		d := digest.FromString(fmt.Sprint(n))
		k.note(d, func(i *known) { i.read = true })
		k.noteManifest(d, arm, d)
		k.noteUser(one, d.String(), want)
		if i, ok := k.image(d); !ok || !i.read {
			t.Fatalf("image %d is forgotten at once", n)
		}
	}
	if len(k.images) > mostKnown || len(k.manifests) > mostKnown || len(k.images[one].users) > mostKnown {
		t.Errorf("it grows to %d images, %d manifests, %d users", len(k.images), len(k.manifests), len(k.images[one].users))
	}
}

func TestTransportsAreSharedForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ts transports
		var made, idle []string
		get := func(name string) http.RoundTripper {
			return ts.get(name, func() transport {
				made = append(made, name)
				return transport{RoundTripper: &http.Transport{}, idle: func() { idle = append(idle, name) }}
			})
		}
		a := get("a")
		get("b")
		time.Sleep(transportLife - time.Second)
		if get("a").(transport).RoundTripper != a.(transport).RoundTripper {
			t.Error("the second pull does not use the connections of the first")
		}
		time.Sleep(time.Second)
		get("a")
		slices.Sort(idle)
		if d := cmp.Diff([][]string{{"a", "b", "a"}, {"a", "b"}}, [][]string{made, idle}); d != "" {
			t.Errorf("made and given up (-want +got):\n%s", d)
		}
		for n := range 10 * mostTransports {
			get(fmt.Sprint(n))
		}
		if len(ts.all) > mostTransports || len(made)-len(idle) != len(ts.all) {
			t.Errorf("%d made, %d given up, %d left", len(made), len(idle), len(ts.all))
		}
	})
}
