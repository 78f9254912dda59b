# SPDX-License-Identifier: Apache-2.0
"""Pages of lists: how long one is, and the token that leads to the next.

A token names the last item of its page, and the list that it is of; a page begins after it,
wherever that item is by then, or was. So nothing that keeps its place in the order is left out or
told twice, whatever comes and goes meanwhile.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from services.common.errors import InvalidArgumentError

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000
TOKEN_LEN_MAX = 400

_ItemT = TypeVar("_ItemT")


def _invalid(name: str, must: str, got: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        "FIELD_INVALID", f"{name} {must}, got {got!r}", metadata={"field": name}
    )


def page_count(page_size: int) -> int:
    """How many items are wanted.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
    """
    if not 0 <= page_size <= PAGE_SIZE_MAX:
        raise _invalid("page_size", f"must be 0..{PAGE_SIZE_MAX}", page_size)
    return page_size or PAGE_SIZE_DEFAULT


def write_token(of: str, key: str) -> str:
    """The token of the page after one of list `of` that ends with `key`."""
    return base64.urlsafe_b64encode(f"{of}/{key}".encode()).decode().rstrip("=")


def read_token(of: str, token: str) -> str:
    """The key that a token names, or "": from the beginning.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
    """
    if not token:
        return ""
    try:
        text = base64.b64decode(token + "=" * (-len(token) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise _invalid("page_token", "must be a next_page_token", token) from error
    found, _, key = text.partition("/")
    if found != of or not key.isprintable() or not key:
        raise _invalid("page_token", f"must be a next_page_token of {of}", token)
    return key


def cut(
    of: str, items: Sequence[_ItemT], count: int, key: Callable[[_ItemT], str]
) -> tuple[list[_ItemT], str]:
    """A page of `items` and the token of the next; there are more where there are over `count`."""
    page = list(items[:count])
    more = len(items) > count
    return page, write_token(of, key(page[-1])) if more else ""
