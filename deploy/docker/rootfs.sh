#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Build the file trees of the images without a container engine, and try each: the same Debian packages, the
# same stage.sh as in the Dockerfile. `make image-rootfs`.
#
# Usage: deploy/docker/rootfs.sh DIRECTORY [IMAGE...]      default: all three; DIRECTORY is made anew
# Needs root, mmdebstrap, and a mirror of Debian; takes minutes and some 300 MB for each image.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '/^# Usage/s/^# //p' "$0" >&2; exit 2; }
directory=$1
shift
[ $# -gt 0 ] || set -- orchestrator page-server fault-agent
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
suite=bookworm
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

packages_of() { sed -n "s/^$1 *//p" deploy/docker/packages | grep -v '^#' | tr ' ' ','; }

# Where this machine gets its Debian from.
sources=(/etc/apt/sources.list.d/debian.sources)
[ -e "${sources[0]}" ] || sources=(/etc/apt/sources.list)
for image in "$@"; do
	root=$directory/$image
	rm -rf "$root"
	more=$(packages_of "$image")
	mmdebstrap --quiet --variant=minbase --aptopt='APT::Install-Recommends "false"' \
		--include="$(packages_of all)${more:+,$more}" "$suite" "$root" "${sources[@]}" >&2
	rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/* "$root"/var/log/*
	deploy/docker/stage.sh "$image" "$root"
	deploy/docker/smoke.sh "$image" "$root" 2>"$directory/$image.log" ||
		{ tail -n 20 "$directory/$image.log" >&2; exit 1; }
	printf '%s: %s MiB, of which %s ours\n' "$image" "$(du -sm "$root" | cut -f1)" "$(du -sm "$root/opt/godwit" | cut -f1)"
done
