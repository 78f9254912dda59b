# SPDX-License-Identifier: Apache-2.0
"""After a reload exactly the good records are in force; what is unchanged was not touched."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import UnavailableError
from services.page_server.images import ImageTable, this_boot_id
from services.pagecore.api import ImageState, ServeImage
from services.pagecore.fake import FakePageCore, FakePageServer
from tests.unit.page_server.conftest import Node


class Recorder(FakePageServer):
    """Notes the puts."""

    def __init__(self) -> None:
        super().__init__(1)
        self.puts: list[tuple[str, int]] = []

    def put_image(self, image: ServeImage) -> None:
        self.puts.append((image.image_id, image.generation))
        super().put_image(image)


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def server() -> Recorder:
    return Recorder()


@pytest.fixture
def table(node: Node, server: Recorder) -> Iterator[ImageTable]:
    before = open_fds()
    table = ImageTable(server, node.images_dir, boot_id=this_boot_id())
    yield table
    table.close()
    assert not server.images
    assert open_fds() == before, "a descriptor of a guest's memory leaked"


def test_records_come_change_and_go(node: Node, server: Recorder, table: ImageTable) -> None:
    ram = node.make_ram()
    path = node.write(node.fields(ram))
    other = node.write(node.fields(node.make_ram("other"), image_id="db.1"))
    assert [record.image_id for record in table.reload().in_force] == ["db.1", "web.1"]
    node.write(node.fields(ram, generation=2, state="frozen"))
    table.reload()
    assert server.images["web.1"].state == ImageState.FROZEN
    assert server.puts == [("db.1", 1), ("web.1", 1), ("web.1", 2)], "db.1 was left alone"
    other.unlink()
    assert [record.image_id for record in table.reload().in_force] == ["web.1"]
    assert set(server.images) == {"web.1"}
    path.unlink()
    assert table.reload().in_force == ()


def test_a_bad_record_does_not_hinder_the_others(
    node: Node, server: Recorder, table: ImageTable
) -> None:
    ram = node.make_ram()
    node.write(node.fields(ram))
    node.write(node.fields(ram, image_id="old", boot_id="00000000-0000-0000-0000-000000000000"))
    node.write(node.fields(ram, image_id="wrong-inode", inode=ram.stat().st_ino + 1))
    node.write(node.fields(ram, image_id="malformed", epoch=0))
    big = {"gpa": 0, "size_bytes": 1 << 30, "file_offset": 0, "page_size_bytes": 4096}
    node.write(node.fields(ram, image_id="too-long", regions=[big]))
    reloaded = table.reload()
    assert [record.image_id for record in reloaded.in_force] == ["web.1"]
    assert set(reloaded.refused) == {"old", "wrong-inode", "malformed", "too-long"}
    assert "boot" in reloaded.refused["old"]
    assert "inode" in reloaded.refused["wrong-inode"]
    assert "epoch" in reloaded.refused["malformed"]
    assert os.strerror(errno.EOVERFLOW) in reloaded.refused["too-long"]


def test_a_record_that_turns_bad_withdraws_its_image(
    node: Node, server: Recorder, table: ImageTable
) -> None:
    """What cannot be read may say that the guest runs again."""
    path = node.write(node.fields(node.make_ram(), state="frozen"))
    table.reload()
    path.write_text("{")
    assert "web.1" in table.reload().refused
    assert not server.images


def test_a_core_that_refuses_withdraws_the_old_record(
    node: Node, server: Recorder, table: ImageTable
) -> None:
    ram = node.make_ram()
    node.write(node.fields(ram))
    table.reload()
    node.write(node.fields(ram, generation=2))
    server.put_errors["web.1"] = errno.ENOMEM
    assert "web.1" in table.reload().refused
    assert not server.images


def test_a_served_image_outlives_the_name_of_its_file(
    node: Node, server: Recorder, table: ImageTable
) -> None:
    """The VMM behind /proc/PID/fd is killed by the seal; its memory is still needed."""
    ram = node.make_ram()
    node.write(node.fields(ram, state="frozen"))
    inode = ram.stat().st_ino
    table.reload()
    ram.unlink()
    assert not table.reload().refused
    fields = node.fields(node.make_ram(), state="frozen", generation=2) | {"inode": inode}
    node.write(fields)
    assert not table.reload().refused
    assert server.images["web.1"].generation == 2
    assert os.fstat(server.images["web.1"].ram_fd).st_ino == inode


def test_another_file_replaces_the_memory(node: Node, server: Recorder, table: ImageTable) -> None:
    node.write(node.fields(node.make_ram()))
    table.reload()
    other = node.make_ram("other")
    node.write(node.fields(other, epoch=9))
    table.reload()
    assert os.fstat(server.images["web.1"].ram_fd).st_ino == other.stat().st_ino


def test_a_directory_that_cannot_be_read_changes_nothing(
    node: Node, server: Recorder, table: ImageTable
) -> None:
    node.write(node.fields(node.make_ram()))
    table.reload()
    node.images_dir.rename(node.images_dir.with_name("away"))
    with pytest.raises(UnavailableError, match="IMAGES_DIR_UNREADABLE"):
        table.reload()
    assert set(server.images) == {"web.1"}


def test_only_frozen_images_that_are_read_are_needed(
    node: Node, server: Recorder, table: ImageTable
) -> None:
    ram = node.make_ram()
    node.write(node.fields(ram))
    node.write(node.fields(ram, image_id="idle", state="frozen"))
    node.write(node.fields(ram, image_id="read", state="frozen"))
    table.reload()
    server.streams.update({"web.1": 2, "read": 3})
    assert table.needed_by() == {"read": 3}


def test_the_fake_core_is_what_the_table_was_tested_with() -> None:
    assert isinstance(FakePageCore().create_page_server(host="", port=0), FakePageServer)
