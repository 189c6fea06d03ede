package containerd

import (
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// sweep removes what is left of a connection after its DEL, by looking. The
// plugins' DEL goes by what it finds first, such as the address of a link,
// and does not look for the rest where that is gone; and it fails where a
// chain it never made does not exist.
func (b *bridge) sweep(ctx context.Context, p *programs, id string) error {
	look := func() (string, error) {
		saved, err := p.run(ctx, "", "iptables-save", "-t", "nat")
		return undoRules(saved, b.name, id), err
	}
	undo, err := look()
	if err != nil {
		return err
	}
	if undo != "" {
		if _, err := p.run(ctx, undo, "iptables-restore", "--noflush", "--wait", "10"); err != nil {
			return err
		}
		if undo, err = look(); err != nil {
			return err
		} else if undo != "" {
			return fmt.Errorf("firewall rules of %s cannot be removed: iptables-restore was asked to %s", id, strings.ReplaceAll(undo, "\n", "; "))
		}
	}
	if err := freeAddresses(filepath.Join(addressDir, b.name), id); err != nil {
		return err
	}
	err = os.Remove(filepath.Join(b.results, "results", b.name+"-"+id+"-"+ifName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// chainsOf are the chains that the plugins bridge and portmap make for one
// container. The names are those of containernetworking's pkg/utils.
func chainsOf(network, id string) []string {
	sum := fmt.Sprintf("%x", sha512.Sum512([]byte(network+id)))
	var all []string
	for _, prefix := range []string{"CNI-", "CNI-DN-", "CNI-SN-"} {
		const most = 28 // characters, iptables' own limit
		all = append(all, (prefix + sum)[:most])
	}
	return all
}

// undoRules turns what iptables-save says into what iptables-restore needs
// to hear for a container's rules and chains to be gone; "" where none are.
func undoRules(saved, network, id string) string {
	ours := map[string]bool{}
	for _, c := range chainsOf(network, id) {
		ours[c] = true
	}
	comment := fmt.Sprintf(`name: \"%s\" id: \"%s\"`, network, id)
	var rules, flush, drop strings.Builder
	for line := range strings.Lines(saved) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0:
		case strings.HasPrefix(f[0], ":"):
			if c := f[0][1:]; ours[c] {
				fmt.Fprintf(&flush, "-F %s\n", c)
				fmt.Fprintf(&drop, "-X %s\n", c)
			}
		case f[0] == "-A" && len(f) > 1 && !ours[f[1]] && (strings.Contains(line, comment) || jumpsTo(f, ours)):
			fmt.Fprintf(&rules, "-D %s\n", strings.TrimSpace(strings.TrimPrefix(line, "-A ")))
		}
	}
	if rules.Len()+drop.Len() == 0 {
		return ""
	}
	return "*nat\n" + rules.String() + flush.String() + drop.String() + "COMMIT\n"
}

func jumpsTo(rule []string, chains map[string]bool) bool {
	for i, w := range rule[:len(rule)-1] {
		if w == "-j" && chains[rule[i+1]] {
			return true
		}
	}
	return false
}

// freeAddresses gives back what the plugin host-local has reserved for a
// container: files named for an address, with the container's id in the first
// line.
func freeAddresses(dir, id string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := netip.ParseAddr(e.Name()); err != nil {
			continue
		}
		path := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		if owner, _, _ := strings.Cut(string(b), "\n"); strings.TrimSpace(owner) != id {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
