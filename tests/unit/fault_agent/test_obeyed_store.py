# SPDX-License-Identifier: Apache-2.0
"""A node obeys one store: the first that commands it; later the one that a rebuild names (I2)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.fault_agent.fence import Command, Fence
from services.fault_agent.journal import Journal, Record
from services.fault_agent.obeyed_store import FILE, NOBODY, ObeyedStore
from services.fault_agent.vms import Vm


async def test_the_first_store_is_the_one(tmp_path: Path) -> None:
    """Durably: another one is refused by the next agent, too, and the refusal names the known."""
    store = ObeyedStore(tmp_path)
    await asyncio.gather(store.require("01A"), store.require("01A"))
    for obeyed in (store, ObeyedStore(tmp_path)):
        await obeyed.require("01A")
        await obeyed.require("")  # a caller of before incarnations
        with pytest.raises(FailedPreconditionError, match="01B") as refused:
            await obeyed.require("01B")
        assert refused.value.reason == "STORE_IN_DOUBT"
        assert refused.value.metadata == {"store_incarnation": "01A"}


async def test_two_first_stores_have_one_winner(tmp_path: Path) -> None:
    store = ObeyedStore(tmp_path)
    said = await asyncio.gather(store.require("01A"), store.require("01B"), return_exceptions=True)
    assert sum(each is None for each in said) == 1


async def test_a_rebuild_changes_it_for_good(tmp_path: Path) -> None:
    store = ObeyedStore(tmp_path)
    await store.require("01A")
    await store.adopt("01B")
    for obeyed in (store, ObeyedStore(tmp_path)):
        await obeyed.require("01B")
        with pytest.raises(FailedPreconditionError):
            await obeyed.require("01A")


@pytest.mark.parametrize("content", [b"", b"godwit-store 1 \n", b"godwit-store 1 01A", b"\xff\xfe"])
async def test_a_damaged_file_obeys_nobody(tmp_path: Path, content: bytes) -> None:
    """Fail closed, until a rebuild."""
    (tmp_path / FILE).write_bytes(content)
    store = ObeyedStore(tmp_path)
    assert store.incarnation == NOBODY
    with pytest.raises(FailedPreconditionError):
        await store.require("01A")
    await store.adopt("01A")
    await ObeyedStore(tmp_path).require("01A")


async def test_what_is_no_incarnation_is_not_obeyed(tmp_path: Path) -> None:
    store = ObeyedStore(tmp_path)
    for wrong in (NOBODY, "a b", "x" * 65):
        with pytest.raises(InvalidArgumentError):
            await store.adopt(wrong)
    assert not (tmp_path / FILE).exists()


async def test_another_stores_command_leaves_no_trace(tmp_path: Path) -> None:
    """Not even its epoch: it may be one that the true store has yet to issue."""
    store = ObeyedStore(tmp_path)
    journal = Journal(tmp_path)
    vm = Vm(Record(vm_id="vm-1", boot_id="boot"), journal=journal, store=store, boot_id="boot")
    async with vm.command(Fence(vm_id="vm-1", epoch=1, store_incarnation="01A"), Command.START):
        pass
    with pytest.raises(FailedPreconditionError, match="01B"):
        async with vm.command(Fence(vm_id="vm-1", epoch=9, store_incarnation="01B"), Command.STOP):
            pytest.fail("admitted")
    assert vm.record.epoch_seen == 1
