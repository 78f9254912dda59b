#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv and bring it to what requirements.lock names; `--project` installs godwit itself into it.
#
# Usage: tools/setup_python.sh deps | project
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh

# Two shells may run make at once; pip does not lock.
exec 9<"$0"
flock 9

pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }

deps() {
	# A venv holds absolute paths: one that was moved, or whose interpreter went, is made anew.
	if [ "$(.venv/bin/python -c 'import sys; print(sys.prefix)' 2>/dev/null)" != "$PWD/.venv" ]; then
		local python
		python=$(find_python) || {
			echo "no Python 3.11+ with venv and headers (GODWIT_PYTHON names one)" >&2
			exit 2
		}
		rm -rf .venv
		"$python" -m venv .venv
	fi
	# --no-deps: the lock is complete, nothing is resolved here. --require-hashes: and nothing else is
	# taken, whatever the index says. --no-compile: most of what is installed is never imported, and
	# Python compiles the rest when it is.
	pip install --no-deps --no-compile --require-hashes --requirement requirements.lock
	pip check
}

project() {
	# Build isolation would download setuptools a second time; the lock has it already.
	pip install --no-deps --no-build-isolation --editable .
}

case ${1:-} in
deps) deps ;;
project) project ;;
*)
	echo "usage: $0 deps | project" >&2
	exit 2
	;;
esac
