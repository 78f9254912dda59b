# SPDX-License-Identifier: Apache-2.0
"""A network of our own making: namespaces, and links between them that a test breaks as it likes.

    async with network(("a", "b"), [("a", "b")]) as net:
        link = net.links["a-b"]
        net.hosts["a"].command("ping", net.hosts["b"].address)   # argv that runs on host a

        since_ns = await link.cut()          # both ways: packets vanish, nobody is told
        await link.cut("a")                  # only what a sends: b is heard, and hears nothing
        await link.heal()                    # of cuts; returns when (CLOCK_MONOTONIC ns)
        await link.shape(delay_ms=5, jitter_ms=2, loss=0.01)
        await link.shape("b", rate_bytes_per_s=5_000_000)        # only what b sends
        await link.reset()                   # a perfect wire again, cuts too
        (await link.counters())["a"].lost    # packets that a sent and nobody got

Every change holds from the moment the call returns, for what is already on its way, too. It needs
root and /dev/net/tun, and nothing of the kernel's traffic control: netem is a module that is not
everywhere. Hosts are network namespaces without a name, which vanish with their last process, so
that a run that crashed leaves nothing. Each has one address, on its loopback device, whatever links
it has: a peer is called by the same address by everybody, as in a fleet.

A SYN that is lost is sent again after 1, 3, 7 s, as on kernels before 6.5, unless a network is
made with `syn_linear=True`.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

CLONE_NEWNET = 0x40000000
MTU = 9000
"""Jumbo frames: four times the throughput of 1500 at the same cost."""
NEEDS = ("root", "netns", "tap")
"""What a test that uses this requires: @pytest.mark.requires(*NEEDS)."""
_FORWARDER = Path(__file__).with_name("link_forwarder.py")
_NET = "198.51.100."  # TEST-NET-2, RFC 5737
_ANSWER_S_MAX = 60.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A network namespace.

    Attributes:
        name: of the host.
        address: the one at which everybody finds it.
        fd: the namespace; open as long as the network is.
    """

    name: str
    address: str
    fd: int

    @property
    def prefix(self) -> tuple[str, ...]:
        """What, put before a command, runs it here. It execs: the process id stays the same."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self.fd}", "--")

    def command(self, *arguments: str) -> list[str]:
        """`arguments`, to be run here."""
        return [*self.prefix, *arguments]

    def run(self, *arguments: str) -> str:
        """Run it here to its end; what it said. Raises CalledProcessError with what it complained.

        Blocks: for set-up.
        """
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)} on {self.name}: {done.stderr.strip()}")
        return done.stdout

    def socket(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of this host, for us. It belongs here, whatever thread uses it."""

        def make() -> socket.socket:
            _libc("setns", self.fd, CLONE_NEWNET)
            return socket.socket(socket.AF_INET, kind)

        return in_thread(make)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Of what one end has sent, since the beginning. Packets, but for `bytes`."""

    packets: int
    """Came out at the other end."""
    bytes: int
    delayed: int
    """Had to wait, for a delay or for others on a slow link."""
    lost: int
    cut: int
    """Vanished in a cut."""
    overflowed: int
    """Did not fit into the queue of a slow link."""
    refused: int
    """The receiving kernel did not take."""


@dataclass(frozen=True, slots=True)
class Link:
    """A wire between two hosts. `sender`: only what that one sends; without, both ways."""

    name: str
    ends: tuple[str, str]
    _forwarder: _Forwarder

    async def cut(self, sender: str = "") -> int:
        """Let packets vanish. Returns since when, CLOCK_MONOTONIC in ns."""
        return await self._set(sender, cut=True)

    async def heal(self, sender: str = "") -> int:
        """End cuts. Returns since when packets pass."""
        return await self._set(sender, cut=False)

    async def shape(self, sender: str = "", **values: float) -> int:
        """Make it worse.

        Args:
            sender: see the class.
            values: some of delay_ms (one way); jitter_ms (0..that more, order is kept); loss
                (0..1, of packets); rate_bytes_per_s (0: no limit); queue_bytes_max (of a rate:
                more is dropped; 1 MiB).
        """
        return await self._set(sender, **values)

    async def reset(self) -> int:
        """A perfect wire."""
        return (await self._ask(self.ends, reset=True, set={"cut": False}))["time_ns"]  # type: ignore[no-any-return]

    async def counters(self) -> Mapping[str, Counters]:
        """By sender."""
        answer = await self._ask(self.ends)
        return {sender: Counters(**values) for sender, values in answer["counters"].items()}

    async def _set(self, sender: str, **values: float) -> int:
        senders = (sender,) if sender else self.ends
        return (await self._ask(senders, set=values))["time_ns"]  # type: ignore[no-any-return]

    async def _ask(self, senders: Sequence[str], **order: Any) -> dict[str, Any]:
        return await self._forwarder.ask({"link": self.name, "senders": list(senders), **order})


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Hosts and links. Made by `network`."""

    hosts: Mapping[str, Host]
    links: Mapping[str, Link] = field(default_factory=dict)
    """By the names of both ends, "a-b", in the order in which they were given."""

    async def reset(self) -> None:
        """Every link is perfect again."""
        for link in self.links.values():
            await link.reset()

    async def cut_off(self, host: str) -> int:
        """Cut every link of a host. Returns since when the last is."""
        return max([await link.cut() for link in self.links.values() if host in link.ends])

    async def rejoin(self, host: str) -> int:
        """Heal every link of a host. Returns since when the first is."""
        return min([await link.heal() for link in self.links.values() if host in link.ends])


@asynccontextmanager
async def network(
    names: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    *,
    mtu: int = MTU,
    syn_linear: bool = False,
    seed: int = 0,
) -> AsyncIterator[Network]:
    """Hosts `names`, each pair of `pairs` linked; see the module. `seed` is that of the losses."""
    with _hosts(names, syn_linear=syn_linear) as hosts:
        spec = {
            "mtu": mtu,
            "seed": seed,
            "links": [
                {"name": f"{a}-{b}", "ends": [[a, hosts[a].fd], [b, hosts[b].fd]]} for a, b in pairs
            ],
        }
        async with _forwarding(spec, [host.fd for host in hosts.values()]) as forwarder:
            for a, b in pairs:
                for here, there in ((a, b), (b, a)):
                    await asyncio.to_thread(_connect, hosts[here], hosts[there], f"{a}-{b}", mtu)
            yield Network(
                hosts=hosts,
                links={f"{a}-{b}": Link(f"{a}-{b}", (a, b), forwarder) for a, b in pairs},
            )


@asynccontextmanager
async def door(host: Host, target: tuple[str, int]) -> AsyncIterator[str]:
    """An address on our own loopback behind which `target`, an address on `host`, is."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            inner = host.socket()
            inner.setblocking(False)
            await asyncio.get_running_loop().sock_connect(inner, target)
            there, back = await asyncio.open_connection(sock=inner)
            await asyncio.gather(_pump(reader, back), _pump(there, writer))
        with suppress(OSError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname()[:2])
    finally:
        server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        with suppress(OSError):
            writer.close()


class _Forwarder:
    """The process of link_forwarder.py, from outside."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lock = asyncio.Lock()

    async def answer(self) -> dict[str, Any]:
        """Its next line."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_ANSWER_S_MAX):
            line = await self._process.stdout.readline()
        assert line, f"the links' process has ended with {self._process.returncode}"
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    async def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and wait until it is carried out."""
        assert self._process.stdin is not None
        async with self._lock:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            return await self.answer()


@asynccontextmanager
async def _forwarding(spec: dict[str, Any], fds: Sequence[int]) -> AsyncIterator[_Forwarder]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_FORWARDER),
        json.dumps(spec),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=fds,
        start_new_session=True,
    )
    try:
        forwarder = _Forwarder(process)
        await forwarder.answer()
        yield forwarder
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_S_MAX):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextmanager
def _hosts(names: Sequence[str], *, syn_linear: bool) -> Iterator[dict[str, Host]]:
    hosts: dict[str, Host] = {}
    try:
        for number, name in enumerate(names, 1):
            fd = in_thread(_new_namespace)
            hosts[name] = host = Host(name=name, address=f"{_NET}{number}", fd=fd)
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{host.address}/32", "dev", "lo")
            if not syn_linear:
                # Not there before 6.5, where it is what we want anyway.
                host.run("sh", "-c", "f=/proc/sys/net/ipv4/tcp_syn_linear_timeouts;"
                         " [ ! -e $f ] || echo 0 >$f")  # fmt: skip
        yield hosts
    finally:
        for host in hosts.values():
            os.close(host.fd)


def _connect(here: Host, there: Host, device: str, mtu: int) -> None:
    here.run("ip", "link", "set", device, "mtu", str(mtu), "txqueuelen", "2000")
    # No router solicitations: a link carries what the test sends, and nothing else.
    here.run("ip", "link", "set", device, "addrgenmode", "none")
    here.run("ip", "link", "set", device, "up")
    here.run("ip", "route", "add", f"{there.address}/32", "dev", device, "src", here.address)


def _new_namespace() -> int:
    _libc("unshare", CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _libc(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def in_thread(work: Callable[[], _T]) -> _T:
    """Do it in a thread of its own: one that has changed its namespace is of no other use."""
    result: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - raised by who asked
            failed.append(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return result[0]
