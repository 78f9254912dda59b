#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Every static check. All of them run, whatever the first ones say; the exit status is 1 if any failed.
#
# Usage: tools/lint.sh [--fix]      --fix rewrites Python, C and protos in the house format instead
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

# Sources that git knows or would take, and that are still there; generated code is not ours to format.
sources() { git ls-files --cached --others --exclude-standard --deduplicate -- "$@" | while read -r file; do
	[ -e "$file" ] && printf '%s\n' "$file"
done; }
mapfile -t c_files < <(sources 'native/*.[ch]' 'services/*.[ch]' | grep -v '^native/ffi/')
mapfile -t shell_files < <(sources '*.sh' .ci/run)

if [ "${1:-}" = --fix ]; then
	set -e
	ruff check --fix .
	ruff format .
	clang-format -i "${c_files[@]}"
	buf format -w protos
	exit
fi

failed=()
check() { # NAME COMMAND...
	local name=$1 output
	shift
	if output=$("$@" 2>&1); then
		printf 'ok    %s\n' "$name"
	else
		printf 'FAIL  %s\n%s\n' "$name" "$output"
		failed+=("$name")
	fi
}

# The C that runs, compiled without hooks and with warnings as errors; and the C that is tested, with.
c_build() {
	local preset
	for preset in native-lint native-plain; do
		(cd native && cmake --preset "$preset" -DGW_PYTHON="$PWD/../.venv/bin/python") &&
			ninja -C "build/$preset" || return
	done
}

# Two at a time: it is the slowest check, and the smallest machine has two cores.
c_tidy() {
	python - <<-'EOF2' | xargs -r -P 2 -n 4 clang-tidy --quiet -p build/native-plain
		import json, pathlib
		for unit in json.loads(pathlib.Path("build/native-plain/compile_commands.json").read_text()):
		    if "/ffi/" not in unit["file"]:
		        print(unit["file"])
	EOF2
}

shell_syntax() {
	local file
	for file in "${shell_files[@]}"; do
		bash -n "$file" || return
	done
	if command -v shellcheck >/dev/null; then shellcheck "${shell_files[@]}"; fi
}

check 'ruff check' ruff check .
check 'ruff format' ruff format --check .
check 'mypy --strict' mypy
check 'buf lint' buf lint protos
check 'buf format' buf format --diff --exit-code protos
check 'protos drift' python tools/gen_protos.py --check
check 'cffi drift' python tools/gen_ffi.py --check
check 'chart README' python -m tools.chart_readme --check
check 'clang-format' clang-format --dry-run -Werror "${c_files[@]}"
check 'gcc warnings' c_build
check 'clang-tidy' c_tidy
check 'shell' shell_syntax

if [ ${#failed[@]} -gt 0 ]; then
	printf 'lint: %d failed: %s\n' "${#failed[@]}" "$(IFS=,; echo "${failed[*]}")"
	exit 1
fi
