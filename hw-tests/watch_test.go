package hwtests

import (
	"context"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// firstInventory is what a watch says at once.
func firstInventory(t *testing.T, d sdk.Devices) []sdk.Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	got := make(chan []sdk.Device, 1)
	done := make(chan error, 1)
	go func() {
		done <- d.Watch(ctx, func(all []sdk.Device) {
			select {
			case got <- all:
			default:
			}
		})
	}()
	select {
	case all := <-got:
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the watch ended with %v, want nil once its context has", err)
		}
		return all
	case err := <-done:
		t.Fatalf("the watch ended before it said anything: %v", err)
	}
	return nil
}
