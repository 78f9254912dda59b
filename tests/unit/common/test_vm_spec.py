# SPDX-License-Identifier: Apache-2.0
"""Promise: a spec says one machine, and what its VMM does not have is refused by name."""

from __future__ import annotations

import json

import pytest

from services.common.errors import InvalidArgumentError
from services.common.vm_spec import VmSpec
from services.fault_agent.drivers.memory_map import memory_regions

MIB = 1 << 20
QEMU = {"vm_id": "v", "memory_bytes": 64 * MIB, "kernel": "/k"}
MICROVM = {
    "vm_id": "v",
    "driver": "microvm",
    "memory_bytes": 64 * MIB,
    "accel": "thread",
    "microvm": {},
}


def parse(base: dict[str, object], **changes: object) -> VmSpec:
    return VmSpec.parse(json.dumps({**base, **changes}))


@pytest.mark.parametrize("base", [QEMU, MICROVM])
def test_a_spec_survives_its_canonical_form(base: dict[str, object]) -> None:
    spec = parse(base)
    again = VmSpec.parse(spec.canonical_json())
    assert (again, again.spec_hash) == (spec, spec.spec_hash)


def test_a_young_field_is_told_only_where_it_says_something() -> None:
    """The release before does not know it, and refuses what it does not know."""
    assert "bandwidth_weight" not in parse(QEMU).canonical_json()
    weighty = parse(QEMU, bandwidth_weight=300)
    assert VmSpec.parse(weighty.canonical_json()) == weighty
    assert weighty.spec_hash != parse(QEMU).spec_hash


@pytest.mark.parametrize(
    ("base", "changes", "why"),
    [
        (QEMU, {"kernel": ""}, "kernel is missing"),
        (QEMU, {"accel": "thread"}, "driver microvm"),
        (QEMU, {"microvm": {}}, "driver microvm"),
        (QEMU, {"driver": "firecracker"}, "driver"),
        (QEMU, {"memory_bytes": 64 * MIB + 4096}, "2 MiB"),
        (QEMU, {"bandwidth_weight": 0}, "bandwidth_weight"),
        (MICROVM, {"bandwidth_weight": 1001}, "bandwidth_weight"),
        (MICROVM, {"accel": "tcg"}, "kvm or thread"),
        (MICROVM, {"microvm": None}, "microvm is missing"),
        (MICROVM, {"vcpus": 33}, "32 vcpus"),
        (MICROVM, {"kernel": "/k"}, "kernel"),
        (MICROVM, {"rng": False, "balloon": True}, "rng, balloon"),
        (MICROVM, {"microvm": {"seeed": 1}}, "seeed"),
        (MICROVM, {"microvm": {"fault_backend": "exit-emulation"}}, "accel kvm"),
        (
            MICROVM,
            {"accel": "kvm", "microvm": {"fault_backend": "exit-sigsegv"}},
            "accel thread",
        ),
    ],
)
def test_a_spec_that_no_vmm_could_run(
    base: dict[str, object], changes: dict[str, object], why: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=why) as refusal:
        parse(base, **changes)
    assert refusal.value.reason == "SPEC_INVALID"


@pytest.mark.parametrize(
    ("memory_bytes", "below"),
    [(64 * MIB, 64 * MIB), (3072 * MIB, 3072 * MIB), (4096 * MIB, 3072 * MIB)],
)
def test_a_microvms_memory_goes_on_above_its_hole(memory_bytes: int, below: int) -> None:
    regions = memory_regions(parse(MICROVM, memory_bytes=memory_bytes))
    assert (regions[0].gpa, regions[0].size_bytes) == (0, below)
    rest = [(region.gpa, region.size_bytes, region.file_offset) for region in regions[1:]]
    assert rest == ([(4 << 30, memory_bytes - below, below)] if memory_bytes > below else [])
