# SPDX-License-Identifier: Apache-2.0
"""A cluster whose orchestrator, node a and node b are hosts of their own, joined by links.

    @pytest.mark.requires(*link.NEEDS)
    async def test_...(tmp_path):
        async with linked_cluster(tmp_path / "cluster") as linked:
            guest = await linked.start_microvm("m", memory_mib=64, workload_mib=32)
            await guest.look()                          # it has verified every page
            moving = await linked.client.migrate("m", "b")
            ...
            await linked.links["a-b"].cut()             # see tests/harness/link.py: cut, heal,
            await linked.links["o-b"].cut("o")          # shape, reset, per direction
            await linked.reset()

    o  orchestrator          links: o-a  o-b  a-b, each with its own faults
    a  agent, page server    a link's ends are called "o", "a", "b": `cut("a")` on "a-b" is what
    b  agent, page server    a sends to b; on "o-a" what a sends to the orchestrator

What a test knows of `services.demo.cluster.Cluster` holds: `linked.cluster.nodes["a"].agent` is a
Part with `kill`, `hooks`, `log`; REST is reached through a door (`linked.client`), whatever is cut.
Guests live on their nodes' hosts; `MicrovmGuest.control` goes through a Unix socket, so that one
can always be asked. Metrics and other ports of a host: `link.door(linked.net.hosts["a"], target)`.

The whole costs about 4 s to start: share it in a module-scoped fixture and `reset` after each test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from godwit.client import AsyncClient

from services.demo.cluster import RAM_PARENT, Cluster, Place, running_cluster
from services.demo.microvm_guest import MicrovmGuest, make_spec
from tests.harness import link

HOSTS = ("o", "a", "b")
PAIRS = (("o", "a"), ("o", "b"), ("a", "b"))
REST_PORT = 8080
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedCluster:
    """A cluster on three hosts. Made by `linked_cluster`."""

    cluster: Cluster
    net: link.Network
    client: AsyncClient

    @property
    def links(self) -> Mapping[str, link.Link]:
        """o-a, o-b, a-b."""
        return self.net.links

    async def reset(self) -> None:
        """Every link is perfect, no hook is ordered: for the end of a test."""
        await self.net.reset()
        for part in self.cluster.parts:
            for order in part.hooks.directory.iterdir():
                order.unlink(missing_ok=True)

    async def start_microvm(
        self,
        vm_id: str,
        node: str = "a",
        *,
        memory_mib: int = 64,
        workload_mib: int = 32,
        vcpus: int = 2,
        accel: str = "thread",
        fault_backend: str = "uffd",
        **microvm: object,
    ) -> MicrovmGuest:
        """A microvm that verifies itself; `microvm`: further fields of its spec."""
        spec = make_spec(
            vm_id,
            accel=accel,
            memory_bytes=memory_mib * MIB,
            workload_bytes=workload_mib * MIB,
            vcpus=vcpus,
            fault_backend=fault_backend,
            **microvm,
        )
        return await MicrovmGuest.start(spec, node, cluster=self.cluster, client=self.client)


@asynccontextmanager
async def linked_cluster(
    directory: Path,
    *,
    environment: Mapping[str, str] | None = None,
    hooked: bool = True,
    mtu: int = link.MTU,
    ram_parent: Path = RAM_PARENT,
    made: Callable[[Path], None] | None = None,
    agent_flags: Sequence[str] = (),
) -> AsyncIterator[LinkedCluster]:
    """Start it below `directory`, which must not exist; see the module, and `running_cluster`."""
    async with AsyncExitStack() as stack:
        net = await stack.enter_async_context(link.network(HOSTS, PAIRS, mtu=mtu))
        orchestrator = net.hosts["o"]
        rest_at = await stack.enter_async_context(
            link.door(orchestrator, (orchestrator.address, REST_PORT))
        )
        places = {
            "orchestrator" if name == "o" else name: Place(
                address=host.address,
                prefix=host.prefix,
                rest_port=REST_PORT if name == "o" else 0,
            )
            for name, host in net.hosts.items()
        }
        cluster = await stack.enter_async_context(
            running_cluster(
                directory,
                ram_parent=ram_parent,
                environment=environment,
                hooked=hooked,
                places=places,
                rest_at=rest_at,
                made=made,
                agent_flags=agent_flags,
            )
        )
        # The cluster takes its leave of the guests over REST.
        stack.push_async_callback(net.reset)
        client = await stack.enter_async_context(AsyncClient(cluster.rest_url))
        yield LinkedCluster(cluster=cluster, net=net, client=client)
