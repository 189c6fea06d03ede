package controlplane

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// MaxTaskDefinitionBytes bounds a task definition document.
const MaxTaskDefinitionBytes = 256 << 10

// TaskDefinition is a task definition in the JSON shape that ECS's
// RegisterTaskDefinition takes. It holds what the document said and nothing
// more: defaults are applied by Demand and Spec. A pointer that is nil was not
// given. Fields that are refused (see TaskDefinitionFields) are not here.
type TaskDefinition struct {
	Family                  string                `json:"family"`
	Belay                   *TaskExtension        `json:"belay,omitzero"`
	ContainerDefinitions    []ContainerDefinition `json:"containerDefinitions"`
	CPU                     CPUUnits              `json:"cpu,omitzero"`
	Memory                  MemoryMiB             `json:"memory,omitzero"`
	NetworkMode             string                `json:"networkMode,omitzero"`
	PIDMode                 string                `json:"pidMode,omitzero"`
	IPCMode                 string                `json:"ipcMode,omitzero"`
	Volumes                 []Volume              `json:"volumes,omitzero"`
	RuntimePlatform         *RuntimePlatform      `json:"runtimePlatform,omitzero"`
	RequiresCompatibilities []string              `json:"requiresCompatibilities,omitzero"`
	PlacementConstraints    []PlacementConstraint `json:"placementConstraints,omitzero"`
	TaskRoleARN             string                `json:"taskRoleArn,omitzero"`
	ExecutionRoleARN        string                `json:"executionRoleArn,omitzero"`
	EphemeralStorage        *EphemeralStorage     `json:"ephemeralStorage,omitzero"`
	EnableFaultInjection    *bool                 `json:"enableFaultInjection,omitzero"`
	Tags                    []Tag                 `json:"tags,omitzero"`
}

// TaskExtension is the `belay` object of a task: what ECS has no field for.
type TaskExtension struct {
	Runtime    string      `json:"runtime,omitzero"` // name of a runtime plugin
	Disconnect *Disconnect `json:"disconnect,omitzero"`
}

// Disconnect says what a task does when its device has lost the control plane.
type Disconnect struct {
	// StopAfter is how long its device may be away before the task stops, in
	// seconds as ECS counts its timeouts; nil: for ever.
	StopAfter *int `json:"stopAfter,omitzero"`
}

// ContainerExtension is the `belay` object of a container.
type ContainerExtension struct {
	Devices []DeviceRequest `json:"devices,omitzero"`
}

// DeviceRequest asks for different devices of one kind, any of those for which
// an expression of the query language holds. The agent chooses.
type DeviceRequest struct {
	Kind  string `json:"kind"`
	Count int    `json:"count,omitzero"` // 0, not given: 1
	Where string `json:"where,omitzero"`
}

// ContainerDefinition is one container of a task definition.
type ContainerDefinition struct {
	Name                   string                 `json:"name"`
	Belay                  *ContainerExtension    `json:"belay,omitzero"`
	Image                  string                 `json:"image,omitzero"`
	Essential              *bool                  `json:"essential,omitzero"`
	EntryPoint             []string               `json:"entryPoint,omitzero"`
	Command                []string               `json:"command,omitzero"`
	Environment            []EnvironmentVariable  `json:"environment,omitzero"`
	EnvironmentFiles       []EnvironmentFile      `json:"environmentFiles,omitzero"`
	WorkingDirectory       string                 `json:"workingDirectory,omitzero"`
	User                   string                 `json:"user,omitzero"`
	Hostname               string                 `json:"hostname,omitzero"`
	CPU                    *int                   `json:"cpu,omitzero"`               // 1024 a core
	Memory                 *int                   `json:"memory,omitzero"`            // MiB, hard limit
	MemoryReservation      *int                   `json:"memoryReservation,omitzero"` // MiB
	PortMappings           []PortMapping          `json:"portMappings,omitzero"`
	MountPoints            []MountPoint           `json:"mountPoints,omitzero"`
	VolumesFrom            []VolumeFrom           `json:"volumesFrom,omitzero"`
	DependsOn              []ContainerDependency  `json:"dependsOn,omitzero"`
	HealthCheck            *HealthCheck           `json:"healthCheck,omitzero"`
	RestartPolicy          *RestartPolicy         `json:"restartPolicy,omitzero"`
	StartTimeout           *int                   `json:"startTimeout,omitzero"` // seconds
	StopTimeout            *int                   `json:"stopTimeout,omitzero"`  // seconds
	Privileged             *bool                  `json:"privileged,omitzero"`
	ReadonlyRootFilesystem *bool                  `json:"readonlyRootFilesystem,omitzero"`
	DisableNetworking      *bool                  `json:"disableNetworking,omitzero"`
	DNSServers             []string               `json:"dnsServers,omitzero"`
	DNSSearchDomains       []string               `json:"dnsSearchDomains,omitzero"`
	ExtraHosts             []HostEntry            `json:"extraHosts,omitzero"`
	DockerLabels           map[string]string      `json:"dockerLabels,omitzero"`
	DockerSecurityOptions  []string               `json:"dockerSecurityOptions,omitzero"`
	LinuxParameters        *LinuxParameters       `json:"linuxParameters,omitzero"`
	SystemControls         []SystemControl        `json:"systemControls,omitzero"`
	Ulimits                []Ulimit               `json:"ulimits,omitzero"`
	Interactive            *bool                  `json:"interactive,omitzero"`
	PseudoTerminal         *bool                  `json:"pseudoTerminal,omitzero"`
	Links                  []string               `json:"links,omitzero"`
	LogConfiguration       *LogConfiguration      `json:"logConfiguration,omitzero"`
	RepositoryCredentials  *RepositoryCredentials `json:"repositoryCredentials,omitzero"`
	ResourceRequirements   []ResourceRequirement  `json:"resourceRequirements,omitzero"`
	CredentialSpecs        []string               `json:"credentialSpecs,omitzero"`
	VersionConsistency     string                 `json:"versionConsistency,omitzero"`
}

// EnvironmentVariable is a name and its value.
type EnvironmentVariable struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// EnvironmentFile names a file of variables in an object store.
type EnvironmentFile struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

// PortMapping publishes a port of a container on the host.
type PortMapping struct {
	Name               string `json:"name,omitzero"`
	ContainerPort      *int   `json:"containerPort,omitzero"`
	ContainerPortRange string `json:"containerPortRange,omitzero"`
	HostPort           *int   `json:"hostPort,omitzero"` // nil or 0: any free one
	Protocol           string `json:"protocol,omitzero"`
	AppProtocol        string `json:"appProtocol,omitzero"`
}

// MountPoint mounts a volume of the task.
type MountPoint struct {
	SourceVolume  string `json:"sourceVolume"`
	ContainerPath string `json:"containerPath"`
	ReadOnly      *bool  `json:"readOnly,omitzero"`
}

// VolumeFrom mounts everything that another container mounts.
type VolumeFrom struct {
	SourceContainer string `json:"sourceContainer"`
	ReadOnly        *bool  `json:"readOnly,omitzero"`
}

// ContainerDependency makes a container wait for another.
type ContainerDependency struct {
	ContainerName string `json:"containerName"`
	Condition     string `json:"condition"`
}

// HealthCheck is a command that tells whether a container is well.
type HealthCheck struct {
	Command     []string `json:"command"`
	Interval    *int     `json:"interval,omitzero"`    // seconds
	Timeout     *int     `json:"timeout,omitzero"`     // seconds
	Retries     *int     `json:"retries,omitzero"`     // failures in a row
	StartPeriod *int     `json:"startPeriod,omitzero"` // seconds
}

// RestartPolicy restarts a container of a task that goes on.
type RestartPolicy struct {
	Enabled              *bool `json:"enabled,omitzero"`
	IgnoredExitCodes     []int `json:"ignoredExitCodes,omitzero"`
	RestartAttemptPeriod *int  `json:"restartAttemptPeriod,omitzero"` // seconds
}

// HostEntry is a line of /etc/hosts.
type HostEntry struct {
	Hostname  string `json:"hostname"`
	IPAddress string `json:"ipAddress"`
}

// LinuxParameters are options of the Linux kernel for a container.
type LinuxParameters struct {
	Capabilities       *KernelCapabilities `json:"capabilities,omitzero"`
	Devices            []DeviceMapping     `json:"devices,omitzero"`
	InitProcessEnabled *bool               `json:"initProcessEnabled,omitzero"`
	MaxSwap            *int                `json:"maxSwap,omitzero"`          // MiB
	SharedMemorySize   *int                `json:"sharedMemorySize,omitzero"` // MiB
	Swappiness         *int                `json:"swappiness,omitzero"`
	Tmpfs              []Tmpfs             `json:"tmpfs,omitzero"`
}

// KernelCapabilities are added to, or dropped from, the runtime's default set.
type KernelCapabilities struct {
	Add  []string `json:"add,omitzero"`
	Drop []string `json:"drop,omitzero"`
}

// DeviceMapping gives a device node of the host to a container.
type DeviceMapping struct {
	HostPath      string   `json:"hostPath"`
	ContainerPath string   `json:"containerPath,omitzero"`
	Permissions   []string `json:"permissions,omitzero"`
}

// Tmpfs is a mount in memory.
type Tmpfs struct {
	ContainerPath string   `json:"containerPath"`
	Size          *int     `json:"size,omitzero"` // MiB
	MountOptions  []string `json:"mountOptions,omitzero"`
}

// SystemControl is a namespaced kernel parameter.
type SystemControl struct {
	Namespace string `json:"namespace"`
	Value     string `json:"value"`
}

// Ulimit is a resource limit of processes; -1 is unlimited.
type Ulimit struct {
	Name      string `json:"name"`
	SoftLimit *int   `json:"softLimit,omitzero"`
	HardLimit *int   `json:"hardLimit,omitzero"`
}

// LogConfiguration names a log driver.
type LogConfiguration struct {
	LogDriver     string            `json:"logDriver"`
	Options       map[string]string `json:"options,omitzero"`
	SecretOptions []SecretReference `json:"secretOptions,omitzero"`
}

// SecretReference names a secret without holding it.
type SecretReference struct {
	Name      string `json:"name"`
	ValueFrom string `json:"valueFrom"`
}

// RepositoryCredentials name registry credentials without holding them.
type RepositoryCredentials struct {
	CredentialsParameter string `json:"credentialsParameter"`
}

// ResourceRequirement asks for accelerators.
type ResourceRequirement struct {
	Type            string           `json:"type"`
	Value           string           `json:"value"`
	SharingStrategy *SharingStrategy `json:"sharingStrategy,omitzero"`
}

// SharingStrategy says how an accelerator is shared: a union of one member.
type SharingStrategy struct {
	NvidiaMPS *NvidiaMPS `json:"nvidiaMps,omitzero"`
}

// NvidiaMPS shares a GPU by NVIDIA's Multi-Process Service.
type NvidiaMPS struct {
	Memory            *int `json:"memory,omitzero"` // MiB
	MaxComputePercent *int `json:"maxComputePercent,omitzero"`
}

// Volume is storage that containers of the task mount.
type Volume struct {
	Name                      string                     `json:"name"`
	Host                      *HostVolume                `json:"host,omitzero"`
	DockerVolumeConfiguration *DockerVolumeConfiguration `json:"dockerVolumeConfiguration,omitzero"`
	ConfiguredAtLaunch        *bool                      `json:"configuredAtLaunch,omitzero"`
}

// HostVolume is a directory of the device; without a path, one of the task's own.
type HostVolume struct {
	SourcePath string `json:"sourcePath,omitzero"`
}

// DockerVolumeConfiguration describes a named volume.
type DockerVolumeConfiguration struct {
	Scope         string            `json:"scope,omitzero"`
	Autoprovision *bool             `json:"autoprovision,omitzero"`
	Driver        string            `json:"driver,omitzero"`
	DriverOpts    map[string]string `json:"driverOpts,omitzero"`
	Labels        map[string]string `json:"labels,omitzero"`
}

// RuntimePlatform is what the images were built for.
type RuntimePlatform struct {
	CPUArchitecture       string `json:"cpuArchitecture,omitzero"`
	OperatingSystemFamily string `json:"operatingSystemFamily,omitzero"`
}

// PlacementConstraint is an expression over instance attributes.
type PlacementConstraint struct {
	Type       string `json:"type"`
	Expression string `json:"expression,omitzero"`
}

// EphemeralStorage is scratch space of a task.
type EphemeralStorage struct {
	SizeInGiB *int `json:"sizeInGiB,omitzero"`
}

// Tag is a label of the definition.
type Tag struct {
	Key   string `json:"key"`
	Value string `json:"value,omitzero"`
}

// Problem is one thing wrong with a document.
type Problem struct {
	Path    string // "containerDefinitions[0].memory"; "" for the document itself
	Line    int    // from 1; 0 when there is none to name
	Message string // the value and the rule it breaks
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", p.Line)
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Message)
	return b.String()
}

// DocumentError is everything wrong with a document, in the document's order.
type DocumentError struct{ Problems []Problem }

// Error prints the problems, one a line.
func (e *DocumentError) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Unwrap makes every DocumentError an InvalidArgument.
func (e *DocumentError) Unwrap() error { return InvalidArgument }

// DecodeTaskDefinition reads a task definition strictly and checks it against
// every rule. The strings are warnings: fields that are kept but change
// nothing here, each with its consequence. The error is a *DocumentError.
func DecodeTaskDefinition(doc []byte) (*TaskDefinition, []string, error) {
	root, problem := parseDocument(doc)
	if problem != nil {
		return nil, nil, &DocumentError{[]Problem{*problem}}
	}
	td := new(TaskDefinition)
	d := newDocumentDecoder(TaskDefinitionFields())
	d.decode(root, td)
	v := &taskDefinitionCheck{documentDecoder: d, td: td}
	v.check()
	if len(d.problems) > 0 {
		return nil, nil, &DocumentError{d.inOrder()}
	}
	return td, d.warnings, nil
}

// FamilyName is the definition's family.
func (td *TaskDefinition) FamilyName() string { return td.Family }

// Canonical is the definition as JSON with fields in a fixed order. What the
// document did not say is not there; sizes with units became plain numbers.
func (td *TaskDefinition) Canonical() []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(td); err != nil {
		// Strings, whole numbers, booleans and lists of them always encode.
		panic("encoding a task definition: " + err.Error())
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}
