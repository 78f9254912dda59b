# SPDX-License-Identifier: Apache-2.0
"""The demo of a fleet: a node is drained and filled again, within limits, and every guest proved.

What is under way at a time is counted here, from what each migration says of its own times, not
from what the orchestrator says of its limits.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path

from godwit import operations, schedule
from godwit.calls import Call, get_node
from godwit.client import AsyncClient
from godwit.errors import GodwitClientError
from godwit.models import Migration
from godwit.operations import Operation, Plan

from services.common.errors import DeadlineExceededError, GodwitError
from services.demo.cluster import Cluster, running_cluster
from services.demo.microvm_guest import MicrovmGuest
from services.demo.microvm_run import microvm_spec
from services.demo.microvm_verdict import MicrovmSetup, judge_microvm
from services.demo.moves import report_of
from services.demo.options import MIB, Narrator, Options
from services.demo.verdict import MigrationReport
from services.fault_agent.drivers.microvm import PROGRAM

OPERATION_S_MAX = 600.0
_POLL_S = 0.2
DRAINED = "a"
LIMITS = {"cluster": 4, "node-out": 2, "node-in": 1}
"""Small, so that they hold something here."""
BACK_LIMITS = {"node-out": 1, "node-in": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """How large it is.

    Attributes:
        nodes: 2..26, named a, b, ...
        vms: half of them on node a, which is drained.
        options: of the guests, and of the run.
    """

    nodes: int = 4
    vms: int = 12
    options: Options = field(
        default_factory=lambda: Options(memory_bytes=64 * MIB, workload_mib=4, dirty_rate=200)
    )


@dataclass(slots=True)
class _Course:
    guests: dict[str, MicrovmGuest] = field(default_factory=dict)
    reports: dict[str, list[MigrationReport]] = field(default_factory=dict)
    legs: list[dict[str, object]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


async def run_fleet(fleet: FleetOptions, narrator: Narrator, directory: Path) -> dict[str, object]:
    """Start the fleet, drain node a, fill it again; the report.

    Raises:
        GodwitError: what keeps it from being set up.
        GodwitClientError: the orchestrator refused to start a guest.
    """
    spec = await microvm_spec(fleet.options, narrator)
    names = [chr(ord("a") + index) for index in range(fleet.nodes)]
    narrator.step(f"cluster: an orchestrator and {len(names)} nodes, each part a process")
    course = _Course()
    async with (
        running_cluster(directory / "cluster", node_names=names) as cluster,
        AsyncClient(cluster.rest_url) as client,
    ):
        narrator.step(
            f"guests: {fleet.vms} start, and verify {fleet.options.workload_mib} MiB each"
        )
        for index, node in enumerate(homes(names, fleet.vms)):
            vm_id = f"vm-{index}"
            named = spec.model_copy(update={"vm_id": vm_id})
            guest = await MicrovmGuest.start(named, node, cluster=cluster, client=client)
            course.guests[vm_id], course.reports[vm_id] = guest, []
        try:
            await _travel(cluster, client, narrator, course)
        except (GodwitClientError, GodwitError) as error:
            course.trouble.append(str(error))
    return _report(fleet, spec.accel, course)


def homes(names: Sequence[str], vms: int) -> list[str]:
    """The node of each VM: half of them on the first, the others dealt out."""
    others = names[1:]
    return [others[index // 2 % len(others)] if index % 2 else names[0] for index in range(vms)]


async def _travel(
    cluster: Cluster, client: AsyncClient, narrator: Narrator, course: _Course
) -> None:
    await _prove(course)
    before = {vm_id: guest.node for vm_id, guest in course.guests.items()}
    await client.send(schedule.set_limits(LIMITS))
    planned = (await client.send(operations.drain(DRAINED, {"dry_run": True}))).value
    assert isinstance(planned, Plan)
    narrator.step(f"plan: {len(planned.steps)} moves in {planned.waves} waves")
    course.trouble += [
        f"plan: {each.vm_id} cannot go: {each.reason}" for each in planned.impossible
    ]
    if not await _operate(client, narrator, course, operations.drain(DRAINED), LIMITS):
        return
    left = await _left_on(DRAINED, cluster, client)
    course.trouble += [f"after the drain {DRAINED} still has {each}" for each in left]
    await client.send(schedule.set_limits(BACK_LIMITS))
    limits = LIMITS | BACK_LIMITS
    if not await _operate(client, narrator, course, operations.undrain(DRAINED), limits):
        return
    course.trouble += [
        f"{vm_id} was on {before[vm_id]} and is on {guest.node}"
        for vm_id, guest in course.guests.items()
        if guest.node != before[vm_id]
    ]


async def _operate(
    client: AsyncClient,
    narrator: Narrator,
    course: _Course,
    call: Call[operations.Begun],
    limits: dict[str, int],
) -> bool:
    """Begin an operation, follow it, prove every guest. False: it did not succeed."""
    begun = (await client.send(call)).value
    assert isinstance(begun, Operation)
    narrator.step(f"{begun.kind} of node {begun.node}: {sum((begun.counts or {}).values())} VMs")
    done = await _followed(client, narrator, begun)
    moved = [each for each in done.vms if each.state == "moved"]
    migrations = [await client.migration(each.migration_id) for each in moved]
    most = most_at_once(migrations)
    course.trouble += exceeded(most, limits)
    for each, migration in zip(moved, migrations, strict=True):
        course.guests[each.vm_id].was_moved(each.destination_node)
        course.reports[each.vm_id].append(report_of(migration))
    took = done.ended_at and done.created_at and (done.ended_at - done.created_at).total_seconds()
    course.legs.append(
        {
            "kind": done.kind,
            "node": done.node,
            "state": done.state,
            "moved": len(moved),
            "total_s": round(took or 0.0, 3),
            "pause_ms_max": max((round(m.pause_ns / 1e6, 3) for m in migrations), default=0.0),
            "most_at_once": dict(sorted(most.items())),
            "limits": limits,
        }
    )
    if done.state != "succeeded":
        course.trouble.append(f"{done.kind} {done.state}: {done.reason}: {done.message}")
        return False
    narrator.step(f"proof: all {len(course.guests)} guests verify every page")
    await _prove(course)
    return True


async def _followed(client: AsyncClient, narrator: Narrator, begun: Operation) -> Operation:
    said = ""
    try:
        async with asyncio.timeout(OPERATION_S_MAX):
            while True:
                now = (await client.send(operations.get_operation(begun.operation_id))).value
                counts = now.counts or {}
                line = ", ".join(f"{counts[state]} {state}" for state in sorted(counts))
                if line != said and not now.has_ended:
                    narrator.step(f"  {line}")
                    said = line
                if now.has_ended:
                    return now
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise DeadlineExceededError(
            "OPERATION_STALLED", f"{begun.kind} is not over after {OPERATION_S_MAX:g} s"
        ) from None


async def _prove(course: _Course) -> None:
    """Every guest verifies its memory; one after the other, for the machine is small."""
    for guest in course.guests.values():
        await guest.look_again()


async def _left_on(node: str, cluster: Cluster, client: AsyncClient) -> list[str]:
    """What a drained node still has, by the store and by its own disk and memory."""
    parts = cluster.nodes[node]
    images = [path.name for path in (parts.state_dir / "images").glob("*.json")]
    memory = [path.name for path in parts.ram_dir.iterdir()]
    vms = list((await client.send(get_node(node))).value.vm_ids)
    return [*vms, *(f"image {name}" for name in images), *(f"memory {name}" for name in memory)]


def most_at_once(migrations: Sequence[Migration]) -> Counter[str]:
    """How many were under way at the same moment, at most, by limit.

    From VALIDATING, which comes after admission, until the end: a part of the time in which each
    held its tokens, so that more than a limit is a proof that it was exceeded.
    """
    edges: list[tuple[datetime, int, list[str]]] = []
    for each in migrations:
        began = next((t.at for t in each.transitions if t.phase == "validating"), None)
        if began is None or each.ended_at is None:
            continue
        keys = ["cluster", f"node-out:{each.source_node}", f"node-in:{each.destination_node}"]
        edges += [(began, 1, keys), (each.ended_at, -1, keys)]
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for _at, change, keys in sorted(edges, key=lambda edge: (edge[0], edge[1])):
        for key in keys:
            now[key] += change
            most[key] = max(most[key], now[key])
    return most


def exceeded(most: Counter[str], limits: dict[str, int]) -> list[str]:
    """Limits that were, in words."""
    return [
        f"limit {key} exceeded: {count}/{limits[key.partition(':')[0]]}"
        for key, count in sorted(most.items())
        if count > limits[key.partition(":")[0]]
    ]


def _report(fleet: FleetOptions, accel: str, course: _Course) -> dict[str, object]:
    verified, corrupt, doubled = 0, 0, 0
    reasons = list(course.trouble)
    for vm_id, guest in course.guests.items():
        judged = _judged(guest, course.reports[vm_id])
        told = judged["reasons"]
        assert isinstance(told, list)
        reasons += [f"{vm_id}: {reason}" for reason in told]
        verified += int(str(judged["pages_verified"]))
        corrupt += int(str(judged["corrupt_pages"]))
        doubled += int(str(judged["doubled_beats"]))
    if len(course.legs) < 2:
        reasons.append("it was not drained and filled again")
    return {
        "vmm": f"{PROGRAM} {metadata.version('godwit')}",
        "accel": accel,
        "nodes": fleet.nodes,
        "vms": fleet.vms,
        "operations": course.legs,
        "moves": sum(len(reports) for reports in course.reports.values()),
        "pages_verified": verified,
        "corrupt_pages": corrupt,
        "doubled_beats": doubled,
        "reasons": reasons,
        "verdict": "failed" if reasons else "ok",
    }


def _judged(guest: MicrovmGuest, reports: list[MigrationReport]) -> dict[str, object]:
    """By what it said itself. One that never moved only had to stay whole."""
    assert guest.spec.microvm is not None
    setup = MicrovmSetup(
        vmm=PROGRAM,
        guest=guest.vm_id,
        memory_bytes=guest.spec.memory_bytes,
        page_count=guest.page_count,
        vcpus=guest.spec.vcpus,
        fault_backend=guest.spec.microvm.fault_backend,
    )
    judged = judge_microvm(setup, guest.stays, reports)
    if reports:
        return judged
    told = judged["reasons"]
    assert isinstance(told, list)
    verified = min((int(stay.sweep.get("pages_verified", 0)) for stay in guest.stays), default=0)
    return judged | {"reasons": told[1:], "pages_verified": verified}
