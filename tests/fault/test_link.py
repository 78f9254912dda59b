# SPDX-License-Identifier: Apache-2.0
"""Promise: the links of the tests do what they say; a fault that is not there proves nothing.

Datagrams show what becomes of single packets. Where time matters only a lower bound is asserted: a
loaded machine makes a link slower, never faster.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.harness import link

pytestmark = [
    pytest.mark.requires(*link.NEEDS),
    pytest.mark.asyncio(loop_scope="module"),
]

PORT = 5000
WAIT_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[link.Network]:
    async with link.network(("a", "b", "c"), [("a", "b")], seed=7) as net:
        yield net


@pytest_asyncio.fixture(loop_scope="module")
async def net(shared: link.Network) -> AsyncIterator[link.Network]:
    yield shared
    await shared.reset()


class Post:
    """A datagram socket on each of two hosts."""

    def __init__(self, net: link.Network) -> None:
        self.sockets = {name: net.hosts[name].socket(socket.SOCK_DGRAM) for name in ("a", "b")}
        for name, each in self.sockets.items():
            each.bind((net.hosts[name].address, 0))
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            each.setblocking(False)

    def send(self, sender: str, data: bytes) -> None:
        other = self.sockets["b" if sender == "a" else "a"]
        self.sockets[sender].sendto(data, other.getsockname())

    def received(self, at: str) -> list[bytes]:
        """Everything that is there now."""
        got = []
        try:
            while True:
                got.append(self.sockets[at].recv(65536))
        except BlockingIOError:
            return got

    async def next(self, at: str) -> bytes:
        """The next one, however long it takes."""
        async with asyncio.timeout(WAIT_S):
            return await asyncio.get_running_loop().sock_recv(self.sockets[at], 65536)

    def close(self) -> None:
        for each in self.sockets.values():
            each.close()


@pytest.fixture
def post(net: link.Network) -> Iterator[Post]:
    post = Post(net)
    yield post
    post.close()


async def settled(net: link.Network, sender: str, count: int) -> link.Counters:
    """The counters of what one end has sent, once `count` more packets than now are judged."""
    async with asyncio.timeout(WAIT_S):
        while True:
            counters = (await net.links["a-b"].counters())[sender]
            if counters.packets + counters.lost + counters.cut + counters.overflowed >= count:
                return counters
            await asyncio.sleep(0.005)


def judged(counters: link.Counters) -> int:
    return counters.packets + counters.lost + counters.cut + counters.overflowed


async def test_a_cut_is_silent_and_one_way_is_one_way(net: link.Network, post: Post) -> None:
    wire = net.links["a-b"]
    before = await wire.counters()
    await wire.cut("a")
    post.send("a", b"lost")
    post.send("b", b"heard")
    assert await post.next("a") == b"heard"
    after = await settled(net, "a", judged(before["a"]) + 1)
    assert after.cut == before["a"].cut + 1
    await wire.heal("a")
    post.send("a", b"again")
    assert await post.next("b") == b"again", "and what was lost stays lost"


async def test_a_connection_outlives_a_cut_without_a_reset(net: link.Network) -> None:
    a, b, wire = net.hosts["a"], net.hosts["b"], net.links["a-b"]
    loop = asyncio.get_running_loop()
    with b.socket() as listener, a.socket() as client:
        listener.bind((b.address, PORT))
        listener.listen()
        client.setblocking(False)
        listener.setblocking(False)
        await loop.sock_connect(client, (b.address, PORT))
        server, _ = await loop.sock_accept(listener)
        with server:
            before = await wire.counters()
            await wire.cut()
            await loop.sock_sendall(client, b"x")
            await settled(net, "a", judged(before["a"]) + 1)
            with pytest.raises(BlockingIOError):
                server.recv(1)
            await wire.heal()
            async with asyncio.timeout(WAIT_S):
                assert await loop.sock_recv(server, 1) == b"x"


async def test_delay_delays_in_its_direction(net: link.Network, post: Post) -> None:
    wire = net.links["a-b"]
    await wire.shape("a", delay_ms=40)
    await wire.shape("b", delay_ms=10)
    for sender, at, least_s in (("a", "b", 0.04), ("b", "a", 0.01)):
        began = time.monotonic()
        post.send(sender, b"x")
        await post.next(at)
        assert time.monotonic() - began >= least_s


async def test_jitter_keeps_the_order(net: link.Network, post: Post) -> None:
    await net.links["a-b"].shape(delay_ms=1, jitter_ms=5)
    sent = [str(number).encode() for number in range(50)]
    for data in sent:
        post.send("a", data)
    assert [await post.next("b") for _ in sent] == sent


async def test_a_cut_takes_what_is_on_its_way(net: link.Network, post: Post) -> None:
    wire = net.links["a-b"]
    before = (await wire.counters())["a"]
    await wire.shape("a", delay_ms=3_600_000)
    post.send("a", b"x")
    post.send("a", b"y")
    await wire.counters()  # a round: what was sent before it has been read
    await wire.cut("a")
    after = await settled(net, "a", judged(before) + 2)
    assert after.cut == before.cut + 2


async def test_loss_loses_as_many_as_it_says(net: link.Network, post: Post) -> None:
    wire, count = net.links["a-b"], 400
    before = (await wire.counters())["a"]
    await wire.shape("a", loss=0.5)
    for number in range(count):
        post.send("a", str(number).encode())
        post.send("b", b"")
    lost = (await settled(net, "a", judged(before) + count)).lost - before.lost
    assert count * 0.35 < lost < count * 0.65
    assert len(post.received("b")) == count - lost
    assert len(post.received("a")) == count, "the other way loses nothing"


async def test_rate_is_a_bottleneck_with_a_queue(net: link.Network, post: Post) -> None:
    wire, size = net.links["a-b"], 1000
    before = (await wire.counters())["a"]
    await wire.shape("a", rate_bytes_per_s=100_000, queue_bytes_max=20_000)
    began = time.monotonic()
    for _ in range(40):
        post.send("a", bytes(size))
    first = await post.next("b")
    assert len(first) == size
    after = await settled(net, "a", judged(before) + 40)
    assert time.monotonic() - began >= 15 * size / 100_000
    assert after.overflowed - before.overflowed >= 15, "more than the queue holds is dropped"


async def test_who_has_no_link_is_not_reached(net: link.Network) -> None:
    with net.hosts["a"].socket() as client, pytest.raises(OSError, match="unreachable"):
        client.connect((net.hosts["c"].address, PORT))


async def test_an_unknown_fault_is_refused(net: link.Network) -> None:
    with pytest.raises(ValueError, match="no gremlins"):
        await net.links["a-b"].shape(gremlins=1)


async def test_a_door_leads_to_a_host(net: link.Network) -> None:
    b = net.hosts["b"]
    with b.socket() as listener:
        listener.bind((b.address, PORT + 1))
        listener.listen()
        listener.setblocking(False)
        async with link.door(b, (b.address, PORT + 1)) as address:
            host, port = address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            inner, _ = await asyncio.get_running_loop().sock_accept(listener)
            writer.write(b"ping")
            async with asyncio.timeout(WAIT_S):
                assert await asyncio.get_running_loop().sock_recv(inner, 4) == b"ping"
                inner.close()
                assert await reader.read() == b"", "the end is passed on"
            writer.close()
