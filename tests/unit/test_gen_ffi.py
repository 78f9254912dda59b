# SPDX-License-Identifier: Apache-2.0
"""The binding is generated from the headers: what it takes from them, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gen_ffi.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_ffi", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gen_ffi = _load()


def _block(text: str) -> str:
    return f"outside;\n/* cdef:begin - why */\n{text}\n/* cdef:end */\noutside;\n"


@pytest.mark.parametrize(
    ("inside", "cdef"),
    [
        ("int f(void);", "int f(void);"),
        ("GW_EXPORT int f(void) __attribute__((nonnull(1)));", "int f(void) ;"),
        ("#define A 64", "#define A 64"),
        ("#define A 0x10", "#define A 0x10"),
        ("#define A (1u << 3) /* bit */", "#define A ..."),
        ("#define A 64u", "#define A ..."),
        (
            "int f(void); /* twice\n * as\n */\n// long\n\n\nint g(void);",
            "int f(void); \nint g(void);",
        ),
    ],
)
def test_what_is_between_the_markers_is_taken(inside: str, cdef: str) -> None:
    assert gen_ffi.cdef_of("x.h", _block(inside)) == cdef


def test_several_blocks_are_joined_and_none_is_nothing() -> None:
    assert gen_ffi.cdef_of("x.h", _block("int f;") + _block("int g;")) == "int f;\nint g;"
    assert gen_ffi.cdef_of("x.h", "int f(void);") == ""


@pytest.mark.parametrize(
    "text",
    [
        _block("#if X\nint f;\n#endif"),
        _block("#define F(x) ((x) + 1)"),
        "/* cdef:begin */ int f;",
        "int f; /* cdef:end */",
    ],
)
def test_what_cffi_cannot_be_told_is_refused(text: str) -> None:
    with pytest.raises(gen_ffi.HeaderError, match=r"x\.h"):
        gen_ffi.cdef_of("x.h", text)


def test_a_header_comes_after_those_it_includes(tmp_path: Path) -> None:
    folder = tmp_path / "godwit"
    folder.mkdir()
    (folder / "a.h").write_text("#include <godwit/c.h>\n#include <stdint.h>\n")
    (folder / "b.h").write_text('#include "godwit/a.h"\n')
    (folder / "c.h").write_text("")
    assert gen_ffi.ordered_headers(tmp_path) == ["godwit/c.h", "godwit/a.h", "godwit/b.h"]
    (folder / "c.h").write_text("#include <godwit/b.h>\n")
    with pytest.raises(gen_ffi.HeaderError, match="circular"):
        gen_ffi.ordered_headers(tmp_path)
