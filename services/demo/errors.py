# SPDX-License-Identifier: Apache-2.0
"""What can keep the demo from being set up: each says what to do about it."""

from __future__ import annotations

from pathlib import Path

from services.common.errors import FailedPreconditionError, InternalError


class ToolMissingError(FailedPreconditionError):
    """A program or a file of a Debian package is not on this machine.

    Attributes:
        what: the program or file that was looked for.
        package: the Debian package, or packages, that have it.
    """

    def __init__(self, what: str, package: str) -> None:
        super().__init__(
            "TOOL_MISSING",
            f"{what} is not installed",
            hint=f"apt-get install --no-install-recommends {package}",
            metadata={"what": what, "package": package},
        )
        self.what = what
        self.package = package


class KernelUnavailableError(FailedPreconditionError):
    """apt cannot deliver the guest's kernel, mostly for want of package lists."""

    def __init__(self, package: str, detail: str) -> None:
        super().__init__(
            "GUEST_KERNEL_UNAVAILABLE",
            f"{package}: {detail}",
            hint="apt-get update",
            metadata={"package": package},
        )


class ModuleMissingError(FailedPreconditionError):
    """The guest's kernel has no such module, neither as a file nor built in."""

    def __init__(self, module: str, directory: Path) -> None:
        super().__init__(
            "GUEST_MODULE_MISSING",
            f"kernel module {module} is not in {directory}",
            hint="remove the guest cache, so that the kernel is fetched again",
            metadata={"module": module},
        )


class CommandFailedError(InternalError):
    """A program ended with a status other than 0.

    Attributes:
        status: its exit status.
        output: what it said on stderr.
    """

    def __init__(self, command: list[str], status: int, output: str) -> None:
        super().__init__(
            "COMMAND_FAILED", f"{' '.join(command)}: exit status {status}: {output.strip()}"
        )
        self.status = status
        self.output = output


class NetworkUnavailableError(FailedPreconditionError):
    """No namespace or bridge can be made here: the demo goes on without a network card."""

    def __init__(self, step: str, detail: str) -> None:
        super().__init__(
            "NETWORK_UNAVAILABLE",
            f"{step}: {detail}",
            hint="needs CAP_NET_ADMIN and CAP_SYS_ADMIN, iproute2 and /dev/net/tun",
            metadata={"step": step},
        )
