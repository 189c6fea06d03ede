package sdktest

import (
	"errors"
	"reflect"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

func hasOp(err, like error) bool {
	var a, b *sdk.Error
	return errors.As(err, &a) && errors.As(like, &b) && a.Op == b.Op
}

func testFirstInventory(t T, r *deviceRig) {
	_, d := r.devices(t)
	w := r.watch(t, d)
	defer w.stop()
	begun := time.Now()
	devices, err := w.next(r.patience(5 * time.Second))
	switch {
	case badInventory(err): // it came
	case err != nil:
		t.Fatalf("expected an inventory at once, an empty one if nothing is there: %v", err)
	}
	t.Logf("%d devices after %s", len(devices), time.Since(begun).Round(time.Millisecond))
}

func testInventoryContract(t T, r *deviceRig) {
	_, d := r.devices(t)
	w := r.watch(t, d)
	defer w.stop()
	devices, err := w.next(r.patience(5 * time.Second))
	if err != nil && !badInventory(err) {
		r.missing(t, ruleInventory, "expected an inventory: %v", err)
	}
	// What it corrects itself to soon after counts as well.
	for end := time.Now().Add(r.patience(time.Second)); err == nil; devices, err = w.next(time.Until(end)) {
		if err := sdk.CheckInventory(devices); err != nil {
			t.Fatalf("%v", err)
		}
	}
	if badInventory(err) {
		t.Fatalf("%v", err)
	}
}

// testWatchSilent allows changes, hardware is alive, but not the same again.
func testWatchSilent(t T, r *deviceRig) {
	_, d := r.devices(t)
	w := r.watch(t, d)
	defer w.stop()
	last, err := w.next(r.patience(5 * time.Second))
	if err != nil {
		if badInventory(err) {
			r.missing(t, ruleContract, "expected an inventory: %v", err)
		}
		r.missing(t, ruleInventory, "expected an inventory: %v", err)
	}
	end := time.Now().Add(r.patience(3 * time.Second))
	for time.Now().Before(end) {
		devices, err := w.next(time.Until(end))
		if err != nil {
			select {
			case err := <-w.ended:
				if !badInventory(err) {
					t.Errorf("expected the watch to go on, it ended: %v", orNil(err))
				}
			default:
			}
			return
		}
		if len(devices) == len(last) && (len(last) == 0 || reflect.DeepEqual(devices, last)) {
			t.Fatalf("expected an inventory only after a change, the same %d devices came again", len(devices))
		}
		last = devices
	}
}

func testTwoWatches(t T, r *deviceRig) {
	_, d := r.devices(t)
	first, second := r.watch(t, d), r.watch(t, d)
	defer first.stop()
	defer second.stop()
	_, err1 := first.next(r.patience(5 * time.Second))
	_, err2 := second.next(r.patience(5 * time.Second))
	switch err := errors.Join(err1, err2); {
	case err == nil:
	case badInventory(err):
		r.missing(t, ruleContract, "expected an inventory: %v", err)
	default:
		r.missing(t, ruleInventory, "expected each of two watches to get an inventory: %v", err)
	}
}

func testWatchesIndependent(t T, r *deviceRig) {
	_, d := r.devices(t)
	first, second := r.watch(t, d), r.watch(t, d)
	defer second.stop()
	for _, w := range []*watch{first, second} {
		if _, err := w.next(r.patience(5 * time.Second)); err != nil {
			for _, rule := range []string{ruleContract, ruleInventory} {
				if r.told(rule) {
					r.missing(t, rule, "")
				}
			}
			r.missing(t, ruleTwoWatches, "expected an inventory: %v", err)
		}
	}
	first.stop()
	select {
	case err := <-second.ended:
		t.Errorf("expected the second watch to go on when the first was ended, it ended too: %v", orNil(err))
	case <-time.After(r.patience(time.Second)):
	}
}

// testIDsStable tries again when the hardware may have changed meanwhile.
func testIDsStable(t T, r *deviceRig) {
	kinds := func() map[string]string {
		p, d := r.devices(t)
		m := map[string]string{}
		for _, dev := range r.inventory(t, d) {
			m[dev.ID] = dev.Kind
		}
		r.close(p)
		return m
	}
	before := kinds()
	for range 3 {
		after := kinds()
		if reflect.DeepEqual(before, after) {
			if len(after) == 0 {
				t.Skip("there is no device here")
			}
			return
		}
		t.Logf("before %v, now %v", before, after)
		before = after
	}
	t.Errorf("expected the same ids and kinds from every process, they differed each time, last %v", before)
}

func testChange(t T, r *deviceRig) {
	if r.opts.Change == nil {
		t.Skip("nothing here can be plugged in or pulled out by the test")
	}
	_, d := r.devices(t)
	w := r.watch(t, d)
	defer w.stop()
	before, err := w.next(r.patience(5 * time.Second))
	if err != nil {
		if badInventory(err) {
			r.missing(t, ruleContract, "expected an inventory: %v", err)
		}
		r.missing(t, ruleInventory, "expected an inventory: %v", err)
	}
	if err := r.opts.Change(); err != nil {
		t.Fatalf("change the hardware: %v", err)
	}
	end := time.Now().Add(r.patience(5 * time.Second))
	for {
		after, err := w.next(time.Until(end))
		if err != nil {
			t.Fatalf("expected an inventory other than %+v within 5 s of the change: %v", before, err)
		}
		if !reflect.DeepEqual(before, after) {
			return
		}
	}
}
