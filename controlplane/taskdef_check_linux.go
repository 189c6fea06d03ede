package controlplane

import (
	"fmt"
	"slices"
	"strings"
)

// capabilityNames are Linux's, as of 5.9, and ALL.
var capabilityNames = strings.Fields(`ALL AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE
	CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN
	MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID
	SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME
	SYS_TTY_CONFIG SYSLOG WAKE_ALARM`)

var ulimitNames = strings.Fields(`core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime
	sigpending stack`)

// tmpfsOptions are those that ECS's API names.
var tmpfsOptions = strings.Fields(`defaults ro rw suid nosuid dev nodev exec noexec sync async dirsync remount mand
	nomand atime noatime diratime nodiratime bind rbind unbindable runbindable private rprivate shared rshared slave
	rslave relatime norelatime strictatime nostrictatime mode uid gid nr_inodes nr_blocks mpol`)

// ipcControls are the kernel parameters of an IPC namespace.
var ipcControls = strings.Fields(`kernel.msgmax kernel.msgmnb kernel.msgmni kernel.sem kernel.shmall kernel.shmmax
	kernel.shmmni kernel.shm_rmid_forced`)

func (c *taskDefinitionCheck) linux(at string, ct *ContainerDefinition) {
	if lp := ct.LinuxParameters; lp != nil {
		path := at + ".linuxParameters"
		if lp.Capabilities != nil {
			c.capabilities(path+".capabilities.add", lp.Capabilities.Add)
			c.capabilities(path+".capabilities.drop", lp.Capabilities.Drop)
		}
		for i, d := range lp.Devices {
			c.device(fmt.Sprintf("%s.devices[%d]", path, i), d)
		}
		c.intRange(path+".maxSwap", lp.MaxSwap, 0, maxMemoryMiB)
		c.intRange(path+".swappiness", lp.Swappiness, 0, 100)
		c.intRange(path+".sharedMemorySize", lp.SharedMemorySize, 1, maxMemoryMiB)
	}
	for i, s := range ct.DockerSecurityOptions {
		path := fmt.Sprintf("%s.dockerSecurityOptions[%d]", at, i)
		name, _, _ := strings.Cut(strings.Replace(s, "=", ":", 1), ":")
		switch name {
		case "no-new-privileges", "apparmor", "label":
		case "credentialspec":
			c.problem(path, "is %s, which is refused: credential specs are for Windows containers", quote(s))
		default:
			c.problem(path, "is %s; it must be no-new-privileges, apparmor:PROFILE or label:VALUE", quote(s))
		}
	}
	for i, s := range ct.SystemControls {
		c.systemControl(fmt.Sprintf("%s.systemControls[%d]", at, i), s)
	}
	c.ulimits(at, ct)
}

func (c *taskDefinitionCheck) capabilities(path string, names []string) {
	for i, n := range names {
		if slices.Contains(capabilityNames, n) {
			continue
		}
		at := fmt.Sprintf("%s[%d]", path, i)
		if plain := strings.TrimPrefix(strings.ToUpper(n), "CAP_"); slices.Contains(capabilityNames, plain) {
			c.problem(at, "is %s; say %s", quote(n), plain)
		} else if !c.broken(at) {
			c.problem(at, "is %s, which is no Linux capability", quote(n))
		}
	}
}

func (c *taskDefinitionCheck) device(path string, d DeviceMapping) {
	if c.required(path+".hostPath", d.HostPath) {
		c.absolute(path+".hostPath", d.HostPath)
	}
	if d.ContainerPath != "" {
		c.absolute(path+".containerPath", d.ContainerPath)
	}
	for i, p := range d.Permissions {
		c.oneOf(fmt.Sprintf("%s.permissions[%d]", path, i), p, "read", "write", "mknod")
	}
}

func (c *taskDefinitionCheck) systemControl(path string, s SystemControl) {
	c.required(path+".value", s.Value)
	if !c.required(path+".namespace", s.Namespace) {
		return
	}
	network := strings.HasPrefix(s.Namespace, "net.")
	ipc := strings.HasPrefix(s.Namespace, "fs.mqueue.") || slices.Contains(ipcControls, s.Namespace)
	switch {
	case strings.Contains(s.Namespace, "/") || strings.Contains(s.Namespace, ".."):
		c.problem(path+".namespace", "is %s; it must be a kernel parameter with dots, such as net.core.somaxconn", quote(s.Namespace))
	case network && c.td.Network() == "host":
		c.problem(path+".namespace", "is %s; on the host network it would change the device itself", quote(s.Namespace))
	case ipc && c.td.IPCMode == "host":
		c.problem(path+".namespace", "is %s; with ipcMode host it would change the device itself", quote(s.Namespace))
	case !network && !ipc:
		c.problem(path+".namespace", "is %s; only parameters of a container's own namespaces can be set: net.*, fs.mqueue.* and the kernel.shm*, kernel.msg* and kernel.sem ones", quote(s.Namespace))
	}
}

func (c *taskDefinitionCheck) ulimits(at string, ct *ContainerDefinition) {
	seen := map[string]bool{}
	for i, u := range ct.Ulimits {
		path := fmt.Sprintf("%s.ulimits[%d]", at, i)
		if c.required(path+".name", u.Name) {
			switch {
			case !slices.Contains(ulimitNames, u.Name):
				c.problem(path+".name", "is %s; it must be one of %s", quote(u.Name), strings.Join(ulimitNames, ", "))
			case seen[u.Name]:
				c.problem(path+".name", "is %s, which an earlier limit has", quote(u.Name))
			}
		}
		seen[u.Name] = true
		for _, l := range []struct {
			name  string
			limit *int
		}{{"softLimit", u.SoftLimit}, {"hardLimit", u.HardLimit}} {
			switch {
			case c.broken(path + "." + l.name):
			case l.limit == nil:
				c.problem(path+"."+l.name, "is required")
			case *l.limit < -1:
				c.problem(path+"."+l.name, "is %d; it must be 0 or more, or -1 for no limit", *l.limit)
			}
		}
		if s, h := u.SoftLimit, u.HardLimit; s != nil && h != nil && *h >= 0 && (*s > *h || *s == -1) {
			c.problem(path+".softLimit", "is %d; it must not be more than hardLimit, %d", *s, *h)
		}
	}
}

// keptFields are held to ECS's rules although they have no effect, so that a
// definition that Belay takes is one that ECS takes.
func (c *taskDefinitionCheck) keptFields(at string, ct *ContainerDefinition) {
	if lc := ct.LogConfiguration; lc != nil {
		if lc.LogDriver == "awsfirelens" {
			c.problem(at+".logConfiguration.logDriver", `is "awsfirelens", which is refused: there is no FireLens log router; leave it out and read the output with `+"`belay logs`")
		} else if c.required(at+".logConfiguration.logDriver", lc.LogDriver) {
			c.oneOf(at+".logConfiguration.logDriver", lc.LogDriver, "awslogs", "fluentd", "gelf", "journald", "json-file", "splunk", "syslog")
		}
		for i, s := range lc.SecretOptions {
			path := fmt.Sprintf("%s.logConfiguration.secretOptions[%d]", at, i)
			c.required(path+".name", s.Name)
			c.required(path+".valueFrom", s.ValueFrom)
		}
	}
	for i, f := range ct.EnvironmentFiles {
		path := fmt.Sprintf("%s.environmentFiles[%d]", at, i)
		c.required(path+".value", f.Value)
		c.required(path+".type", f.Type)
		c.oneOf(path+".type", f.Type, "s3")
	}
	if rc := ct.RepositoryCredentials; rc != nil {
		c.required(at+".repositoryCredentials.credentialsParameter", rc.CredentialsParameter)
	}
	c.oneOf(at+".versionConsistency", ct.VersionConsistency, "enabled", "disabled")
}
