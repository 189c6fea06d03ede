#!/bin/sh
# Boots a Debian 12 of its own under qemu, with systemd and cgroup v2, and runs
# guest.sh in it: what cannot be seen on a host with cgroup v1, without
# systemd, or whose clock others need. The CPUs are emulated: expect minutes.
# The console goes to the file named at the start, what the tests print to
# stdout.
# BELAY_TEST_KVM=1 uses KVM instead.
#
#   hw-tests/vm/run.sh [SUITE]...      clock, containerd, host, process, units; all of them
#
# Needs root, qemu-system-x86, debootstrap and e2fsprogs. BELAY_TEST_CACHE
# names where the system's disk is kept between runs, BELAY_TEST_RUN what
# -test.run gets. BELAY_TEST_CGROUP=1 boots it with cgroup v1.
set -eu

cd "$(dirname "$0")/../.."
cache=${BELAY_TEST_CACHE:-/var/cache/belay-test}/vm-1 # raise with what base() makes
suites=${*:-clock containerd host process units}
PATH="$PATH:/usr/sbin:/sbin"

for tool in qemu-system-x86_64 debootstrap mke2fs; do
	command -v $tool >/dev/null || { echo "no $tool: apt-get install qemu-system-x86 debootstrap e2fsprogs" >&2; exit 1; }
done
[ "$(id -u)" -eq 0 ] || { echo "debootstrap needs root: sudo $0" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP

# base makes the system's disk, once: never written to, runs use snapshots.
base() {
	echo "making a Debian 12 in $cache (minutes, once)" >&2
	tree=$work/tree
	debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,udev,kmod,iproute2,iptables,procps,busybox-static,initramfs-tools,linux-image-cloud-amd64,containerd,runc,containernetworking-plugins,docker-registry \
		bookworm "$tree" >"$work/debootstrap.log" 2>&1 || { tail -n 20 "$work/debootstrap.log" >&2; return 1; }
	finish "$tree"
}

# finish gives a debootstrap tree our unit and makes a disk of it.
finish() {
	tree=$1
	cat >"$tree/etc/systemd/system/belay-vm.service" <<-'EOF'
		[Unit]
		After=multi-user.target containerd.service
		[Service]
		Type=oneshot
		Environment=TMPDIR=/var/tmp HOME=/root
		ExecStartPre=/bin/mount /dev/vdb /mnt
		ExecStart=/mnt/guest.sh
		StandardOutput=file:/dev/ttyS1
		StandardError=inherit
		[Install]
		WantedBy=default.target
	EOF
	# Nothing may wait for, or talk to, what is not there.
	chroot "$tree" systemctl enable -q belay-vm.service
	chroot "$tree" systemctl mask -q docker-registry.service serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer
	echo vm >"$tree/etc/hostname"
	rm -rf "$tree/var/cache/apt/archives" "$tree/var/lib/apt/lists" "$tree/usr/share/doc" "$tree/usr/share/locale"
	mkdir -p "$cache"
	cp "$tree"/boot/vmlinuz-* "$cache/vmlinuz"
	cp "$tree"/boot/initrd.img-* "$cache/initrd"
	mke2fs -q -t ext4 -O ^has_journal -d "$tree" "$cache/disk.tmp" 3G
	mv "$cache/disk.tmp" "$cache/disk"
}

# payload is what this tree builds, for a second disk.
payload() {
	dir=$work/payload
	mkdir -p "$dir/tests" "$dir/built" "$dir/bin"
	cp -a "${BIN:-bin}/." "$dir/bin/"
	cp -a systemd "$dir/systemd"
	cp hw-tests/vm/guest.sh "$dir/guest.sh"
	export CGO_ENABLED=0
	for suite in $suites; do
		case $suite in
		clock) go test -c -ldflags '-s -w' -o "$dir/tests/clock" ./hw-tests/clock ;;
		containerd)
			go test -c -ldflags '-s -w' -o "$dir/tests/containerd" ./hw-tests/containerd
			go build -ldflags '-s -w' -o "$dir/built/containerd" ./hw-tests/containerd/testdata/containerd
			for arch in amd64 arm64 arm; do GOARM=7 GOARCH=$arch go build -ldflags '-s -w' -o "$dir/built/workload-$arch" ./images/workload; done
			;;
		host) go test -c -ldflags '-s -w' -o "$dir/tests/host" ./agent/internal/host ;;
		process) go test -c -ldflags '-s -w' -o "$dir/tests/process" ./plugins/process ;;
		units)
			go test -c -ldflags '-s -w' -o "$dir/tests/units" ./hw-tests/vm
			go build -ldflags '-s -w' -o "$dir/built/workload-amd64" ./images/workload
			;;
		*) echo "no suite $suite: clock, containerd, host, process or units" >&2; return 1 ;;
		esac
	done
	echo "$suites" >"$dir/suites"
	echo "${BELAY_TEST_RUN:-}" >"$dir/pattern"
	mke2fs -q -t ext4 -O ^has_journal -d "$dir" "$work/payload.img" 1G
}

[ -e "$cache/disk" ] || base
echo "building the tests" >&2
payload
console=$work/console.log
echo "booting; the console is in $console" >&2
# Emulation always works; a /dev/kvm inside a virtual machine may open and then
# leave the kernel hanging, so KVM is for those who ask.
accel=tcg,thread=multi cpu=max,la57=off
[ "${BELAY_TEST_KVM:-0}" = 1 ] && accel=kvm cpu=host
groups=
[ "${BELAY_TEST_CGROUP:-2}" = 1 ] && groups=systemd.unified_cgroup_hierarchy=0
timeout "${BELAY_TEST_VM_TIMEOUT:-7200}" qemu-system-x86_64 -accel "$accel" -cpu "$cpu" -smp 2 -m 2048 \
	-nodefaults -nographic -nic none -kernel "$cache/vmlinuz" -initrd "$cache/initrd" \
	-append "root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off systemd.show_status=1 $groups" \
	-drive "file=$cache/disk,format=raw,if=virtio,snapshot=on" -drive "file=$work/payload.img,format=raw,if=virtio" \
	-device virtio-rng-pci -serial "file:$console" -serial "file:$work/out" </dev/null 2>"$work/qemu.log" &
qemu=$!
trap 'kill $qemu 2>/dev/null || :; rm -rf "$work"' EXIT
touch "$work/out"
tail -n +1 -s 0.2 --pid=$qemu -f "$work/out"
wait $qemu || { cat "$work/qemu.log" "$console" | tail -n 40 >&2; echo "the machine did not end well, or not in time" >&2; exit 1; }
# The last word is the guest's.
if [ "$(tail -n 1 "$work/out" | tr -d '\r')" != "vm: all passed" ]; then
	tail -n 20 "$console" >&2
	exit 1
fi
