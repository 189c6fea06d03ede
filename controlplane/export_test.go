package controlplane

import "context"

// SweepNow is one pass of the sweep.
func (p *Plane) SweepNow(ctx context.Context) error {
	if err := p.sweepTasks(ctx); err != nil {
		return err
	}
	_, err := p.sweepTokens(ctx, "")
	return err
}
