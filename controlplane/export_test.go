package controlplane

import "context"

// SweepNow is one round of the sweep.
func (p *Plane) SweepNow(ctx context.Context) error { return p.sweep(ctx) }
