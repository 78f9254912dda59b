#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Unpack packages of another Debian suite, with all that they depend on, into a directory: the newest
# QEMU or CRIU beside the system's. Nothing is installed, and the system's own package lists and sources
# stay as they are: apt works on lists, a cache and an empty status file of its own.
#
# Usage: tools/unpack_debian.sh SUITE DIRECTORY PACKAGE...
# DIRECTORY/root is what was unpacked; DIRECTORY/run PROGRAM [ARGUMENT...] runs one of its programs, with
# its own loader and libraries.
# Exit: 0 it is there; 3 it cannot be had from here, with the reason.
set -euo pipefail

[ $# -ge 3 ] || { sed -n '/^# Usage/,/^# Exit/s/^# //p' "$0" >&2; exit 2; }
suite=$1
mkdir -p "$2"
directory=$(cd "$2" && pwd)
shift 2

exec 9>"$directory/lock"
flock 9
[ "$(cat "$directory/done" 2>/dev/null)" != "$suite $*" ] || exit 0

cannot() {
	printf 'unpack_debian.sh: %s of Debian %s cannot be had here: %s\n' "$packages" "$suite" "$1" >&2
	exit 3
}
packages=$*
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || cannot "this is no Debian"

# Where this machine gets its Debian from is where the other suite is, if anywhere.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
	awk '$2 == "Debian" && $1 !~ /security/ { print $1; exit }')
if [ -z "$mirror" ]; then
	mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb  *\(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' \
		/etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | grep -m 1 debian)
fi
[ -n "$mirror" ] || cannot "no Debian mirror is named in apt's sources"

state=$directory/apt
rm -rf "$state" "$directory/root" "$directory/done"
mkdir -p "$state"/{lists,cache,etc/preferences.d,etc/parts} "$directory"/root/usr/{bin,sbin,lib,lib64}
# As base-files would link them: packages name files in either place.
for name in bin sbin lib lib64; do ln -s "usr/$name" "$directory/root/$name"; done
: >"$state/status"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite" >"$state/sources.list"
options=(
	-o "Dir::Etc::sourcelist=$state/sources.list" -o "Dir::Etc::sourceparts=$state/etc/parts"
	-o "Dir::Etc::preferences=/dev/null" -o "Dir::Etc::preferencesparts=$state/etc/preferences.d"
	-o "Dir::State=$state" -o "Dir::State::lists=$state/lists" -o "Dir::State::status=$state/status"
	-o "Dir::Cache=$state/cache" -o "Acquire::Languages=none"
	-o "APT::Sandbox::User=root" -o "APT::Install-Recommends=false" -o "Debug::NoLocking=true"
)

log=$directory/log
apt-get "${options[@]}" -q update >"$log" 2>&1 || cannot "$(grep -E '^(E|W|Err)' "$log" | tail -n 1)"
apt-get "${options[@]}" -q -y --download-only install "$@" >>"$log" 2>&1 ||
	cannot "$(grep -E '^(E|Err)' "$log" | tail -n 1)"
for package in "$state"/cache/archives/*.deb; do
	dpkg-deb --extract "$package" "$directory/root"
done
cat >"$directory/run" <<-'END'
	#!/bin/bash
	# run PROGRAM [ARGUMENT...]
	set -euo pipefail
	root=$(dirname "$(readlink -f "$0")")/root
	machine=$(uname -m)-linux-gnu
	export QEMU_MODULE_DIR=$root/usr/lib/$machine/qemu
	loader=$(compgen -G "$root/usr/lib*/ld-linux*.so*" | head -n 1)
	program=$(PATH=$root/usr/bin:$root/usr/sbin command -v "$1")
	exec "$loader" --library-path "$root/usr/lib/$machine:$root/usr/lib" "$program" "${@:2}"
END
chmod +x "$directory/run"
rm -rf "$state/cache" "$state/lists"
echo "$suite $*" >"$directory/done"
