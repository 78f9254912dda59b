# SPDX-License-Identifier: Apache-2.0
"""Made-up input for parsers: JSON, and JSON that was right before one thing in it was changed."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.integers() | st.sampled_from([0, 1, -1, 4096, 1 << 31, 1 << 53, 1 << 63, 1 << 64])
VALUES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
JSON = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
"""Any JSON value."""
TEXTS = JSON.map(json.dumps).map(str.encode) | st.binary(max_size=200)
"""JSON, or any bytes."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _changed(value: Any, path: tuple[Any, ...], new: Any, *, leave_out: bool) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if leave_out:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


def wounded(value: Any) -> st.SearchStrategy[Any]:
    """`value` with something in it replaced or left out."""
    return st.builds(
        lambda path, new, leave_out: _changed(value, path, new, leave_out=leave_out),
        st.sampled_from(_places(value)),
        JSON,
        st.booleans(),
    )
