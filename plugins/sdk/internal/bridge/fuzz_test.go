package bridge

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
	pluginv2 "github.com/belay-edge/belay/plugins/sdk/internal/pluginpb/v2"
)

// readers are all that turns messages of the other side into words of the SDK.
var readers = []func([]byte) bool{
	reads(FromInfo), reads(FromConfig), reads(FromStart), reads(FromContainer), reads(FromInventory), reads(FromStats),
	reads(FromExec), reads(FromExecResult), reads(FromDescription), reads(FromInventoryOfDevices), reads(FromEdits),
	reads(FromDeviceStats), reads(FromRuntimeInfo), reads(FromAttempt), reads(FromTaskSpec), reads(FromPull),
	reads(FromProgress), reads(FromImage), reads(FromStartV1),
}

func reads[P proto.Message, T any](from func(P) T) func([]byte) bool {
	return func(b []byte) bool {
		var p P
		p = p.ProtoReflect().New().Interface().(P)
		if proto.Unmarshal(b, p) != nil {
			return false
		}
		from(p)
		return true
	}
}

// FuzzFromMessages: nothing a plugin or an agent sends ends the other.
func FuzzFromMessages(f *testing.F) {
	for i := range readers {
		f.Add(uint8(i), []byte(nil))
	}
	for _, p := range []proto.Message{
		&pluginpb.DescribeResponse{}, &pluginv2.ListResponse{Containers: []*pluginpb.Container{nil}, RanForNs: []int64{-1}},
		&pluginv2.DeviceInventory{Devices: []*pluginv2.DeviceInfo{nil, {Attributes: map[string]string{"": ""}}}},
		&pluginv2.StartRequest{Spec: &pluginv2.ContainerSpec{Hooks: []*pluginv2.Hook{nil}}},
	} {
		b, err := proto.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		for r := range readers {
			f.Add(uint8(r), b)
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, b []byte) {
		readers[int(which)%len(readers)](b)
	})
}
