# SPDX-License-Identifier: Apache-2.0
"""Image records: what the page server beside this agent serves (ADR 3).

`<images_dir>/<image_id>.json` holds one image:

    {"image_id": "web-1.7.9", "vm_id": "web-1", "boot_id": "...", "epoch": 7, "inode": 1234,
     "generation": 2, "state": "frozen", "ram_path": "/dev/shm/...",
     "destination": "b.node.godwit", "destination_epoch": 9, "destination_key": "", "token_key": "",
     "regions": [{"gpa": 0, "size_bytes": N, "file_offset": 0, "page_size_bytes": 4096}, ...]}

The directory is the only truth; the page server is told to read it again and answers what is in
force. A record is gone when its file is.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from godwit.common.v1 import common_pb2
from godwit.page.v1 import image_admin_service_pb2, image_admin_service_pb2_grpc

from services.common import grpc_client
from services.common.errors import GodwitError, UnavailableError
from services.common.peer_tls import PeerTls
from services.fault_agent.drivers.api import MemoryRegion
from services.fault_agent.journal import Export, ExportState, Record

log = logging.getLogger(__name__)

RELOAD_S = 5.0
WITHDRAW_S = 1.0
"""A guest may be waiting to be resumed behind it."""

_STATES = {
    ExportState.LIVE: common_pb2.IMAGE_STATE_LIVE,
    ExportState.FROZEN: common_pb2.IMAGE_STATE_FROZEN,
}


class PageServerUnreachableError(UnavailableError):
    """The page server of this node does not answer, or does not serve what it was told to."""

    def __init__(self, message: str) -> None:
        super().__init__(
            "PAGE_SERVER_UNREACHABLE",
            message,
            hint="check that the page server of this node runs and reads the agent's --images-dir",
        )


def image_message(
    record: Record, export: Export, regions: Sequence[MemoryRegion]
) -> common_pb2.Image:
    """The image as the other node is told."""
    return common_pb2.Image(
        image_id=export.image_id,
        vm_id=record.vm_id,
        epoch=export.epoch,
        boot_id=record.boot_id,
        inode=record.ram_inode,
        generation=export.generation,
        state=_STATES[export.state],
        regions=[
            common_pb2.Region(
                region_id=index,
                gpa_bytes=region.gpa,
                size_bytes=region.size_bytes,
                page_size_bytes=region.page_size_bytes,
            )
            for index, region in enumerate(regions)
        ],
    )


def record_bytes(record: Record, export: Export, regions: Sequence[MemoryRegion]) -> bytes:
    """The file's content."""
    fields = {
        "image_id": export.image_id,
        "vm_id": record.vm_id,
        "boot_id": record.boot_id,
        "epoch": export.epoch,
        "inode": record.ram_inode,
        "generation": export.generation,
        "state": export.state.value,
        "ram_path": record.ram_path,
        "regions": [
            {
                "gpa": region.gpa,
                "size_bytes": region.size_bytes,
                "file_offset": region.file_offset,
                "page_size_bytes": region.page_size_bytes,
            }
            for region in regions
        ],
        "destination": export.destination,
        "destination_epoch": export.destination_epoch,
        "destination_key": export.destination_key,
        "token_key": export.token_key,
    }
    return json.dumps(fields, indent=1).encode() + b"\n"


class Images:
    """The records of a node, and the page server that serves them."""

    def __init__(
        self, directory: Path, page_server_control: str, tls: PeerTls | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._control = page_server_control
        self._channel = grpc_client.open_channel(page_server_control, tls)
        self._stub = image_admin_service_pb2_grpc.ImageAdminServiceStub(self._channel)
        # One reload at a time: an answer tells about the records that were there when it began.
        self._reloading = asyncio.Lock()
        self.page_address = ""
        """Where the page server listens, as it said last. Empty: it was never reached."""

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def publish(
        self, record: Record, export: Export, regions: Sequence[MemoryRegion]
    ) -> common_pb2.Image:
        """Make an image served exactly as the record says; in force on return.

        The record names memory of this boot, so that no record needs to outlive the boot.

        Raises:
            PageServerUnreachableError: nobody serves it now; a page server that starts later will.
        """
        path = self._path(export.image_id)
        # Renamed, so that the page server reads all of it or the one before. Not synced: it names
        # a boot and means nothing after it, and what a power cut leaves of it is refused.
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_bytes(record_bytes(record, export, regions))
        scratch.rename(path)
        served = await self.reload(export.image_id)
        image = image_message(record, export, regions)
        for candidate in served.images:
            if candidate.image_id == image.image_id:
                if candidate != image:
                    raise PageServerUnreachableError(
                        f"image {image.image_id} was written as {_short(image)},"
                        f" the page server serves {_short(candidate)}"
                    )
                return image
        why = [item.reason for item in served.refused_images if item.image_id == image.image_id]
        raise PageServerUnreachableError(
            f"image {image.image_id} is not served: {'; '.join(why) or 'no reason given'}"
        )

    async def withdraw(self, image_id: str) -> bool:
        """Remove a record. True: its image is not served any more. Idempotent.

        False: the page server did not answer and may serve it until it reads the records again.
        """
        self._path(image_id).unlink(missing_ok=True)
        try:
            await self.reload(timeout_s=WITHDRAW_S)
        except PageServerUnreachableError as error:
            log.warning("image %s is withdrawn, but %s", image_id, error)
            return False
        return True

    async def reload(
        self, image_id: str = "", *, timeout_s: float = RELOAD_S
    ) -> image_admin_service_pb2.ReloadImagesResponse:
        """Tell the page server to read the records, or one, and return what it serves of them now.

        Raises:
            PageServerUnreachableError: it did not answer.
        """
        async with self._reloading:
            try:
                answer = await grpc_client.call(
                    self._channel,
                    self._stub.ReloadImages,
                    image_admin_service_pb2.ReloadImagesRequest(image_id=image_id),
                    timeout_s=timeout_s,
                    connect_s=timeout_s,
                    peer=f"the page server's control port {self._control}",
                )
            except GodwitError as error:
                if error.reason == "RECORD_MALFORMED":
                    log.error("a record in %s: %s", self._directory, error.message)
                raise PageServerUnreachableError(error.message) from error
        self.page_address = answer.page_address
        return answer

    def _path(self, image_id: str) -> Path:
        return self._directory / f"{image_id}.json"


def _short(image: common_pb2.Image) -> str:
    state = common_pb2.ImageState.Name(image.state)
    return f"epoch {image.epoch} inode {image.inode} generation {image.generation} {state}"
