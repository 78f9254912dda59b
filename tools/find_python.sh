# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced. find_python prints the interpreter that .venv is made with, or returns 1.
#
# It must be 3.11 or newer and have venv and its C headers: the binding is compiled against them.
# The first python3 on PATH may be a build of somebody's own without either, so all are tried.
# GODWIT_PYTHON names one and overrides the search.

_python_suits() {
	"$1" -c '
import os, sys, sysconfig
import ensurepip, venv
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(sys.version_info < (3, 11) or not os.path.exists(header))
' >/dev/null 2>&1
}

find_python() {
	local candidate
	if [ -n "${GODWIT_PYTHON:-}" ]; then
		_python_suits "$GODWIT_PYTHON" || return 1
		command -v "$GODWIT_PYTHON"
		return
	fi
	# 3.11 first: requirements.lock was resolved on it.
	for candidate in python3.11 /usr/bin/python3.11 python3 /usr/bin/python3 python3.12 python3.13 python3.14; do
		if _python_suits "$candidate"; then
			command -v "$candidate"
			return
		fi
	done
	return 1
}
