package containerd

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Labels on every container of ours. They are what List and adoption go by.
const (
	labelPrefix    = "belay."
	labelOwner     = "belay.owner"
	labelAlso      = "belay.also." // + owner: on images, of further agents in the namespace
	labelTask      = "belay.task"
	labelContainer = "belay.container"
	labelAttempt   = "belay.attempt"
	labelBoot      = "belay.boot"
	labelDigest    = "belay.image-digest"
	labelNetwork   = "belay.network"
	labelStop      = "belay.stop-signal"
	labelPort      = "belay.port." // + number: protocol hostIP hostPort containerPort name
)

const maxIDChars = 76 // containerd's own limit

// Names are checked by hand: the regular expressions would be compiled, and
// kept, by every plugin that is in one binary with this one.
const alphanumeric = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

// only tells whether s is not empty and all in set.
func only(s, set string) bool { return s != "" && strings.Trim(s, set) == "" }

func isTaskID(s string) bool { return len(s) == 32 && only(s, "0123456789abcdef") }

// isPlainName: letters and digits, and between them single '.', '_' and '-'.
func isPlainName(s string) bool {
	const between = "._-"
	for i := range len(s) {
		if strings.IndexByte(between, s[i]) >= 0 && (i == 0 || i == len(s)-1 || strings.IndexByte(between, s[i-1]) >= 0) {
			return false
		}
	}
	return only(s, alphanumeric+between)
}

// validAttempt refuses what could not be a directory or a label.
func validAttempt(op string, a sdk.Attempt) error {
	switch {
	case !isTaskID(a.Task):
		return sdk.Errorf(sdk.Invalid, op, "task id %q is not 32 lower-case hex digits", a.Task)
	case a.Container == "" || len(a.Container) > 255:
		return sdk.Errorf(sdk.Invalid, op, "container name %q is not of 1 to 255 characters", a.Container)
	case a.Number < 1:
		return sdk.Errorf(sdk.Invalid, op, "attempt %d is not positive", a.Number)
	}
	return nil
}

// leafName names an attempt within its task.
func leafName(a sdk.Attempt) string {
	name, number := a.Container, strconv.Itoa(a.Number)
	if !isPlainName(name) || len(a.Task)+1+len(name)+1+len(number) > maxIDChars {
		sum := sha256.Sum256([]byte(name))
		name = hex.EncodeToString(sum[:8])
	}
	return name + "-" + number
}

// containerID is the name of an attempt in containerd: always the same one.
func containerID(a sdk.Attempt) string { return a.Task + "-" + leafName(a) }

// attemptOf reads the identity from a container's labels.
func attemptOf(labels map[string]string) (sdk.Attempt, error) {
	n, err := strconv.Atoi(labels[labelAttempt])
	a := sdk.Attempt{Task: labels[labelTask], Container: labels[labelContainer], Number: n}
	if err != nil {
		return a, fmt.Errorf("label %s is %q", labelAttempt, labels[labelAttempt])
	}
	return a, validAttempt("read labels", a)
}

// portLabel and portFrom carry a port mapping in one label.
func portLabel(m sdk.PortMapping) string {
	ip := m.HostIP
	if ip == "" {
		ip = "*"
	}
	return fmt.Sprintf("%s %s %d %d %s", m.Protocol, ip, m.HostPort, m.ContainerPort, m.Name)
}

func portFrom(label string) (sdk.PortMapping, error) {
	f := strings.SplitN(label, " ", 5)
	if len(f) != 5 {
		return sdk.PortMapping{}, fmt.Errorf("port label %q is not ours", label)
	}
	host, err1 := strconv.Atoi(f[2])
	container, err2 := strconv.Atoi(f[3])
	if err1 != nil || err2 != nil {
		return sdk.PortMapping{}, fmt.Errorf("port label %q is not ours", label)
	}
	m := sdk.PortMapping{Protocol: f[0], HostIP: f[1], HostPort: host, ContainerPort: container, Name: f[4]}
	if m.HostIP == "*" {
		m.HostIP = ""
	}
	return m, nil
}

// portsFrom reads every port label, in order.
func portsFrom(labels map[string]string) ([]sdk.PortMapping, error) {
	var all []sdk.PortMapping
	for i := 0; ; i++ {
		v, ok := labels[labelPort+strconv.Itoa(i)]
		if !ok {
			return all, nil
		}
		m, err := portFrom(v)
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
}
