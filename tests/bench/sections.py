# SPDX-License-Identifier: Apache-2.0
"""The sections, in the order in which they are measured, and how long each may take."""

from __future__ import annotations

from typing import cast

from tests.bench import counts, lanes, memory, sizes, streams, threads, tls
from tests.bench.peers import section as peers
from tests.bench.section import Section

_MODULES = (lanes, streams, threads, memory, sizes, tls, counts)
_PEERS = (peers.UNCAPPED, peers.FAST, peers.SLOW)
SECTIONS: dict[str, Section] = {found.name: cast(Section, found) for found in (*_MODULES, *_PEERS)}
QUICK = ("lanes", "streams", "threads", "memory", "tls", "counts")

WHOLE_S = 43 * 60.0
"""All of them, on the slowest machine: what is not measured then is missed."""
LIMITS_S = {
    "lanes": 300.0,
    "streams": 300.0,
    "threads": 120.0,
    "memory": 240.0,
    "sizes": 300.0,
    "tls": 120.0,
    "counts": 300.0,
    "peers": 420.0,
    "peers-125": 480.0,
    "peers-10": 660.0,
}
MOVES_SHARE = 0.85
"""Of a section's limit, after which no round of moves is begun any more."""
