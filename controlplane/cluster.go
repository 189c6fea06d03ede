package controlplane

import (
	"context"
)

// DefaultCluster exists from the start and is meant where none is named.
const DefaultCluster = "default"

// ClusterView is a cluster with what is counted of it.
type ClusterView struct {
	Cluster
	Instances, Connected, Running, Pending int
}

func badClusterName(name string) error {
	return Errorf(InvalidArgument, "cluster %q: a name is 1 to 255 letters, digits, hyphens and underscores", name)
}

// CreateCluster makes a cluster; one that exists is returned as it is, as ECS
// does.
func (p *Plane) CreateCluster(ctx context.Context, token, name string) (Cluster, int64, error) {
	if !isName(name) {
		return Cluster{}, 0, badClusterName(name)
	}
	return mutate(ctx, p, "creating a cluster", token, name, func() (*change, Cluster, error) {
		if cluster, ok := p.cluster(name); ok {
			return nil, cluster.V, nil
		}
		cluster, c := Cluster{Name: name, CreatedAt: p.now()}, &change{}
		c.compare(clusterKey(name), 0)
		return c, cluster, c.put(clusterKey(name), cluster)
	})
}

// touchCluster writes the cluster's record again, making it if need be: what
// is about to be put into the cluster makes a racing delete of it fail.
func (p *Plane) touchCluster(c *change, name string) error {
	cluster, ok := p.cluster(name)
	if !ok {
		cluster.V = Cluster{Name: name, CreatedAt: p.now()}
	}
	return c.put(clusterKey(name), cluster.V)
}

func (p *Plane) cluster(name string) (e entry[Cluster], ok bool) {
	p.state.read(func(r *records, _ int64) { e, ok = r.clusters[name] })
	return e, ok
}

// DeleteCluster deletes an empty cluster.
func (p *Plane) DeleteCluster(ctx context.Context, token, name string) (int64, error) {
	_, revision, err := mutate(ctx, p, "deleting a cluster", token, name, func() (*change, struct{}, error) {
		cluster, ok := p.cluster(name)
		if !ok {
			return nil, struct{}{}, noCluster(name)
		}
		if name == DefaultCluster {
			return nil, struct{}{}, Errorf(Precondition, "cluster %q is always there and cannot be deleted", name)
		}
		var instances, activations int
		p.state.read(func(r *records, _ int64) {
			for _, e := range r.instances {
				if e.V.Cluster == name && e.V.Status == InstanceActive {
					instances++
				}
			}
			for _, e := range r.activations {
				if e.V.Cluster == name && !p.Expired(e.V) && e.V.Used < e.V.Limit {
					activations++
				}
			}
		})
		if instances > 0 || activations > 0 {
			return nil, struct{}{}, Errorf(Precondition, "cluster %q has %d instance(s) and %d activation(s) in force: deregister and delete them first", name, instances, activations)
		}
		c := &change{}
		c.compare(clusterKey(name), cluster.Mod)
		c.delete(clusterKey(name))
		return c, struct{}{}, nil
	})
	return revision, err
}

func noCluster(name string) error {
	return Errorf(NotFound, "no cluster %q: belay cluster list shows those there are", name)
}

// ListClusters returns all clusters, by name.
func (p *Plane) ListClusters(ctx context.Context, f Freshness, page Page) (cs []ClusterView, next string, revision int64, err error) {
	if err := p.fresh(ctx, f); err != nil {
		return nil, "", 0, err
	}
	p.state.read(func(r *records, at int64) {
		revision = at
		for _, e := range r.clusters {
			cs = append(cs, ClusterView{Cluster: e.V})
		}
	})
	if cs, next, err = paginate(cs, page, func(c ClusterView) string { return c.Name }); err != nil {
		return nil, "", 0, err
	}
	views := make(map[string]*ClusterView, len(cs))
	for i := range cs {
		views[cs[i].Name] = &cs[i]
	}
	p.count(views)
	return cs, next, revision, nil
}

// DescribeCluster returns one cluster.
func (p *Plane) DescribeCluster(ctx context.Context, f Freshness, name string) (ClusterView, int64, error) {
	if name == "" {
		name = DefaultCluster
	}
	if err := p.fresh(ctx, f); err != nil {
		return ClusterView{}, 0, err
	}
	cluster, ok := p.cluster(name)
	if !ok {
		return ClusterView{}, 0, noCluster(name)
	}
	view := ClusterView{Cluster: cluster.V}
	p.count(map[string]*ClusterView{name: &view})
	return view, p.state.at(), nil
}

// count fills in the numbers of the named clusters in one pass.
func (p *Plane) count(views map[string]*ClusterView) {
	var ids []string
	var clusters []string
	p.state.read(func(r *records, _ int64) {
		for id, e := range r.instances {
			if view := views[e.V.Cluster]; view != nil && e.V.Status == InstanceActive {
				view.Instances++
				ids, clusters = append(ids, id), append(clusters, e.V.Cluster)
			}
		}
		for _, e := range r.tasks {
			if view := views[e.V.Cluster]; view != nil {
				running, pending := e.V.phase()
				view.Running += running
				view.Pending += pending
			}
		}
	})
	for i, id := range ids {
		if _, ok := p.tunnels.Session(id); ok {
			views[clusters[i]].Connected++
		}
	}
}
