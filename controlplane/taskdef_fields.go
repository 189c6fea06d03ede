package controlplane

import (
	"slices"
	"strings"
)

// Treatment is what becomes of a field of a task definition.
type Treatment string

// Treatments.
const (
	Honoured Treatment = "honoured" // does what it does in ECS
	Kept     Treatment = "kept"     // stored and echoed, no effect, warned about
	Refused  Treatment = "refused"  // the definition is not accepted
)

// FieldRule is the treatment of one field.
type FieldRule struct {
	Path      string // list items as "[]": "containerDefinitions[].cpu"
	Treatment Treatment
	Note      string // Kept: the consequence. Refused: the reason. Honoured: how, if not plain

	harmless []string // values that ask for what happens anyway: no warning
}

// matters tells whether a kept field's value asks for something that Belay
// does not do anyway.
func (r FieldRule) matters(n *node) bool {
	if (n.kind == 'a' && len(n.items) == 0) || (n.kind == 'o' && len(n.members) == 0) {
		return false
	}
	return !slices.Contains(r.harmless, n.text) || n.text == ""
}

// TaskDefinitionFields is the treatment of every field that ECS's
// RegisterTaskDefinition takes, in the order of docs/task-definitions.md. A
// test holds it to the fields of the public Go SDK.
func TaskDefinitionFields() []FieldRule {
	return slices.Concat(taskFields(), volumeFields(), containerFields(), containerLinuxFields(), containerKeptFields())
}

// outputFields are told by describe calls and not taken by register: files are
// often made from the one for the other.
var outputFields = map[string]string{
	"taskDefinition":       "is what a describe call wraps a definition in; pass what is inside it",
	"taskDefinitionArn":    outputField,
	"revision":             outputField,
	"status":               outputField,
	"requiresAttributes":   outputField,
	"compatibilities":      outputField,
	"registeredAt":         outputField,
	"registeredBy":         outputField,
	"deregisteredAt":       outputField,
	"deleteRequestedAt":    outputField,
	"daemonTaskDefinition": outputField,
}

const outputField = "is part of a described definition, set by the control plane; leave it out"

// reservedNames will be fields of `belay` objects.
var reservedNames = []string{
	"placement", "identity", "secrets", "logging", "ingress", "update", "shell",
}

const sameAsParent = "as the object it is in"

func honoured(note string, paths ...string) []FieldRule { return rules(Honoured, note, paths) }

func kept(note string, paths ...string) []FieldRule { return rules(Kept, note, paths) }

func refused(note string, paths ...string) []FieldRule { return rules(Refused, note, paths) }

// rules gives every path the treatment; the note is the first path's, and the
// others, which lie inside it, refer to it.
func rules(t Treatment, note string, paths []string) []FieldRule {
	out := make([]FieldRule, len(paths))
	for i, p := range paths {
		out[i] = FieldRule{Path: p, Treatment: t, Note: note}
		if i > 0 && t != Honoured {
			out[i].Note = sameAsParent
		}
	}
	return out
}

func harmless(rs []FieldRule, values ...string) []FieldRule {
	rs[0].harmless = values
	return rs
}

func taskFields() []FieldRule {
	const inference = "Elastic Inference is no longer offered by anyone"
	const mesh = "no service mesh proxy can be put before a task"
	return slices.Concat(
		honoured("", "family", "containerDefinitions", "cpu", "memory"),
		honoured("bridge (the default), host and none; awsvpc is refused, a device has no VPC", "networkMode"),
		honoured("host; task is kept with a warning, each container has a process namespace of its own", "pidMode"),
		honoured("", "ipcMode"),
		honoured("", "runtimePlatform", "runtimePlatform.cpuArchitecture"),
		honoured("LINUX; Windows families are refused", "runtimePlatform.operatingSystemFamily"),
		honoured("checked; a definition runs on enrolled devices whatever it lists, and FARGATE or MANAGED_INSTANCES alone is warned about", "requiresCompatibilities"),
		honoured("", "tags", "tags[].key", "tags[].value"),
		honoured("", "placementConstraints"),
		honoured("memberOf", "placementConstraints[].type"),
		honoured("see [the query language](query-language.md); besides attributes, "+strings.Join(ConstraintSubjects(), ", ")+"; task:group is refused", "placementConstraints[].expression"),
		kept("there are no cloud roles on a device: the containers get no credentials", "taskRoleArn"),
		kept("nothing is done in this role's name: images are pulled with the device's own registry credentials", "executionRoleArn"),
		kept("a task can use the device's free disk, no more and no less", "ephemeralStorage", "ephemeralStorage.sizeInGiB"),
		harmless(kept("faults cannot be injected into tasks", "enableFaultInjection"), "false"),
		refused(inference, "inferenceAccelerators", "inferenceAccelerators[].deviceName", "inferenceAccelerators[].deviceType"),
		refused(mesh, "proxyConfiguration", "proxyConfiguration.type", "proxyConfiguration.containerName",
			"proxyConfiguration.properties", "proxyConfiguration.properties[].name", "proxyConfiguration.properties[].value"),
	)
}

func volumeFields() []FieldRule {
	const remote = "is storage in a cloud that a device cannot mount; use host or an ordinary volume"
	efs := "volumes[].efsVolumeConfiguration"
	fsx := "volumes[].fsxWindowsFileServerVolumeConfiguration"
	s3 := "volumes[].s3filesVolumeConfiguration"
	dv := "volumes[].dockerVolumeConfiguration"
	return slices.Concat(
		honoured("", "volumes", "volumes[].name", "volumes[].host"),
		honoured("without it the volume is a directory of the task's own", "volumes[].host.sourcePath"),
		honoured("", dv),
		honoured("task: gone with the task; shared: kept on the device under its name", dv+".scope"),
		harmless(kept("a volume that is missing is always made", dv+".autoprovision"), "true"),
		harmless(kept("volumes are plain directories of the device; no volume driver is called", dv+".driver"), "local"),
		kept("no volume driver is called, so nobody reads its options", dv+".driverOpts"),
		kept("volumes carry no labels", dv+".labels"),
		harmless(kept("no storage is attached when a task starts: the volume is a directory of the task's own", "volumes[].configuredAtLaunch"), "false"),
		refused("EFS "+remote, efs, efs+".fileSystemId", efs+".rootDirectory", efs+".transitEncryption", efs+".transitEncryptionPort",
			efs+".authorizationConfig", efs+".authorizationConfig.accessPointId", efs+".authorizationConfig.iam"),
		refused("FSx "+remote, fsx, fsx+".fileSystemId", fsx+".rootDirectory",
			fsx+".authorizationConfig", fsx+".authorizationConfig.credentialsParameter", fsx+".authorizationConfig.domain"),
		refused("S3 Files "+remote, s3, s3+".fileSystemArn", s3+".accessPointArn", s3+".rootDirectory", s3+".transitEncryptionPort"),
	)
}

func containerFields() []FieldRule {
	c := "containerDefinitions[]."
	pm := c + "portMappings[]"
	hc := c + "healthCheck"
	rp := c + "restartPolicy"
	return slices.Concat(
		honoured("", c+"name"),
		honoured("not needed by the process runtime", c+"image"),
		honoured("", c+"essential", c+"entryPoint", c+"command", c+"environment", c+"environment[].name", c+"environment[].value",
			c+"workingDirectory", c+"user", c+"hostname", c+"cpu", c+"memory", c+"memoryReservation"),
		honoured("", c+"portMappings", pm+".name", pm+".containerPort", pm+".protocol"),
		honoured("left out or 0: a free port of the device", pm+".hostPort"),
		kept("the ports of a range are not published; list each in a mapping of its own", pm+".containerPortRange"),
		kept("there is no proxy before a port that could use it", pm+".appProtocol"),
		honoured("", c+"mountPoints", c+"mountPoints[].sourceVolume", c+"mountPoints[].containerPath", c+"mountPoints[].readOnly",
			c+"volumesFrom", c+"volumesFrom[].sourceContainer", c+"volumesFrom[].readOnly",
			c+"dependsOn", c+"dependsOn[].containerName", c+"dependsOn[].condition",
			hc, hc+".command", hc+".interval", hc+".timeout", hc+".retries", hc+".startPeriod",
			rp, rp+".enabled", rp+".ignoredExitCodes", rp+".restartAttemptPeriod",
			c+"startTimeout", c+"stopTimeout"),
	)
}

func containerLinuxFields() []FieldRule {
	c := "containerDefinitions[]."
	lp := c + "linuxParameters"
	return slices.Concat(
		honoured("", c+"privileged", c+"readonlyRootFilesystem", c+"disableNetworking", c+"dnsServers", c+"dnsSearchDomains",
			c+"extraHosts", c+"extraHosts[].hostname", c+"extraHosts[].ipAddress", c+"dockerLabels"),
		honoured("no-new-privileges, apparmor:PROFILE and label:...; Windows credential specs are refused", c+"dockerSecurityOptions"),
		honoured("", lp, lp+".capabilities", lp+".capabilities.add", lp+".capabilities.drop",
			lp+".devices", lp+".devices[].hostPath", lp+".devices[].containerPath", lp+".devices[].permissions",
			lp+".initProcessEnabled", lp+".maxSwap", lp+".sharedMemorySize", lp+".swappiness",
			lp+".tmpfs", lp+".tmpfs[].containerPath", lp+".tmpfs[].size", lp+".tmpfs[].mountOptions"),
		honoured("namespaced parameters only", c+"systemControls", c+"systemControls[].namespace", c+"systemControls[].value"),
		honoured("", c+"ulimits", c+"ulimits[].name", c+"ulimits[].softLimit", c+"ulimits[].hardLimit", c+"interactive", c+"pseudoTerminal"),
	)
}

func containerKeptFields() []FieldRule {
	c := "containerDefinitions[]."
	lc := c + "logConfiguration"
	rr := c + "resourceRequirements"
	return slices.Concat(
		kept("no log driver is used: the device keeps the output, read it with `belay logs`; awsfirelens is refused",
			lc, lc+".logDriver", lc+".options", lc+".secretOptions", lc+".secretOptions[].name", lc+".secretOptions[].valueFrom"),
		honoured("the container gets devices of kind gpu; say more of them in its belay.devices", rr),
		honoured("GPU; NeuronDevice is kept with a warning, InferenceAccelerator refused: it is no longer offered by anyone", rr+"[].type"),
		honoured("", rr+"[].value"),
		kept("a GPU is shared as its device plugin declares, without MPS", rr+"[].sharingStrategy", rr+"[].sharingStrategy.nvidiaMps",
			rr+"[].sharingStrategy.nvidiaMps.memory", rr+"[].sharingStrategy.nvidiaMps.maxComputePercent"),
		kept("the files are not fetched: their variables are missing in the container",
			c+"environmentFiles", c+"environmentFiles[].type", c+"environmentFiles[].value"),
		kept("containers are not linked: publish a port, or use the host network", c+"links"),
		kept("no secret store is asked: images are pulled with the device's own registry credentials",
			c+"repositoryCredentials", c+"repositoryCredentials.credentialsParameter"),
		kept("no directory service is joined: the container gets no Kerberos tickets", c+"credentialSpecs"),
		harmless(kept("a tag is always resolved once a task, and the digest kept for all its attempts", c+"versionConsistency"), "enabled"),
		refused("secrets are not supported yet; use environment for what is not secret",
			c+"secrets", c+"secrets[].name", c+"secrets[].valueFrom"),
		refused("there is no FireLens log router; leave it out and read the output with `belay logs`",
			c+"firelensConfiguration", c+"firelensConfiguration.type", c+"firelensConfiguration.options"),
	)
}
