# SPDX-License-Identifier: Apache-2.0
"""Makes a store that may have forgotten something whole again, from the agents' journals (I2).

While no orchestrator runs:
  1. every node is asked, so that nothing changes if one does not answer;
  2. the store becomes another incarnation, in doubt;
  3. every node is told to obey it: from its answer on, no command of any other store is under way
     there or will be admitted, so that what it can prove stays true;
  4. all evidence is collected and merged (`merge.py`);
  5. one transaction writes it and ends the doubt.
Ended anywhere in between, the store is in doubt and the next rebuild does all of it again. No guest
is started, stopped or touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import GodwitError, UnavailableError
from services.orchestrator.agents import AgentPool
from services.orchestrator.merge import Known, Merged, merge
from services.orchestrator.store import Store, rebuilt
from services.orchestrator.store.rows import MigrationRow, NodeRow


class RebuildIncompleteError(UnavailableError):
    """A node that may know more than the store cannot be asked."""

    def __init__(self, node: str, error: GodwitError) -> None:
        super().__init__(
            "REBUILD_INCOMPLETE",
            f"node {node} cannot be asked: {error.reason}: {error.message}",
            hint=f"start its agent; or leave it out with --without {node}: when it comes back, the"
            " store is in doubt again",
            metadata={"node": node},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rebuild did."""

    incarnation: str
    nodes: tuple[str, ...]
    """Whose journals were merged."""
    vm_count: int
    notes: tuple[str, ...]
    """What changed, for people."""


async def rebuild(
    store: Store,
    open_pool: Callable[[str], AgentPool],
    *,
    without: Collection[str] = (),
    now_ns: int,
) -> Report:
    """Merge the journals of all nodes but those in `without`. `open_pool` takes an incarnation.

    Raises:
        RebuildIncompleteError: a node does not answer, or its journal cannot be read.
        RebuildConflictError: journals contradict each other.
    """
    nodes = [row for row in await store.fleet.nodes() if row.name not in without]
    async with _pool(open_pool, store.incarnation, nodes) as pool:
        for node in nodes:
            with _asking(node.name):
                await pool.get(node.name).hello()
    await store.identity.renew("a rebuild was begun and has not ended: run it again")
    found: dict[str, dict[str, pb.Evidence]] = {}
    async with _pool(open_pool, store.incarnation, nodes) as pool:
        for node in nodes:
            with _asking(node.name):
                await pool.get(node.name).hello(adopt_store=True)
        for node in nodes:
            with _asking(node.name):
                vms = await pool.get(node.name).list_vms()
            found[node.name] = {each.vm_id: each for each in vms}
        known = await _known(store, pool, found, frozenset(without))
    merged = [merge(each, now_ns=now_ns) for each in known]
    await _write(store, known, merged)
    return Report(
        incarnation=store.incarnation,
        nodes=tuple(node.name for node in nodes),
        vm_count=len(merged),
        notes=tuple(note for each in merged for note in each.notes),
    )


@contextlib.asynccontextmanager
async def _pool(
    open_pool: Callable[[str], AgentPool], incarnation: str, nodes: list[NodeRow]
) -> AsyncIterator[AgentPool]:
    pool = open_pool(incarnation)
    try:
        for node in nodes:
            pool.put(node.name, node.agent_address)
        yield pool
    finally:
        await pool.close()


@contextlib.contextmanager
def _asking(node: str) -> Iterator[None]:
    try:
        yield
    except GodwitError as error:
        raise RebuildIncompleteError(node, error) from error


async def _known(
    store: Store,
    pool: AgentPool,
    found: dict[str, dict[str, pb.Evidence]],
    silent: frozenset[str],
) -> list[Known]:
    vms = {vm.vm_id: vm for vm in await store.fleet.vms()}
    last_epochs = await store.fleet.last_epochs()
    migrations: dict[str, dict[str, MigrationRow]] = {}
    for row in await rebuilt.all_migrations(store.database):
        migrations.setdefault(row.vm_id, {})[row.migration_id] = row
    for vm in vms.values():
        here = found.get(vm.node)
        if here is not None and vm.vm_id not in here:
            # Not listed is not unknown: a record that cannot be read is not listed either.
            with _asking(vm.node):
                await pool.get(vm.node).describe(vm.vm_id)
    seen = {vm_id for here in found.values() for vm_id in here}
    return [
        Known(
            vm_id=vm_id,
            vm=vms.get(vm_id),
            last_epoch=last_epochs.get(vm_id, 0),
            migrations=migrations.get(vm_id, {}),
            evidence=tuple(here[vm_id] for here in found.values() if vm_id in here),
            silent=silent,
        )
        for vm_id in sorted(seen | set(vms) | set(last_epochs))
    ]


async def _write(store: Store, known: list[Known], merged: list[Merged]) -> None:
    pairs = list(zip(known, merged, strict=True))
    await rebuilt.write(
        store.database,
        vms={each.vm_id: out.vm for each, out in pairs},
        last_epochs={each.vm_id: out.last_epoch for each, out in pairs},
        migrations=[row for out in merged for row in out.migrations],
    )
    store.identity.in_doubt = ""
