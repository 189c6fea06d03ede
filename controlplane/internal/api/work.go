package api

import (
	"context"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/belay-edge/belay/controlplane"
	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/wire"
)

func (s *server) RegisterTaskDefinition(ctx context.Context, r *connect.Request[apiv1.RegisterTaskDefinitionRequest]) (*connect.Response[apiv1.RegisterTaskDefinitionResponse], error) {
	if err := s.authorize(ctx, "taskdef:register", ""); err != nil {
		return nil, err
	}
	d, revision, err := s.plane.RegisterTaskDefinition(ctx, r.Msg.ClientToken, []byte(r.Msg.Document))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.RegisterTaskDefinitionResponse{TaskDefinition: taskDefinition(d), StoreRevision: uint64(revision)}), nil
}

func (s *server) ListTaskDefinitions(ctx context.Context, r *connect.Request[apiv1.ListTaskDefinitionsRequest]) (*connect.Response[apiv1.ListTaskDefinitionsResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "taskdef:list", m.Family); err != nil {
		return nil, err
	}
	ds, next, revision, err := s.plane.ListTaskDefinitions(ctx, freshness(m.Read), m.Family, m.Inactive, page(m.Page))
	if err != nil {
		return nil, err
	}
	answer := &apiv1.ListTaskDefinitionsResponse{TaskDefinitions: each(ds, taskDefinition), NextToken: next, StoreRevision: uint64(revision)}
	for _, d := range answer.TaskDefinitions {
		d.Document = ""
	}
	return connect.NewResponse(answer), nil
}

func (s *server) DescribeTaskDefinition(ctx context.Context, r *connect.Request[apiv1.DescribeTaskDefinitionRequest]) (*connect.Response[apiv1.DescribeTaskDefinitionResponse], error) {
	if err := s.authorize(ctx, "taskdef:describe", r.Msg.TaskDefinition); err != nil {
		return nil, err
	}
	d, revision, err := s.plane.DescribeTaskDefinition(ctx, freshness(r.Msg.Read), r.Msg.TaskDefinition)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DescribeTaskDefinitionResponse{TaskDefinition: taskDefinition(d), StoreRevision: uint64(revision)}), nil
}

func (s *server) DeregisterTaskDefinition(ctx context.Context, r *connect.Request[apiv1.DeregisterTaskDefinitionRequest]) (*connect.Response[apiv1.DeregisterTaskDefinitionResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "taskdef:deregister", m.TaskDefinition); err != nil {
		return nil, err
	}
	d, revision, err := s.plane.DeregisterTaskDefinition(ctx, m.ClientToken, m.TaskDefinition)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DeregisterTaskDefinitionResponse{TaskDefinition: taskDefinition(d), StoreRevision: uint64(revision)}), nil
}

func (s *server) RunTask(ctx context.Context, r *connect.Request[apiv1.RunTaskRequest]) (*connect.Response[apiv1.RunTaskResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "task:run", m.Cluster); err != nil {
		return nil, err
	}
	ts, failures, revision, err := s.plane.RunTask(ctx, controlplane.NewTasks{
		Token: m.ClientToken, Cluster: m.Cluster, TaskDefinition: m.TaskDefinition, Count: int(m.Count),
		Instance: m.Instance, Group: m.Group, StartedBy: m.StartedBy,
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.RunTaskResponse{
		Tasks: each(ts, s.task), Revision: uint64(revision),
		Failures: each(failures, func(f controlplane.PlacementFailure) *apiv1.Placement {
			return &apiv1.Placement{Reason: f.Reason, Instance: f.Instance, Detail: f.Detail}
		}),
	}), nil
}

var statuses = []string{
	controlplane.StatusProvisioning, controlplane.StatusPending, controlplane.StatusActivating, controlplane.StatusRunning,
	controlplane.StatusDeactivating, controlplane.StatusStopping, controlplane.StatusDeprovisioning, controlplane.StatusStopped,
}

func (s *server) ListTasks(ctx context.Context, r *connect.Request[apiv1.ListTasksRequest]) (*connect.Response[apiv1.ListTasksResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "task:list", m.Cluster); err != nil {
		return nil, err
	}
	desired := m.DesiredStatus
	switch {
	case desired != "" && desired != controlplane.StatusRunning && desired != controlplane.StatusStopped:
		return nil, controlplane.Errorf(controlplane.InvalidArgument, "desired status %q: want RUNNING or STOPPED", desired)
	case m.LastStatus != "" && !slices.Contains(statuses, m.LastStatus):
		return nil, controlplane.Errorf(controlplane.InvalidArgument, "last status %q: want one of %s", m.LastStatus, strings.Join(statuses, ", "))
	case desired == "" && m.LastStatus == "" && !m.All:
		desired = controlplane.StatusRunning
	}
	ts, next, revision, err := s.plane.ListTasks(ctx, freshness(m.Read), controlplane.TaskFilter{
		Cluster: m.Cluster, Instance: m.Instance, Family: m.Family, DesiredStatus: desired, LastStatus: m.LastStatus,
	}, page(m.Page))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.ListTasksResponse{Tasks: each(ts, s.task), NextToken: next, Revision: uint64(revision)}), nil
}

func (s *server) DescribeTask(ctx context.Context, r *connect.Request[apiv1.DescribeTaskRequest]) (*connect.Response[apiv1.DescribeTaskResponse], error) {
	if err := s.authorize(ctx, "task:describe", r.Msg.Id); err != nil {
		return nil, err
	}
	t, revision, err := s.plane.DescribeTask(ctx, freshness(r.Msg.Read), r.Msg.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.DescribeTaskResponse{Task: s.task(t), Revision: uint64(revision)}), nil
}

func (s *server) StopTask(ctx context.Context, r *connect.Request[apiv1.StopTaskRequest]) (*connect.Response[apiv1.StopTaskResponse], error) {
	m := r.Msg
	if err := s.authorize(ctx, "task:stop", m.Id); err != nil {
		return nil, err
	}
	t, revision, err := s.plane.StopTask(ctx, m.ClientToken, m.Id, m.Reason)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&apiv1.StopTaskResponse{Task: s.task(t), Revision: uint64(revision)}), nil
}

func (s *server) WatchTasks(ctx context.Context, r *connect.Request[apiv1.WatchTasksRequest], stream *connect.ServerStream[apiv1.WatchTasksResponse]) error {
	if err := s.authorize(ctx, "task:watch", strings.Join(r.Msg.Ids, ",")); err != nil {
		return err
	}
	return s.plane.WatchTasks(ctx, freshness(r.Msg.Read), r.Msg.Ids, func(t controlplane.Task, revision int64) error {
		return stream.Send(&apiv1.WatchTasksResponse{Task: s.task(t), Revision: uint64(revision)})
	})
}

func (s *server) TaskLogs(ctx context.Context, r *connect.Request[apiv1.TaskLogsRequest], stream *connect.ServerStream[apiv1.TaskLogsResponse]) error {
	m := r.Msg
	if err := s.authorize(ctx, "task:logs", m.Id); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, logsTimeout)
	defer cancel()
	ask := &wire.LogsRequest{TaskId: m.Id, Container: m.Container, Tail: m.Tail, Attempt: m.Attempt}
	return s.plane.Logs(ctx, ask, func(c *wire.Chunk) error {
		return stream.Send(&apiv1.TaskLogsResponse{Stream: c.Stream, Data: c.Data})
	})
}
