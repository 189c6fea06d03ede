package containerd

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// leftovers lists what a container leaves on the machine while it exists:
// records, snapshots, shims, mounts, cgroups, addresses, firewall rules, files.
func leftovers(t *testing.T, w *world) []string {
	t.Helper()
	var all []string
	for _, args := range [][]string{{"containers", "ls", "-q"}, {"tasks", "ls", "-q"}, {"leases", "ls", "-q"}} {
		out, err := exec.Command("ctr", append([]string{"-a", w.ctd.Address, "-n", "belay"}, args...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range strings.Fields(string(out)) {
			all = append(all, args[0]+" "+f)
		}
	}
	out, err := exec.Command("ctr", "-a", w.ctd.Address, "-n", "belay", "snapshots", "ls").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasSuffix(strings.TrimSpace(line), "Active") {
			all = append(all, "snapshot "+strings.Fields(line)[0])
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if p := strings.Fields(line)[4]; strings.HasPrefix(p, w.run) || strings.HasPrefix(p, filepath.Dir(w.ctd.Log())) {
			all = append(all, "mount "+p)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/belay/*", "/sys/fs/cgroup/*/belay/*", filepath.Join(w.run, "containers", "*"), filepath.Join(w.run, "netns", "*"),
		filepath.Join(w.run, "cni", "results", "*"), filepath.Join(w.run, "exec", "*"), filepath.Join(w.state, "tasks", "*"), filepath.Join("/run/belay-cni", bridgeName, "10.*"),
		filepath.Join(bundles(w.ctd, "state"), "*"), filepath.Join(bundles(w.ctd, "root"), "*")} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			// Only directories of cgroups are ours to leave.
			if i, err := os.Stat(f); err == nil && (i.IsDir() || !strings.HasPrefix(f, "/sys/")) {
				all = append(all, "path "+f)
			}
		}
	}
	rules, err := exec.Command("iptables-save").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, bits, _ := strings.Cut(bridgeSubnet, "10.231.")
	for line := range strings.Lines(string(rules)) {
		if strings.Contains(line, "10.231."+strings.TrimSuffix(bits, "0/24")) && !strings.Contains(line, "MASQUERADE") {
			all = append(all, "rule "+strings.TrimSpace(line))
		}
	}
	slices.Sort(all)
	return all
}

// networkLeftovers lists what containers on this process's bridge have: links,
// addresses, firewall rules, and chains that no rule leads to.
func networkLeftovers(t *testing.T) []string {
	t.Helper()
	var all []string
	ports, err := filepath.Glob(filepath.Join("/sys/class/net", bridgeName, "brif", "*"))
	if err != nil {
		t.Fatal(err)
	}
	leases, err := filepath.Glob(filepath.Join("/run/belay-cni", bridgeName, "10.*"))
	if err != nil {
		t.Fatal(err)
	}
	all = append(ports, leases...)
	saved, err := exec.Command("iptables-save", "-t", "nat").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(saved)) {
		line = strings.TrimSpace(line)
		chain, declared := strings.CutPrefix(strings.Fields(line)[0], ":CNI-")
		unused := declared && !strings.HasPrefix(chain, "HOSTPORT-") && !strings.Contains(string(saved), "-j CNI-"+chain+"\n")
		if strings.Contains(line, bridgeName+`\"`) || unused {
			all = append(all, line)
		}
	}
	return all
}

// bundles is where containerd keeps what a shim works with: below its state,
// and below its root what must outlive a reboot.
func bundles(ctd *rig.Containerd, below string) string {
	return filepath.Join(filepath.Dir(ctd.Log()), below, "io.containerd.runtime.v2.task", "belay")
}
