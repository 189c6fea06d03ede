package agent

// Statuses of a task, in the order a task passes them; it may skip some and
// never goes back.
const (
	Provisioning   = "PROVISIONING"
	Pending        = "PENDING"
	Activating     = "ACTIVATING"
	Running        = "RUNNING"
	Deactivating   = "DEACTIVATING"
	Stopping       = "STOPPING"
	Deprovisioning = "DEPROVISIONING"
	Stopped        = "STOPPED"
)

// Stop codes, in ECS's words.
const (
	CodeEssentialExited = "EssentialContainerExited"
	CodeUserInitiated   = "UserInitiated"
	CodeFailedToStart   = "TaskFailedToStart"
	// CodeDisconnected is not ECS's: disconnect.stopAfter has passed.
	CodeDisconnected = "DeviceDisconnected"
)

// Health of a container or a task.
const (
	HealthUnknown   = "UNKNOWN"
	HealthHealthy   = "HEALTHY"
	HealthUnhealthy = "UNHEALTHY"
)

// rank orders statuses; an unknown one is before all others.
func rank(status string) int {
	for i, s := range [...]string{
		Provisioning, Pending, Activating, Running,
		Deactivating, Stopping, Deprovisioning, Stopped,
	} {
		if s == status {
			return i + 1
		}
	}
	return 0
}

// advance returns the later of two statuses: the only way a status changes.
func advance(from, to string) string {
	if rank(to) > rank(from) {
		return to
	}
	return from
}
