# SPDX-License-Identifier: Apache-2.0
"""Generate the Python code of protos/ into clients/python, or check that it is what is committed.

Messages, their type stubs, and gRPC stubs for grpc.aio only: nothing here uses the threaded API,
and stubs for both would give every servicer a context type that is neither.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = ROOT / "clients" / "python"

INIT = '''# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/{package} by `make proto`."""
'''


def generate(out: Path) -> None:
    """Write what all of protos/ gives under `out`.

    Raises:
        SystemExit: protoc refused a file; it has said why on stderr.
    """
    sources = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    # protoc finds its plugins on PATH: ours are beside this interpreter.
    bin_dir = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([bin_dir, os.environ.get("PATH", "")])
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet,only_async:{out}",
            *sources,
        ]
    )
    if status != 0:
        sys.exit(status)
    # The plugins write an empty gRPC module for files that have no service.
    for module in out.rglob("*_pb2_grpc.py"):
        if "Servicer" not in module.read_text():
            module.unlink()
            module.with_suffix(".pyi").unlink()
    for version in {path.parent for path in out.rglob("*_pb2.py")}:
        for folder in (version, version.parent):
            package = folder.relative_to(out).as_posix()
            (folder / "__init__.py").write_text(INIT.format(package=package))


def generated_files(tree: Path) -> set[Path]:
    """The files under `tree`/godwit/*/ that this tool owns, relative to `tree`."""
    files = {
        path.relative_to(tree)
        for pattern in ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
        for path in tree.rglob(pattern)
    }
    inits = {file.parent / "__init__.py" for file in files}
    inits |= {file.parent.parent / "__init__.py" for file in files}
    return {*files, *(file for file in inits if (tree / file).exists())}


def drift(fresh: Path) -> list[Path]:
    """The files that differ between the committed tree and `fresh`, or exist in one only."""
    names = generated_files(fresh) | generated_files(PACKAGE)
    return sorted(
        name
        for name in names
        if not (fresh / name).exists()
        or not (PACKAGE / name).exists()
        or not filecmp.cmp(fresh / name, PACKAGE / name, shallow=False)
    )


def main() -> int:
    """Generate, or with --check say what has drifted and return 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if anything differs")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory)
        generate(fresh)
        stale = drift(fresh)
        if check:
            for name in stale:
                print(f"clients/python/{name}: not what protos/ gives; run `make proto`")
            return 1 if stale else 0
        for name in stale:
            target = PACKAGE / name
            if (fresh / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(fresh / name, target)
            else:
                target.unlink()
            print(f"clients/python/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
