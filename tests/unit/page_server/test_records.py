# SPDX-License-Identifier: Apache-2.0
"""A record is taken whole or refused whole, and the refusal names what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.page_server.ram_file import open_ram
from services.page_server.records import read_record, record_paths
from services.pagecore.api import ImageState
from tests.unit.page_server.conftest import PAGE, RAM_PAGE_COUNT, Node

GOOD_REGION = {"gpa": 0, "size_bytes": 8 * PAGE, "file_offset": 0, "page_size_bytes": PAGE}


def test_a_good_record_comes_through_whole(node: Node) -> None:
    regions = [GOOD_REGION, GOOD_REGION | {"gpa": 1 << 32, "file_offset": 8 * PAGE}]
    fields = node.fields(node.make_ram(), state="frozen", generation=3, regions=regions)
    record = read_record(node.write(fields))
    image = record.serve_image(ram_fd=9)
    assert (image.image_id, image.vm_id, image.epoch, image.generation) == ("web.1", "web", 7, 3)
    assert (image.state, image.inode, image.ram_fd) == (ImageState.FROZEN, fields["inode"], 9)
    assert [region.gpa for region in image.regions] == [0, 1 << 32]
    message = record.message()
    assert [region.region_id for region in message.regions] == [0, 1]
    assert (int(message.state), message.boot_id) == (2, fields["boot_id"])


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("unknown field", {"colour": "red"}, "colour"),
    ("text for a number", {"epoch": "7"}, "epoch"),
    ("a number with a point", {"generation": 1.0}, "generation"),
    ("epoch zero", {"epoch": 0}, "epoch"),
    ("generation zero", {"generation": 0}, "generation"),
    ("no inode", {"inode": 0}, "inode"),
    ("unknown state", {"state": "thawed"}, "state"),
    ("unset state", {"state": ""}, "state"),
    ("relative path", {"ram_path": "dev/shm/ram"}, "ram_path"),
    ("path in the id", {"image_id": "a b"}, "image_id"),
    ("no regions", {"regions": []}, "regions"),
    ("too many regions", {"regions": [GOOD_REGION] * 65}, "regions"),
    ("empty region", {"regions": [GOOD_REGION | {"size_bytes": 0}]}, "size_bytes"),
    ("negative offset", {"regions": [GOOD_REGION | {"file_offset": -PAGE}]}, "file_offset"),
    ("half a page", {"regions": [GOOD_REGION | {"size_bytes": PAGE + 1}]}, "multiple of 4096"),
    ("page of 8 KiB", {"regions": [GOOD_REGION | {"page_size_bytes": 8192}]}, "page_size_bytes"),
    ("overlap", {"regions": [GOOD_REGION, GOOD_REGION | {"gpa": PAGE}]}, "overlap"),
    ("beyond any file", {"regions": [GOOD_REGION | {"file_offset": 1 << 63}]}, "file_offset"),
]


@pytest.mark.parametrize(
    ("changes", "named"), [item[1:] for item in BAD_FIELDS], ids=[item[0] for item in BAD_FIELDS]
)
def test_a_bad_record_is_refused_by_name(node: Node, changes: dict[str, Any], named: str) -> None:
    path = node.write(node.fields(node.make_ram(), **changes))
    with pytest.raises(InvalidArgumentError) as caught:
        read_record(path)
    assert caught.value.reason == "RECORD_MALFORMED"
    assert named in caught.value.message


@pytest.mark.parametrize("field", ["boot_id", "epoch", "inode", "generation", "state", "ram_path"])
def test_every_field_is_needed(node: Node, field: str) -> None:
    fields = node.fields(node.make_ram())
    del fields[field]
    with pytest.raises(InvalidArgumentError, match=field):
        read_record(node.write(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\0", "{}" * 2, " " * (2 << 20)])
def test_what_is_no_record_is_refused(node: Node, text: str) -> None:
    path = node.images_dir / "x.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match="RECORD_MALFORMED"):
        read_record(path)


def test_the_file_name_is_the_image_id(node: Node) -> None:
    """Else withdrawing one file could leave its image served by another."""
    path = node.write(node.fields(node.make_ram()))
    other = path.rename(path.with_name("other.json"))
    with pytest.raises(InvalidArgumentError, match=r"other\.json"):
        read_record(other)


def test_half_written_files_are_not_records(node: Node) -> None:
    good = node.write(node.fields(node.make_ram()))
    (node.images_dir / ".web.2.json.new").write_text("{")
    (node.images_dir / "notes.txt").write_text("")
    assert record_paths(node.images_dir) == [good]


# --- the file behind it ---


def refused(path: Path | str, inode: int) -> str:
    with pytest.raises(FailedPreconditionError) as caught:
        open_ram(str(path), inode)
    assert caught.value.reason == "RAM_FILE_REFUSED"
    return caught.value.message


def test_memory_is_opened_for_reading_only(node: Node) -> None:
    ram = node.make_ram()
    fd = open_ram(str(ram), ram.stat().st_ino)
    assert os.pread(fd, PAGE, 0) == bytes(PAGE)
    assert not os.get_inheritable(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)


def test_a_memfd_is_reached_through_proc(node: Node) -> None:
    memfd = os.memfd_create("godwit-test", os.MFD_CLOEXEC)
    os.truncate(memfd, RAM_PAGE_COUNT * PAGE)
    path = f"/proc/{os.getpid()}/fd/{memfd}"
    inode = os.fstat(memfd).st_ino
    os.close(open_ram(path, inode))
    assert "inode" in refused(path, inode + 1)
    os.close(memfd)
    assert refused(path, inode)


def test_other_memory_under_the_same_name_is_refused(node: Node) -> None:
    ram = node.make_ram()
    inode = ram.stat().st_ino
    keep = os.open(ram, os.O_RDONLY)  # so that its inode number is not given out again
    ram.unlink()
    node.make_ram()
    assert str(inode) in refused(ram, inode)
    os.close(keep)


def test_links_devices_and_disks_are_refused(node: Node, tmp_path: Path) -> None:
    ram = node.make_ram()
    link = node.ram_dir / "link"
    link.symlink_to(ram)
    assert refused(link, ram.stat().st_ino)
    fifo = node.ram_dir / "fifo"
    os.mkfifo(fifo)
    assert "regular" in refused(fifo, fifo.stat().st_ino)
    assert "regular" in refused(node.ram_dir, node.ram_dir.stat().st_ino)
    assert refused(node.ram_dir / "missing", 1)


def test_files_that_are_not_memory_are_refused() -> None:
    other = Path("/proc/version")
    assert "not memory" in refused(other, other.stat().st_ino)
