package controlplane

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// The store's layout:
//
//	/belay/v1/incarnation                          random id of the store, kept over restarts
//	/belay/v1/lives                                []life: every start of a control plane on it
//	/belay/v1/<account>/clusters/<name>            Cluster
//	                    activations/<id>           Activation
//	                    instances/<id>             Instance
//	                    keys/<key fingerprint>     id of the instance that holds the key
//	                    bindings/<instance>        Bindings
//	                    taskdefs/<family>/<rev>    TaskDefinitionRecord; rev padded to 10 digits
//	                    tasks/<id>                 Task
//	                    taskspecs/<id>             wire.TaskSpec, protobuf
//	                    strays/<instance>/<task>   Stray: what only a device knows, see Divergence
//	                    tokens/<sha256 of token>   tokenRecord: the answer to a mutating call
//
// All values but the first and the specs are JSON. There is one account for
// now; the segment is there so that there can be more.
const (
	root           = "/belay/v1/"
	account        = root + "default/"
	incarnationKey = root + "incarnation"
	livesKey       = root + "lives"
	tokensPrefix   = account + "tokens/"
)

func clusterKey(name string) string      { return account + "clusters/" + name }
func activationKey(id string) string     { return account + "activations/" + id }
func instanceKey(id string) string       { return account + "instances/" + id }
func fingerprintKey(f string) string     { return account + "keys/" + f }
func bindingsKey(instance string) string { return account + "bindings/" + instance }
func taskKey(id string) string           { return account + "tasks/" + id }
func taskSpecKey(id string) string       { return account + "taskspecs/" + id }
func strayKey(instance, task string) string {
	return account + "strays/" + instance + "/" + task
}
func tokenKey(token string) string { return tokensPrefix + hex.EncodeToString(hash([]byte(token))) }
func taskDefinitionKey(family string, revision int) string {
	return fmt.Sprintf("%staskdefs/%s/%010d", account, family, revision)
}

// splitKey gives the kind of a key and the rest of it.
func splitKey(key string) (kind, rest string, ok bool) {
	rest, ok = strings.CutPrefix(key, account)
	if !ok {
		return "", "", false
	}
	return strings.Cut(rest, "/")
}

// ParseTaskDefinitionRef takes "family" or "family:revision" apart; revision
// is 0 when none is named.
func ParseTaskDefinitionRef(ref string) (family string, revision int, err error) {
	family, rev, named := strings.Cut(ref, ":")
	if named {
		revision, err = strconv.Atoi(rev)
		if err != nil || revision < 1 {
			return "", 0, Errorf(InvalidArgument, "task definition %q: the revision after the colon must be a number from 1", ref)
		}
	}
	if family == "" {
		return "", 0, Errorf(InvalidArgument, "task definition %q: want family or family:revision", ref)
	}
	return family, revision, nil
}

func isHex(s string) bool {
	for _, c := range s {
		if !strings.ContainsRune("0123456789abcdef", c) {
			return false
		}
	}
	return true
}

// isName tells names safe as one segment of a key: 1 to 255 letters, digits,
// - and _, as ECS allows for clusters and families.
func isName(s string) bool {
	for _, c := range s {
		if c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return s != "" && len(s) <= 255
}
