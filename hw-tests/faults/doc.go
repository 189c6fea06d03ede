// Package faults runs a whole site of Belay under faults and holds it to what
// must be so at every moment: real agent, plugins, control plane, containerd
// and registry, in network namespaces with a router between them.
//
//	make faults FAULT_RUNS=500 SEED=1     as root; half a minute a run
//	make faults FAULT_RUNS=1 SEED=1 FIRST=217
//	make faults-teeth                     bugs planted one at a time
//
// A run starts a few tasks, deals six to eight faults, each aimed at a phase of
// a task's life, heals them, waits until API and device agree, ends its tasks
// and looks for what they left. A device and its two keepers, tasks that run
// and crash through many runs, are used for 25 runs; then the keepers end, too,
// and file descriptors and goroutines are compared with those at the beginning.
//
// What is drawn depends on the seed and the run's number alone: the same
// numbers deal the same faults to the same phases for as long. When exactly a
// fault meets a program does not repeat, and a run that is played again by
// itself finds a younger site than it did. The directory that a violation
// leaves (/tmp/faults-*) holds the journal, every log and the witness files.
//
// A fault is placed when the harness sees a task in the phase: a pull when the
// proxy before the registry is asked for a layer, which it holds back; a start
// when the agent has the task; a health check, a stop or an end when the
// container says so in its witness file. A keeper is restarted by its policy,
// for which it must have run a minute: where none has, the agent is restarted
// with clocks a minute later, as after a suspend.
//
// What is not as in the world:
//   - The wall clock belongs to the machine and is not touched. The fault "clock"
//     restarts the agent in a time namespace with CLOCK_BOOTTIME and
//     CLOCK_MONOTONIC up to three hours later; a reboot begins them anew at 20 s.
//     Plugins keep the device's clocks, since the kernel tells when a process
//     was started by the reader's clocks, and a suspend changes nothing there.
//   - The device's disk is a tmpfs of 96 MiB: what was written when the power
//     is cut is there after it. Cuts at every write are tested in agent/internal/state.
//   - systemd is not there: the harness starts the agent again when it has
//     killed it.
package faults
