package agent

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

func TestStartRequestSaysWhatTheDefinitionSays(t *testing.T) {
	c := &wire.Container{
		Name: "main", EntryPoint: []string{"/init"}, EntryPointSet: true, Command: nil, CommandSet: true,
		Environment: []*wire.KeyValue{{Name: "A", Value: "b=c"}}, MemoryMib: 64, MaxSwapMib: proto.Int64(-1), Swappiness: proto.Uint32(0),
		Ports:   []*wire.PortMapping{{ContainerPort: 80}, {ContainerPort: 53, HostPort: 5353, Protocol: "udp"}},
		Ulimits: []*wire.Ulimit{{Name: "nofile", Soft: 1024, Hard: -1}},
		Devices: []*wire.Device{{HostPath: "/dev/x", Permissions: []string{"mknod", "read"}}},
		Tmpfs:   []*wire.Tmpfs{{Target: "/t", SizeMib: 8, Options: []string{"noexec"}}},
	}
	task := &wire.TaskSpec{Family: "f", Revision: 3, Cluster: "c"}
	unlimited, zero := int64(-1), uint64(0)
	j := job{task: task, container: c, image: "r/i:1", digest: "sha256:1", hostPorts: []int{40000, 5353}}
	j.Attempt = sdk.Attempt{Task: "t", Container: "main", Number: 2}
	got := startRequest(j, "device", []sdk.Mount{{Type: "bind", Source: "/s", Target: "/d"}})
	want := sdk.StartRequest{
		Attempt: j.Attempt, Network: sdk.NetworkBridge,
		Spec: sdk.ContainerSpec{
			Image: "r/i:1", Digest: "sha256:1", EntryPoint: []string{"/init"}, Command: []string{},
			Env: []string{
				"BELAY_TASK_ID=t", "BELAY_TASK_FAMILY=f", "BELAY_TASK_REVISION=3", "BELAY_CONTAINER_NAME=main",
				"BELAY_ATTEMPT=2", "BELAY_CLUSTER=c", "BELAY_INSTANCE_ID=device", "A=b=c",
			},
			Limits:  sdk.Limits{CPUShares: 2, MemoryBytes: 64 << 20, MemorySwap: &unlimited, Swappiness: &zero},
			Mounts:  []sdk.Mount{{Type: "bind", Source: "/s", Target: "/d"}, {Type: "tmpfs", Target: "/t", Options: []string{"noexec", "size=8m"}}},
			Ports:   []sdk.PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 40000}, {Protocol: "udp", ContainerPort: 53, HostPort: 5353}},
			Ulimits: []sdk.Ulimit{{Name: "nofile", Soft: 1024, Hard: math.MaxUint64}},
			Devices: []sdk.HostDevice{{HostPath: "/dev/x", Permissions: "rm"}},
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	c.DisableNetworking = true
	if got := startRequest(j, "", nil); got.Network != sdk.NetworkNone || got.Spec.Ports != nil {
		t.Errorf("without network: %s %v", got.Network, got.Spec.Ports)
	}
}

func TestTaskLimits(t *testing.T) {
	got := taskSpec("t", &wire.TaskSpec{Cpu: 512, MemoryMib: 128, Network: "host"})
	want := sdk.TaskSpec{ID: "t", Network: "host", Limits: sdk.Limits{CPUShares: 512, CPUQuota: 50_000, MemoryBytes: 128 << 20}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if l := taskSpec("t", &wire.TaskSpec{}).Limits; l != (sdk.Limits{}) {
		t.Errorf("without limits: %+v", l)
	}
}

func TestVolumesFromFollowsOtherContainersOnce(t *testing.T) {
	spec := &wire.TaskSpec{Containers: []*wire.Container{
		{Name: "a", Mounts: []*wire.Mount{{Volume: "own", Target: "/x"}}, VolumesFrom: []*wire.VolumeFrom{{Container: "b", ReadOnly: true}}},
		{Name: "b", Mounts: []*wire.Mount{{Volume: "theirs", Target: "/x"}, {Volume: "more", Target: "/y"}}, VolumesFrom: []*wire.VolumeFrom{{Container: "a"}}},
	}}
	got := mountPoints(spec, spec.Containers[0])
	want := []mountPoint{{"own", "/x", false}, {"more", "/y", true}}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(mountPoint{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestHealthCommandForms(t *testing.T) {
	for _, tc := range []struct{ in, want []string }{
		{[]string{"CMD", "curl", "-f", "x"}, []string{"curl", "-f", "x"}},
		{[]string{"CMD-SHELL", "curl -f x || exit 1"}, []string{"/bin/sh", "-c", "curl -f x || exit 1"}},
		{nil, nil},
	} {
		if d := cmp.Diff(tc.want, healthCommand(&wire.HealthCheck{Command: tc.in})); d != "" {
			t.Errorf("%q (-want +got):\n%s", tc.in, d)
		}
	}
}

func TestPinnedReferenceHasOneDigest(t *testing.T) {
	for in, want := range map[string]string{
		"r.test/app:1":             "r.test/app:1@sha256:2",
		"r.test/app@sha256:1":      "r.test/app@sha256:2",
		"r.test:5000/app@sha256:2": "r.test:5000/app@sha256:2",
	} {
		if got := pinned(in, "sha256:2"); got != want {
			t.Errorf("pinned(%q) = %q, want %q", in, got, want)
		}
	}
}
