//go:build 386 || arm

package main

import "syscall"

// The plain calls take 16-bit ids on these.
const (
	sysSetgroups = syscall.SYS_SETGROUPS32
	sysSetresuid = syscall.SYS_SETRESUID32
	sysSetresgid = syscall.SYS_SETRESGID32
)
