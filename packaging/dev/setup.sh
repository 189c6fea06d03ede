#!/bin/sh
# Installs what `make demo` and `make test` need beside Go, make and git, on
# Debian and Ubuntu as root. Elsewhere it says exactly what to install. When
# nothing is missing it says nothing and takes no time.
#
#   packaging/dev/setup.sh            install what is missing
#   packaging/dev/setup.sh --check    only say what is missing
#
# Exit status: 0 everything is there, 1 something is missing.
set -eu

# Many of these live in sbin, which is not in everyone's PATH.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

# What is needed, and the package that has it: a program, or a path.
needed() {
	cat <<-'EOF'
		containerd               containerd
		ctr                      containerd
		containerd-shim-runc-v2  containerd
		runc                     runc
		iptables                 iptables
		dockerd                  docker.io
		docker-registry          docker-registry
		ps                       procps
		ip                       iproute2
		gcc                      gcc
		/usr/include/stdlib.h    libc6-dev
		/usr/lib/python3/dist-packages/grpc  python3-grpcio
		/usr/bin/tini-static     tini
	EOF
}

# CNI plugins are not in PATH, and each distribution has its own place.
has_cni() {
	for d in /opt/cni/bin /usr/lib/cni /usr/libexec/cni; do
		[ -x "$d/bridge" ] && [ -x "$d/host-local" ] && [ -x "$d/portmap" ] && return 0
	done
	return 1
}

# A busybox linked to the C library does not run in an image without one; the
# static one needs no loader.
has_static_busybox() {
	for b in /bin/busybox /usr/bin/busybox; do
		[ -x "$b" ] && ! ldd "$b" >/dev/null 2>&1 && return 0
	done
	return 1
}

missing() {
	needed | while read -r what package; do
		case $what in
		/*) [ -e "$what" ] || echo "$package" ;;
		*) command -v "$what" >/dev/null 2>&1 || echo "$package" ;;
		esac
	done
	has_cni || echo containernetworking-plugins
	has_static_busybox || echo busybox-static
}

list() { missing | sort -u | tr '\n' ' ' | sed 's/ $//'; }

packages=$(list)
[ -z "$packages" ] && exit 0

if [ "${1:-}" = --check ]; then
	echo "missing: $packages" >&2
	exit 1
fi
if ! command -v apt-get >/dev/null 2>&1; then
	echo "Missing, by their Debian names: $packages" >&2
	echo "This is not Debian or Ubuntu: install them with your own package manager." >&2
	exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
	echo "Missing: $packages" >&2
	echo "Only root may install them. Run: sudo apt-get install -y --no-install-recommends $packages" >&2
	exit 1
fi

# Package scripts would start a containerd and a registry of the host's; ours
# are private. A host that has them already is left as it is.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
	trap 'rm -f $policy' EXIT
	trap 'exit 1' INT TERM HUP
fi

log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
echo "installing $packages" >&2
install() {
	# shellcheck disable=SC2086 # one word a package
	apt-get install -y -q --no-install-recommends $packages >>"$log" 2>&1
}
# Lists may be missing or old: ask for new ones only when they have to be.
if ! install && ! { apt-get update -q >>"$log" 2>&1 && install; }; then
	tail -n 20 "$log" >&2
	rm -f "$log"
	echo "Could not install: $packages" >&2
	exit 1
fi
rm -f "$log"

packages=$(list)
if [ -n "$packages" ]; then
	echo "Still missing after the installation: $packages" >&2
	exit 1
fi
