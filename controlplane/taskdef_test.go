package controlplane

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func decode(t *testing.T, doc string) (*TaskDefinition, []string) {
	t.Helper()
	td, warnings, err := DecodeTaskDefinition([]byte(doc))
	if err != nil {
		t.Fatalf("DecodeTaskDefinition: %v", err)
	}
	return td, warnings
}

// with is a good definition with more fields in its only container.
func with(fields string) string {
	return `{"family":"f","containerDefinitions":[{"name":"c","image":"i",` + fields + `}]}`
}

func TestProblemsAreToldAllAtOnceInOrder(t *testing.T) {
	doc := `{
  "Family": "web",
  "cpu": "lots",
  "containerDefinitions": [
    {
      "name": "a b",
      "image": "UPPER:x",
      "memory": "512",
      "memory": 5,
      "portMappings": [
        {"containerPort": 80, "hostport": 8080},
        {"containerPort": 70000}
      ]
    }
  ]
}`
	_, _, err := DecodeTaskDefinition([]byte(doc))
	want := strings.TrimPrefix(`
family: is required
line 2: Family: unknown field: names are case-sensitive, did you mean "family"?
line 3: cpu: is the string "lots"; it must be CPU units such as "256" (1024 a core, from 2 to 196608) or cores such as ".25 vCPU"
line 6: containerDefinitions[0].name: is "a b"; it must be 1 to 255 letters, digits, underscores and hyphens
line 7: containerDefinitions[0].image: is "UPPER:x", which is no image reference: repository name (library/UPPER) must be lowercase
line 8: containerDefinitions[0].memory: must be a whole number, not the string "512"
line 8: containerDefinitions[0].memory: is given a second time on line 9
line 11: containerDefinitions[0].portMappings[0].hostport: unknown field: names are case-sensitive, did you mean "hostPort"?
line 12: containerDefinitions[0].portMappings[1].containerPort: is 70000; it must be from 1 to 65535`, "\n")
	if err == nil {
		t.Fatal("accepted")
	}
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	if !errors.Is(err, InvalidArgument) {
		t.Error("not an InvalidArgument")
	}
}

func TestRules(t *testing.T) {
	two := func(a, b string) string {
		return `{"family":"f","containerDefinitions":[{"name":"a","image":"i"` + a + `},{"name":"b","image":"i"` + b + `}]}`
	}
	process := func(fields string) string {
		return `{"family":"f","belay":{"runtime":"process"},"containerDefinitions":[{"name":"c",` + fields + `}]}`
	}
	task := func(fields string) string {
		return `{"family":"f","containerDefinitions":[{"name":"c","image":"i"}],` + fields + `}`
	}
	for _, tc := range []struct{ name, doc, want string }{
		{"empty", " \n", "the document is empty"},
		{"not an object", `[1]`, "the document is a list"},
		{"two documents", `{} {}`, "line 1: malformed JSON: invalid character '{' after top-level value"},
		{"truncated", "{\n\"family\":", "line 2: malformed JSON: unexpected end of JSON input"},
		{"comma", "{\n\"family\":\"f\",\n}", "line 3: malformed JSON: invalid character '}'"},
		{"not UTF-8", "{\"family\":\"\xff\"}", "line 1: the text is not UTF-8"},
		{"deep", strings.Repeat(`{"a":`, 40) + "1" + strings.Repeat("}", 40), "more than 32 levels"},
		{"large", `{"family":"` + strings.Repeat("x", MaxTaskDefinitionBytes) + `"}`, "bytes; at most"},
		{"duplicate", `{"family":"a",` + "\n" + `"family":"b"}`, "line 1: family: is given a second time on line 2"},
		{"typo", task(`"networkmode":"host"`), `networkmode: unknown field: names are case-sensitive, did you mean "networkMode"?`},
		{"near", task(`"volume":[]`), `volume: unknown field: did you mean "volumes"?`},
		{"far", task(`"banana":1`), `banana: unknown field`},
		{"described", task(`"taskDefinitionArn":"x"`), "taskDefinitionArn: is part of a described definition"},
		{"wrapped", `{"taskDefinition":{}}`, "pass what is inside it"},
		{"reserved task field", task(`"belay":{"placement":{}}`), "belay.placement: is reserved for a later version"},
		{"stop at once", task(`"belay":{"disconnect":{"stopAfter":0}}`), "belay.disconnect.stopAfter: is 0; it must be from 10 to 31536000"},
		{"stop in years", task(`"belay":{"disconnect":{"stopAfter":31536001}}`), "belay.disconnect.stopAfter: is 31536001; it must be from 10 to 31536000"},
		{"stop after words", task(`"belay":{"disconnect":{"stopAfter":"30m"}}`), `belay.disconnect.stopAfter: `},
		{"disconnect of no kind", task(`"belay":{"disconnect":60}`), `belay.disconnect: `},
		{"disconnect field", task(`"belay":{"disconnect":{"stopafter":60}}`), `belay.disconnect.stopafter: unknown field: names are case-sensitive, did you mean "stopAfter"?`},
		{"disconnect of a container", with(`"belay":{"disconnect":{"stopAfter":60}}`), `belay.disconnect: unknown field`},
		{"reserved container field", with(`"belay":{"ingress":[]}`), "containerDefinitions[0].belay.ingress: is reserved"},
		{"device kind", with(`"belay":{"devices":[{"kind":"GPU"}]}`), `containerDefinitions[0].belay.devices[0].kind: is "GPU"; it must be a kind of device`},
		{"device without a kind", with(`"belay":{"devices":[{"count":1}]}`), "containerDefinitions[0].belay.devices[0].kind: is required"},
		{"no devices", with(`"belay":{"devices":[{"kind":"gpu","count":0}]}`), "belay.devices[0].count: is 0; it must be from 1 to 16"},
		{"too many devices", with(`"belay":{"devices":[{"kind":"gpu","count":17}]}`), "belay.devices[0].count: is 17; it must be from 1 to 16"},
		{"device expression", with(`"belay":{"devices":[{"kind":"gpu","where":"attribute:memory_mib > "}]}`), `belay.devices[0].where: is "attribute:memory_mib > ": `},
		{"device subject", with(`"belay":{"devices":[{"kind":"gpu","where":"agentVersion == 1"}]}`), `belay.devices[0].where: is "agentVersion == 1": `},
		{"device field", with(`"belay":{"devices":[{"kind":"gpu","were":"x"}]}`), `belay.devices[0].were: unknown field: did you mean "where"?`},
		{"too many device requests", with(`"resourceRequirements":[{"type":"GPU","value":"1"}],"belay":{"devices":[` + strings.Repeat(`{"kind":"gpu"},`, 7) + `{"kind":"gpu"}]}`),
			"belay.devices: has 8 requests; a container may have at most 8"},
		{"GPU count", with(`"resourceRequirements":[{"type":"GPU","value":"one"}]`), `resourceRequirements[0].value: is "one"; it must be a number of GPUs from 1 to 16`},
		{"GPU count missing", with(`"resourceRequirements":[{"type":"GPU"}]`), `resourceRequirements[0].value: is required`},
		{"GPU twice", with(`"resourceRequirements":[{"type":"GPU","value":"1"},{"type":"GPU","value":"1"}]`), `resourceRequirements[1].type: is "GPU", which an earlier requirement has`},
		{"inference accelerator", with(`"resourceRequirements":[{"type":"InferenceAccelerator","value":"d"}]`), `resourceRequirements[0].type: is "InferenceAccelerator", which is refused`},
		{"resource", with(`"resourceRequirements":[{"type":"FPGA","value":"1"}]`), `resourceRequirements[0].type: is "FPGA"; it must be GPU or NeuronDevice`},
		{"unknown belay field", task(`"belay":{"Runtime":"x"}`), `did you mean "runtime"?`},
		{"runtime name", task(`"belay":{"runtime":"../x"}`), "belay.runtime: is"},
		{"family pattern", `{"family":"a/b","containerDefinitions":[{"name":"c","image":"i"}]}`, `family: is "a/b"; it must be 1 to 255`},
		{"no containers", `{"family":"f"}`, "containerDefinitions: has 0 containers"},
		{"eleven", `{"family":"f","containerDefinitions":[` + strings.TrimSuffix(strings.Repeat(`{},`, 11), ",") + `]}`, "has 11 containers; there must be 1 to 10"},
		{"null container", `{"family":"f","containerDefinitions":[null]}`, "containerDefinitions[0]: must not be null"},
		{"string for object", `{"family":"f","containerDefinitions":["c"]}`, `containerDefinitions[0]: must be an object, not the string "c"`},
		{"object for list", `{"family":"f","containerDefinitions":{}}`, "containerDefinitions: must be a list, not an object"},
		{"number for bool", with(`"essential":1`), "essential: must be true or false, not the number 1"},
		{"fraction", with(`"cpu":1.5`), "cpu: must be a whole number, not 1.5"},
		{"exponent", with(`"cpu":1e3`), "cpu: must be a whole number, not 1e3"},
		{"huge number", with(`"cpu":99999999999999999999`), "cpu: 99999999999999999999 is too large"},
		{"NUL", with(`"command":["a\u0000b"]`), "command[0]: holds a NUL character"},
		{"null label", with(`"dockerLabels":{"a":null}`), `dockerLabels["a"]: must be a string, not null`},
		{"no image", `{"family":"f","containerDefinitions":[{"name":"c"}]}`, "image: is required"},
		{"bad image", with(`"user":"a b"`), `user: is "a b"`},
		{"same names", two("", `,"name":"a"`), "is given a second time"},
		{"duplicate container names", `{"family":"f","containerDefinitions":[{"name":"a","image":"i"},{"name":"a","image":"i"}]}`, `containerDefinitions[1].name: is "a", which an earlier container has`},
		{"none essential", with(`"essential":false`), "has no essential container"},
		{"process needs command", process(`"essential":true`), "command: is required by the process runtime"},
		{"process path", process(`"command":["sleep"]`), `command[0]: is "sleep"; the process runtime needs the absolute path`},
		{"process entry point", process(`"entryPoint":["sh"],"command":["/bin/true"]`), `entryPoint[0]: is "sh"`},
		{"process mounts", process(`"command":["/a"],"readonlyRootFilesystem":true`), "readonlyRootFilesystem: cannot be had from the process runtime"},
		{"process network", `{"family":"f","networkMode":"bridge","belay":{"runtime":"process"},"containerDefinitions":[{"name":"c","command":["/a"]}]}`, "has only the host's network"},
		{"unknown dependency", two("", `,"dependsOn":[{"containerName":"x","condition":"START"}]`), `is "x", which is no container of the task`},
		{"own dependency", two("", `,"dependsOn":[{"containerName":"b","condition":"START"}]`), "is the container itself"},
		{"circle", two(`,"dependsOn":[{"containerName":"b","condition":"START"}]`, `,"dependsOn":[{"containerName":"a","condition":"START"}]`), "goes round in a circle: a -> b -> a"},
		{"HEALTHY without check", two("", `,"dependsOn":[{"containerName":"a","condition":"HEALTHY"}]`), `container "a" has no healthCheck`},
		{"SUCCESS of essential", two("", `,"dependsOn":[{"containerName":"a","condition":"SUCCESS"}]`), `container "a" is essential`},
		{"condition", two("", `,"dependsOn":[{"containerName":"a","condition":"healthy"}]`), "must be START, COMPLETE, SUCCESS or HEALTHY"},
		{"host port twice", two(`,"portMappings":[{"containerPort":80,"hostPort":8080}]`, `,"portMappings":[{"containerPort":81,"hostPort":8080}]`), "containerDefinitions[1].portMappings[0]: takes host port 8080/tcp, which containerDefinitions[0].portMappings[0] takes already"},
		{"host network ports", `{"family":"f","networkMode":"host","containerDefinitions":[{"name":"c","image":"i","portMappings":[{"containerPort":80,"hostPort":81}]}]}`, "must be left out or be the container's port, 80"},
		{"none network ports", `{"family":"f","networkMode":"none","containerDefinitions":[{"name":"c","image":"i","portMappings":[{"containerPort":80}]}]}`, "networkMode is none"},
		{"no container port", with(`"portMappings":[{}]`), "portMappings[0].containerPort: is required"},
		{"protocol", with(`"portMappings":[{"containerPort":1,"protocol":"TCP"}]`), "must be tcp or udp"},
		{"port range", with(`"portMappings":[{"containerPortRange":"90-80"}]`), "two rising ports"},
		{"reservation", with(`"memory":64,"memoryReservation":128`), "memoryReservation: is 128 MiB; it must not be more than memory, 64 MiB"},
		{"least memory", with(`"memory":5`), "memory: is 5; it must be from 6"},
		{"task cpu", `{"family":"f","cpu":"256","containerDefinitions":[{"name":"c","image":"i","cpu":512}]}`, "cpu: is 256; the containers ask for 512"},
		{"task memory", `{"family":"f","memory":".5 GB","containerDefinitions":[{"name":"c","image":"i","memory":600}]}`, "memory: is 600 MiB; the task's memory is 512 MiB"},
		{"volume", with(`"mountPoints":[{"sourceVolume":"v","containerPath":"/v"}]`), `is "v", which is no volume of the task`},
		{"mount path", with(`"mountPoints":[{"sourceVolume":"v","containerPath":"v"}]`), "must be an absolute path"},
		{"mounted twice", with(`"linuxParameters":{"tmpfs":[{"containerPath":"/a","size":1},{"containerPath":"/a/","size":1}]}`), "where something is mounted already"},
		{"mounted over root", with(`"linuxParameters":{"tmpfs":[{"containerPath":"/","size":1}]}`), "nothing can be mounted over"},
		{"volumesFrom", with(`"volumesFrom":[{"sourceContainer":"x"}]`), "is no container of the task"},
		{"host volume", task(`"volumes":[{"name":"v","host":{"sourcePath":"/a/../b"}}]`), `must not contain ".."`},
		{"health command", with(`"healthCheck":{"command":["curl","x"]}`), "must be CMD"},
		{"health empty", with(`"healthCheck":{"command":["CMD"]}`), "has nothing after CMD"},
		{"health interval", with(`"healthCheck":{"command":["CMD","x"],"interval":1}`), "interval: is 1; it must be from 5 to 300"},
		{"ulimit", with(`"ulimits":[{"name":"files","softLimit":1,"hardLimit":1}]`), "must be one of core, cpu"},
		{"ulimit order", with(`"ulimits":[{"name":"nofile","softLimit":9,"hardLimit":1}]`), "must not be more than hardLimit"},
		{"restart period", with(`"restartPolicy":{"enabled":true,"restartAttemptPeriod":1}`), "must be from 60 to 1800"},
		{"restart enabled", with(`"restartPolicy":{}`), "restartPolicy.enabled: is required"},
		{"stop timeout", with(`"stopTimeout":0`), "stopTimeout: is 0"},
		{"capability", with(`"linuxParameters":{"capabilities":{"add":["CAP_NET_ADMIN"]}}`), "say NET_ADMIN"},
		{"no capability", with(`"linuxParameters":{"capabilities":{"drop":["FLY"]}}`), "is no Linux capability"},
		{"device", with(`"linuxParameters":{"devices":[{"hostPath":"dev/x","permissions":["rw"]}]}`), "must be read, write or mknod"},
		{"sysctl", with(`"systemControls":[{"namespace":"vm.swappiness","value":"1"}]`), "only parameters of a container's own namespaces"},
		{"dns", with(`"dnsServers":["example"]`), "is no IP address"},
		{"env name", with(`"environment":[{"name":"A=B","value":""}]`), `must not contain "="`},
		{"awsvpc", task(`"networkMode":"awsvpc"`), "refused: a device has no VPC"},
		{"windows", task(`"runtimePlatform":{"operatingSystemFamily":"WINDOWS_SERVER_2022_CORE"}`), "devices run Linux"},
		{"arch", task(`"runtimePlatform":{"cpuArchitecture":"arm64"}`), "must be X86_64 or ARM64"},
		{"secrets", with(`"secrets":[{"name":"A","valueFrom":"x"}]`), "secrets: is refused: secrets are not supported yet"},
		{"firelens", with(`"firelensConfiguration":{"type":"fluentbit"}`), "firelensConfiguration: is refused"},
		{"awsfirelens", with(`"logConfiguration":{"logDriver":"awsfirelens"}`), "there is no FireLens log router"},
		{"efs", task(`"volumes":[{"name":"v","efsVolumeConfiguration":{"fileSystemId":"x"}}]`), "EFS is storage in a cloud"},
		{"refused, wrong case", with(`"Secrets":[]`), `did you mean "secrets"?`},
		{"tag", task(`"tags":[{"key":"aws:x"}]`), "is reserved"},
		{"constraint type", task(`"placementConstraints":[{"type":"distinctInstance"}]`), `placementConstraints[0].type: is "distinctInstance"; it must be memberOf`},
		{"constraint without expression", task(`"placementConstraints":[{"type":"memberOf"}]`), `placementConstraints[0].expression: is required`},
		{"constraint's place", task("\"placementConstraints\":[{\"type\":\"memberOf\",\"expression\":\"attribute:a exists\"},\n{\"type\":\"memberOf\",\n\"expression\":\"attribute:site = lab\"}]"),
			`line 3: placementConstraints[1].expression: at character 16, near "= lab": found "=", did you mean "=="?; expected an operator after "attribute:site": ==, !=`},
		{"constraint's pattern", task(`"placementConstraints":[{"type":"memberOf","expression":"attribute:a =~ [b"}]`), `placementConstraints[0].expression: at character 16, near "[b": the pattern is not valid: missing closing ]`},
		{"constraint's subject", task(`"placementConstraints":[{"type":"memberOf","expression":"task:group == web"}]`),
			`at character 1, near "task:group == web": unknown subject "task:group"; known are attribute:NAME, agentConnected, agentVersion, ec2InstanceId, registeredAt, runningTasksCount`},
		{"constraint of the wrong kind", task(`"placementConstraints":[{"type":"memberOf","expression":1}]`), `placementConstraints[0].expression: must be a string, not the number 1`},
		{"eleven constraints", task(`"placementConstraints":[` + strings.TrimSuffix(strings.Repeat(`{"type":"memberOf","expression":"attribute:a exists"},`, 11), ",") + `]`), "has 11 constraints; at most 10 are allowed"},
		{"compatibility", task(`"requiresCompatibilities":["EXTERNALS"]`), "requiresCompatibilities[0]: is"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := DecodeTaskDefinition([]byte(tc.doc))
			var de *DocumentError
			if !errors.As(err, &de) || len(de.Problems) == 0 {
				t.Fatalf("err = %v, want a *DocumentError with problems", err)
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("problems:\n%s\nwant among them: %s", err, tc.want)
			}
		})
	}
}

// What is wrong with a constraint is told once.
func TestOneProblemAConstraint(t *testing.T) {
	for _, constraint := range []string{`{"type":"memberOf","expression":7}`, `{"type":"memberOf"}`, `{"type":"memberOf","expression":""}`, `{"type":"memberOf","expression":"x"}`} {
		_, _, err := DecodeTaskDefinition([]byte(`{"family":"f","placementConstraints":[` + constraint + `],"containerDefinitions":[{"name":"c","image":"i"}]}`))
		var de *DocumentError
		if !errors.As(err, &de) || len(de.Problems) != 1 {
			t.Errorf("%s: %v, want one problem", constraint, err)
		}
	}
}

func TestConstraints(t *testing.T) {
	td, warnings := decode(t, `{"family":"f","containerDefinitions":[{"name":"c","image":"i"}],"placementConstraints":[
		{"type":"memberOf","expression":"attribute:ecs.os-type==linux"},{"type":"memberOf","expression":"runningTasksCount < 3 && !(attribute:a exists)"}]}`)
	if warnings != nil {
		t.Errorf("warnings: %q", warnings)
	}
	es, err := td.Constraints()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range es {
		got = append(got, e.String())
	}
	if diff := cmp.Diff([]string{"attribute:ecs.os-type == linux", "runningTasksCount < 3 and not attribute:a exists"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// The document keeps what was written.
	if !strings.Contains(string(td.Canonical()), `"expression":"attribute:ecs.os-type==linux"`) {
		t.Errorf("canonical: %s", td.Canonical())
	}
}

func TestManyProblemsAreCut(t *testing.T) {
	doc := `{"family":"f","containerDefinitions":[{"name":"c","image":"i","environment":[` +
		strings.TrimSuffix(strings.Repeat("{},", 60_000), ",") + `]}]}`
	_, _, err := DecodeTaskDefinition([]byte(doc))
	if err == nil || !strings.HasSuffix(err.Error(), "and 59900 more problems") {
		t.Fatalf("err ends %q", err.Error()[max(0, len(err.Error())-80):])
	}
}

func TestWarningsNameTheConsequence(t *testing.T) {
	_, warnings := decode(t, `{"family":"f","taskRoleArn":"arn:x","enableFaultInjection":false,
		"placementConstraints":[],"requiresCompatibilities":["FARGATE"],
		"containerDefinitions":[{"name":"c","image":"i","versionConsistency":"enabled",
			"environment":[{"name":"A","value":"1"},{"name":"A","value":"2"}],
			"logConfiguration":{"logDriver":"awslogs","options":{"awslogs-group":"g"}},
			"resourceRequirements":[{"type":"GPU","value":"1"},{"type":"NeuronDevice","value":"1"}]}]}`)
	want := []string{
		"taskRoleArn: kept, but has no effect: there are no cloud roles on a device: the containers get no credentials",
		"containerDefinitions[0].logConfiguration: kept, but has no effect: no log driver is used: the device keeps the output, read it with `belay logs`; awsfirelens is refused",
		"requiresCompatibilities: kept, but has no effect: tasks run on enrolled devices all the same",
		`containerDefinitions[0].environment[1].name: "A" is given by environment[0] too: the last one counts`,
		"containerDefinitions[0].resourceRequirements[1]: kept, but has no effect: no device plugin knows this sort of accelerator",
	}
	if diff := cmp.Diff(want, warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

func TestDevicesAreAskedForInBothWords(t *testing.T) {
	td, warnings := decode(t, `{"family":"f","containerDefinitions":[
		{"name":"a","image":"i","resourceRequirements":[{"type":"GPU","value":"2"}],
		 "belay":{"devices":[{"kind":"tpu"},{"kind":"camera","count":3,"where":"attribute:vendor == acme"}]}},
		{"name":"b","image":"i"},
		{"name":"c","image":"i","resourceRequirements":[{"type":"GPU","sharingStrategy":{"nvidiaMps":{"memory":1024}}}]}]}`)
	want := []DeviceDemand{
		{Container: "a", Requests: []DeviceRequest{{Kind: "gpu", Count: 2}, {Kind: "tpu", Count: 1}, {Kind: "camera", Count: 3, Where: "attribute:vendor == acme"}}},
		{Container: "c", Requests: []DeviceRequest{{Kind: "gpu", Count: 1}}},
	}
	if diff := cmp.Diff(want, td.Demand().Devices); diff != "" {
		t.Errorf("demand (-want +got):\n%s", diff)
	}
	spec := td.Spec()
	got := spec.Containers[0].DeviceRequests
	if len(got) != 3 || got[2].Kind != "camera" || got[2].Count != 3 || got[2].Where != "attribute:vendor == acme" || len(spec.Containers[1].DeviceRequests) != 0 {
		t.Errorf("spec %v", got)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "without MPS") {
		t.Errorf("warnings %q", warnings)
	}
}

// Definitions in testdata/taskdef are accepted, and their canonical form,
// demand and spec are as recorded beside them.
func TestGoldenDefinitions(t *testing.T) {
	files, err := filepath.Glob("testdata/taskdef/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no definitions in testdata/taskdef (%v)", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			doc, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			td, warnings := decode(t, string(doc))
			again, _ := decode(t, string(td.Canonical()))
			if diff := cmp.Diff(td, again); diff != "" {
				t.Errorf("the canonical form means something else (-first +again):\n%s", diff)
			}
			got, err := json.MarshalIndent(map[string]any{
				"canonical": json.RawMessage(td.Canonical()),
				"warnings":  warnings,
				"demand":    td.Demand(),
				"spec":      td.Spec(),
			}, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(file, ".json") + ".golden"
			if os.Getenv("UPDATE_GOLDEN") != "" {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)+"\n"); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestSizes(t *testing.T) {
	for _, tc := range []struct {
		cpu, memory     string
		wantCPU, wantMB int // 0: refused
	}{
		{`"256"`, `"512"`, 256, 512},
		{`1024`, `1024`, 1024, 1024},
		{`".5 vCPU"`, `"1 GB"`, 512, 1024},
		{`"1vcpu"`, `"0.5GB"`, 1024, 512},
		{`"2 vCPU"`, `"1.5 gb"`, 2048, 1536},
		{`"0.1 vCPU"`, `"0.1 GB"`, 102, 102},
		{`""`, `""`, 0, 0},
		{`"1"`, `"5"`, 0, 0},
		{`"-256"`, `"-1 GB"`, 0, 0},
		{`1.5`, `1.5`, 0, 0},
		{`". vCPU"`, `"GB"`, 0, 0},
		{`"1e3"`, `"1 TB"`, 0, 0},
		{`true`, `[]`, 0, 0},
		{`"99999999999999999999"`, `"9999999 GB"`, 0, 0},
	} {
		var c CPUUnits
		var m MemoryMiB
		root, problem := parseDocument([]byte(`{"cpu":` + tc.cpu + `,"memory":` + tc.memory + `}`))
		if problem != nil {
			t.Fatal(problem)
		}
		errC, errM := c.fromDocument(root.members[0].value), m.fromDocument(root.members[1].value)
		if (errC == nil) != (tc.wantCPU != 0) || (errC == nil && int(c) != tc.wantCPU) {
			t.Errorf("cpu %s = %d, %v; want %d", tc.cpu, c, errC, tc.wantCPU)
		}
		if (errM == nil) != (tc.wantMB != 0) || (errM == nil && int(m) != tc.wantMB) {
			t.Errorf("memory %s = %d, %v; want %d", tc.memory, m, errM, tc.wantMB)
		}
	}
}

func TestDemandCountsReservationsAndTaskSize(t *testing.T) {
	td, _ := decode(t, `{"family":"f","containerDefinitions":[
		{"name":"a","image":"i","cpu":100,"memory":256,"memoryReservation":128,"portMappings":[{"containerPort":80,"hostPort":8080},{"containerPort":81}]},
		{"name":"b","image":"i","cpu":50,"memory":64}]}`)
	want := Demand{CPU: 150, MemoryMiB: 192, Ports: []PortKey{{"tcp", 8080}}, Runtime: "containerd", Network: "bridge"}
	if diff := cmp.Diff(want, td.Demand()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	td.CPU, td.Memory, td.NetworkMode = 512, 1024, "host"
	want = Demand{CPU: 512, MemoryMiB: 1024, Ports: []PortKey{{"tcp", 80}, {"tcp", 81}}, Runtime: "containerd", Network: "host"}
	if diff := cmp.Diff(want, td.Demand()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzDecodeTaskDefinition(f *testing.F) {
	files, _ := filepath.Glob("testdata/taskdef/*.json")
	for _, file := range files {
		doc, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(doc)
	}
	f.Add([]byte(`{"family":"f","family":"g","containerDefinitions":[{"name":"c","image":"i","dockerLabels":{"":"","a.b[":"\ud800"}}]}`))
	f.Add([]byte(`{"family":"s","belay":{"runtime":"process"},"containerDefinitions":[{"name":"s","command":["/bin/sleep","600"],"essential":true}]}`))
	f.Add([]byte("{\"a\":[[[[{}]]]],\"\\u0000\":null,\"cpu\":-0,\"memory\":1e400}"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		td, _, err := DecodeTaskDefinition(doc)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without words")
			}
			return
		}
		td.Demand()
		td.Spec()
		canonical := td.Canonical()
		again, _, err := DecodeTaskDefinition(canonical)
		if err != nil {
			t.Fatalf("the canonical form is refused: %v\n%s", err, canonical)
		}
		if diff := cmp.Diff(string(canonical), string(again.Canonical())); diff != "" {
			t.Errorf("the canonical form changes (-first +again):\n%s", diff)
		}
	})
}
