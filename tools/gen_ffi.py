# SPDX-License-Identifier: Apache-2.0
"""Generate native/ffi/_native.c, the cffi binding, from the headers, or check that it is current.

The headers are the only declaration: what stands between `/* cdef:begin` and `/* cdef:end */` goes
to cffi, in the order in which headers include each other. Rejected: a cdef written by hand, which
drifts; running the preprocessor, which drags in libc. The C is committed, so that building the
module needs no cffi.

Source: https://cffi.readthedocs.io/en/stable/cdef.html (API mode, out of line).
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "native" / "include"
OUTPUT = ROOT / "native" / "ffi" / "_native.c"
MODULE = "services.pagecore._native"

BLOCK = re.compile(r"/\*\s*cdef:begin\b.*?\*/(.*?)/\*\s*cdef:end\b.*?\*/", re.DOTALL)
INCLUDED = re.compile(r'^\s*#\s*include\s*[<"](godwit/[a-z0-9_]+\.h)[>"]', re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
# cffi knows `#define NAME 1` and `#define NAME ...`; by the second the compiler says the value.
DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+(.*?)[ \t]*$", re.MULTILINE)
LITERAL = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)")
NOT_CDEF = re.compile(r"\bGW_EXPORT\b|__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)")
OTHER_DIRECTIVE = re.compile(
    r"^[ \t]*#(?![ \t]*define[ \t]+\w+[ \t]+(\.{3}|-?\w+)[ \t]*$)", re.MULTILINE
)


class HeaderError(Exception):
    """A header says something that cffi cannot be told; the message names the header."""


def ordered_headers(include: Path) -> list[str]:
    """Every header of godwit/ as `godwit/x.h`, each after those it includes.

    Raises:
        HeaderError: headers include each other in a circle, or one that is missing.
    """
    names = sorted(f"godwit/{path.name}" for path in (include / "godwit").glob("*.h"))
    order: list[str] = []
    under_way: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name in under_way or name not in names:
            raise HeaderError(f"{name}: circular or missing include, from {under_way[-1]}")
        under_way.append(name)
        for needed in INCLUDED.findall((include / name).read_text()):
            visit(needed)
        under_way.pop()
        order.append(name)

    for name in names:
        visit(name)
    return order


def cdef_of(name: str, text: str) -> str:
    """What header `name` with content `text` gives to cffi; empty if it has no cdef block.

    Raises:
        HeaderError: unbalanced markers, or a directive other than an object-like #define.
    """
    blocks = BLOCK.findall(text)
    if not len(blocks) == text.count("cdef:begin") == text.count("cdef:end"):
        raise HeaderError(f"{name}: cdef:begin and cdef:end do not pair up")
    cdef = NOT_CDEF.sub("", COMMENT.sub("", "\n".join(blocks)))
    cdef = DEFINE.sub(
        lambda match: match[0] if LITERAL.fullmatch(match[2]) else f"#define {match[1]} ...", cdef
    )
    wrong = OTHER_DIRECTIVE.search(cdef)
    if wrong:
        line = cdef[wrong.start() :].splitlines()[0]
        raise HeaderError(f"{name}: inside cdef: only `#define NAME VALUE` is possible, not {line}")
    return re.sub(r"\n\s*\n+", "\n", cdef).strip()


def generate(include: Path, output: Path) -> None:
    """Write the C of the binding for the headers under `include` to `output`."""
    headers = {name: (include / name).read_text() for name in ordered_headers(include)}
    cdefs = {name: cdef_of(name, text) for name, text in headers.items()}
    bound = [name for name, cdef in cdefs.items() if cdef]
    ffi = FFI()
    for name in bound:
        ffi.cdef(cdefs[name])
    ffi.set_source(MODULE, "\n".join(f"#include <{name}>" for name in bound))
    with contextlib.redirect_stdout(None):  # it reports each file it writes
        ffi.emit_c_code(str(output))


def main() -> int:
    """Generate, or with --check say that the committed file has drifted and return 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it differs")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory) / OUTPUT.name
        try:
            generate(INCLUDE, fresh)
        except HeaderError as error:
            print(error, file=sys.stderr)
            return 1
        current = OUTPUT.read_bytes() if OUTPUT.exists() else b""
        if fresh.read_bytes() == current:
            return 0
        if check:
            print("native/ffi/_native.c: not what the headers give; run `make ffi`")
            return 1
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.write_bytes(fresh.read_bytes())
        print("native/ffi/_native.c")
    return 0


if __name__ == "__main__":
    sys.exit(main())
