#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Resolve pyproject.toml anew into requirements.lock, in a throw-away environment: the resolver's own
# dependencies must not be able to hold back a version of ours. Run it on Python 3.11, the oldest
# that is supported: what newer ones need is a subset. Each pin has the hashes of all its files, so
# that other machines and newer Pythons may take another one: it takes some minutes.
#
# Usage: tools/lock.sh [--keep]      --keep: what is pinned stays, only what is new is resolved
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$(find_python)" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -qq install pip-tools

upgrade=(--upgrade)
if [ "${1:-}" = --keep ]; then
	upgrade=()
	cp requirements.lock "$work/lock"
fi

# Nothing that tells where it was resolved: no index, no paths.
"$work/venv/bin/pip-compile" --quiet --extra dev --allow-unsafe --strip-extras --no-header \
	--generate-hashes --no-annotate --no-emit-options --no-emit-index-url --no-emit-find-links \
	--no-emit-trusted-host "${upgrade[@]}" --output-file "$work/lock" pyproject.toml

{
	echo "# Every package of .venv, pinned with the hashes of its files: resolved from pyproject.toml on Python 3.11 by"
	echo "# \`make lock\`. Installed with --no-deps and --require-hashes: nothing is resolved on a user's machine, and an"
	echo "# index that was tampered with is refused."
	grep -v -e '^#' -e '^$' "$work/lock"
} >requirements.lock
