// Package system reads what a device is: its board, operating system, CPUs,
// memory, cgroups and identity, and keeps time by the only clock a device can
// be trusted with. Facts are read below a root path, so that tests read the
// fixtures of boards nobody has at hand. A fact that is not known is left out,
// never guessed.
package system

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/shirou/gopsutil/v3/common"
	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/mem"

	"github.com/belay-edge/belay/controlplane/wire"
)

// SharesPerCPU is what one CPU counts in task definitions.
const SharesPerCPU = 1024

// Reserve is what the agent and the operating system keep for themselves. It
// is subtracted from what is offered to tasks.
type Reserve struct {
	CPUPercent int    // of all CPUs together, 0 to 90
	MemoryMiB  uint64 // never offered to tasks
}

// Facts describe one device.
type Facts struct {
	// Attributes by name, all beginning with "belay.".
	Attributes map[string]string `json:"attributes"`
	// CPU is what tasks may use, 1024 a CPU; 0 when unknown.
	CPU uint64 `json:"cpu"`
	// MemoryMiB is what tasks may use; 0 when unknown.
	MemoryMiB uint64 `json:"memoryMiB"`
	Hostname  string `json:"hostname,omitempty"`
	// MachineID is a hash that differs between devices but tells nothing
	// else about them; empty when the device has nothing to hash.
	MachineID string `json:"machineId,omitempty"`
	// BootID is constant until the next boot.
	BootID string `json:"bootId,omitempty"`
}

// Options of Read.
type Options struct {
	Arch    string // as GOARCH; "": of this process
	Reserve Reserve
}

// Read reads the facts of the device whose file system is at root, "/" being
// this one. Files that are missing or unreadable leave their facts out. An
// error means that root itself is not a device's file system, or that nothing
// could be learned of the CPUs and memory of this very device.
func Read(ctx context.Context, root string, o Options) (Facts, error) {
	if st, err := os.Stat(root); err != nil {
		return Facts{}, err
	} else if !st.IsDir() {
		return Facts{}, &os.PathError{Op: "read facts", Path: root, Err: errors.New("not a directory")}
	}
	t := tree(root)
	a := attributes{}
	arch := o.Arch
	if arch == "" {
		arch = runtime.GOARCH
	}
	a.set("belay.arch", arch)
	a.set("belay.arch.variant", t.archVariant(arch))
	t.operatingSystem(a)
	t.board(a)
	t.cgroups(a)

	f := Facts{
		Attributes: a,
		Hostname:   t.read("proc/sys/kernel/hostname"),
		BootID:     t.read("proc/sys/kernel/random/boot_id"),
		MachineID:  t.machineID(),
	}
	a.set("belay.hostname", f.Hostname)

	ctx = context.WithValue(ctx, common.EnvKey, common.EnvMap{
		common.HostProcEnvKey: t.path("proc"),
		common.HostSysEnvKey:  t.path("sys"),
	})
	cpus, _ := cpu.CountsWithContext(ctx, true)
	if cpus > 0 {
		a.set("belay.cpus", strconv.Itoa(cpus))
		total := uint64(cpus) * SharesPerCPU
		f.CPU = total - total*uint64(o.Reserve.CPUPercent)/100
	}
	// One broken line makes gopsutil return what it had so far; the first CPU is enough.
	if infos, _ := cpu.InfoWithContext(ctx); len(infos) > 0 && infos[0].ModelName != "Undefined" {
		a.set("belay.cpu.model", infos[0].ModelName)
	}
	if vm, err := mem.VirtualMemoryWithContext(ctx); err == nil && vm.Total > 0 {
		total := vm.Total >> 20
		a.set("belay.memory_mib", strconv.FormatUint(total, 10))
		f.MemoryMiB = total - min(total, o.Reserve.MemoryMiB)
	}
	if root == "/" && (cpus == 0 || f.Attributes["belay.memory_mib"] == "") {
		return f, errors.New("read /proc/cpuinfo and /proc/meminfo: no CPUs or no memory found: is /proc mounted?")
	}
	return f, nil
}

// Wire puts the facts in the form the control plane takes, attributes of the
// operator's own beside the device's. Plugins and ports are the caller's to add.
func (f Facts) Wire(own map[string]string) *wire.Facts {
	attrs := make(map[string]string, len(f.Attributes)+len(own))
	for k, v := range own {
		attrs[k] = v
	}
	for k, v := range f.Attributes {
		attrs[k] = v
	}
	return &wire.Facts{Attributes: attrs, Cpu: f.CPU, MemoryMib: f.MemoryMiB}
}

// attributes leaves out what is empty.
type attributes map[string]string

func (a attributes) set(name, value string) {
	if value != "" {
		a[name] = value
	}
}

// tree reads below a root.
type tree string

// maxFact bounds what is read of any one file: procfs and sysfs files are
// small, but a fixture or a broken driver may not be.
const maxFact = 256 << 10

func (t tree) path(elem string) string { return filepath.Join(string(t), filepath.FromSlash(elem)) }

// raw returns the file's content, or nil: missing files, EACCES, EAGAIN,
// ENODATA and empty files are all normal answers of sysfs.
func (t tree) raw(name string) []byte {
	f, err := os.Open(t.path(name))
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFact))
	if err != nil {
		return nil
	}
	return b
}

// read returns the file's text without surrounding white space and without
// the NUL that ends device-tree strings.
func (t tree) read(name string) string {
	return strings.TrimSpace(strings.TrimRight(string(t.raw(name)), "\x00\n"))
}

func (t tree) exists(name string) bool {
	_, err := os.Stat(t.path(name))
	return err == nil
}

// field returns the value of the first "key : value" line, as in /proc/cpuinfo.
func (t tree) field(name, key string) string {
	for line := range strings.Lines(string(t.raw(name))) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
