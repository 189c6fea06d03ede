package controlplane

import (
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/belay-edge/belay/controlplane/wire/query"
)

// Why an instance cannot take a task, in ECS's words where it has one.
const (
	ReasonAgent      = "AGENT"           // not connected
	ReasonRuntime    = "RUNTIME"         // no ready plugin for it
	ReasonAttribute  = "ATTRIBUTE"       // architecture
	ReasonConstraint = "CONSTRAINT"      // a placement constraint; ECS has a sentence for it
	ReasonCPU        = "RESOURCE:CPU"    //
	ReasonMemory     = "RESOURCE:MEMORY" //
	ReasonPorts      = "RESOURCE:PORTS"  //
	ReasonGPU        = "RESOURCE:GPU"    // the task asks for GPUs and nothing else
	ReasonDevices    = "RESOURCE:DEVICE" // accelerators, cameras and the like
	ReasonMissing    = "MISSING"         // no instance at all
)

// Candidate is an instance as placement sees it.
type Candidate struct {
	ID        string
	Connected bool
	Facts     Facts
	Used      Demand // CPU, memory, ports and devices taken

	Capabilities []string // of its agent

	// What placement constraints may ask for, besides Facts.
	Attributes   map[string]string // set by activation or operator
	AgentVersion string
	RegisteredAt time.Time
	Running      int // tasks
}

// ConstraintSubjects are the subjects of a placement constraint besides
// attributes. An instance is never an EC2 instance: ec2InstanceId is known, so
// that definitions of ECS can be read, and present nowhere.
func ConstraintSubjects() []string {
	return []string{"agentConnected", "agentVersion", "ec2InstanceId", "registeredAt", "runningTasksCount"}
}

// Lookup answers placement constraints. What an operator set never hides what
// the device tells.
func (c *Candidate) Lookup() query.Lookup {
	told, set := query.Attributes(c.Facts.Attributes), query.Attributes(c.Attributes)
	return func(subject string) (string, bool) {
		switch subject {
		case "agentConnected":
			return strconv.FormatBool(c.Connected), true
		case "agentVersion":
			return c.AgentVersion, c.AgentVersion != ""
		case "registeredAt":
			return c.RegisteredAt.UTC().Format(time.RFC3339), !c.RegisteredAt.IsZero()
		case "runningTasksCount":
			return strconv.Itoa(c.Running), true
		}
		if value, ok := told(subject); ok {
			return value, true
		}
		return set(subject)
	}
}

// Placement asks for Count tasks to be placed, each taking Demand, on instances
// for which all the constraints hold.
type Placement struct {
	Demand      Demand
	Constraints []query.Expr
	Count       int
	Candidates  []Candidate // ACTIVE instances
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
