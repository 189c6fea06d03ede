package controlplane

import "math/rand/v2"

// Why an instance cannot take a task, in ECS's words where it has one.
const (
	ReasonAgent     = "AGENT"           // not connected
	ReasonRuntime   = "RUNTIME"         // no ready plugin for it
	ReasonAttribute = "ATTRIBUTE"       // architecture
	ReasonCPU       = "RESOURCE:CPU"    //
	ReasonMemory    = "RESOURCE:MEMORY" //
	ReasonPorts     = "RESOURCE:PORTS"  //
	ReasonMissing   = "MISSING"         // no instance at all
)

// Candidate is an instance as placement sees it.
type Candidate struct {
	ID        string
	Connected bool
	Facts     Facts
	Used      Demand // CPU, memory and ports taken
}

// Placement asks for Count tasks to be placed, each taking Demand.
type Placement struct {
	Demand     Demand
	Count      int
	Candidates []Candidate // ACTIVE instances
	// For telling why, where there are no candidates.
	Cluster   string
	Elsewhere []string // other clusters that have ACTIVE instances, in order
}

// PlacementFailure is why tasks were not placed on an instance.
type PlacementFailure struct {
	Reason   string `json:"reason"`
	Instance string `json:"instance,omitempty"` // "": there is none
	Detail   string `json:"detail"`             // for a person, with numbers
}

// PlaceFunc chooses an instance for each task, fewer than Count when there is
// not enough room, in which case failures says why not, once an instance. It
// must not keep or change what it is given.
type PlaceFunc func(p Placement, r *rand.Rand) (instances []string, failures []PlacementFailure)
