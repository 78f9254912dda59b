# SPDX-License-Identifier: Apache-2.0
"""What a VM is: the one file from which both command lines are built (docs/vm-spec.md)."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.common.errors import InvalidArgumentError

PAGE_BYTES = 4096
VM_ID_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
_MAC_PATTERN = r"^([0-9a-f]{2}:){5}[0-9a-f]{2}$"

VmId = Annotated[str, Field(pattern=VM_ID_PATTERN)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Disk(_Strict):
    """A disk that both nodes reach under the same path."""

    path: str = Field(min_length=1)
    """Absolute path of the image or block device."""
    format: Literal["raw", "qcow2"] = "raw"
    read_only: bool = False
    cache: Literal["none", "writeback", "writethrough"] = "none"
    """Anything but none is refused by preflight: the other node would read stale data."""


class Tap(_Strict):
    """Where the agent of the node makes the tap device of a NIC."""

    bridge: str = Field(min_length=1, max_length=15)
    netns: str = ""
    """Name of the network namespace that holds the bridge (ip netns); empty: the agent's own."""


class Nic(_Strict):
    """A virtio network card."""

    mac: str = Field(pattern=_MAC_PATTERN)
    tap: Tap | None = None
    """None: the card is there and its link is down."""


class VmSpec(_Strict):
    """A VM, complete. Equal specs have equal hashes, on every node."""

    vm_id: VmId
    driver: Literal["qemu"] = "qemu"
    memory_bytes: int = Field(ge=64 << 20, le=16 << 40)
    """Guest memory. A multiple of 2 MiB."""
    vcpus: int = Field(default=1, ge=1, le=256)
    machine: Literal["pc", "q35"] = "pc"
    cpu: str = Field(default="max", pattern=r"^[A-Za-z0-9_.,+=-]{1,200}$")
    accel: Literal["tcg", "kvm"] = "tcg"
    kernel: str = Field(min_length=1)
    """Absolute path of the kernel image, the same on every node."""
    initrd: str = ""
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    rng: bool = True
    balloon: bool = False
    extra_devices: tuple[str, ...] = ()
    """Further -device values. Preflight refuses those that cannot move (VFIO, vhost-user)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.memory_bytes % (2 << 20):
            raise ValueError(f"memory_bytes must be a multiple of 2 MiB, got {self.memory_bytes}")
        return self

    @property
    def spec_hash(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def canonical_json(self) -> str:
        """One spelling for equal specs: every field, in the order of the class."""
        return self.model_dump_json()

    @classmethod
    def parse(cls, text: str | bytes) -> VmSpec:
        """Read a spec from JSON.

        Raises:
            InvalidArgumentError: SPEC_INVALID, naming each field that is wrong and why.
        """
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(str(part) for part in item['loc']) or 'spec'}: {item['msg']}"
                for item in error.errors()
            )
            raise InvalidArgumentError(
                "SPEC_INVALID", wrong, hint="see docs/vm-spec.md for every field"
            ) from error
