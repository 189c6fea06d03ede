package process

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// busTimeout bounds a question to systemd that has no deadline of its own.
const busTimeout = 10 * time.Second

// How waitid(2) says a process ended, in ExecMainCode.
const (
	cldExited = 1
	cldKilled = 2
	cldDumped = 3
)

// systemdSupervisor makes each attempt a transient unit that remains after
// the program's exit, so that systemd remembers the code until it is recorded.
type systemdSupervisor struct {
	stage string // path of belay-supervise
	boot  string
	tag   string

	mu   sync.Mutex
	conn *sd.Conn
}

func newSystemd(stage, boot, tag string) *systemdSupervisor {
	return &systemdSupervisor{stage: stage, boot: boot, tag: tag}
}

// bus is the connection to systemd, made anew when it was lost.
func (s *systemdSupervisor) bus(ctx context.Context) (*sd.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil && s.conn.Connected() {
		return s.conn, nil
	}
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
	// The connection lives on; ctx only bounds the making of it.
	type made struct {
		conn *sd.Conn
		err  error
	}
	done := make(chan made, 1)
	go func() {
		conn, err := sd.NewSystemConnectionContext(context.Background())
		done <- made{conn, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	select {
	case m := <-done:
		if m.err != nil {
			return nil, sdk.Errorf(sdk.Unavailable, "ask systemd", "connect to the system bus: %w", m.err)
		}
		s.conn = m.conn
		return s.conn, nil
	case <-ctx.Done():
		go func() {
			if m := <-done; m.conn != nil {
				m.conn.Close()
			}
		}()
		return nil, sdk.Errorf(sdk.Unavailable, "ask systemd", "the system bus does not answer: %w", ctx.Err())
	}
}

// unitName is the unit of an attempt. A unit's name has at most 255 bytes.
func (s *systemdSupervisor) unitName(a sdk.Attempt) string {
	c := a.Container
	if len(c) > 100 {
		sum := sha256.Sum256([]byte(c))
		c = c[:80] + "_" + hex.EncodeToString(sum[:8])
	}
	return fmt.Sprintf("belay-%s-%s-%s.%d.service", s.tag, a.Task, c, a.Number)
}

// sliceName puts a task below belay.slice: dashes make the hierarchy.
func (s *systemdSupervisor) sliceName(task string) string {
	return fmt.Sprintf("belay-process-%s-%s.slice", s.tag, task)
}

func property(name string, value any) sd.Property {
	return sd.Property{Name: name, Value: dbus.MakeVariant(value)}
}

// limitProperties translates limits for the cgroup version systemd runs on.
func limitProperties(l sdk.Limits, v2 bool) ([]sd.Property, error) {
	// systemd takes every limit and keeps silent about those it cannot keep.
	for controller, wanted := range map[string]bool{"cpu": l.CPUShares > 0 || l.CPUQuota > 0, "pids": l.Pids > 0,
		"memory": l.MemoryBytes > 0 || l.MemoryReservation > 0 || l.MemorySwap != nil} {
		if wanted && !systemdHas(controller, v2) {
			return nil, sdk.Errorf(sdk.Unsupported, "limit "+strings.Join(limitNames(l), ", "), "this kernel has no %s controller that systemd can use", controller).
				WithHint("enable it (cgroup_enable=" + controller + " on the kernel's command line) or drop the limit")
		}
	}
	var p []sd.Property
	if l.CPUShares > 0 && v2 {
		p = append(p, property("CPUWeight", weightOf(l.CPUShares)))
	} else if l.CPUShares > 0 {
		p = append(p, property("CPUShares", min(max(l.CPUShares, 2), 262144)))
	}
	if l.CPUQuota > 0 {
		p = append(p, property("CPUQuotaPerSecUSec", max(l.CPUQuota, 1000)*(1_000_000/cpuPeriod)))
	}
	if l.MemoryBytes > 0 && v2 {
		p = append(p, property("MemoryMax", l.MemoryBytes))
	} else if l.MemoryBytes > 0 {
		p = append(p, property("MemoryLimit", l.MemoryBytes))
	}
	if l.Pids > 0 {
		p = append(p, property("TasksMax", uint64(l.Pids)))
	}
	if l.Swappiness != nil {
		return nil, sdk.Errorf(sdk.Unsupported, "limit swappiness", "systemd has no such limit")
	}
	if !v2 && (l.MemoryReservation > 0 || l.MemorySwap != nil) {
		return nil, sdk.Errorf(sdk.Unsupported, "limit memory reservation or swap", "systemd limits them on cgroup version 2 only")
	}
	if l.MemoryReservation > 0 {
		p = append(p, property("MemoryLow", l.MemoryReservation))
	}
	if l.MemorySwap != nil {
		swap := uint64(1<<64 - 1) // no limit
		if *l.MemorySwap >= 0 {
			swap = uint64(*l.MemorySwap)
		}
		p = append(p, property("MemorySwapMax", swap))
	}
	return p, nil
}

// systemdHas tells whether systemd can use a controller.
func systemdHas(controller string, v2 bool) bool {
	if v2 {
		b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		return err == nil && slices.Contains(strings.Fields(string(b)), controller)
	}
	return unix.Access("/sys/fs/cgroup/"+controller, unix.W_OK) == nil
}

func onCgroup2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// startUnit makes a transient unit; existing is true when there is one already.
func (s *systemdSupervisor) startUnit(ctx context.Context, name string, p []sd.Property) (existing bool, err error) {
	conn, err := s.bus(ctx)
	if err != nil {
		return false, err
	}
	result := make(chan string, 1)
	if _, err := conn.StartTransientUnitContext(ctx, name, "fail", p, result); err != nil {
		if busError(err, "UnitExists") {
			return true, nil
		}
		return false, fmt.Errorf("ask systemd to start %s: %w", name, err)
	}
	select {
	case got := <-result:
		if got != "done" {
			return false, fmt.Errorf("systemd could not start %s: job %s", name, got)
		}
		return false, nil
	case <-ctx.Done():
		return false, fmt.Errorf("wait for systemd to start %s: %w", name, ctx.Err())
	}
}

// busError tells whether err is systemd's or D-Bus's error of that name.
func busError(err error, names ...string) bool {
	var e dbus.Error
	if !errors.As(err, &e) {
		return false
	}
	for _, n := range names {
		if strings.HasSuffix(e.Name, "."+n) {
			return true
		}
	}
	return false
}

func (s *systemdSupervisor) launch(ctx context.Context, a *attempt) (int, error) {
	limits, err := limitProperties(a.limits, onCgroup2())
	if err != nil {
		return 0, err
	}
	if s.keepsOOM(ctx) {
		// Left alone, systemd ends the whole unit when the kernel kills any
		// process of it for memory. What a child's end means is its program's
		// business, as in a container.
		limits = append(limits, property("OOMPolicy", "continue"))
	}
	p := append([]sd.Property{
		sd.PropDescription("Belay task " + a.Task + " container " + a.Container + " attempt " + strconv.Itoa(a.Number)),
		sd.PropExecStart([]string{s.stage, "stage", a.dir}, false),
		sd.PropType("simple"),
		// Without it a unit that exits 0 vanishes, and its exit with it.
		sd.PropRemainAfterExit(true),
		property("Slice", s.sliceName(a.Task)),
		property("Environment", []string{"GOMAXPROCS=1", "GOGC=off"}),
		property("StandardInput", "null"),
		property("StandardOutput", "null"), // the stage opens the files itself
		property("StandardError", "null"),
		property("KillMode", "control-group"),
		property("TimeoutStopUSec", uint64(busTimeout/time.Microsecond)),
		// systemd says that memory ran out on cgroup version 2 only, and not
		// under that policy: it is noted while the unit still has its cgroup.
		{Name: "ExecStopPost", Value: dbus.MakeVariant([]execCommand{{s.stage, []string{s.stage, "ended", a.dir}, true}})},
		property("CPUAccounting", true),
		property("MemoryAccounting", true),
		property("TasksAccounting", true),
	}, limits...)
	_, err = s.startUnit(ctx, a.meta.Unit, p)
	return 0, err
}

// execCommand is one command of a unit, as D-Bus has it.
type execCommand struct {
	Path          string
	Args          []string
	IgnoreFailure bool
}

// keepsOOM tells whether this systemd has an OOMPolicy: version 243 and newer.
func (s *systemdSupervisor) keepsOOM(ctx context.Context) bool {
	conn, err := s.bus(ctx)
	if err != nil {
		return false
	}
	v, err := conn.GetManagerProperty("Version") // quoted: "252.39-1~deb12u2"
	if err != nil {
		return false
	}
	digits, _, _ := strings.Cut(strings.Trim(v, `"`), ".")
	digits, _, _ = strings.Cut(digits, "-")
	digits, _, _ = strings.Cut(digits, " ")
	n, _ := strconv.Atoi(digits)
	return n >= 243
}

// unit is what systemd knows about one.
type unit struct {
	loaded   bool
	active   string // ActiveState
	sub      string // SubState
	mainPID  int    // ExecMainPID: kept after the exit
	code     int    // cldExited, ...; 0 while it runs
	status   int
	result   string
	reported bool // an exit of the main process is known
	ran      time.Duration
}

func (s *systemdSupervisor) unit(ctx context.Context, name string) (unit, error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	conn, err := s.bus(ctx)
	if err != nil {
		return unit{}, err
	}
	p, err := conn.GetAllPropertiesContext(ctx, name)
	if err != nil {
		return unit{}, sdk.Errorf(sdk.Unavailable, "ask systemd about "+name, "%w", err)
	}
	text := func(k string) string { v, _ := p[k].(string); return v }
	u := unit{loaded: text("LoadState") == "loaded", active: text("ActiveState"), sub: text("SubState"), result: text("Result")}
	if v, ok := p["ExecMainPID"].(uint32); ok {
		u.mainPID = int(v)
	}
	if v, ok := p["ExecMainCode"].(int32); ok {
		u.code = int(v)
	}
	if v, ok := p["ExecMainStatus"].(int32); ok {
		u.status = int(v)
	}
	u.reported = u.code != 0
	begun, _ := p["ExecMainStartTimestampMonotonic"].(uint64) // microseconds
	if over, _ := p["ExecMainExitTimestampMonotonic"].(uint64); begun > 0 && over > begun {
		u.ran = time.Duration(over-begun) * time.Microsecond
	}
	return u, nil
}

func (s *systemdSupervisor) pending(ctx context.Context, a *attempt) (bool, error) {
	u, err := s.unit(ctx, a.meta.Unit)
	return u.loaded && !u.reported && u.active != "inactive" && u.active != "failed", err
}

func (s *systemdSupervisor) settled(context.Context, *attempt) (bool, int, error) {
	return true, 0, nil // leftovers are killed before the exit is recorded
}

func (s *systemdSupervisor) watched(_ *attempt, program int) int { return program }

func (s *systemdSupervisor) ended(ctx context.Context, a *attempt) (record.Exit, bool, error) {
	u, err := s.unit(ctx, a.meta.Unit)
	if err != nil {
		return record.Exit{}, false, err
	}
	started, _ := a.started()
	switch {
	case !u.loaded || u.mainPID != 0 && u.mainPID != started.PID:
		return record.Exit{Code: -1, Reason: "unit " + a.meta.Unit + " was stopped or removed by somebody else: its exit code went with it"}, true, nil
	case !u.reported:
		return record.Exit{}, false, nil // systemd has not got to it yet
	}
	if u.sub == "stop-post" {
		return record.Exit{}, false, nil // the stage notes how the program ended
	}
	// A unit that remains after its exit keeps the processes its program left.
	if err := s.kill(ctx, a); err != nil {
		return record.Exit{}, false, err
	}
	if u.active == "deactivating" {
		return record.Exit{}, false, nil // stop-post comes next
	}
	e := record.Exit{Code: u.status, RanFor: int64(u.ran)}
	if u.code == cldKilled || u.code == cldDumped {
		e.Code = 128 + u.status
		e.Reason = "killed by signal " + strconv.Itoa(u.status)
		if u.result == "oom-kill" || u.status == int(syscall.SIGKILL) && a.outOfMemory() {
			e.OOM, e.Reason = true, "killed by the kernel: out of memory"
		}
	} else if u.code != cldExited {
		e.Code, e.Reason = -1, "systemd reports an end it does not explain"
	}
	return e, true, nil
}

func (s *systemdSupervisor) terminate(ctx context.Context, a *attempt) error {
	return s.signal(ctx, a, sd.Main, syscall.SIGTERM)
}

func (s *systemdSupervisor) kill(ctx context.Context, a *attempt) error {
	return s.signal(ctx, a, sd.All, syscall.SIGKILL)
}

func (s *systemdSupervisor) signal(ctx context.Context, a *attempt, who sd.Who, sig syscall.Signal) error {
	conn, err := s.bus(ctx)
	if err != nil {
		return err
	}
	err = conn.KillUnitWithTarget(ctx, a.meta.Unit, who, int32(sig))
	if err != nil && !busError(err, "NoSuchUnit", "NoSuchProcess", "UnixProcessIdUnknown") {
		return sdk.Errorf(sdk.Unavailable, "signal "+a.meta.Unit, "%w", err)
	}
	return nil
}

func (s *systemdSupervisor) joins(a *attempt, program int) []string {
	return unitGroup(program, a.meta.Unit).joins()
}

func (s *systemdSupervisor) discard(ctx context.Context, a *attempt) error {
	return s.stopUnit(ctx, a.meta.Unit)
}

// stopUnit stops and forgets a unit; one that is not there is fine.
func (s *systemdSupervisor) stopUnit(ctx context.Context, name string) error {
	conn, err := s.bus(ctx)
	if err != nil {
		return err
	}
	result := make(chan string, 1)
	if _, err := conn.StopUnitContext(ctx, name, "replace", result); err == nil {
		select {
		case <-result:
		case <-ctx.Done():
			return fmt.Errorf("wait for systemd to stop %s: %w", name, ctx.Err())
		}
	} else if !busError(err, "NoSuchUnit") {
		return sdk.Errorf(sdk.Unavailable, "stop "+name, "%w", err)
	}
	if err := conn.ResetFailedUnitContext(ctx, name); err != nil && !busError(err, "NoSuchUnit") {
		return sdk.Errorf(sdk.Unavailable, "forget "+name, "%w", err)
	}
	return nil
}

func (s *systemdSupervisor) prepareTask(ctx context.Context, id string, l sdk.Limits) error {
	p, err := limitProperties(l, onCgroup2())
	if err != nil {
		return err
	}
	if len(p) == 0 {
		return nil // the first unit brings the slice up
	}
	p = append(p, sd.PropDescription("Belay task "+id))
	_, err = s.startUnit(ctx, s.sliceName(id), p)
	return err
}

func (s *systemdSupervisor) removeTask(ctx context.Context, id string) error {
	return s.stopUnit(ctx, s.sliceName(id))
}
