# SPDX-License-Identifier: Apache-2.0
"""Close a descriptor inside another process: one system call made by its own main thread.

For the sabotage of the demo only; x86-64 only. Rejected: gdb, which nobody should have to install
for a test, and UFFDIO_UNREGISTER through a descriptor of ours, which is not the loss of the last.
Source: ptrace(2); arch/x86 struct user_regs_struct.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PTRACE_SINGLESTEP = 9
_PTRACE_GETREGS = 12
_PTRACE_SETREGS = 13
_PTRACE_DETACH = 17
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_WALL = 0x40000000
_SYS_CLOSE = 3
_SYSCALL_INSTRUCTION = b"\x0f\x05"
_REGISTER_NAMES = """
    r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss
    fs_base gs_base ds es fs gs
"""
_NO_CALL = (1 << 64) - 1
_RESTART_BLOCK = _RESTART_FIRST = -516
_RESTART_LAST = -512


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTER_NAMES.split()]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def close_in(pid: int, fd: int) -> None:
    """Close descriptor `fd` of process `pid`; its other threads run on. Blocks for a moment.

    Raises:
        OSError: no such process or descriptor, or no permission.
    """
    with _stopped(pid):
        saved = _Registers()
        _ptrace(_PTRACE_GETREGS, pid, ctypes.addressof(saved))
        registers = _Registers.from_buffer_copy(saved)
        # At an instruction that is there: writing one would change code that other threads run.
        registers.rip = _syscall_address(pid)
        registers.rax, registers.rdi = _SYS_CLOSE, fd
        registers.orig_rax = _NO_CALL  # else the kernel would restart the call that we interrupt
        try:
            _ptrace(_PTRACE_SETREGS, pid, ctypes.addressof(registers))
            _ptrace(_PTRACE_SINGLESTEP, pid)
            _wait_stopped(pid)
            _ptrace(_PTRACE_GETREGS, pid, ctypes.addressof(registers))
            result = ctypes.c_longlong(registers.rax).value
        finally:
            _ptrace(_PTRACE_SETREGS, pid, ctypes.addressof(_restarting(saved)))
    if result < 0:
        raise OSError(-result, f"close({fd}) in process {pid}: {os.strerror(-result)}")


def _restarting(saved: _Registers) -> _Registers:
    """The registers as they were, with an interrupted system call made again: ours to do now."""
    registers = _Registers.from_buffer_copy(saved)
    result = ctypes.c_longlong(saved.rax).value
    if saved.orig_rax != _NO_CALL and _RESTART_FIRST <= result <= _RESTART_LAST:
        if result == _RESTART_BLOCK:
            registers.rax = ctypes.c_ulonglong(-errno.EINTR).value
        else:
            registers.rax = saved.orig_rax
            registers.rip -= len(_SYSCALL_INSTRUCTION)
        registers.orig_rax = _NO_CALL
    return registers


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    _ptrace(_PTRACE_SEIZE, pid)
    try:
        _ptrace(_PTRACE_INTERRUPT, pid)
        _wait_stopped(pid)
        yield
    finally:
        _ptrace(_PTRACE_DETACH, pid)


def _wait_stopped(pid: int) -> None:
    _, status = os.waitpid(pid, _WALL)
    if not os.WIFSTOPPED(status):
        raise ProcessLookupError(f"process {pid} ended")
    if os.WSTOPSIG(status) != signal.SIGTRAP:
        raise InterruptedError(f"process {pid} stopped by signal {os.WSTOPSIG(status)}")


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace request {request}: {os.strerror(number)}")


def _syscall_address(pid: int) -> int:
    """Where the vDSO falls back to a real system call."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            first, last = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(first)
                offset = memory.read(last - first).find(_SYSCALL_INSTRUCTION)
            if offset >= 0:
                return first + offset
    raise ProcessLookupError(f"no system call instruction in the vDSO of process {pid}")
