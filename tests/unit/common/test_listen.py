# SPDX-License-Identifier: Apache-2.0
"""Nothing without TLS is bound where others can reach it, unless somebody said so."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidArgumentError
from services.common.listen import INSECURE_FLAG, Address, parse_address, parse_listen


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("127.8.9.1:65535", "127.8.9.1", 65535),
        ("localhost:7443", "127.0.0.1", 7443),
        ("[::1]:7443", "::1", 7443),
        ("[::ffff:127.0.0.1]:1", "::ffff:127.0.0.1", 1),
    ],
)
def test_loopback_is_bound(text: str, host: str, port: int) -> None:
    assert parse_listen(text) == Address(host=host, port=port)


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "192.0.2.7:1", "[::ffff:192.0.2.1]:1"])
def test_others_need_the_flag(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_listen(text)
    assert caught.value.reason == "LISTEN_NOT_LOOPBACK"
    assert INSECURE_FLAG in caught.value.hint
    assert str(parse_listen(text, insecure_plaintext=True)) == text


@pytest.mark.parametrize(
    "text", ["", ":1", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80",
             "node-b:1", "http://127.0.0.1:1", "127.0.0.1:1 ", "[127.0.0.1:1", "300.0.0.1:1"]
)  # fmt: skip
def test_what_cannot_be_bound_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="ADDRESS_INVALID"):
        parse_listen(text, insecure_plaintext=True)


@pytest.mark.parametrize("text", ["node-b.example:7443", "127.0.0.1:1", "[fe80::1%eth0]:9"])
def test_names_can_be_dialled(text: str) -> None:
    assert str(parse_address(text)) == text


@pytest.mark.parametrize("text", ["node-b", "node-b:0", "node-b:99999", "a b:1", ""])
def test_what_cannot_be_dialled_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="ADDRESS_INVALID"):
        parse_address(text)


def test_a_name_is_not_loopback() -> None:
    """It may resolve to anything, later."""
    assert not Address(host="localhost.example", port=1).is_loopback
