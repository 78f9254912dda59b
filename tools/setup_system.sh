#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Check that the machine has what a job needs; install what is missing where that is possible.
#
# Usage: tools/setup_system.sh GROUP...      groups: build guest postgres chart image lint fuzz bench
#
# It looks for the things themselves, not for packages: what somebody built by hand counts too, and
# the check costs milliseconds, so it needs no stamp that could go stale.
# Exit: 0 all there; 2 something is missing and cannot be installed from here.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh

missing_things=()
missing_packages=()

lacks() { # THING PACKAGE...
	missing_things+=("$1")
	shift
	missing_packages+=("$@")
}

need_command() { # COMMAND PACKAGE; sbin counts, an ordinary user's PATH lacks it
	PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || lacks "$1" "$2"
}

need_header() { # HEADER PACKAGE
	if command -v gcc >/dev/null; then
		printf '#include <%s>\n' "$1" | gcc -E -x c - >/dev/null 2>&1 || lacks "$1" "$2"
	else
		[ -e "/usr/include/$1" ] || lacks "$1" "$2"
	fi
}

check_group() {
	case $1 in
	build)
		find_python >/dev/null || lacks "Python 3.11+ with venv and Python.h" python3-venv python3-dev
		need_command gcc gcc
		need_command cmake cmake
		need_command ninja ninja-build
		need_command pkg-config pkg-config
		need_header stdlib.h libc6-dev
		need_header linux/userfaultfd.h linux-libc-dev
		need_header nghttp2/nghttp2.h libnghttp2-dev
		need_header lz4.h liblz4-dev
		need_header openssl/ssl.h libssl-dev
		;;
	guest)
		need_command qemu-system-x86_64 qemu-system-x86
		need_command qemu-img qemu-utils
		[ -x /bin/busybox ] && static_elf /bin/busybox || lacks "a static busybox" busybox-static
		need_command cpio cpio
		need_command xz xz-utils
		need_command ip iproute2
		;;
	postgres)
		postgresql_server || lacks "PostgreSQL's server" postgresql
		;;
	chart)
		need_command promtool prometheus
		;;
	image)
		need_command mmdebstrap mmdebstrap
		need_command strip binutils
		need_command unshare util-linux
		need_command ip iproute2
		;;
	bench)
		need_command valgrind valgrind
		;;
	lint)
		need_command clang-format clang-format
		need_command clang-tidy clang-tidy
		;;
	fuzz)
		need_command clang clang
		libfuzzer || lacks "libFuzzer for clang" libclang-rt-14-dev
		;;
	*)
		echo "setup_system.sh: unknown group '$1' (build, guest, postgres, chart, image, lint, fuzz, bench)" >&2
		exit 2
		;;
	esac
}

# Debian keeps the server's programs off PATH.
postgresql_server() {
	command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

libfuzzer() {
	command -v clang >/dev/null &&
		[ -e "$(clang -print-file-name=libclang_rt.fuzzer-x86_64.a)" ]
}

# Debian's plain busybox is dynamic and cannot be a guest's init.
static_elf() { ! ldd "$1" 2>/dev/null | grep -q '=>'; }

check_all() {
	missing_things=()
	missing_packages=()
	local group
	for group in "$@"; do
		check_group "$group"
	done
}

check_all "$@"
[ ${#missing_things[@]} -eq 0 ] && exit 0

install_line="apt-get install --no-install-recommends ${missing_packages[*]}"

give_up() {
	printf 'godwit needs, and did not find:\n' >&2
	printf '  %s\n' "${missing_things[@]}" >&2
	printf '%s\n' "$@" >&2
	exit 2
}

command -v apt-get >/dev/null ||
	give_up "This is no Debian: install them with your system's package manager." \
		"On Debian 12 the line is: $install_line"

as_root=()
if [ "$(id -u)" -ne 0 ]; then
	if command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
		as_root=(sudo)
	else
		give_up "Neither root nor sudo: as root, run" "  $install_line"
	fi
fi

apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@"; }

# A fresh image has no package lists; an old one may name versions that the mirror has dropped.
printf 'installing: %s\n' "${missing_packages[*]}" >&2
if ! compgen -G '/var/lib/apt/lists/*Packages*' >/dev/null; then
	apt update -q >&2
fi
apt install -q -y --no-install-recommends "${missing_packages[@]}" >&2 ||
	{ apt update -q >&2 && apt install -q -y --no-install-recommends "${missing_packages[@]}" >&2; } ||
	give_up "apt-get failed; its message is above. The line was:" "  $install_line"

check_all "$@"
[ ${#missing_things[@]} -eq 0 ] || give_up "They are still missing after: $install_line"
