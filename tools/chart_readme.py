# SPDX-License-Identifier: Apache-2.0
"""Write the chart's README from the comments of its values.yaml, or check that it is.

    python -m tools.chart_readme [--check]

A value is documented by the comment above it; one that has none is an error, so that none can be
added without a word. Whole maps and lists count as one value where they stand for something of
Kubernetes (resources, tolerations), or are empty.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent.parent / "deploy" / "helm" / "godwit"
WHOLE = frozenset(
    {"resources", "tolerations", "nodeSelector", "objectSelector", "devices", "labels"}
    | {"apiServerPorts"}
)

HEAD = """\
# Godwit's Helm chart

<!-- Made by tools/chart_readme.py from values.yaml. -->

An orchestrator, and on each node an agent with a page server, a device plugin and what they need.
How to install it, step by step, and what each choice costs:
[docs/install-kubernetes.md](../../../docs/install-kubernetes.md).

```
helm install godwit deploy/helm/godwit --namespace godwit --create-namespace
helm test godwit --namespace godwit
```

## Values

| value | default | |
|---|---|---|
"""


class UndocumentedError(Exception):
    """A value has no comment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A row."""

    path: str
    default: str
    """JSON."""
    text: str


def values(text: str) -> Iterator[Value]:
    """Every value of a values.yaml, in its order.

    Raises:
        UndocumentedError: one has no comment above it.
    """
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    data = yaml.safe_load(text)
    assert isinstance(root, yaml.MappingNode)
    yield from _below(root, data, (), lines)


def _below(
    node: yaml.MappingNode, data: dict[str, object], path: tuple[str, ...], lines: list[str]
) -> Iterator[Value]:
    for key_node, value_node in node.value:
        key = str(key_node.value)
        here, value = (*path, key), data[key]
        if isinstance(value_node, yaml.MappingNode) and value_node.value and key not in WHOLE:
            assert isinstance(value, dict)
            yield from _below(value_node, value, here, lines)
            continue
        comment = _comment(lines, key_node.start_mark.line)
        if not comment:
            raise UndocumentedError(f"values.yaml:{key_node.start_mark.line + 1}: {'.'.join(here)}")
        yield Value(path=".".join(here), default=json.dumps(value), text=comment)


def _comment(lines: list[str], at: int) -> str:
    found: list[str] = []
    for line in reversed(lines[:at]):
        stripped = line.strip()
        if not stripped.startswith("#"):
            break
        found.append(stripped.removeprefix("#").strip())
    return " ".join(reversed(found))


def readme(text: str) -> str:
    """The whole README for a values.yaml."""
    rows = (
        f"| `{each.path}` | `{each.default}` | {each.text.replace('|', chr(92) + '|')} |\n"
        for each in values(text)
    )
    return HEAD + "".join(rows)


def main() -> int:
    """Write it, or with --check say that it has drifted and return 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it differs")
    check: bool = parser.parse_args().check
    target = CHART / "README.md"
    try:
        wanted = readme((CHART / "values.yaml").read_text())
    except UndocumentedError as error:
        print(f"no comment: {error}", file=sys.stderr)
        return 1
    if not check:
        target.write_text(wanted)
        return 0
    if not target.exists() or target.read_text() != wanted:
        print(f"{target.name} is not what values.yaml gives: python -m tools.chart_readme")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
