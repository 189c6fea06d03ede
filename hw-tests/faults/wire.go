package faults

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// wire is the device's line to its router: a TUN interface at each end and this
// process between them, which can do to the packets what a bad line does.
type wire struct {
	mu    sync.Mutex
	up    shape // from the device
	down  shape // to the device
	ends  []*os.File
	lines sync.WaitGroup
	count [2]int // packets that were passed on, up and down
	lost  [2]int
}

// shape is what happens to packets of one direction. The zero value passes
// them on at once.
type shape struct {
	cut       bool
	udp, tcp  bool // blocked
	loss      float64
	duplicate float64
	reorder   float64 // share that is held back for a while
	delay     time.Duration
}

// shape changes both directions.
func (w *wire) shape(f func(up, down *shape)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.up, &w.down)
}

// connect makes the two ends: an interface in the device's network namespace
// and one in the router's.
func (w *wire) connect(deviceNS, routerNS string) error {
	w.disconnect()
	device, err := tun(deviceNS, "eth0")
	if err != nil {
		return err
	}
	router, err := tun(routerNS, "lan0")
	if err != nil {
		device.Close()
		return err
	}
	w.ends = []*os.File{device, router}
	w.lines.Add(2)
	go w.carry(device, router, 0, &w.up)
	go w.carry(router, device, 1, &w.down)
	return nil
}

// disconnect takes both ends away.
func (w *wire) disconnect() {
	for _, e := range w.ends {
		e.Close()
	}
	w.ends = nil
	w.lines.Wait()
}

// tun makes an interface in a network namespace.
func tun(netns, name string) (*os.File, error) {
	var file *os.File
	err := within(netns, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		var request struct {
			name  [unix.IFNAMSIZ]byte
			flags uint16
			_     [22]byte
		}
		copy(request.name[:], name)
		request.flags = unix.IFF_TUN | unix.IFF_NO_PI
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&request))); e != 0 {
			unix.Close(fd)
			return fmt.Errorf("make interface %s: %w", name, e)
		}
		file = os.NewFile(uintptr(fd), name)
		return nil
	})
	return file, err
}

// parcel is a packet on its way.
type parcel struct {
	at    time.Time
	order uint64
	data  []byte
}

type parcels []parcel

func (p parcels) Len() int { return len(p) }
func (p parcels) Less(i, j int) bool {
	return p[i].at.Before(p[j].at) || p[i].at.Equal(p[j].at) && p[i].order < p[j].order
}
func (p parcels) Swap(i, j int) { p[i], p[j] = p[j], p[i] }
func (p *parcels) Push(x any)   { *p = append(*p, x.(parcel)) }
func (p *parcels) Pop() any {
	old := *p
	last := old[len(old)-1]
	*p = old[:len(old)-1]
	return last
}

// carry reads packets at one end and writes them at the other until an end is
// closed.
func (w *wire) carry(from, to *os.File, way int, s *shape) {
	defer w.lines.Done()
	const most = 4096 // a line holds only so many; more are lost
	late := make(chan parcel, most)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		deliver(to, late)
	}()
	defer func() { close(late); <-ended }()
	var order uint64
	buf := make([]byte, 65536)
	for {
		n, err := from.Read(buf)
		if err != nil {
			if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADFD) {
				return
			}
			// An interface that is down, or a device that was cut off.
			if _, err := from.Stat(); err != nil {
				return
			}
			<-time.After(time.Millisecond)
			continue
		}
		w.mu.Lock()
		now := *s
		w.mu.Unlock()
		copies, delay := fate(now, buf[:n])
		w.mu.Lock()
		if copies == 0 {
			w.lost[way]++
		} else {
			w.count[way]++
		}
		w.mu.Unlock()
		for range copies {
			if delay == 0 && len(late) == 0 {
				_, _ = to.Write(buf[:n]) // a line promises nothing
				continue
			}
			order++
			select {
			case late <- parcel{time.Now().Add(delay), order, append([]byte(nil), buf[:n]...)}:
			default:
			}
		}
	}
}

// fate says how often and how late a packet arrives.
func fate(s shape, packet []byte) (copies int, delay time.Duration) {
	const udp, tcp = 17, 6
	protocol := 0
	if len(packet) >= 20 && packet[0]>>4 == 4 {
		protocol = int(packet[9])
	}
	switch {
	case s.cut, s.udp && protocol == udp && !isDNS(packet), s.tcp && protocol == tcp:
		return 0, 0
	case s.loss > 0 && rand.Float64() < s.loss:
		return 0, 0
	}
	copies = 1
	if s.duplicate > 0 && rand.Float64() < s.duplicate {
		copies = 2
	}
	delay = s.delay
	if s.reorder > 0 && rand.Float64() < s.reorder {
		delay += time.Duration(rand.Int64N(int64(60 * time.Millisecond)))
	}
	return copies, delay
}

// isDNS: firewalls that block UDP let names be resolved.
func isDNS(p []byte) bool {
	at := int(p[0]&15) * 4
	if len(p) < at+4 {
		return false
	}
	const dns = 53
	return int(p[at])<<8|int(p[at+1]) == dns || int(p[at+2])<<8|int(p[at+3]) == dns
}

// deliver writes packets when they are due.
func deliver(to *os.File, in <-chan parcel) {
	var waiting parcels
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		wait := time.Hour
		if len(waiting) > 0 {
			wait = time.Until(waiting[0].at)
		}
		if wait <= 0 {
			_, _ = to.Write(heap.Pop(&waiting).(parcel).data)
			continue
		}
		timer.Reset(wait)
		select {
		case p, ok := <-in:
			if !ok {
				return
			}
			heap.Push(&waiting, p)
		case <-timer.C:
		}
	}
}
