# SPDX-License-Identifier: Apache-2.0
"""Offer device nodes of this machine to the pods of its kubelet.

    godwit device-plugin --device godwit.io/kvm=kvm --device godwit.io/userfaultfd=userfaultfd

A process of its own and not the agent's: the agent's pod asks the kubelet for these devices, and
would never be started if it were the only one to offer them. Containers that have a device keep it
while this process is away.

Exit status: 0 ended by a signal; 2 bad configuration; 1 a bug.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common import lifecycle
from services.common.lifecycle import ExitStatus
from services.device_plugin.plugin import Plugin, Resource

PROGRAM = "device_plugin"
KUBELET_DIR = Path("/var/lib/kubelet/device-plugins")
DEV_DIR = Path("/dev")
SHARES = 110
"""As many pods as a kubelet takes by default."""
SHARES_MAX = 10_000
_DEVICE = re.compile(
    r"(?P<name>[a-z0-9.-]+/[A-Za-z0-9._-]+)=(?P<path>[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What it is told."""

    kubelet_dir: Path
    resources: tuple[Resource, ...]

    @classmethod
    def from_argv(cls, argv: Sequence[str] | None) -> Config:
        """Parse and check; exits with BAD_CONFIG on any error."""
        parser = argparse.ArgumentParser(
            prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--kubelet-dir", type=Path, default=KUBELET_DIR, metavar="DIR")
        parser.add_argument(
            "--device",
            action="append",
            required=True,
            metavar="RESOURCE=NAME",
            help="a resource, and what it is called below /dev; repeat it",
        )
        parser.add_argument("--shares", type=int, default=SHARES, metavar="N")
        parser.add_argument(
            "--dev-dir",
            type=Path,
            default=DEV_DIR,
            metavar="DIR",
            help="where this process can look at the node's /dev",
        )
        args = parser.parse_args(argv)
        if not 1 <= args.shares <= SHARES_MAX:
            parser.error(f"--shares must be 1..{SHARES_MAX}, got {args.shares}")
        if not args.kubelet_dir.is_dir():
            parser.error(f"--kubelet-dir {args.kubelet_dir} is not there")
        resources = []
        for text in args.device:
            match = _DEVICE.fullmatch(text)
            if match is None or ".." in match["path"]:
                parser.error(f"--device must be DOMAIN/NAME=NAME-BELOW-/dev, got {text!r}")
            resources.append(
                Resource(
                    name=match["name"],
                    device=DEV_DIR / match["path"],
                    seen_at=args.dev_dir / match["path"],
                    shares=args.shares,
                )
            )
        if len({each.name for each in resources}) < len(resources):
            parser.error("--device names a resource twice")
        return cls(kubelet_dir=args.kubelet_dir, resources=tuple(resources))


async def run(config: Config) -> ExitStatus:
    """Until a signal comes."""
    plugins = {each.name: Plugin(each, config.kubelet_dir) for each in config.resources}
    with lifecycle.stop_on_signal() as stop:
        async with lifecycle.background({name: each.keep for name, each in plugins.items()}):
            await stop.wait()
    return ExitStatus.OK


def main(argv: Sequence[str] | None = None) -> ExitStatus:
    """Run; returns the exit status."""
    config = Config.from_argv(argv)
    return lifecycle.run(PROGRAM, lambda: run(config))
