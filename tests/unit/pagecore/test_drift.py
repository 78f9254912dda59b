# SPDX-License-Identifier: Apache-2.0
"""Python's picture of the C library is the headers', field by field and value by value.

The headers are parsed by cffi itself, so this needs no compiled module and cannot compare one
stale copy with another.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from pathlib import Path
from typing import Any

import cffi
import pytest
from godwit.common.v1 import common_pb2

from services.pagecore import api, fake, uffd_names
from tools import gen_ffi

# Where api.py says more than C does: units in names, and Python's own types.
RENAMED = {
    "page_size": "page_size_bytes",
    "len": "len_bytes",
    "size": "size_bytes",
    "file_offset": "offset",
}
C_ONLY = {"struct_size", "reserved", "region_count", "range_count", "uffd_count", "token_len"}
PYTHON_ONLY = {"struct gw_inject_range": {"uffd_index"}, "struct gw_hold": {"number"}}
"""An injection makes one userfaultfd; holds have their numbers by their place."""

PAIRS = {
    "struct gw_arrival_config": api.ArrivalConfig,
    "struct gw_arrival_region": api.ArrivalRegion,
    "struct gw_arrival_status": api.ArrivalStatus,
    "struct gw_latency_summary": api.LatencySummary,
    "struct gw_serve_image": api.ServeImage,
    "struct gw_serve_region": api.ServeRegion,
    "struct gw_hold": api.Hold,
    "struct gw_serve_stats": api.ServeStats,
    "struct gw_inject_result": api.Injection,
    "struct gw_inject_range": api.ArrivalRegion,
}
ENUMS = {
    "enum gw_arrival_phase": ("GW_ARRIVAL_", api.ArrivalPhase),
    "enum gw_hold_cause": ("GW_HOLD_", api.HoldCause),
    "enum gw_install_method": ("GW_INSTALL_", api.InstallMethod),
    "enum gw_image_state": ("GW_IMAGE_", api.ImageState),
}


@pytest.fixture(scope="module")
def headers() -> Any:
    ffi = cffi.FFI()
    for name in gen_ffi.ordered_headers(gen_ffi.INCLUDE):
        text = gen_ffi.cdef_of(name, (gen_ffi.INCLUDE / name).read_text())
        # Values that only the compiler knows are of no interest here.
        ffi.cdef(re.sub(r"#define \w+ \.\.\.\n?", "", text))
    return ffi


def _c_fields(ffi: Any, name: str, python: set[str]) -> set[str]:
    fields = {field for field, _ in ffi.typeof(name).fields} - C_ONLY
    return {field if field in python else RENAMED.get(field, field) for field in fields}


@pytest.mark.parametrize("name", PAIRS)
def test_struct_fields_agree(headers: Any, name: str) -> None:
    python = {field.name for field in dataclasses.fields(PAIRS[name])}
    python -= PYTHON_ONLY.get(name, set())
    native = _c_fields(headers, name, python)
    native = {"regions" if field == "ranges" else field for field in native}
    assert native == python


@pytest.mark.parametrize("name", ENUMS)
def test_enum_values_agree(headers: Any, name: str) -> None:
    prefix, python = ENUMS[name]
    elements: dict[int, str] = headers.typeof(name).elements
    native = {text.removeprefix(prefix): value for value, text in elements.items()}
    assert native == {item.name: item.value for item in python}


def test_every_public_struct_is_compared(headers: Any) -> None:
    """A struct that a later header adds is either compared here or named as C's own."""
    _typedefs, structs, _unions = headers.list_types()
    known = {name.removeprefix("struct ") for name in PAIRS}
    opaque = {"gw_arrival", "gw_serve"}
    arguments = {"gw_serve_config"}
    ours = {name for name in structs if name.startswith(("gw_arrival", "gw_serve", "gw_inject"))}
    assert ours <= known | opaque | arguments


def test_image_state_is_the_wire_value() -> None:
    wire = {
        name.removeprefix("IMAGE_STATE_"): value
        for name, value in common_pb2.ImageState.items()
        if value
    }
    assert wire == {item.name: item.value for item in api.ImageState}


def test_fake_offers_what_the_protocols_ask() -> None:
    """The type checker says so too; this names what is missing."""
    for protocol, made in (
        (api.Arrival, fake.FakeArrival),
        (api.PageServer, fake.FakePageServer),
        (api.PageCore, fake.FakePageCore),
    ):
        wanted = {name for name in vars(protocol) if not name.startswith("_")}
        assert wanted <= {name for name in dir(made) if not name.startswith("_")}


def _uffd_header_bits() -> dict[str, int]:
    header = Path("/usr/include/linux/userfaultfd.h")
    if not header.exists():
        pytest.skip("no /usr/include/linux/userfaultfd.h: install linux-libc-dev")
    found = re.findall(r"#define\s+UFFD_FEATURE_(\w+)\s+\(1<<(\d+)\)", header.read_text())
    return {name.lower().replace("_", "-"): int(bit) for name, bit in found}


def test_feature_names_are_the_kernels() -> None:
    for name, bit in _uffd_header_bits().items():
        assert uffd_names.NAMES[bit] == name


def test_enums_are_int_enums() -> None:
    assert all(issubclass(python, enum.IntEnum) for _, python in ENUMS.values())
