# SPDX-License-Identifier: Apache-2.0
# The front door: every target is a line or two; the work is in tools/ and native/CMakeLists.txt.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PY := .venv/bin/python
ARGS ?=
NATIVE_VARIANTS := plain asan tsan

# A preset of native/CMakePresets.json: configured once, then ninja alone decides what is stale.
# One build at a time in a directory: ninja does not lock, and two shells may run make at once.
cmake_build = mkdir -p build && exec 9>build/$(1).lock && flock 9 && \
	{ [ -f build/$(1)/build.ninja ] || \
	(cd native && cmake --preset $(1) -DGW_PYTHON=$(CURDIR)/$(PY)) >/dev/null; } && \
	ninja -C build/$(1) --quiet >&2

.PHONY: help
help: ## list the targets
	@echo 'godwit: post-copy live migration of virtual machines'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="..." is passed on by demo and test: make demo ARGS="--memory 1G --json"'

# --- set-up: what is already there costs well under a second -------------------------------------

.PHONY: setup
setup: .venv/.project native ## install what is missing, make .venv, build the native part

.PHONY: system system-guest system-postgres system-chart system-image system-lint system-fuzz system-bench
system:
	@tools/setup_system.sh build
system-guest:
	@tools/setup_system.sh guest
system-postgres:
	@tools/setup_system.sh postgres
system-image:
	@tools/setup_system.sh image
system-chart:
	@tools/setup_system.sh chart
system-lint:
	@tools/setup_system.sh lint
system-fuzz:
	@tools/setup_system.sh fuzz
system-bench:
	@tools/setup_system.sh bench

.venv/.deps: requirements.lock tools/setup_python.sh tools/find_python.sh | system
	@echo 'setup: .venv from requirements.lock' >&2
	@tools/setup_python.sh deps
	@touch $@

.venv/.project: pyproject.toml .venv/.deps
	@tools/setup_python.sh project
	@touch $@

.PHONY: native
native: .venv/.deps ## build the C core and its Python binding
	@$(call cmake_build,native)

# --- jobs ----------------------------------------------------------------------------------------

.PHONY: demo
demo: setup ## migrate a real guest to another node and back
	@# Without what QEMU's guest needs, the demo takes a microvm and says so.
	@case '$(ARGS)' in *microvm*) ;; *) tools/setup_system.sh guest || true ;; esac
	@.venv/bin/godwit demo $(ARGS)

.PHONY: test
test: system-guest system-postgres system-chart setup native-test ## all tests, native ones in every variant
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

.PHONY: test-kube
test-kube: setup ## the tests against a real Kubernetes API server, from KUBEBUILDER_ASSETS
	@GODWIT_REQUIRE=kube $(PY) -m pytest tests/kube $(ARGS)

.PHONY: soak
soak: setup ## the model test, ever new, for SECONDS=N
	@$(PY) -m tests.sim.soak $(or $(SECONDS),60)

.PHONY: native-test
native-test: $(NATIVE_VARIANTS:%=native-test-%) ## the C tests: plain, ASan+UBSan, TSan

.PHONY: $(NATIVE_VARIANTS:%=native-test-%) $(NATIVE_VARIANTS:%=native-build-%)
$(NATIVE_VARIANTS:%=native-build-%): native-build-%: .venv/.deps
	@$(call cmake_build,native-$*)
$(NATIVE_VARIANTS:%=native-test-%): native-test-%: native-build-%
	@ctest --test-dir build/native-$* --output-on-failure --no-tests=error --parallel 2

.PHONY: bench bench-quick
bench: setup system-bench system-guest ## measure everything against the peers, judge the bars: some 40 minutes
	@ninja -C build/native --quiet bench_page_path >&2
	@$(PY) -m tests.bench $(ARGS)
bench-quick: setup system-bench ## the page path alone, in minutes
	@ninja -C build/native --quiet bench_page_path >&2
	@$(PY) -m tests.bench --quick $(ARGS)

.PHONY: fuzz
fuzz: system-fuzz .venv/.deps ## fuzz the native edges, TIME=N seconds each
	@$(call cmake_build,native-fuzz)
	@tools/fuzz.sh $(or $(TIME),60)

.PHONY: bench-faults
bench-faults: setup ## time page faults: userfaultfd against vCPU exits, 1 to 4 vCPUs
	@ninja -C build/native bench_fault_agent >&2
	@$(PY) -m tests.bench.faults $(ARGS)

.PHONY: bench-store
bench-store: setup system-postgres ## admissions, decisions and lists with a long history, on both databases
	@$(PY) -m tests.bench.store --at build $(ARGS)

.PHONY: bench-watchers
bench-watchers: setup system-postgres ## a thousand watchers and a long history, on both databases
	@$(PY) -m tests.bench.watchers --at build $(ARGS)

.PHONY: soak-moves
soak-moves: setup ## move a microvm 200 times in a row on each fault backend, checking every page
	@$(PY) -m tests.soak.moves $(ARGS)

.PHONY: chaos
chaos: setup ## N=300 moves with a random fault in each; SEED=... runs one again
	@$(PY) -m tests.chaos -n $(or $(N),300) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: test-network
test-network: setup ## moves under every fault of the network, the long ones: half an hour
	@$(PY) -m pytest -m long tests/fault $(ARGS)

.PHONY: soak-cuts
soak-cuts: setup ## cut the network 40 times in post-copy, and time what comes after
	@$(PY) -m tests.soak.cuts $(ARGS)

.PHONY: soak-never-two
soak-never-two: system-guest setup ## cut the network 50 times around the decision: never two guests
	@$(PY) -m tests.soak.never_two $(ARGS)

.PHONY: lint
lint: system-lint setup ## every static check, and that generated code is what its sources give
	@tools/lint.sh

.PHONY: format
format: system-lint .venv/.deps ## rewrite Python, C and protos in the house format
	@tools/lint.sh --fix

.PHONY: proto
proto: .venv/.deps ## regenerate the Python code of protos/
	@$(PY) tools/gen_protos.py

.PHONY: ffi
ffi: .venv/.deps ## regenerate native/ffi/_native.c from the headers
	@$(PY) tools/gen_ffi.py

.PHONY: lock
lock: system ## resolve pyproject.toml anew into requirements.lock
	@tools/lock.sh

.PHONY: sbom
sbom: setup ## write build/sbom.json: everything that is pinned or linked, as CycloneDX
	@$(PY) -m tools.sbom build/sbom.json

.PHONY: audit
audit: .venv/.deps ## known vulnerabilities of what is pinned; ADVISORIES=FILE where nothing can be reached
	@$(PY) -m tools.audit $(if $(ADVISORIES),--advisories $(ADVISORIES)) $(ARGS) || [ $$? -eq 3 ]

.PHONY: image-rootfs
image-rootfs: setup system-image ## the images' file trees without a container engine, built and tried; root
	@deploy/docker/rootfs.sh build/images $(IMAGES)

.PHONY: clean
clean: ## remove what was built; .venv stays
	rm -rf build services/pagecore/_native.abi3.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
