package containerd

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

// TestBridgeConfiguration: no ADD runs iptables unless there are ports to map,
// and every DEL undoes what any ADD may have made.
func TestBridgeConfiguration(t *testing.T) {
	b := newBridge(Config{Bridge: Bridge{Name: "br0", Subnet: "10.9.0.0/24"}, CNIBinDirs: []string{"/none"}}, t.TempDir())
	if b.listErr != nil {
		t.Fatal(b.listErr)
	}
	for want, list := range map[string]*libcni.NetworkConfigList{"[bridge]": b.bare, "[bridge portmap]": b.list} {
		var got []string
		for _, p := range list.Plugins {
			got = append(got, p.Network.Type)
			if bytes.Contains(p.Bytes, []byte("ipMasq")) {
				t.Errorf("%s makes rules for every address", p.Network.Type)
			}
		}
		if fmt.Sprint(got) != want {
			t.Errorf("plugins %s, want %s", got, want)
		}
	}
	if b.bare.Name != b.list.Name {
		t.Error("a DEL would not find the results of an ADD without ports")
	}
}
