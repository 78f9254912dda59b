# SPDX-License-Identifier: Apache-2.0
"""What a test needs of the machine, found out by trying.

A test says `@pytest.mark.requires("uffd", "kvm")`, or calls `require("uffd")` where it only then
knows. Without the thing it is skipped, with what is missing and what to do. GODWIT_REQUIRE, a list
such as `uffd,kvm,qemu`, names what this machine must have: without it such a test fails, so that
a continuous-integration run cannot pass by skipping. native/tests/check.h does the same in C.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import platform
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from tests.harness import kube, postgres

REQUIRE_ENV = "GODWIT_REQUIRE"

# linux/userfaultfd.h, linux/kvm.h, linux/if_tun.h
USERFAULTFD_IOC_NEW = 0xAA00
KVM_CREATE_VM = 0xAE01
TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
USERFAULTFD_SYSCALL = {"x86_64": 323, "aarch64": 282}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """Something that a machine may lack.

    probe: returns why the thing is not there, or None if it is; leaves nothing behind.
    what_to_do: one sentence for whoever reads the skip.
    """

    probe: Callable[[], str | None]
    what_to_do: str


def _why(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, '?')}: {error.strerror}"


def _probe_uffd() -> str | None:
    """One that sees the faults of kernel code too, as KVM's are: not UFFD_USER_MODE_ONLY."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        device_says = f"/dev/userfaultfd: {_why(error)}"
    else:
        try:
            os.close(fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags))
        except OSError as error:
            device_says = f"USERFAULTFD_IOC_NEW: {_why(error)}"
        else:
            return None
        finally:
            os.close(device)
    number = USERFAULTFD_SYSCALL.get(platform.machine())
    if number is None:
        return f"{device_says}; userfaultfd(2) is not known for {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if fd < 0:
        code = ctypes.get_errno()
        return f"{device_says}; userfaultfd(2): {_why(OSError(code, os.strerror(code)))}"
    os.close(fd)
    return None


def _probe_kvm() -> str | None:
    """A device that opens is not enough: inside a container or a VM creating a guest may fail."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {_why(error)}"
    try:
        os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))
    except OSError as error:
        return f"KVM_CREATE_VM: {_why(error)}"
    finally:
        os.close(device)
    return None


def _probe_tap() -> str | None:
    """An interface that is not made persistent goes when its last descriptor is closed."""
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/net/tun: {_why(error)}"
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"gwprobe%d", IFF_TAP | IFF_NO_PI))
    except OSError as error:
        return f"TUNSETIFF: {_why(error)}"
    finally:
        os.close(device)
    return _lacks_command("ip")


def _probe_netns() -> str | None:
    missing = _lacks_command("unshare")
    if missing is not None:
        return missing
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


def _probe_root() -> str | None:
    return None if os.geteuid() == 0 else f"running as uid {os.geteuid()}"


def _lacks_command(name: str) -> str | None:
    return None if shutil.which(name) else f"{name} is not on PATH"


def _probe_net_raw() -> str | None:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0).close()
    except OSError as error:
        return _why(error)
    return None


THINGS: Mapping[str, Thing] = {
    "uffd": Thing(
        probe=_probe_uffd,
        what_to_do="run as root, or let this user open /dev/userfaultfd, or set"
        " vm.unprivileged_userfaultfd=1",
    ),
    "kvm": Thing(
        probe=_probe_kvm,
        what_to_do="run on a machine with VT-x or AMD-V, nested if it is a VM itself, as a user who"
        " may open /dev/kvm",
    ),
    "qemu": Thing(
        probe=lambda: _lacks_command("qemu-system-x86_64"),
        what_to_do="apt-get install --no-install-recommends qemu-system-x86",
    ),
    "tap": Thing(
        probe=_probe_tap,
        what_to_do="run with CAP_NET_ADMIN, with the tun module loaded and iproute2 installed",
    ),
    "netns": Thing(probe=_probe_netns, what_to_do="run with CAP_SYS_ADMIN"),
    "net_raw": Thing(probe=_probe_net_raw, what_to_do="run with CAP_NET_RAW"),
    "postgres": Thing(
        probe=postgres.missing, what_to_do="apt-get install --no-install-recommends postgresql"
    ),
    "kube": Thing(
        probe=kube.missing,
        what_to_do="set KUBEBUILDER_ASSETS to a directory with etcd and kube-apiserver, such as"
        " `setup-envtest use -p path` of sigs.k8s.io/controller-runtime prints",
    ),
    "promtool": Thing(
        probe=lambda: _lacks_command("promtool"),
        what_to_do="apt-get install --no-install-recommends prometheus",
    ),
    "root": Thing(probe=_probe_root, what_to_do="run as root"),
}


@functools.cache
def missing(name: str) -> str | None:
    """Why the thing `name` is not there, or None if it is. Tried once a process.

    Raises:
        KeyError: no such thing is known.
    """
    return THINGS[name].probe()


def required_names(environ: Mapping[str, str]) -> frozenset[str]:
    """The things that GODWIT_REQUIRE says must be there.

    Raises:
        pytest.UsageError: it names a thing that is not known: a typing error there would disarm it.
    """
    names = frozenset(name.strip() for name in environ.get(REQUIRE_ENV, "").split(",")) - {""}
    unknown = names - THINGS.keys()
    if unknown:
        raise pytest.UsageError(
            f"{REQUIRE_ENV} names {sorted(unknown)}; known are {sorted(THINGS)}"
        )
    return names


def require(*names: str) -> None:
    """End the calling test if the machine lacks one of `names`: skipped, or failed as asked for.

    Raises:
        KeyError: no such thing is known.
        pytest.skip.Exception: something is missing.
        pytest.fail.Exception: something is missing that GODWIT_REQUIRE names.
    """
    lacking = [(name, why) for name in names if (why := missing(name)) is not None]
    if not lacking:
        return
    text = "; ".join(f"needs {name} ({why}): {THINGS[name].what_to_do}" for name, why in lacking)
    wanted = required_names(os.environ).intersection(name for name, _ in lacking)
    if wanted:
        pytest.fail(f"{text} [{REQUIRE_ENV} says this machine has {sorted(wanted)}]", pytrace=False)
    pytest.skip(text)
