# SPDX-License-Identifier: Apache-2.0
"""What is served: the image records in force and the memory that they hold open."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import FailedPreconditionError, GodwitError, UnavailableError
from services.page_server.ram_file import open_ram
from services.page_server.records import ImageRecord, read_record, record_path, record_paths
from services.pagecore.api import PageServer

log = logging.getLogger(__name__)

BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """What a reload found."""

    in_force: tuple[ImageRecord, ...]
    """By image id."""
    refused: Mapping[str, str]
    """Why a record is not served, by image id (the file's name without its suffix)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    record: ImageRecord
    ram_fd: int
    """Ours. Kept so that a new generation needs no path: the VMM behind /proc/PID may be gone."""


class ImageTable:
    """Makes the page core serve exactly what the records say.

    Threads: reloads may come from any thread and run one at a time. That outlives the call that
    asked: cancelling it does not stop its thread.
    """

    def __init__(self, server: PageServer, directory: Path, *, boot_id: str) -> None:
        self._server = server
        self._directory = directory
        self._boot_id = boot_id
        self._served: dict[str, _Served] = {}
        self._lock = threading.Lock()
        self.open_ram: Callable[[str, int], int] = open_ram
        """How memory is opened; ram_file.open_ram, or what is left of it. Set it before threads."""

    def reload(self, image_id: str = "") -> Reloaded:
        """Read every record again, or that of one image; in force on return.

        Blocks for the reading of small files.

        A record that is refused is withdrawn even where an older one of the same image was served:
        what cannot be read may say that the guest runs again, and then the old one is a lie.

        Raises:
            UnavailableError: IMAGES_DIR_UNREADABLE; nothing has changed.
        """
        with self._lock:
            known = {image_id} if image_id else set(self._served)
            wanted, refused = self._read(image_id)
            for name in self._served.keys() & known - wanted.keys():
                self._withdraw(name)
            for name, record in wanted.items():
                try:
                    self._put(record)
                except GodwitError as error:
                    refused[name] = f"{error.message}{f' ({error.hint})' * bool(error.hint)}"
                    self._withdraw(name)
            for name, reason in refused.items():
                log.error("image %s is not served: %s", name, reason)
            served = self._served.keys() & known if image_id else self._served.keys()
            in_force = (self._served[name].record for name in sorted(served))
            return Reloaded(in_force=tuple(in_force), refused=refused)

    def _read(self, image_id: str) -> tuple[dict[str, ImageRecord], dict[str, str]]:
        wanted: dict[str, ImageRecord] = {}
        refused: dict[str, str] = {}
        try:
            paths = (
                [record_path(self._directory, image_id)]
                if image_id
                else record_paths(self._directory)
            )
        except OSError as error:
            raise UnavailableError("IMAGES_DIR_UNREADABLE", str(error)) from error
        for path in paths:
            try:
                record = read_record(path)
                if record.boot_id != self._boot_id:
                    raise FailedPreconditionError(
                        "BOOT_ID_DIFFERS",
                        f"boot_id {record.boot_id} is not this boot's ({self._boot_id}):"
                        " the memory is gone",
                    )
            except FileNotFoundError:
                continue  # withdrawn while we read
            except GodwitError as error:
                refused[path.stem] = error.message
            else:
                wanted[record.image_id] = record
        return wanted, refused

    def _put(self, record: ImageRecord) -> None:
        held = self._served.get(record.image_id)
        if held and held.record == record:
            return  # its streams go on untouched, whatever has become of the path
        same_memory = held and (held.record.ram_path, held.record.inode) == (
            record.ram_path,
            record.inode,
        )
        ram_fd = (
            held.ram_fd if held and same_memory else self.open_ram(record.ram_path, record.inode)
        )
        try:
            self._server.put_image(record.serve_image(ram_fd))
        except OSError as error:
            if not same_memory:
                os.close(ram_fd)
            raise FailedPreconditionError("IMAGE_REFUSED", str(error)) from error
        if held and not same_memory:
            os.close(held.ram_fd)
        self._served[record.image_id] = _Served(record=record, ram_fd=ram_fd)
        log.info(
            "image %s is served: epoch %d, generation %d, %s",
            record.image_id,
            record.epoch,
            record.generation,
            record.state,
        )

    def _withdraw(self, image_id: str) -> None:
        held = self._served.pop(image_id, None)
        if held is None:
            return
        self._server.remove_image(image_id)
        os.close(held.ram_fd)
        log.info("image %s is withdrawn", image_id)

    def in_force(self) -> tuple[ImageRecord, ...]:
        """The records that are served now."""
        with self._lock:
            return tuple(held.record for held in self._served.values())

    def needed_by(self) -> dict[str, int]:
        """Frozen images that somebody reads now, and on how many streams.

        Of these this process may hold a guest's only copy.
        """
        with self._lock:
            frozen = [name for name, held in self._served.items() if held.record.is_frozen]
            counts = {name: self._server.image_stream_count(name) for name in frozen}
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        """Withdraw everything."""
        with self._lock:
            for image_id in list(self._served):
                self._withdraw(image_id)


def this_boot_id() -> str:
    """The boot id of this machine."""
    return BOOT_ID_PATH.read_text().strip()
