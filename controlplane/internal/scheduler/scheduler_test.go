package scheduler

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/query"
)

func candidate(id string, change func(*controlplane.Candidate)) controlplane.Candidate {
	c := controlplane.Candidate{ID: id, Connected: true, Facts: controlplane.Facts{
		Attributes: map[string]string{"belay.arch": "arm64"}, CPU: 4096, MemoryMiB: 1000,
		Plugins: []controlplane.PluginInfo{{Name: "containerd", Kinds: []string{"runtime"}, State: "ready", Networks: []string{"bridge", "host"}}},
	}}
	if change != nil {
		change(&c)
	}
	return c
}

var http = controlplane.PortKey{Protocol: "tcp", Port: 80}

func TestPlaceRefusals(t *testing.T) {
	demand := controlplane.Demand{CPU: 512, MemoryMiB: 600, Ports: []controlplane.PortKey{http}, Runtime: "containerd", Network: "bridge", Arch: "arm64"}
	for _, c := range []struct {
		name   string
		change func(*controlplane.Candidate)
		reason string // "": it fits
		detail string
	}{
		{"fits", nil, "", ""},
		{"not connected", func(c *controlplane.Candidate) { c.Connected = false }, "AGENT", "not connected"},
		{"no such plugin", func(c *controlplane.Candidate) { c.Facts.Plugins[0].Name = "podman" }, "RUNTIME", `no runtime plugin "containerd"`},
		{"plugin of another kind", func(c *controlplane.Candidate) { c.Facts.Plugins[0].Kinds = []string{"device"} }, "RUNTIME", "no runtime plugin"},
		{"plugin was never up", func(c *controlplane.Candidate) {
			p := &c.Facts.Plugins[0]
			p.State, p.LastError, p.Networks = "failed", "no socket", nil
		}, "RUNTIME", "failed: no socket"},
		{"runtime without its daemon", func(c *controlplane.Candidate) { c.Facts.Plugins[0].Networks = nil }, "RUNTIME", "is not there or does not answer"},
		{"plugin quarantined", func(c *controlplane.Candidate) {
			c.Facts.Plugins[0].State, c.Facts.Plugins[0].LastError = "quarantined", "crashed 5 times"
		}, "RUNTIME", "quarantined: crashed 5 times"},
		{"plugin crashed a moment ago", func(c *controlplane.Candidate) {
			c.Facts.Plugins[0].State, c.Facts.Plugins[0].LastError = "starting", "killed"
		}, "", ""},
		{"network not done", func(c *controlplane.Candidate) { c.Facts.Plugins[0].Networks = []string{"host"} }, "RUNTIME", `not "bridge"`},
		{"another architecture", func(c *controlplane.Candidate) { c.Facts.Attributes["belay.arch"] = "amd64" }, "ATTRIBUTE", "it is amd64, the task is for arm64"},
		{"CPU taken", func(c *controlplane.Candidate) { c.Used.CPU = 4000 }, "RESOURCE:CPU", "needs 512 CPU units, 96 of its 4096"},
		{"memory taken", func(c *controlplane.Candidate) { c.Used.MemoryMiB = 500 }, "RESOURCE:MEMORY", "needs 600 MiB, 500 of its 1000"},
		{"memory overcommitted before", func(c *controlplane.Candidate) { c.Used.MemoryMiB = 1500 }, "RESOURCE:MEMORY", "needs 600 MiB, 0 of its 1000"},
		{"port taken", func(c *controlplane.Candidate) { c.Used.Ports = []controlplane.PortKey{http} }, "RESOURCE:PORTS", "80/tcp"},
		{"port reserved", func(c *controlplane.Candidate) { c.Facts.ReservedPorts = []controlplane.PortKey{http} }, "RESOURCE:PORTS", "80/tcp"},
		{"same port, other protocol", func(c *controlplane.Candidate) {
			c.Used.Ports = []controlplane.PortKey{{Protocol: "udp", Port: 80}}
		}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, failures := Place(controlplane.Placement{Demand: demand, Count: 1, Candidates: []controlplane.Candidate{candidate("a", c.change)}}, rand.New(rand.NewPCG(1, 2)))
			if c.reason == "" {
				if diff := cmp.Diff([]string{"a"}, got); diff != "" || failures != nil {
					t.Fatalf("%s %v", diff, failures)
				}
				return
			}
			if len(got) != 0 || len(failures) != 1 || failures[0].Reason != c.reason || failures[0].Instance != "a" || !strings.Contains(failures[0].Detail, c.detail) {
				t.Errorf("placed on %v, failures %+v; want %s: %s", got, failures, c.reason, c.detail)
			}
		})
	}
}

func TestPlaceWithConstraints(t *testing.T) {
	lab := candidate("lab", func(c *controlplane.Candidate) {
		c.Attributes = map[string]string{"site": "lab", "belay.arch": "forged"}
		c.AgentVersion, c.Running = "1.10.2", 3
		c.RegisteredAt = time.Date(2026, 3, 1, 9, 0, 0, 0, time.FixedZone("", 3600))
	})
	shed := candidate("shed", func(c *controlplane.Candidate) {
		c.Attributes, c.Connected = map[string]string{"site": "shed"}, false
	})
	for _, c := range []struct {
		name        string
		constraints []string
		want        []controlplane.PlacementFailure // "": placed on lab
	}{
		{"none", nil, nil},
		{"an operator's attribute", []string{"attribute:site == lab"}, nil},
		{"what the device tells is not hidden", []string{"attribute:belay.arch == arm64"}, nil},
		{"the version", []string{"agentVersion >= 1.9.0"}, nil},
		{"the time", []string{"registeredAt < 2026-03-01T08:00:01Z and registeredAt > 2026-03-01T07:59:59"}, nil},
		{"the tasks", []string{"runningTasksCount == 3 and agentConnected == true"}, nil},
		{"all must hold", []string{"attribute:site == lab", "attribute:gpu exists"}, []controlplane.PlacementFailure{
			{Reason: controlplane.ReasonConstraint, Instance: "lab", Detail: "attribute:gpu exists: it has no gpu"},
			{Reason: controlplane.ReasonConstraint, Instance: "shed", Detail: `attribute:site == lab: it is "shed"`},
		}},
		{"one elsewhere, and not connected there", []string{"attribute:site == shed"}, []controlplane.PlacementFailure{
			{Reason: controlplane.ReasonConstraint, Instance: "lab", Detail: `attribute:site == shed: it is "lab"`},
			{Reason: controlplane.ReasonAgent, Instance: "shed", Detail: "its agent is not connected"},
		}},
		{"what no device is", []string{"ec2InstanceId == i-1"}, []controlplane.PlacementFailure{
			{Reason: controlplane.ReasonConstraint, Instance: "lab", Detail: "ec2InstanceId == i-1: it has no ec2InstanceId"},
			{Reason: controlplane.ReasonConstraint, Instance: "shed", Detail: "ec2InstanceId == i-1: it has no ec2InstanceId"},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := controlplane.Placement{Count: 1, Demand: controlplane.Demand{Runtime: "containerd"}, Candidates: []controlplane.Candidate{lab, shed}}
			for _, text := range c.constraints {
				e, err := query.Parse(text, controlplane.ConstraintSubjects()...)
				if err != nil {
					t.Fatal(err)
				}
				p.Constraints = append(p.Constraints, e)
			}
			got, failures := Place(p, rand.New(rand.NewPCG(1, 2)))
			var want []string
			if c.want == nil {
				want = []string{"lab"}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("placed (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(c.want, failures); diff != "" {
				t.Errorf("failures (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPlaceMany(t *testing.T) {
	demand := controlplane.Demand{MemoryMiB: 400, Runtime: "containerd"}
	p := controlplane.Placement{Demand: demand, Count: 5, Candidates: []controlplane.Candidate{candidate("a", nil), candidate("b", nil)}}
	got, failures := Place(p, rand.New(rand.NewPCG(1, 2)))
	count := map[string]int{}
	for _, id := range got {
		count[id]++
	}
	// Two fit on each; of the fifth it is said for each why it does not.
	if diff := cmp.Diff(map[string]int{"a": 2, "b": 2}, count); diff != "" {
		t.Error(diff)
	}
	if len(failures) != 2 || failures[0].Reason != "RESOURCE:MEMORY" || failures[1].Reason != "RESOURCE:MEMORY" {
		t.Errorf("failures %+v", failures)
	}
	if p.Candidates[0].Used.MemoryMiB != 0 {
		t.Error("Place changed what it was given")
	}
}

func TestPlaceIsRandomAndRepeatable(t *testing.T) {
	p := controlplane.Placement{Demand: controlplane.Demand{Runtime: "containerd"}, Count: 1, Candidates: []controlplane.Candidate{candidate("a", nil), candidate("b", nil), candidate("c", nil)}}
	count := map[string]int{}
	for seed := range uint64(300) {
		one, _ := Place(p, rand.New(rand.NewPCG(seed, 0)))
		two, _ := Place(p, rand.New(rand.NewPCG(seed, 0)))
		if diff := cmp.Diff(one, two); diff != "" {
			t.Fatal(diff)
		}
		count[one[0]]++
	}
	for _, id := range []string{"a", "b", "c"} {
		if count[id] < 60 {
			t.Errorf("%s was chosen %d of 300 times", id, count[id])
		}
	}
}

// Without --cluster it is the default one that is asked, which the answer did
// not name.
func TestPlaceWithoutInstances(t *testing.T) {
	for _, r := range []struct {
		name      string
		elsewhere []string
		want      string
	}{
		{"none anywhere", nil, "cluster default has no instances: enrol a device with an activation for it"},
		{"some elsewhere", []string{"lab", "shop"}, "cluster default has no instances, there are some in lab, shop: choose one with --cluster, or enrol a device with an activation for default"},
		{"in many", strings.Split("a b c d e f g", " "), "cluster default has no instances, there are some in a, b, c, d, e, 2 more: choose one with --cluster, or enrol a device with an activation for default"},
	} {
		t.Run(r.name, func(t *testing.T) {
			_, failures := Place(controlplane.Placement{Count: 1, Cluster: "default", Elsewhere: r.elsewhere}, nil)
			want := []controlplane.PlacementFailure{{Reason: controlplane.ReasonMissing, Detail: r.want}}
			if diff := cmp.Diff(want, failures); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// An agent that does not know belay.disconnect would let the task run for ever.
func TestOldAgentsGetNoTaskThatStopsAway(t *testing.T) {
	old := candidate("old", nil)
	able := candidate("able", func(c *controlplane.Candidate) { c.Capabilities = []string{wire.CapabilityDisconnect} })
	for _, d := range []struct {
		stops bool
		want  []string
	}{{false, []string{"old"}}, {true, nil}} {
		demand := controlplane.Demand{Runtime: "containerd", Network: "bridge", StopsAway: d.stops}
		got, failures := Place(controlplane.Placement{Demand: demand, Count: 1, Candidates: []controlplane.Candidate{old}}, rand.New(rand.NewPCG(1, 2)))
		if diff := cmp.Diff(d.want, got); diff != "" {
			t.Errorf("stops away %t: (-want +got):\n%s", d.stops, diff)
		}
		if d.stops && (len(failures) != 1 || !strings.Contains(failures[0].Detail, "too old")) {
			t.Errorf("failures %v", failures)
		}
		got, _ = Place(controlplane.Placement{Demand: demand, Count: 1, Candidates: []controlplane.Candidate{able}}, rand.New(rand.NewPCG(1, 2)))
		if diff := cmp.Diff([]string{"able"}, got); diff != "" {
			t.Errorf("stops away %t: (-want +got):\n%s", d.stops, diff)
		}
	}
}
