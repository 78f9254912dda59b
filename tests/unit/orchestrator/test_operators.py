# SPDX-License-Identifier: Apache-2.0
"""What a person can order, and what is refused whoever orders it (docs/runbooks)."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import NotFoundError
from tests.harness.fake_fleet import VM, FakeFleet, eventually


async def order(fleet: FakeFleet, migration_id: str, verb: str, **body: Any) -> httpx.Response:
    return await fleet.post(f"/v1/migrations/{migration_id}:{verb}", body)


async def refusal(fleet: FakeFleet, migration_id: str, verb: str, **body: Any) -> str:
    """Its reason; nothing is changed by it."""
    before = await fleet.migration(migration_id)
    answer = await order(fleet, migration_id, verb, **body)
    assert answer.status_code == 409, answer.text
    after = await fleet.migration(migration_id)
    assert (after["phase"], after["epoch"]) == (before["phase"], before["epoch"])
    return str(answer.json()["reason"])


def glass(epoch: int, **fields: Any) -> dict[str, Any]:
    values = {"epoch": epoch, "fenced_vm_id": VM, "operator": "ada", "because": "pdu 4 is off"}
    return values | fields


async def stuck(fleet: FakeFleet) -> dict[str, Any]:
    """The destination's VMM died after the guest was let run."""
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    fleet.b.kill_vmm(VM)
    found: dict[str, Any] = await fleet.in_phase(migration_id, "needs_attention")
    assert found["reason"] == "DESTINATION_VMM_DEAD"
    return found


async def unanswered(fleet: FakeFleet) -> dict[str, Any]:
    """COMMITTED, and the destination has gone before anybody knows whether the guest ran there."""
    gate = fleet.b.hold("Activate")
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    await fleet.b.kill()
    found: dict[str, Any] = await fleet.until(
        migration_id, lambda each: each["phase"] == "committed" and "UNREACH" in each["reason"]
    )
    return found


async def test_recover_says_what_each_node_can_prove(fleet: FakeFleet) -> None:
    found = await stuck(fleet)
    answer = (await order(fleet, found["migration_id"], "recover")).json()
    assert answer["migration"]["phase"] == "needs_attention"
    text = "\n".join(answer["findings"])
    assert "source a: sealed" in text
    assert "destination b: arrived, VMM dead" in text
    assert "activating" in text
    assert "DESTINATION_VMM_DEAD" in text


async def test_recover_does_at_once_what_is_safe(fleet: FakeFleet) -> None:
    """The destination is back, and its guest never ran: it goes back now, not at the next look."""
    found = await unanswered(fleet)
    text = (await order(fleet, found["migration_id"], "recover")).json()["findings"]
    assert any("b does not answer" in line for line in text)
    fleet.b.kill_vmm(VM)
    await fleet.b.start()
    await order(fleet, found["migration_id"], "recover")
    ended = await fleet.ended(found["migration_id"])
    assert ended["phase"] == "returned"
    assert fleet.world.owners(VM) == ["a"]


async def test_abandon_frees_both_nodes_and_the_id(fleet: FakeFleet) -> None:
    found = await stuck(fleet)
    migration_id, epoch = found["migration_id"], found["epoch"]
    answer = await order(fleet, migration_id, "abandon", epoch=epoch, confirm=True)
    assert answer.status_code == 200, answer.text
    lost = answer.json()
    assert (lost["phase"], lost["reason"], lost["decision"]) == ("lost", "ABANDONED", "lost")

    async def forgotten() -> bool:
        try:
            await fleet.vm()
        except NotFoundError:
            return True
        return False

    async def freed() -> bool:
        records = [agent.records[VM] for agent in (fleet.a, fleet.b)]
        return all(each.role == pb.VM_ROLE_GONE and not each.memory for each in records)

    await eventually(forgotten)
    await eventually(freed)
    await fleet.start_vm()
    assert fleet.world.owners(VM) == ["a"]
    assert fleet.world.broken == []


async def test_abandon_is_refused_where_a_guest_could_be_lost(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    running = await fleet.in_phase(migration_id, "postcopy")
    epoch = running["epoch"]
    assert await refusal(fleet, migration_id, "abandon", epoch=epoch, confirm=True) == "NOT_STUCK"
    fleet.b.kill_vmm(VM)
    await fleet.in_phase(migration_id, "needs_attention")
    orders: dict[str, Any] = {"epoch": epoch}
    assert await refusal(fleet, migration_id, "abandon", **orders) == "NOT_CONFIRMED"
    orders |= {"epoch": epoch + 1, "confirm": True}
    assert await refusal(fleet, migration_id, "abandon", **orders) == "EPOCH_MISMATCH"
    await fleet.b.kill()
    orders |= {"epoch": epoch}
    assert await refusal(fleet, migration_id, "abandon", **orders) == "DESTINATION_UNREACHABLE"
    await fleet.b.start()
    answer = await order(fleet, migration_id, "abandon", **orders)
    assert answer.status_code == 200
    assert await refusal(fleet, migration_id, "abandon", **orders) == "ALREADY_ENDED"


async def test_abandon_ends_a_guest_whose_memory_is_gone(fleet: FakeFleet) -> None:
    """It runs on what it has and waits for ever on the rest: a person may end it."""
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    await fleet.a.reboot()
    fleet.b.fetching.set()
    found = await fleet.in_phase(migration_id, "needs_attention")
    assert found["reason"] == "SOURCE_MEMORY_GONE"
    answer = await order(fleet, migration_id, "abandon", epoch=found["epoch"], confirm=True)
    assert answer.status_code == 200, answer.text

    async def ended() -> bool:
        return fleet.world.owners(VM) == []

    await eventually(ended)


async def test_broken_glass_gives_the_guest_back_and_says_who_did_it(fleet: FakeFleet) -> None:
    found = await unanswered(fleet)
    migration_id = found["migration_id"]
    answer = await order(fleet, migration_id, "break-glass", **glass(found["epoch"]))
    assert answer.status_code == 200, answer.text
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("returned", "GLASS_BROKEN")
    said = [each["message"] for each in ended["transitions"] if each["phase"] == "giving_back"]
    assert "ada gave the guest back to a" in said[0]
    assert "pdu 4 is off" in said[0]
    assert fleet.world.owners(VM) == ["a"]
    # The node comes back with the guest loaded and paused: it is fenced, and starts nothing.
    assert fleet.b.records[VM].vmm == pb.VMM_STATE_PAUSED
    await fleet.b.start()

    async def fenced() -> bool:
        record = fleet.b.records[VM]
        return (record.role, record.vmm) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)

    await eventually(fenced)
    assert fleet.b.records[VM].epoch_seen == ended["return_epoch"]
    assert fleet.world.owners(VM) == ["a"]
    assert fleet.world.broken == []


async def test_broken_glass_is_refused_where_it_would_double_or_age_a_guest(
    fleet: FakeFleet,
) -> None:
    found = await stuck(fleet)
    migration_id, epoch = found["migration_id"], found["epoch"]
    verb = "break-glass"
    assert await refusal(fleet, migration_id, verb, **glass(epoch)) == "GUEST_RAN"
    assert await refusal(fleet, migration_id, verb, **glass(epoch + 1)) == "EPOCH_MISMATCH"
    other = glass(epoch, fenced_vm_id="vm-2")
    assert await refusal(fleet, migration_id, verb, **other) == "NOT_CONFIRMED"
    await fleet.b.kill()
    assert await refusal(fleet, migration_id, verb, **glass(epoch)) == "GUEST_RAN"
    answer = await order(fleet, migration_id, verb, **glass(epoch, because=" "))
    assert answer.status_code == 422


async def test_broken_glass_needs_a_source_that_has_the_guest(fleet: FakeFleet) -> None:
    fleet.a.keeps_states = False
    found = await unanswered(fleet)
    assert fleet.a.records[VM].role == pb.VM_ROLE_SEALED
    refused = await refusal(fleet, found["migration_id"], "break-glass", **glass(found["epoch"]))
    assert refused == "GUEST_GONE"


@pytest.mark.parametrize("verb", ["recover", "abandon", "break-glass"])
async def test_an_unknown_migration_is_not_found(fleet: FakeFleet, verb: str) -> None:
    body = glass(1) if verb == "break-glass" else {"epoch": 1, "confirm": True}
    answer = await order(fleet, "01JNONE", verb, **({} if verb == "recover" else body))
    assert answer.status_code == 404
