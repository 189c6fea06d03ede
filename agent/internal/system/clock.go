package system

import (
	"container/heap"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Clock keeps time by CLOCK_BOOTTIME, which no one sets and which goes on in
// suspend; Go's own timers stop there, so After is driven by one timerfd on
// that clock. It implements agent.Clock
// and agent.Sleeper.
type Clock struct {
	bootID string
	fd     *os.File
	done   chan struct{}

	mu      sync.Mutex
	pending deadlines
	closed  bool
}

// NewClock starts a clock. Close stops it.
func NewClock() (*Clock, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read boot id: %w", err)
	}
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("create timer on CLOCK_BOOTTIME: %w", err)
	}
	c := &Clock{
		bootID: strings.TrimSpace(string(id)),
		fd:     os.NewFile(uintptr(fd), "timerfd"),
		done:   make(chan struct{}),
	}
	go c.run()
	return c, nil
}

// Close stops the clock: what waits in After will not fire.
func (c *Clock) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	err := c.fd.Close()
	<-c.done
	return err
}

// Now is the time since boot, suspend included.
func (c *Clock) Now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// Only a clock id or address it does not know makes it fail.
		panic("clock_gettime(CLOCK_BOOTTIME): " + err.Error())
	}
	return time.Duration(ts.Nano())
}

// Awake is the time since boot, suspend left out.
func (c *Clock) Awake() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic("clock_gettime(CLOCK_MONOTONIC): " + err.Error()) // as above
	}
	return time.Duration(ts.Nano())
}

// BootID is constant until the next boot.
func (c *Clock) BootID() string { return c.bootID }

// When is this moment on every clock there is.
func (c *Clock) When() *wire.When {
	return &wire.When{
		BootId:       c.bootID,
		BoottimeNs:   int64(c.Now()),
		WallUnixNs:   time.Now().UnixNano(),
		Synchronized: Synchronized(),
	}
}

// Synchronized says whether the kernel believes its wall clock to be set by a
// time service: without one, a Pi boots in 1970 or in its last shutdown.
func Synchronized() bool {
	var tx unix.Timex // Modes 0 only reads
	state, err := unix.Adjtimex(&tx)
	return err == nil && state != unix.TIME_ERROR && tx.Status&unix.STA_UNSYNC == 0
}

// After sends once d has passed, suspend included. A channel nobody reads any
// more costs a few bytes until then.
func (c *Clock) After(d time.Duration) <-chan time.Time {
	now := c.Now()
	d = min(max(d, 0), math.MaxInt64-now) // "for ever" must not come round to the past
	w := &deadline{at: now + d, ch: make(chan time.Time, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return w.ch
	}
	heap.Push(&c.pending, w)
	if c.pending[0] == w {
		c.arm()
	}
	return w.ch
}

// run fires what is due whenever the timer expires.
func (c *Clock) run() {
	defer close(c.done)
	var expirations [8]byte
	for {
		if _, err := c.fd.Read(expirations[:]); err != nil {
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
				continue
			}
			return // closed
		}
		c.mu.Lock()
		for now := c.Now(); len(c.pending) > 0 && c.pending[0].at <= now; {
			heap.Pop(&c.pending).(*deadline).ch <- time.Now() // one send a channel, into its buffer
		}
		c.arm()
		c.mu.Unlock()
	}
}

// arm sets the timer to the earliest deadline. Called with mu held.
func (c *Clock) arm() {
	if c.closed || len(c.pending) == 0 {
		return
	}
	// A zero value would disarm it; an absolute time in the past fires at once.
	at := max(c.pending[0].at, 1)
	conn, err := c.fd.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) {
		spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(at))}
		_ = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME, &spec, nil)
	})
}

type deadline struct {
	at time.Duration
	ch chan time.Time
}

// deadlines is a heap, earliest first.
type deadlines []*deadline

func (d deadlines) Len() int           { return len(d) }
func (d deadlines) Less(i, j int) bool { return d[i].at < d[j].at }
func (d deadlines) Swap(i, j int)      { d[i], d[j] = d[j], d[i] }
func (d *deadlines) Push(x any)        { *d = append(*d, x.(*deadline)) }
func (d *deadlines) Pop() any {
	old := *d
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*d = old[:len(old)-1]
	return last
}
