# SPDX-License-Identifier: Apache-2.0
"""A whole Godwit on one host: an orchestrator and two nodes, each part a process of its own.

The demo runs on it and so do the integration tests, which kill, stop and restart its parts. Every
part listens on loopback at a port that the kernel chose and keeps, and logs to `<directory>/logs`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from godwit.client import TIMEOUT_S, AsyncClient
from godwit.errors import GodwitClientError
from godwit.models import Node

from services.common.errors import UnavailableError
from services.common.listen import INSECURE_FLAG, TLS_DIR_FLAG
from services.demo import leftovers
from services.demo.cluster_tls import OPERATOR, ORCHESTRATOR, ClusterTls, make_cluster_tls
from services.demo.part import START_TIMEOUT_S, Part, base_environment
from services.fault_agent import journal
from services.fault_agent.drivers.command_line import (
    INSPECTION_SOCKET,
    console_log,
)

RAM_PARENT = Path("/dev/shm")  # noqa: S108 - guest memory has to be tmpfs
NETWORK_CAPABILITIES = ("sys_admin",)
"""Our bridges are in network namespaces, which a tap is made in by setns(2)."""
_STOP_VM_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A host, as far as a part of the cluster cares; by default this one, over loopback.

    Attributes:
        address: numeric, of this host; what others have to reach is bound to it.
        prefix: put before the command of each part; it execs.
        rest_port: of the orchestrator; 0: any.
    """

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    rest_port: int = 0

    def listen(self, port: int = 0) -> str:
        """What to bind."""
        return f"{self.address}:{port}"

    def flags(self, tls_dir: Path | None) -> tuple[str, ...]:
        """What a part needs to be told that binds to it."""
        if tls_dir is not None:
            return TLS_DIR_FLAG, str(tls_dir)
        return () if self.address == "127.0.0.1" else (INSECURE_FLAG,)


HERE = Place()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeParts:
    """One node: its agent, its page server, its directories."""

    name: str
    agent: Part
    page_server: Part
    state_dir: Path
    ram_dir: Path

    def vm_dir(self, vm_id: str) -> Path:
        """Where the agent keeps everything of one VM."""
        return self.state_dir / "vms" / vm_id

    def console(self, vm_id: str, epoch: int) -> Path:
        """The file that the guest's console is written to, one a run."""
        return self.vm_dir(vm_id) / console_log(epoch)

    def monitor(self, vm_id: str) -> Path:
        """The VMM's second QMP socket, which no agent uses."""
        return self.vm_dir(vm_id) / INSPECTION_SOCKET

    def record(self, vm_id: str) -> journal.Record:
        """What the node's journal says of a VM.

        Raises:
            FileNotFoundError: it does not know the VM.
        """
        return journal.read(self.vm_dir(vm_id) / journal.FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running cluster. Made by `running_cluster`."""

    directory: Path
    orchestrator: Part
    nodes: Mapping[str, NodeParts]
    claim: leftovers.Claim
    rest_at: str = ""
    tls: ClusterTls | None = None
    """None: plaintext."""

    @property
    def rest_url(self) -> str:
        """Where the orchestrator's REST API is, for us."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{self.rest_at or self.orchestrator.addresses['rest']}"

    def client(self, timeout_s: float = TIMEOUT_S) -> AsyncClient:
        """A client of it, for whoever drives the cluster."""
        tls_dir = self.tls.member(OPERATOR) if self.tls else None
        return AsyncClient(self.rest_url, timeout_s=timeout_s, tls_dir=tls_dir)

    @property
    def parts(self) -> list[Part]:
        """Every part, the orchestrator last."""
        nodes = [part for node in self.nodes.values() for part in (node.page_server, node.agent)]
        return [*nodes, self.orchestrator]

    async def start(self, part: Part) -> None:
        """Start a part, for the first time or again, at the same address.

        Raises:
            UnavailableError: PART_FAILED with the end of its log.
        """
        self.claim.add(await part.start())


@asynccontextmanager
async def running_cluster(
    directory: Path,
    *,
    ram_parent: Path = RAM_PARENT,
    node_names: Sequence[str] = ("a", "b"),
    environment: Mapping[str, str] | None = None,
    hooked: bool = False,
    places: Mapping[str, Place] | None = None,
    rest_at: str = "",
    made: Callable[[Path], None] | None = None,
    agent_flags: Sequence[str] = (),
    kept_capabilities: Sequence[str] = NETWORK_CAPABILITIES,
    tls: bool = False,
) -> AsyncIterator[Cluster]:
    """Start an orchestrator and its nodes; at the end stop them and every VMM that they left.

    Args:
        directory: must not exist; holds state, logs and sockets, and stays.
        ram_parent: a tmpfs; guest memory goes below it and is removed at the end.
        node_names: of the nodes.
        environment: what the parts get on top of ours.
        hooked: their hook points are on, which costs some system calls in the guest's pause.
        places: where a node, or "orchestrator", is, if it is not here.
        rest_at: HOST:PORT at which we reach REST, if it is not where the orchestrator listens.
        agent_flags: further arguments of each agent.
        kept_capabilities: what each agent keeps beside what every agent does.
        tls: every part has certificates, and speaks nothing else.
        made: called with `directory` when it is there and still empty.

    Raises:
        FileExistsError: `directory` exists.
        UnavailableError: a part did not start.
    """
    keep = (f"--keep-capability={name}" for name in kept_capabilities)
    flags = (*agent_flags, *keep)
    directory.mkdir(parents=True)  # noqa: ASYNC240 - local and quick, here and below
    if made is not None:
        made(directory)
    base, places = base_environment(environment), places or {}
    await leftovers.remove_stale(ram_parent)
    async with leftovers.claimed(ram_parent, directory) as claim:
        nodes: dict[str, NodeParts] = {}
        keys = make_cluster_tls(directory / "tls", tuple(node_names)) if tls else None
        cluster = Cluster(
            directory=directory,
            tls=keys,
            orchestrator=_orchestrator(
                directory, base, hooked=hooked, place=places.get("orchestrator", HERE), tls=keys
            ),
            nodes=nodes,
            claim=claim,
            rest_at=rest_at,
        )
        try:
            await cluster.start(cluster.orchestrator)
            for name in node_names:
                place = places.get(name, HERE)
                await _start_node(
                    name,
                    cluster,
                    nodes,
                    base,
                    hooked=hooked,
                    place=place,
                    agent_flags=flags,
                )
            await _wait_reachable(cluster)
            yield cluster
        finally:
            await _stop_vms(cluster)
            # The VMs are gone, or refused to go: no part is needed any more, so none need drain.
            await asyncio.gather(*(part.kill() for part in cluster.parts))


def _orchestrator(
    directory: Path,
    base: Mapping[str, str],
    *,
    hooked: bool,
    place: Place,
    tls: ClusterTls | None,
) -> Part:
    return Part(
        "orchestrator",
        [
            "services.orchestrator",
            *("--rest", place.listen(place.rest_port)),
            *("--grpc", place.listen()),
            *("--store", str(directory / "orchestrator.sqlite")),
            *place.flags(tls.member(ORCHESTRATOR) if tls else None),
        ],
        pinned={"rest": "--rest", "grpc": "--grpc"},
        directory=directory,
        environment=base,
        hooked=hooked,
        prefix=place.prefix,
    )


async def _start_node(
    name: str,
    cluster: Cluster,
    nodes: dict[str, NodeParts],
    base: Mapping[str, str],
    *,
    hooked: bool,
    place: Place,
    agent_flags: Sequence[str],
) -> None:
    state_dir, ram_dir = cluster.directory / name, cluster.claim.path / name
    images_dir = state_dir / "images"
    flags = place.flags(cluster.tls.member(name) if cluster.tls else None)
    images_dir.mkdir(parents=True)
    ram_dir.mkdir()
    page_server = Part(
        f"{name}.page-server",
        [
            "services.page_server",
            *("--listen", place.listen()),
            *("--control", "127.0.0.1:0"),
            *("--metrics", "127.0.0.1:0"),
            *("--images-dir", str(images_dir)),
            *("--ram-dir", str(ram_dir)),
            *flags,
        ],
        pinned={"page": "--listen", "control": "--control", "metrics": "--metrics"},
        directory=cluster.directory,
        environment=base,
        hooked=hooked,
        prefix=place.prefix,
    )
    await cluster.start(page_server)
    agent = Part(
        f"{name}.agent",
        [
            "services.fault_agent",
            *("--node", name),
            *("--listen", place.listen()),
            *("--metrics", "127.0.0.1:0"),
            *("--state-dir", str(state_dir)),
            *("--images-dir", str(images_dir)),
            *("--ram-dir", str(ram_dir)),
            *("--page-server-control", page_server.addresses["control"]),
            *("--orchestrator", cluster.orchestrator.addresses["grpc"]),
            *flags,
            *agent_flags,
        ],
        pinned={"grpc": "--listen", "metrics": "--metrics"},
        directory=cluster.directory,
        environment=base,
        hooked=hooked,
        prefix=place.prefix,
    )
    # Listed before it runs: a node half started is cleaned up like a whole one.
    nodes[name] = NodeParts(
        name=name, agent=agent, page_server=page_server, state_dir=state_dir, ram_dir=ram_dir
    )
    await cluster.start(agent)


async def _wait_reachable(cluster: Cluster) -> None:
    nodes: list[Node] = []
    try:
        async with cluster.client() as client, asyncio.timeout(START_TIMEOUT_S):
            while {node.name for node in nodes if node.reachable} != set(cluster.nodes):
                await asyncio.sleep(0.05)
                nodes = await client.nodes()
    except TimeoutError:
        known = ", ".join(f"{node.name}: {node.message or 'reachable'}" for node in nodes)
        raise UnavailableError(
            "NODES_UNREACHABLE",
            f"after {START_TIMEOUT_S:g} s the orchestrator knows {known or 'no node'}",
            hint=f"see {cluster.directory / 'logs'}",
        ) from None


async def _stop_vms(cluster: Cluster) -> None:
    """Politely, as far as that goes; what is left is killed through the journals."""
    if not cluster.orchestrator.is_running:
        return
    with contextlib.suppress(GodwitClientError):
        async with cluster.client(_STOP_VM_TIMEOUT_S) as client:
            for vm in await client.vms():
                with contextlib.suppress(GodwitClientError):
                    await client.stop_vm(vm.vm_id)
