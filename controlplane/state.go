package controlplane

import (
	"encoding/json"
	"log/slog"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane/wire"
)

// entry is a record with the revision that wrote it. Records in memory are
// replaced whole, never changed in place, so that readers may keep them.
type entry[T any] struct {
	V   T
	Mod int64
}

// state is the store's content in memory, with the indices reads need.
type state struct {
	log *slog.Logger

	mu       sync.RWMutex
	revision int64
	changed  chan struct{} // closed and replaced when revision grows
	records
	subs map[string]map[*subscription]struct{} // by topic
}

type records struct {
	clusters    map[string]entry[Cluster]
	activations map[string]entry[Activation]
	instances   map[string]entry[Instance]
	bindings    map[string]entry[Bindings]
	taskdefs    map[string]map[int]entry[TaskDefinitionRecord]
	tasks       map[string]entry[Task]
	specs       map[string]*wire.TaskSpec
	onInstance  map[string]map[string]struct{}     // task ids
	strays      map[string]map[string]entry[Stray] // by instance and task
}

func newRecords() records {
	return records{
		clusters: map[string]entry[Cluster]{}, activations: map[string]entry[Activation]{},
		instances: map[string]entry[Instance]{}, bindings: map[string]entry[Bindings]{}, taskdefs: map[string]map[int]entry[TaskDefinitionRecord]{},
		tasks: map[string]entry[Task]{}, specs: map[string]*wire.TaskSpec{},
		onInstance: map[string]map[string]struct{}{}, strays: map[string]map[string]entry[Stray]{},
	}
}

func newState(log *slog.Logger) *state {
	return &state{log: log, changed: make(chan struct{}), records: newRecords(), subs: map[string]map[*subscription]struct{}{}}
}

func (s *state) at() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.revision
}

func (s *state) progress() (int64, <-chan struct{}) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.revision, s.changed
}

// reset replaces everything by a list of the store. Everybody who watches is
// told, since nobody knows what changed.
func (s *state) reset(kvs []KV, revision int64) {
	fresh := newRecords()
	for _, kv := range kvs {
		if _, err := fresh.put(kv); err != nil {
			s.log.Error("a record of the store cannot be read and is left out", "key", kv.Key, "error", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = fresh
	for topic := range s.subs {
		s.notify(topic)
	}
	s.advance(revision)
}

func (s *state) apply(c Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Revision <= s.revision {
		return
	}
	for _, kv := range c.KVs {
		topic, err := s.put(kv)
		if err != nil {
			s.log.Error("a record of the store cannot be read and is left as it was", "key", kv.Key, "error", err)
			continue
		}
		if topic != "" {
			s.notify(topic)
		}
	}
	s.advance(c.Revision)
}

func (s *state) advance(revision int64) {
	s.revision = revision
	close(s.changed)
	s.changed = make(chan struct{})
}

// setTransient replaces a task in memory only, if it is still as it was read:
// for what is not worth a write, such as how far a pull has come.
func (s *state) setTransient(t Task, mod int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.tasks[t.ID]; ok && old.Mod == mod {
		s.tasks[t.ID] = entry[Task]{t, mod}
		s.notify(taskTopic(t.ID))
	}
}

// put takes in one key and names the topic whose watchers it concerns.
func (r *records) put(kv KV) (topic string, err error) {
	kind, rest, ok := splitKey(kv.Key)
	if !ok {
		return "", nil
	}
	switch kind {
	case "clusters":
		err = set(r.clusters, rest, kv)
	case "activations":
		err = set(r.activations, rest, kv)
	case "instances":
		topic, err = instanceTopic(rest), set(r.instances, rest, kv)
	case "bindings":
		before := r.bindings[rest].V.Sequence
		err = set(r.bindings, rest, kv)
		if r.bindings[rest].V.Sequence != before {
			topic = instanceTopic(rest)
		}
	case "taskdefs":
		err = r.putTaskDefinition(rest, kv)
	case "tasks":
		topic, err = taskTopic(rest), r.putTask(rest, kv)
	case "strays":
		err = r.putStray(rest, kv)
	case "taskspecs":
		if kv.Value == nil {
			delete(r.specs, rest)
			break
		}
		spec := &wire.TaskSpec{}
		if err = proto.Unmarshal(kv.Value, spec); err == nil {
			r.specs[rest] = spec
		}
	}
	return topic, err
}

func set[T any](m map[string]entry[T], id string, kv KV) error {
	if kv.Value == nil {
		delete(m, id)
		return nil
	}
	var v T
	if err := json.Unmarshal(kv.Value, &v); err != nil {
		return err
	}
	m[id] = entry[T]{v, kv.ModRevision}
	return nil
}

func (r *records) putTask(id string, kv KV) error {
	old, had := r.tasks[id]
	if err := set(r.tasks, id, kv); err != nil {
		return err
	}
	now, has := r.tasks[id]
	if had && (!has || now.V.Instance != old.V.Instance) {
		delete(r.onInstance[old.V.Instance], id)
		if len(r.onInstance[old.V.Instance]) == 0 {
			delete(r.onInstance, old.V.Instance)
		}
	}
	if has {
		if r.onInstance[now.V.Instance] == nil {
			r.onInstance[now.V.Instance] = map[string]struct{}{}
		}
		r.onInstance[now.V.Instance][id] = struct{}{}
	}
	return nil
}

func (r *records) putStray(rest string, kv KV) error {
	instance, task, _ := strings.Cut(rest, "/")
	if r.strays[instance] == nil {
		r.strays[instance] = map[string]entry[Stray]{}
	}
	err := set(r.strays[instance], task, kv)
	if len(r.strays[instance]) == 0 {
		delete(r.strays, instance)
	}
	return err
}

func (r *records) putTaskDefinition(rest string, kv KV) error {
	family, rev, _ := strings.Cut(rest, "/")
	revision, err := strconv.Atoi(rev)
	if err != nil {
		return err
	}
	if kv.Value == nil {
		delete(r.taskdefs[family], revision)
		return nil
	}
	var d TaskDefinitionRecord
	if err := json.Unmarshal(kv.Value, &d); err != nil {
		return err
	}
	if r.taskdefs[family] == nil {
		r.taskdefs[family] = map[int]entry[TaskDefinitionRecord]{}
	}
	r.taskdefs[family][revision] = entry[TaskDefinitionRecord]{d, kv.ModRevision}
	return nil
}

// read runs f with the records held still. f must not keep the maps.
func (s *state) read(f func(r *records, revision int64)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	f(&s.records, s.revision)
}

func taskTopic(id string) string     { return "task/" + id }
func instanceTopic(id string) string { return "instance/" + id }

// subscription wakes one watcher; many changes before it wakes are one.
type subscription struct{ wake chan struct{} }

// subscribe makes a subscription to topics; the first wake is already due.
func (s *state) subscribe(topics ...string) (sub *subscription, end func()) {
	sub = &subscription{wake: make(chan struct{}, 1)}
	sub.wake <- struct{}{}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range topics {
		if s.subs[t] == nil {
			s.subs[t] = map[*subscription]struct{}{}
		}
		s.subs[t][sub] = struct{}{}
	}
	return sub, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, t := range topics {
			delete(s.subs[t], sub)
			if len(s.subs[t]) == 0 {
				delete(s.subs, t)
			}
		}
	}
}

func (s *state) notify(topic string) {
	for sub := range s.subs[topic] {
		select {
		case sub.wake <- struct{}{}:
		default:
		}
	}
}
