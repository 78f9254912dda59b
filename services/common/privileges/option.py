# SPDX-License-Identifier: Apache-2.0
"""--sandbox of the processes that have one."""

from __future__ import annotations

import argparse

from services.pagecore.api import SandboxMode

OPTION = "--sandbox"


def add_sandbox_option(parser: argparse.ArgumentParser) -> None:
    """enforce, log or off; `sandbox` of what is parsed is a SandboxMode."""
    parser.add_argument(
        OPTION,
        type=_mode,
        default=SandboxMode.ENFORCE,
        metavar="MODE",
        help="enforce: refuse what this process has no use for (default); log: let it through and"
        " have the kernel log it; off",
    )


def _mode(text: str) -> SandboxMode:
    try:
        return SandboxMode[text.upper()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not enforce, log or off") from None
