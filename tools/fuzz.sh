#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Let libFuzzer look for inputs that make the native edges fall, SECONDS for each target.
#
# Usage: tools/fuzz.sh SECONDS [TARGET...]      targets: the files native/fuzz/fuzz_TARGET.c; default all
#
# It goes on from native/fuzz/corpus and from what earlier runs found (build/fuzz/TARGET). What falls
# is written to build/fuzz/crashes: mend it, then add the file to the corpus.
# `tools/fuzz.sh keep [TARGET...]` takes what covers more than the corpus into it.
# Exit: 0 nothing fell; 1 something did.
set -euo pipefail
cd "$(dirname "$0")/.."

FILE_LEN_MAX=1024 # of what is kept: a corpus is read by people's machines again and again

what=${1:?usage: tools/fuzz.sh SECONDS|keep [TARGET...]}
shift
if [ $# -eq 0 ]; then
	mapfile -t targets < <(basename -s .c native/fuzz/fuzz_*.c | sed 's/^fuzz_//')
else
	targets=("$@")
fi

mkdir -p build/fuzz/crashes
failed=()
for target in "${targets[@]}"; do
	program=build/native-fuzz/fuzz_$target
	found=build/fuzz/$target corpus=native/fuzz/corpus/$target
	mkdir -p "$found" "$corpus"
	if [ "$what" = keep ]; then
		# By edges, not by how often they are taken: a quarter of the files, and the fuzzer finds
		# the others again within minutes.
		"$program" -set_cover_merge=1 -use_counters=0 -max_len=$FILE_LEN_MAX "$corpus" "$found" 2>/dev/null
		echo "$target: $(find "$corpus" -type f | wc -l) files in $corpus"
		continue
	fi
	if "$program" -max_total_time="$what" -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
		-artifact_prefix="build/fuzz/crashes/$target-" "$found" "$corpus" \
		>"build/fuzz/$target.log" 2>&1; then
		echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "build/fuzz/$target.log") inputs, nothing fell"
	else
		failed+=("$target")
		echo "$target: FELL, see build/fuzz/$target.log and build/fuzz/crashes"
	fi
done
[ ${#failed[@]} -eq 0 ]
