# SPDX-License-Identifier: Apache-2.0
"""Which microvms this machine can run."""

from __future__ import annotations

import functools
import subprocess
import tempfile

import pytest

from services.fault_agent.drivers.microvm import PROGRAM, find_program

BACKENDS = [
    pytest.param("thread", "uffd"),
    pytest.param("thread", "exit-sigsegv"),
    pytest.param("kvm", "uffd", marks=pytest.mark.requires("kvm", "uffd")),
    pytest.param("kvm", "exit-emulation", marks=pytest.mark.requires("kvm", "uffd")),
    pytest.param("kvm", "kvm-userfault", marks=pytest.mark.requires("kvm", "uffd")),
]
"""Parameters (accel, backend). `need_backend` skips what the kernel does not have."""


def need_microvm() -> str:
    """Its path; a test fails without: it is built with everything else."""
    program = find_program(PROGRAM)
    assert program is not None, "make native"
    return program


@functools.cache
def why_not(accel: str, backend: str, program: str = "") -> str:
    """Why a microvm cannot wait for its memory that way; empty if it can.

    `program` is another build of it than the one that the agent finds.
    """
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [
                *(program or need_microvm(), "--control", f"{directory}/control", "--incoming"),
                *("--accel", accel, "--memory", "64M", "--die-with-parent"),
                *("--fault-socket", f"{directory}/faults", "--fault-backend", backend),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        possible = process.stdout.readline() != ""
        process.kill()
        _, why = process.communicate()
        return "" if possible else why.strip() or "it ended"


def need_backend(accel: str, backend: str, program: str = "") -> None:
    """Skip a test where the kernel does not have it."""
    if why := why_not(accel, backend, program):
        pytest.skip(f"needs {backend} with {accel}: {why}")
