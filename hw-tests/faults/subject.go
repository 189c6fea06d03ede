package faults

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// breed is a sort of task the harness runs.
type breed string

const (
	keeper   breed = "keeper"   // runs over many runs; crashes when told to and is restarted by its policy
	long     breed = "long"     // runs until it is stopped
	pair     breed = "pair"     // waits for a container that must succeed first
	oneshot  breed = "oneshot"  // ends by itself, with 7
	process  breed = "process"  // long, on the runtime plugin process
	minAge         = 62         // seconds a keeper must have run to be restarted
	longNap        = "0.25"     // seconds: how soon a workload notices anything
	mainMark       = "MAIN=yes" // tells a workload's first process from a health check's
	stopTook       = 7          // seconds a stop may take before it is killed
	exitWith       = 7
)

// workload is what a container does. It tells its witness file of each start
// and end, which a kill does not let it do.
const workload = mainMark + `
w=$WITNESS/$BELAY_TASK_ID
say() { echo "$1 $BELAY_CONTAINER_NAME $BELAY_ATTEMPT" >> $w; }
trap 'say term; sleep 0.4; say end; exit 143' TERM
say start
`

func script(after string) []any { return []any{"/bin/sh", "-c", workload + after} }

// waits until it is told to crash.
const waits = `while [ ! -e $w.crash.$BELAY_ATTEMPT ]; do sleep ` + longNap + `; done
say end
exit 3`

// subject is one task under observation.
type subject struct {
	breed      breed
	id         string
	family     string
	containers []string
	health     bool
	image      string
	bornAt     int  // boots of the device before it
	damaged    bool // its record on the device was
	asked      bool
	crashes    int
}

func (s *subject) runtime() string {
	if s.breed == process {
		return "process"
	}
	return "containerd"
}

// document is its task definition.
func (s *subject) document(witness string) string {
	env := []any{map[string]any{"name": "WITNESS", "value": witness}}
	c := func(name, sh string) map[string]any {
		d := map[string]any{"name": name, "command": script(sh), "environment": env, "stopTimeout": stopTook}
		if s.runtime() == "containerd" {
			d["image"], d["memory"] = s.image, 32
			d["mountPoints"] = []any{map[string]any{"sourceVolume": "witness", "containerPath": witness}}
		}
		return d
	}
	main := c("main", waits)
	if s.health {
		main["healthCheck"] = map[string]any{
			"command":  []any{"CMD-SHELL", "echo $BELAY_ATTEMPT >> $WITNESS/$BELAY_TASK_ID.probe; sleep 0.3"},
			"interval": 5, "timeout": 5, "retries": 10,
		}
	}
	doc := map[string]any{"family": s.family}
	all := []any{main}
	switch s.breed {
	case keeper:
		main["restartPolicy"] = map[string]any{"enabled": true, "restartAttemptPeriod": 60}
	case pair:
		first := c("first", "sleep 0.3; say end; exit 0")
		first["essential"] = false
		main["dependsOn"] = []any{map[string]any{"containerName": "first", "condition": "SUCCESS"}}
		all = []any{first, main}
	case oneshot:
		main["command"] = script("for i in 1 2 3 4 5 6; do sleep " + longNap + "; done; say end; exit " + strconv.Itoa(exitWith))
	case process:
		doc["belay"] = map[string]any{"runtime": "process"}
	}
	doc["containerDefinitions"] = all
	if s.runtime() == "containerd" {
		doc["volumes"] = []any{map[string]any{"name": "witness", "host": map[string]any{"sourcePath": witness}}}
	}
	b, err := json.Marshal(doc)
	if err != nil {
		panic(err) // of maps and strings only
	}
	return string(b)
}

// testimony is what a subject's containers have said.
type testimony struct {
	starts, terms, ends map[string]int // by container and attempt: "main 1"
}

func (s *site) testimony(id string) testimony {
	t := testimony{map[string]int{}, map[string]int{}, map[string]int{}}
	f, err := os.Open(filepath.Join(s.witness, id))
	if err != nil {
		return t // it has said nothing
	}
	defer f.Close()
	for l := bufio.NewScanner(f); l.Scan(); {
		what, who, _ := strings.Cut(l.Text(), " ")
		switch what {
		case "start":
			t.starts[who]++
		case "term":
			t.terms[who]++
		case "end":
			t.ends[who]++
		}
	}
	return t
}

// last is the highest attempt of a container that has said something.
func last(said map[string]int, container string) (attempt int) {
	for who := range said {
		name, number, _ := strings.Cut(who, " ")
		if n, _ := strconv.Atoi(number); name == container {
			attempt = max(attempt, n)
		}
	}
	return attempt
}

// launch asks the control plane to run a task.
func (s *site) launch(ctx context.Context, sub *subject, token string) error {
	sub.family = "f-" + string(sub.breed)
	if sub.image == "" {
		sub.image = registryName + "/shell:1"
	}
	sub.containers = []string{"main"}
	if sub.breed == pair {
		sub.containers = []string{"first", "main"}
	}
	var registered struct {
		TaskDefinition struct {
			Family   string
			Revision int
		}
	}
	if err := s.api.Call(ctx, "RegisterTaskDefinition", map[string]any{"document": sub.document(s.witness), "clientToken": token + "-def"}, &registered); err != nil {
		return err
	}
	var ran struct {
		Tasks    []apiTask
		Failures []json.RawMessage
	}
	td := registered.TaskDefinition
	sub.bornAt = int(s.device.boots.Load())
	if err := s.api.Call(ctx, "RunTask", map[string]any{"cluster": cluster, "clientToken": token,
		"taskDefinition": fmt.Sprintf("%s:%d", td.Family, td.Revision)}, &ran); err != nil {
		return err
	}
	if len(ran.Tasks) != 1 {
		return fmt.Errorf("task run placed %d tasks: %s", len(ran.Tasks), ran.Failures)
	}
	sub.id = ran.Tasks[0].ID
	return nil
}

// apiTask is a task as the operator API tells of it.
type apiTask struct {
	ID            string
	LastStatus    string
	DesiredStatus string
	StopCode      string
	StoppedReason string
	Note          string
	Containers    []apiContainer
}

type apiContainer struct {
	Name, LastStatus string
	Attempt, PID     int
	ExitCode         *int
	Reason           string
}

func (t apiTask) container(name string) apiContainer {
	if i := slices.IndexFunc(t.Containers, func(c apiContainer) bool { return c.Name == name }); i >= 0 {
		return t.Containers[i]
	}
	return apiContainer{}
}

var statuses = []string{"", "PROVISIONING", "PENDING", "ACTIVATING", "RUNNING", "DEACTIVATING", "STOPPING", "DEPROVISIONING", "STOPPED"}

func rank(status string) int { return slices.Index(statuses, status) }
