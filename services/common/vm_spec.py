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

_MICROVM_VCPUS_MAX = 32
_QEMU_ONLY = (
    *("machine", "cpu", "kernel", "initrd", "cmdline"),
    *("disks", "nics", "rng", "balloon", "extra_devices"),
)
_YOUNG = ("bandwidth_weight",)

VmId = Annotated[str, Field(pattern=VM_ID_PATTERN)]


class _Strict(BaseModel):
    # Built when first used, as a part of the whole: a guest may be waiting for our start.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


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


FAULT_BACKENDS = ("kvm-userfault", "exit-emulation", "exit-sigsegv", "uffd")
"""How a guest's access to absent memory is noticed (docs/exit-channel.md), best first."""


class Microvm(_Strict):
    """What a godwit-microvm does beside holding memory; native/microvm/README.md."""

    workload: Literal["verify", "sequential", "hot", "idle"] = "verify"
    workload_bytes: int = Field(default=0, ge=0, multiple_of=PAGE_BYTES)
    """Memory that the workload keeps; 0: half of the guest's."""
    ops_per_second: int = Field(default=0, ge=0, lt=1 << 32)
    """Page touches of each vCPU; 0: no limit."""
    tick_us: int = Field(default=1000, ge=100, le=1_000_000)
    """Period of each vCPU's timer and heartbeat."""
    seed: int = Field(default=1, ge=0, lt=1 << 64)
    """Of the workload's random order."""
    fault_backend: Literal["auto", "kvm-userfault", "exit-emulation", "exit-sigsegv", "uffd"] = (
        "auto"
    )
    """auto: the best that the node where it arrives can do."""
    uffd_count: int = Field(default=1, ge=1, le=16)
    """Userfaultfds that its memory is dealt out to."""
    beat_log: str = Field(default="", pattern=r"^(/.{1,120})?$")
    """File on every node that each heartbeat is appended to; native/microvm/README.md."""


class VmSpec(_Strict):
    """A VM, complete. Equal specs have equal hashes, on every node."""

    vm_id: VmId
    driver: Literal["qemu", "microvm"] = "qemu"
    memory_bytes: int = Field(ge=64 << 20, le=16 << 40)
    """Guest memory. A multiple of 2 MiB."""
    vcpus: int = Field(default=1, ge=1, le=256)
    machine: Literal["pc", "q35"] = "pc"
    cpu: str = Field(default="max", pattern=r"^[A-Za-z0-9_.,+=-]{1,200}$")
    accel: Literal["tcg", "kvm", "thread"] = "tcg"
    kernel: str = ""
    """Absolute path of the kernel image, the same on every node."""
    initrd: str = ""
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    rng: bool = True
    balloon: bool = False
    extra_devices: tuple[str, ...] = ()
    """Further -device values. Preflight refuses those that cannot move (VFIO, vhost-user)."""
    bandwidth_weight: int = Field(default=100, ge=1, le=1000)
    """Its share where several guests arrive from one host (--peer-bytes-per-s-max)."""
    microvm: Microvm | None = None
    """For driver microvm, and only there."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.memory_bytes % (2 << 20):
            raise ValueError(f"memory_bytes must be a multiple of 2 MiB, got {self.memory_bytes}")
        problem = self._not_of_qemu() if self.driver == "qemu" else self._not_of_microvm()
        if problem:
            raise ValueError(problem)
        return self

    def _not_of_qemu(self) -> str:
        if not self.kernel:
            return "kernel is missing"
        if self.accel == "thread":
            return "accel thread is for driver microvm"
        return "microvm is for driver microvm" if self.microvm else ""

    def _not_of_microvm(self) -> str:
        fields = type(self).model_fields
        given = [name for name in _QEMU_ONLY if getattr(self, name) != fields[name].default]
        if given:
            return f"{', '.join(given)}: a microvm has none"
        if self.accel == "tcg":
            # Not chosen for it: a state saved by one is refused by the other.
            return "accel of a microvm is kvm or thread"
        if self.microvm is None:
            return "microvm is missing"
        if self.vcpus > _MICROVM_VCPUS_MAX:
            return f"a microvm has at most {_MICROVM_VCPUS_MAX} vcpus"
        if self.microvm.fault_backend == "exit-sigsegv" and self.accel != "thread":
            return "fault_backend exit-sigsegv is for accel thread"
        if self.microvm.fault_backend in ("kvm-userfault", "exit-emulation") and (
            self.accel != "kvm"
        ):
            return f"fault_backend {self.microvm.fault_backend} is for accel kvm"
        return ""

    @property
    def spec_hash(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def canonical_json(self) -> str:
        """One spelling for equal specs: every field, in the order of the class.

        But for those that are younger than the first release and at their default: the release
        before this one refuses what it does not know.
        """
        fields = type(self).model_fields
        young = {n for n in _YOUNG if getattr(self, n) == fields[n].default}
        return self.model_dump_json(exclude=young)

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
