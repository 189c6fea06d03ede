package controlplane

import (
	"context"
	"time"
)

// Duplicate is a machine that used the key of an instance while another one
// was alive with it: a copied disk. It was refused.
type Duplicate struct {
	HashedMachineID string    `json:"hashedMachineId,omitempty"`
	BootID          string    `json:"bootId,omitempty"`
	Hostname        string    `json:"hostname,omitempty"`
	Address         string    `json:"address,omitempty"`
	FirstSeen       time.Time `json:"firstSeen"`
	LastSeen        time.Time `json:"lastSeen"`
}

// duplicateEvery bounds how often the same duplicate is worth a write.
const duplicateEvery = time.Hour

// ReportDuplicate implements Devices.
func (p *Plane) ReportDuplicate(ctx context.Context, instance string, d Duplicate) error {
	for _, text := range []*string{&d.HashedMachineID, &d.BootID, &d.Hostname, &d.Address} {
		*text = bounded(*text)
	}
	_, _, err := mutate(ctx, p, "noting a duplicate", "", nil, func() (*change, struct{}, error) {
		e, err := p.instance(instance)
		if err != nil {
			return nil, struct{}{}, err
		}
		now := p.now()
		d.FirstSeen, d.LastSeen = now, now
		if old := e.V.Duplicate; old != nil {
			d.FirstSeen = old.FirstSeen
			if old.HashedMachineID == d.HashedMachineID && old.BootID == d.BootID && now.Sub(old.LastSeen) < duplicateEvery {
				return nil, struct{}{}, nil
			}
		}
		i := e.V
		i.Duplicate = &d
		c := &change{}
		c.compare(instanceKey(instance), e.Mod)
		return c, struct{}{}, c.put(instanceKey(instance), i)
	})
	return err
}

// RebindInstance forgets which machine an instance is on, and that another one
// was refused: the next that connects with its key is taken for it.
func (p *Plane) RebindInstance(ctx context.Context, token, id string) (v InstanceView, revision int64, err error) {
	if id, err = p.findInstance(id); err != nil {
		return InstanceView{}, 0, err
	}
	_, revision, err = mutate(ctx, p, "rebinding an instance", token, settlement{id}, func() (*change, struct{}, error) {
		e, err := p.instance(id)
		if err != nil {
			return nil, struct{}{}, err
		}
		i := e.V
		if i.Status != InstanceActive {
			return nil, struct{}{}, Errorf(Precondition, "instance %s was deregistered", id)
		}
		i.HashedMachineID, i.Duplicate = "", nil
		c := &change{}
		c.compare(instanceKey(id), e.Mod)
		return c, struct{}{}, c.put(instanceKey(id), i)
	})
	if err != nil {
		return InstanceView{}, 0, err
	}
	// Whoever has the session now may be the wrong one.
	p.tunnels.Rebind(id)
	p.state.read(func(r *records, _ int64) { v = r.view(r.instances[id].V) })
	p.connection(&v)
	return v, revision, nil
}
