package agent

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// turning is a device with a plugin more, of which it is seen only later what
// it is.
type turning struct {
	*fakeRuntime
	changes chan string
	mu      sync.Mutex
	err     error // of Runtime
	asked   int
}

func (r *turning) RuntimeNames() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == sdk.NotFound {
		return []string{defaultRuntime}
	}
	return []string{"late", defaultRuntime}
}

func (r *turning) Runtime(name string) (sdk.Runtime, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if name != "late" {
		return r.fakeRuntime, nil
	}
	r.asked++
	if r.err != nil {
		return nil, r.err
	}
	return r.fakeRuntime, nil
}

func (r *turning) Changes() <-chan string { return r.changes }

// becomes makes the plugin another one.
func (r *turning) becomes(err error) {
	r.mu.Lock()
	r.err = err
	r.mu.Unlock()
	r.changes <- "late"
	<-time.After(time.Minute)
	synctest.Wait()
}

// TestOnlyRuntimesAreFollowed: what turns out to be no runtime is not asked for
// events every few seconds for ever, and followed when it becomes one.
func TestOnlyRuntimesAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &turning{changes: make(chan string), err: sdk.Unavailable}
		var mu sync.Mutex
		var followed []string
		newBubble(t, 0.5, func(c *Config) {
			r.fakeRuntime = c.Runtimes.(*fakeRuntime)
			c.Runtimes = r
			c.Mind = func(name string, _ time.Duration) (func(bool), func()) {
				mu.Lock()
				defer mu.Unlock()
				followed = append(followed, name)
				return func(bool) {}, func() {
					mu.Lock()
					defer mu.Unlock()
					followed = slices.DeleteFunc(followed, func(n string) bool { return n == name })
				}
			}
		})
		follows := func() bool {
			mu.Lock()
			defer mu.Unlock()
			return slices.Contains(followed, "events of late")
		}
		<-time.After(time.Minute)
		if !follows() {
			t.Error("what may be a runtime is not followed")
		}
		r.becomes(sdk.NotFound)
		if follows() {
			t.Error("what is none is followed")
		}
		before := r.asked
		<-time.After(time.Hour)
		if r.asked != before {
			t.Errorf("asked %d times more", r.asked-before)
		}
		r.becomes(nil)
		if !follows() {
			t.Error("what became one is not followed")
		}
	})
}
