# SPDX-License-Identifier: Apache-2.0
"""What the documents list is what the code has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pydantic
import pytest

from services.common import vm_spec

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"


def _point(argument: ast.expr) -> str | None:
    """A hook point's name; what varies in it is `<>`."""
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    if isinstance(argument, ast.JoinedStr):
        parts = argument.values
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "<>" for part in parts
        )
    return None


def _points_in_code() -> set[str]:
    found = set()
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            point = _point(node.args[0]) if name == "reach" else None
            if point is not None:
                found.add(point)
    return found


def test_every_hook_point_is_listed() -> None:
    text = (DOCS / "testing.md").read_text().split("Points (a test", 1)[1]
    listed = {
        re.sub(r"<\w+>", "<>", name) for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    }
    assert _points_in_code() == listed


def test_the_examples_of_the_vm_spec_are_some() -> None:
    text = (DOCS / "vm-spec.md").read_text()
    examples = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert [vm_spec.VmSpec.parse(example).driver for example in examples] == ["qemu", "microvm"]


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("## Fields", vm_spec.VmSpec),
        ("**Disk**", vm_spec.Disk),
        ("**Nic**", vm_spec.Nic),
        ("**Tap**", vm_spec.Tap),
        ("**Microvm**", vm_spec.Microvm),
    ],
)
def test_every_field_of_the_vm_spec_is_described(
    title: str, model: type[pydantic.BaseModel]
) -> None:
    section = (DOCS / "vm-spec.md").read_text().split(title, 1)[1].split("\n\n**", 1)[0]
    section = section.split("\n## ", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(model.model_fields)


def test_every_hook_point_of_the_c_core_is_used_by_a_test() -> None:
    """A point that no test holds or calls proves nothing."""
    native = ROOT / "native"
    points = {
        point
        for path in (*(native / "src").glob("*.c"), *(native / "microvm").glob("*.c"))
        for point in re.findall(r'\bGW_HOOK\("([^"]+)"\)', path.read_text())
    }
    assert len(points) > 10
    tests = "".join(path.read_text() for path in (native / "tests").glob("*.[ch]"))
    assert sorted(point for point in points if f'"{point}"' not in tests) == []
