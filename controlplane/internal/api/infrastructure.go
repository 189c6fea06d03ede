package api

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/belay-edge/belay/controlplane"
	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
)

func (s *server) CreateActivation(ctx context.Context, r *connect.Request[apiv1.CreateActivationRequest]) (*connect.Response[apiv1.CreateActivationResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "activation:create", m.Cluster); err != nil {
		return nil, err
	}
	attributes, err := attributeMap(m.Attributes)
	if err != nil {
		return nil, err
	}
	a, code, revision, err := s.plane.CreateActivation(ctx, controlplane.NewActivation{
		Token: m.ClientToken, Cluster: m.Cluster, Limit: int(m.Limit), Life: time.Duration(m.ExpiresSeconds) * time.Second,
		Attributes: attributes, Description: m.Description,
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.CreateActivationResponse{Activation: s.activation(a), Code: code, Revision: uint64(revision)}), nil
}

func (s *server) ListActivations(ctx context.Context, r *connect.Request[apiv1.ListActivationsRequest]) (*connect.Response[apiv1.ListActivationsResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "activation:list", m.Cluster); err != nil {
		return nil, err
	}
	as, next, revision, err := s.plane.ListActivations(ctx, freshness(m.Read), m.Cluster, page(m.Page))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.ListActivationsResponse{Activations: each(as, s.activation), NextToken: next, Revision: uint64(revision)}), nil
}

func (s *server) DeleteActivation(ctx context.Context, r *connect.Request[apiv1.DeleteActivationRequest]) (*connect.Response[apiv1.DeleteActivationResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "activation:delete", m.Id); err != nil {
		return nil, err
	}
	revision, err := s.plane.DeleteActivation(ctx, m.ClientToken, m.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DeleteActivationResponse{Revision: uint64(revision)}), nil
}

func (s *server) CreateCluster(ctx context.Context, r *connect.Request[apiv1.CreateClusterRequest]) (*connect.Response[apiv1.CreateClusterResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "cluster:create", m.Name); err != nil {
		return nil, err
	}
	c, revision, err := s.plane.CreateCluster(ctx, m.ClientToken, m.Name)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.CreateClusterResponse{Cluster: cluster(controlplane.ClusterView{Cluster: c}), Revision: uint64(revision)}), nil
}

func (s *server) ListClusters(ctx context.Context, r *connect.Request[apiv1.ListClustersRequest]) (*connect.Response[apiv1.ListClustersResponse], error) {
	if err := s.authorize(ctx, "cluster:list", ""); err != nil {
		return nil, err
	}
	cs, next, revision, err := s.plane.ListClusters(ctx, freshness(r.Msg.Read), page(r.Msg.Page))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.ListClustersResponse{Clusters: each(cs, cluster), NextToken: next, Revision: uint64(revision)}), nil
}

func (s *server) DescribeCluster(ctx context.Context, r *connect.Request[apiv1.DescribeClusterRequest]) (*connect.Response[apiv1.DescribeClusterResponse], error) {
	if err := s.authorize(ctx, "cluster:describe", r.Msg.Name); err != nil {
		return nil, err
	}
	c, revision, err := s.plane.DescribeCluster(ctx, freshness(r.Msg.Read), r.Msg.Name)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DescribeClusterResponse{Cluster: cluster(c), Revision: uint64(revision)}), nil
}

func (s *server) DeleteCluster(ctx context.Context, r *connect.Request[apiv1.DeleteClusterRequest]) (*connect.Response[apiv1.DeleteClusterResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "cluster:delete", m.Name); err != nil {
		return nil, err
	}
	revision, err := s.plane.DeleteCluster(ctx, m.ClientToken, m.Name)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DeleteClusterResponse{Revision: uint64(revision)}), nil
}

func (s *server) ListInstances(ctx context.Context, r *connect.Request[apiv1.ListInstancesRequest]) (*connect.Response[apiv1.ListInstancesResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "instance:list", m.Cluster); err != nil {
		return nil, err
	}
	vs, next, revision, err := s.plane.ListInstances(ctx, freshness(m.Read), m.Cluster, page(m.Page))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.ListInstancesResponse{Instances: each(vs, instance), NextToken: next, Revision: uint64(revision)}), nil
}

func (s *server) DescribeInstance(ctx context.Context, r *connect.Request[apiv1.DescribeInstanceRequest]) (*connect.Response[apiv1.DescribeInstanceResponse], error) {
	if err := s.authorize(ctx, "instance:describe", r.Msg.Id); err != nil {
		return nil, err
	}
	v, revision, err := s.plane.DescribeInstance(ctx, freshness(r.Msg.Read), r.Msg.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DescribeInstanceResponse{Instance: instance(v), Revision: uint64(revision)}), nil
}

func (s *server) DeregisterInstance(ctx context.Context, r *connect.Request[apiv1.DeregisterInstanceRequest]) (*connect.Response[apiv1.DeregisterInstanceResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "instance:deregister", m.Id); err != nil {
		return nil, err
	}
	v, revision, err := s.plane.DeregisterInstance(ctx, m.ClientToken, m.Id, m.Force)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DeregisterInstanceResponse{Instance: instance(v), Revision: uint64(revision)}), nil
}

func (s *server) AdoptInstance(ctx context.Context, r *connect.Request[apiv1.AdoptInstanceRequest]) (*connect.Response[apiv1.AdoptInstanceResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "instance:adopt", m.Id); err != nil {
		return nil, err
	}
	v, revision, err := s.plane.AdoptInstance(ctx, m.ClientToken, m.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.AdoptInstanceResponse{Instance: instance(v), Revision: uint64(revision)}), nil
}

func (s *server) DropInstance(ctx context.Context, r *connect.Request[apiv1.DropInstanceRequest]) (*connect.Response[apiv1.DropInstanceResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "instance:drop", m.Id); err != nil {
		return nil, err
	}
	v, revision, err := s.plane.DropInstance(ctx, m.ClientToken, m.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DropInstanceResponse{Instance: instance(v), Revision: uint64(revision)}), nil
}

func (s *server) RebindInstance(ctx context.Context, r *connect.Request[apiv1.RebindInstanceRequest]) (*connect.Response[apiv1.RebindInstanceResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "instance:rebind", m.Id); err != nil {
		return nil, err
	}
	v, revision, err := s.plane.RebindInstance(ctx, m.ClientToken, m.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.RebindInstanceResponse{Instance: instance(v), Revision: uint64(revision)}), nil
}
