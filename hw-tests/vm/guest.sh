#!/bin/sh
# Runs in the machine that run.sh boots, at each of its boots, and powers it
# off at the end. Its output is run.sh's.
set -u
here=/mnt
state=/var/lib/belay-vm # remembered over the reboot
mkdir -p $state
export BELAY_TEST_SLOW="${BELAY_TEST_SLOW:-6}"
# The clock is this machine's own: it may be set.
export BELAY_TEST_CLOCK=1 BELAY_BIN=$here/bin
export BELAY_TEST_PROCESS_BUILT=$here BELAY_TEST_CONTAINERD_BUILT=$here/built BELAY_TEST_UNITS=$here
pattern=$(cat $here/pattern)

# run runs one suite's tests that match and remembers a failure.
run() {
	suite=$1 match=$2
	echo "vm: $suite, $(cut -d. -f1 /proc/uptime) s after boot"
	mkdir -p /var/tmp/cwd && cd /var/tmp/cwd
	"$here/tests/$suite" -test.v -test.timeout 60m ${match:+-test.run "$match"} 2>&1 | grep --line-buffered -v '^=== ' | sed -u "s/^/$suite: /"
	# Exit statuses of pipes are lost in this shell: the last line tells.
}

# passed runs a suite and says whether it passed.
passed() {
	run "$@" | tee $state/log
	grep -q "^$1: PASS\$" $state/log || { echo "vm: $1 failed"; echo "$1" >>$state/failed; }
}

if [ ! -e $state/rebooted ]; then
	echo "vm: $(uname -r), $(systemctl --version | head -n 1), cgroups $(stat -fc %T /sys/fs/cgroup), $(containerd --version | cut -d' ' -f3), $(runc --version | head -n 1)"
	for suite in $(cat $here/suites); do
		case $suite in
		units) ;;
		*) passed "$suite" "$pattern" ;;
		esac
	done
	if grep -qw units $here/suites; then
		passed units "${pattern:-^TestBefore}"
		touch $state/rebooted
		echo "vm: reboot"
		sync
		systemctl reboot
		exit
	fi
else
	passed units '^TestAfter'
fi
[ -e $state/failed ] || echo "vm: all passed"
sync
systemctl poweroff
