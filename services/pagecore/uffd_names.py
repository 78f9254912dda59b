# SPDX-License-Identifier: Apache-2.0
"""Names of the userfaultfd features, as capabilities and preflight spell them.

GODWIT_MASK_UFFD_FEATURES, a list such as `event-remove,poison`, makes this process behave as on a
kernel that lacks them: that is how the compatibility matrix is tested on one machine.
Source: linux/userfaultfd.h of 6.18; bits never change their meaning.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

MASK_ENV = "GODWIT_MASK_UFFD_FEATURES"

NAMES = (
    "pagefault-flag-wp",
    "event-fork",
    "event-remap",
    "event-remove",
    "missing-hugetlbfs",
    "missing-shmem",
    "event-unmap",
    "sigbus",
    "thread-id",
    "minor-hugetlbfs",
    "minor-shmem",
    "exact-address",
    "wp-hugetlbfs-shmem",
    "wp-unpopulated",
    "poison",
    "wp-async",
    "move",
)
"""Name i is bit i of uffdio_api.features."""

ARRIVAL_FEATURES = ("missing-shmem", "event-remove")
"""What an arrival into shared memory cannot do without."""

MINOR_FEATURES = ("minor-shmem",)
"""What installs by CONTINUE need on top."""


def masked() -> frozenset[str]:
    """Features that this process shall not see.

    Raises:
        ValueError: GODWIT_MASK_UFFD_FEATURES names one that does not exist.
    """
    names = frozenset(filter(None, (part.strip() for part in _mask_text().split(","))))
    unknown = sorted(names.difference(NAMES))
    if unknown:
        raise ValueError(f"{MASK_ENV} names unknown features {unknown}; known: {', '.join(NAMES)}")
    return names


def _mask_text() -> str:
    return os.environ.get(MASK_ENV, "")


def from_bits(bits: int) -> tuple[str, ...]:
    """Names of the features in `bits`, without the masked ones; unknown bits are left out."""
    hidden = masked()
    return tuple(name for bit, name in enumerate(NAMES) if bits >> bit & 1 and name not in hidden)


def to_bits(names: Iterable[str]) -> int:
    """The bits to ask the kernel for.

    Raises:
        OSError: EINVAL, as the kernel says it, if one is masked.
    """
    bits = 0
    for name in names:
        if name in masked():
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)} [{MASK_ENV} hides {name}]")
        bits |= 1 << NAMES.index(name)
    return bits
