package system

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// networkSettle is how long changes may go on before they are looked at:
	// they come in bursts, and most are of no interest.
	networkSettle = 200 * time.Millisecond
	// networkInterval is the least time between two looks.
	networkInterval = time.Second
)

// WatchNetwork calls changed whenever this device's own addresses, or its
// routes to elsewhere, are others than before: what a link to the outside could
// depend on. What containers' interfaces do does not count, nor that a lease or
// a router's announcement was renewed. Busy says
// whether it looks at something; waiting for the kernel may take for ever. It
// returns nil when ctx ends.
func WatchNetwork(ctx context.Context, changed func(), busy func(bool)) error {
	busy(true)
	defer busy(false)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("watch addresses and routes: open a netlink socket: %w", err)
	}
	sock := os.NewFile(uintptr(fd), "netlink")
	defer sock.Close()
	groups := uint32(1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1) |
		1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1))
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return fmt.Errorf("watch addresses and routes: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = sock.SetReadDeadline(time.Now()) })()
	was, err := network()
	if err != nil {
		return err
	}
	for b := make([]byte, 64<<10); ; {
		busy(false)
		// Only that something happened counts; what it is, a dump tells, even
		// when so much happened that messages were dropped.
		if _, err := sock.Read(b); err != nil && !errors.Is(err, unix.ENOBUFS) {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch addresses and routes: %w", err)
		}
		busy(true)
		if !pause(ctx, networkSettle) {
			return nil
		}
		now, err := network()
		if err != nil {
			continue // a dump that was interrupted by a change: another message comes
		}
		if !slices.Equal(was, now) {
			was = now
			changed()
		}
		if !pause(ctx, networkInterval-networkSettle) {
			return nil
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// network is what counts of addresses and routes, one line each, sorted.
func network() ([]string, error) {
	var lines []string
	inner := bridges()
	for _, kind := range []int{unix.RTM_GETADDR, unix.RTM_GETROUTE} {
		b, err := syscall.NetlinkRIB(kind, unix.AF_UNSPEC)
		if err != nil {
			return nil, fmt.Errorf("read addresses and routes: %w", err)
		}
		messages, err := syscall.ParseNetlinkMessage(b)
		if err != nil {
			return nil, fmt.Errorf("read addresses and routes: %w", err)
		}
		for i := range messages {
			line := ""
			switch messages[i].Header.Type {
			case unix.RTM_NEWADDR:
				line = addressLine(&messages[i])
			case unix.RTM_NEWROUTE:
				line = routeLine(&messages[i], inner)
			}
			if line != "" {
				lines = append(lines, line)
			}
		}
	}
	slices.Sort(lines)
	return slices.Compact(lines), nil
}

// addressLine is "" for addresses that lead nowhere: of loopback and of the
// link only.
func addressLine(m *syscall.NetlinkMessage) string {
	if len(m.Data) < unix.SizeofIfAddrmsg {
		return ""
	}
	scope, index := m.Data[3], binary.NativeEndian.Uint32(m.Data[4:])
	if scope >= unix.RT_SCOPE_LINK {
		return ""
	}
	attrs, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return ""
	}
	for _, a := range attrs {
		if ip, ok := netip.AddrFromSlice(a.Value); ok && a.Attr.Type == unix.IFA_ADDRESS {
			return fmt.Sprintf("address %s/%d of %d", ip, m.Data[1], index)
		}
	}
	return ""
}

// routeLine is "" for routes to this device itself and to its links. Whether a
// bridge has a carrier does not count unless a router is behind it: one for
// containers has none whenever no container runs.
func routeLine(m *syscall.NetlinkMessage, inner map[uint32]bool) string {
	if len(m.Data) < unix.SizeofRtMsg {
		return ""
	}
	bits, table, scope, kind := m.Data[1], m.Data[4], m.Data[6], m.Data[7]
	flags := binary.NativeEndian.Uint32(m.Data[8:]) & (unix.RTNH_F_DEAD | unix.RTNH_F_LINKDOWN)
	if table == unix.RT_TABLE_LOCAL || kind != unix.RTN_UNICAST && kind != unix.RTN_UNREACHABLE && kind != unix.RTN_BLACKHOLE {
		return ""
	}
	attrs, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return ""
	}
	var parts []string
	var over uint32
	routed := false
	for _, a := range attrs {
		name := map[uint16]string{unix.RTA_DST: "to", unix.RTA_GATEWAY: "via", unix.RTA_PREFSRC: "from"}[a.Attr.Type]
		switch ip, ok := netip.AddrFromSlice(a.Value); {
		case name != "" && ok:
			if name == "to" && (ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsLoopback()) {
				return ""
			}
			routed = routed || name == "via"
			parts = append(parts, name+" "+ip.String())
		case a.Attr.Type == unix.RTA_OIF && len(a.Value) == 4:
			over = binary.NativeEndian.Uint32(a.Value)
			parts = append(parts, fmt.Sprintf("over %d", over))
		case a.Attr.Type == unix.RTA_PRIORITY && len(a.Value) == 4:
			parts = append(parts, fmt.Sprintf("metric %d", binary.NativeEndian.Uint32(a.Value)))
		}
	}
	if inner[over] && !routed {
		flags = 0
	}
	slices.Sort(parts)
	return fmt.Sprintf("route /%d table %d type %d scope %d flags %d %s", bits, table, kind, scope, flags, strings.Join(parts, " "))
}

// bridges are the indexes of bridges among the links.
func bridges() map[uint32]bool {
	found := map[uint32]bool{}
	b, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
	if err != nil {
		return found
	}
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return found
	}
	for i := range messages {
		m := &messages[i]
		if m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(m)
		if err != nil {
			continue
		}
		for _, a := range attrs {
			if a.Attr.Type&^unix.NLA_F_NESTED == unix.IFLA_LINKINFO && isBridge(a.Value) {
				found[binary.NativeEndian.Uint32(m.Data[4:])] = true
			}
		}
	}
	return found
}

// isBridge looks for the kind in the attributes within IFLA_LINKINFO.
func isBridge(b []byte) bool {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return false
		}
		if binary.NativeEndian.Uint16(b[2:]) == unix.IFLA_INFO_KIND {
			return strings.TrimRight(string(b[unix.SizeofNlAttr:n]), "\x00") == "bridge"
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return false
}
