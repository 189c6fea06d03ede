package sdktest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Memory is a runtime whose containers exist in memory only and exit when a
// test says so. It keeps the contract, but for output: nothing is written.
type Memory struct {
	mu         sync.Mutex
	info       sdk.RuntimeInfo
	containers map[sdk.Attempt]*memoryContainer
	tasks      map[string]bool
	watchers   map[chan sdk.Attempt]bool
	fail       func(op string) error
	started    map[sdk.Attempt]int
	nextPID    int
	images     map[string][]string // references, by digest
	disk       sdk.Disk
}

type memoryContainer struct {
	sdk.Container
	ignoresTerm bool
	begun       time.Time
	exited      chan struct{}
}

// NewMemory makes an empty runtime with images, exec, stats and every network.
func NewMemory() *Memory {
	return &Memory{
		info: sdk.RuntimeInfo{Version: "memory", Images: true, Exec: true, Stats: true,
			Networks: []string{sdk.NetworkBridge, sdk.NetworkHost, sdk.NetworkNone}},
		containers: map[sdk.Attempt]*memoryContainer{},
		tasks:      map[string]bool{},
		watchers:   map[chan sdk.Attempt]bool{},
		started:    map[sdk.Attempt]int{},
		nextPID:    1000,
		images:     map[string][]string{},
		disk:       sdk.Disk{TotalBytes: 1 << 40, FreeBytes: 1 << 39},
	}
}

var (
	_ sdk.Runtime    = (*Memory)(nil)
	_ sdk.ImageStore = (*Memory)(nil)
)

// FailWith makes every call ask f first, with the method's name in lower case;
// an error is what the call returns. nil: none fails.
func (m *Memory) FailWith(f func(op string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = f
}

// Exit ends a running attempt with an exit code.
func (m *Memory) Exit(a sdk.Attempt, code int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.containers[a]
	if !ok || c.State != sdk.StateRunning {
		return fmt.Errorf("%s does not run", a)
	}
	m.exit(c, code)
	return nil
}

// Started counts how often a process was really started for an attempt.
func (m *Memory) Started(a sdk.Attempt) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.started[a]
}

// IgnoreTerm makes Stop of that running attempt need its whole grace.
func (m *Memory) IgnoreTerm(a sdk.Attempt) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c, ok := m.containers[a]; ok {
		c.ignoresTerm = true
	}
}

func (m *Memory) exit(c *memoryContainer, code int) {
	c.State, c.PID, c.ExitCode, c.RanFor = sdk.StateExited, 0, &code, max(time.Since(c.begun), 1)
	close(c.exited)
	m.hint(c.Attempt)
}

func (m *Memory) hint(a sdk.Attempt) {
	for w := range m.watchers {
		select {
		case w <- a:
		default: // hints may be lost
		}
	}
}

// enter locks and asks FailWith.
func (m *Memory) enter(ctx context.Context, op string) error {
	if err := ctx.Err(); err != nil {
		return sdk.Errorf(sdk.KindOf(err), op, "%w", err)
	}
	m.mu.Lock()
	fail := m.fail
	m.mu.Unlock()
	if fail != nil {
		if err := fail(op); err != nil {
			return err
		}
	}
	m.mu.Lock()
	return nil
}

// Info implements sdk.Runtime.
func (m *Memory) Info(ctx context.Context) (sdk.RuntimeInfo, error) {
	if err := m.enter(ctx, "info"); err != nil {
		return sdk.RuntimeInfo{}, err
	}
	defer m.mu.Unlock()
	return m.info, nil
}

// PrepareTask implements sdk.Runtime.
func (m *Memory) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	if err := m.enter(ctx, "preparetask"); err != nil {
		return err
	}
	defer m.mu.Unlock()
	m.tasks[t.ID] = true
	return nil
}

// RemoveTask implements sdk.Runtime.
func (m *Memory) RemoveTask(ctx context.Context, task string) error {
	if err := m.enter(ctx, "removetask"); err != nil {
		return err
	}
	defer m.mu.Unlock()
	delete(m.tasks, task)
	return nil
}

// Pull implements sdk.Runtime.
func (m *Memory) Pull(ctx context.Context, r sdk.PullRequest, progress func(sdk.PullProgress)) (sdk.Image, error) {
	if err := m.enter(ctx, "pull"); err != nil {
		return sdk.Image{}, err
	}
	m.mu.Unlock()
	if progress != nil {
		progress(sdk.PullProgress{Layers: 1, Bytes: 100})
		progress(sdk.PullProgress{Layers: 1, LayersDone: 1, Bytes: 100, BytesDone: 100})
	}
	digest := "sha256:" + fmt.Sprintf("%064x", len(r.Image))
	name, _, _ := strings.Cut(r.Image, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if ref := name + "@" + digest; !slices.Contains(m.images[digest], ref) {
		m.images[digest] = append(m.images[digest], ref)
	}
	return sdk.Image{Reference: r.Image, Digest: digest, Bytes: 100}, nil
}

// Images implements sdk.ImageStore.
func (m *Memory) Images(ctx context.Context) (sdk.ImageInventory, error) {
	if err := m.enter(ctx, "images"); err != nil {
		return sdk.ImageInventory{}, err
	}
	defer m.mu.Unlock()
	inv := sdk.ImageInventory{Disk: m.disk}
	for _, digest := range slices.Sorted(maps.Keys(m.images)) {
		inv.Images = append(inv.Images, sdk.StoredImage{Digest: digest, References: slices.Clone(m.images[digest]), Bytes: 100, InUse: m.inUse(digest)})
	}
	return inv, nil
}

func (m *Memory) inUse(digest string) bool {
	for _, c := range m.containers {
		if c.ImageDigest == digest {
			return true
		}
	}
	return false
}

// RemoveImage implements sdk.ImageStore.
func (m *Memory) RemoveImage(ctx context.Context, digest string) error {
	if err := m.enter(ctx, "removeimage"); err != nil {
		return err
	}
	defer m.mu.Unlock()
	if m.inUse(digest) {
		return sdk.Errorf(sdk.Conflict, "remove image "+digest, "a container uses it")
	}
	delete(m.images, digest)
	return nil
}

// SetDisk says what Images tells of the disk.
func (m *Memory) SetDisk(d sdk.Disk) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.disk = d
}

// Start implements sdk.Runtime.
func (m *Memory) Start(ctx context.Context, r sdk.StartRequest) (sdk.Container, error) {
	if err := m.enter(ctx, "start"); err != nil {
		return sdk.Container{}, err
	}
	defer m.mu.Unlock()
	if c, ok := m.containers[r.Attempt]; ok {
		return c.Container, nil
	}
	for _, c := range m.containers {
		for _, p := range c.Ports {
			clash := func(q sdk.PortMapping) bool { return q.HostPort == p.HostPort && q.Protocol == p.Protocol }
			if c.State == sdk.StateRunning && slices.ContainsFunc(r.Spec.Ports, clash) {
				return sdk.Container{}, sdk.Errorf(sdk.Conflict, "start "+r.Attempt.String(), "host port %d is taken by %s", p.HostPort, c.Attempt)
			}
		}
	}
	m.nextPID++
	m.started[r.Attempt]++
	c := &memoryContainer{begun: time.Now(), exited: make(chan struct{}), Container: sdk.Container{
		Attempt: r.Attempt, RuntimeID: "memory-" + r.Attempt.String(), State: sdk.StateRunning, PID: m.nextPID,
		ImageDigest: r.Spec.Digest, Ports: r.Spec.Ports,
	}}
	m.containers[r.Attempt] = c
	m.hint(r.Attempt)
	return c.Container, nil
}

// Stop implements sdk.Runtime.
func (m *Memory) Stop(ctx context.Context, a sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	if err := m.enter(ctx, "stop"); err != nil {
		return sdk.Container{}, err
	}
	c, ok := m.containers[a]
	if !ok {
		m.mu.Unlock()
		return sdk.Container{}, sdk.Errorf(sdk.NotFound, "stop "+a.String(), "no such attempt")
	}
	if c.State == sdk.StateRunning && !c.ignoresTerm && grace > 0 {
		m.exit(c, 143)
	}
	exited := c.exited
	m.mu.Unlock()

	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-exited:
	case <-timer.C:
	case <-ctx.Done():
		return sdk.Container{}, sdk.Errorf(sdk.KindOf(ctx.Err()), "stop "+a.String(), "%w", ctx.Err())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.State == sdk.StateRunning {
		m.exit(c, 137)
	}
	return c.Container, nil
}

// Remove implements sdk.Runtime.
func (m *Memory) Remove(ctx context.Context, a sdk.Attempt) error {
	if err := m.enter(ctx, "remove"); err != nil {
		return err
	}
	defer m.mu.Unlock()
	if c, ok := m.containers[a]; ok && c.State == sdk.StateRunning {
		return sdk.Errorf(sdk.Conflict, "remove "+a.String(), "it is running")
	}
	delete(m.containers, a)
	return nil
}

// List implements sdk.Runtime.
func (m *Memory) List(ctx context.Context) (sdk.Inventory, error) {
	if err := m.enter(ctx, "list"); err != nil {
		return sdk.Inventory{}, err
	}
	defer m.mu.Unlock()
	inv := sdk.Inventory{Tasks: slices.Sorted(maps.Keys(m.tasks))}
	for _, c := range m.containers {
		inv.Containers = append(inv.Containers, c.Container)
	}
	slices.SortFunc(inv.Containers, func(a, b sdk.Container) int { return cmp.Compare(a.RuntimeID, b.RuntimeID) })
	return inv, nil
}

// Events implements sdk.Runtime.
func (m *Memory) Events(ctx context.Context, f func(sdk.Attempt)) error {
	if err := m.enter(ctx, "events"); err != nil {
		return err
	}
	hints := make(chan sdk.Attempt, 64)
	m.watchers[hints] = true
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.watchers, hints)
		m.mu.Unlock()
	}()
	for {
		select {
		case a := <-hints:
			f(a)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Stats implements sdk.Runtime.
func (m *Memory) Stats(ctx context.Context, a sdk.Attempt) (sdk.Stats, error) {
	if err := m.enter(ctx, "stats"); err != nil {
		return sdk.Stats{}, err
	}
	defer m.mu.Unlock()
	if c, ok := m.containers[a]; !ok || c.State != sdk.StateRunning {
		return sdk.Stats{}, sdk.Errorf(sdk.NotFound, "stats "+a.String(), "it does not run")
	}
	return sdk.Stats{CPUNanos: 1, MemoryBytes: 1, Pids: 1}, nil
}

// Exec implements sdk.Runtime. Every command succeeds in silence; FailWith
// makes them fail.
func (m *Memory) Exec(ctx context.Context, r sdk.ExecRequest) (sdk.ExecResult, error) {
	if err := m.enter(ctx, "exec"); err != nil {
		return sdk.ExecResult{}, err
	}
	defer m.mu.Unlock()
	if c, ok := m.containers[r.Attempt]; !ok || c.State != sdk.StateRunning {
		return sdk.ExecResult{}, sdk.Errorf(sdk.NotFound, "exec in "+r.Attempt.String(), "it does not run")
	}
	return sdk.ExecResult{}, nil
}

// MemoryPlugin is a plugin whose runtime is a Memory.
type MemoryPlugin struct {
	Name   string
	Memory *Memory
	// OnConfigure is what Configure does; nil: nothing.
	OnConfigure func(sdk.Config) error
}

var _ sdk.RuntimePlugin = (*MemoryPlugin)(nil)

// Info implements sdk.Plugin.
func (p *MemoryPlugin) Info() sdk.Info {
	return sdk.Info{Name: p.Name, Version: "1.2.3-test", Kinds: []sdk.Kind{sdk.KindRuntime}}
}

// Configure implements sdk.Plugin.
func (p *MemoryPlugin) Configure(_ context.Context, c sdk.Config) error {
	if p.OnConfigure == nil {
		return nil
	}
	return p.OnConfigure(c)
}

// Runtime implements sdk.RuntimePlugin.
func (p *MemoryPlugin) Runtime() sdk.Runtime { return p.Memory }
