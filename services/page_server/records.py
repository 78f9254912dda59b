# SPDX-License-Identifier: Apache-2.0
"""Image records: the fault agent's word about which memory is served (ADR 3).

`<images_dir>/<image_id>.json`, one image a file. A record is taken whole or refused whole: a guess
about a guest's memory is worth less than a guest that waits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic
from godwit.common.v1 import common_pb2
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.common.errors import InvalidArgumentError
from services.pagecore.api import ImageState, ServeImage, ServeRegion

SUFFIX = ".json"
IMAGE_ID_PATTERN = "[A-Za-z0-9._-]{1,128}"
RECORD_LEN_MAX = 1 << 20
REGION_COUNT_MAX = 64
"""GW_SERVE_REGION_COUNT_MAX."""
_SIZE_MAX = (1 << 63) - 1

_Size = Annotated[int, Field(ge=0, le=_SIZE_MAX)]
_Counter = Annotated[int, Field(ge=1, le=(1 << 64) - 1)]

_KEY_PATTERN = r"^([0-9a-f]{64})?$"
_STATES = {"live": ImageState.LIVE, "frozen": ImageState.FROZEN}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RecordRegion(_Strict):
    """A region of the guest and where it lies in the RAM file."""

    gpa: _Size
    """Guest-physical address of its first byte."""
    size_bytes: Annotated[int, Field(gt=0, le=_SIZE_MAX)]
    file_offset: _Size
    """Of its first byte, in the RAM file. Bytes."""
    page_size_bytes: Literal[4096, 2097152]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("gpa", "size_bytes", "file_offset"):
            value = getattr(self, name)
            if value % self.page_size_bytes:
                raise ValueError(f"{name} {value} is not a multiple of {self.page_size_bytes}")
        return self


class ImageRecord(_Strict):
    """One image, complete."""

    image_id: str = Field(pattern=f"^{IMAGE_ID_PATTERN}$")
    vm_id: str = Field(min_length=1, max_length=63)
    boot_id: str = Field(min_length=1, max_length=64)
    """/proc/sys/kernel/random/boot_id of the boot in which the memory was filled."""
    epoch: _Counter
    inode: _Counter
    """Of the file behind `ram_path`: a file made anew under the same name is other memory."""
    generation: _Counter
    state: Literal["live", "frozen"]
    ram_path: str = Field(pattern=r"^/")
    """A file on tmpfs or hugetlbfs, or /proc/PID/fd/N of a memfd."""
    regions: Annotated[tuple[RecordRegion, ...], Field(min_length=1, max_length=REGION_COUNT_MAX)]
    """In image order: ascending, not overlapping."""
    destination: str = Field(default="", max_length=253)
    """With TLS: DNS name of the node that alone may read it; empty: any node."""
    destination_epoch: _Size = 0
    """Streams of an older epoch are refused."""
    destination_key: str = Field(default="", pattern=_KEY_PATTERN)
    """Hex; the key of the destination, good whatever its certificate says while it is frozen."""
    token_key: str = Field(default="", pattern=_KEY_PATTERN)
    """Hex; Ed25519 public key of who signs the tokens of readers; empty: none is asked for."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        end = 0
        for region in self.regions:
            if region.gpa < end:
                raise ValueError(f"regions overlap or are out of order at gpa {region.gpa:#x}")
            end = region.gpa + region.size_bytes
        return self

    @property
    def is_frozen(self) -> bool:
        """Whether what is read is final."""
        return self.state == "frozen"

    def serve_image(self, ram_fd: int) -> ServeImage:
        """The record as the page core takes it."""
        return ServeImage(
            image_id=self.image_id,
            vm_id=self.vm_id,
            boot_id=self.boot_id,
            epoch=self.epoch,
            inode=self.inode,
            generation=self.generation,
            state=_STATES[self.state],
            ram_fd=ram_fd,
            regions=tuple(
                ServeRegion(
                    gpa=region.gpa,
                    size_bytes=region.size_bytes,
                    file_offset=region.file_offset,
                    page_size_bytes=region.page_size_bytes,
                )
                for region in self.regions
            ),
            destination=self.destination,
            destination_epoch=self.destination_epoch,
            destination_key=bytes.fromhex(self.destination_key),
            token_key=bytes.fromhex(self.token_key),
        )

    def message(self) -> common_pb2.Image:
        """The record as it goes over the wire."""
        return common_pb2.Image(
            image_id=self.image_id,
            vm_id=self.vm_id,
            epoch=self.epoch,
            boot_id=self.boot_id,
            inode=self.inode,
            generation=self.generation,
            state=common_pb2.ImageState.ValueType(_STATES[self.state]),
            regions=[
                common_pb2.Region(
                    region_id=number,
                    gpa_bytes=region.gpa,
                    size_bytes=region.size_bytes,
                    page_size_bytes=region.page_size_bytes,
                )
                for number, region in enumerate(self.regions)
            ],
        )


def read_record(path: Path) -> ImageRecord:
    """Read one record.

    Raises:
        FileNotFoundError: it was removed meanwhile.
        InvalidArgumentError: RECORD_MALFORMED: what is wrong with it, field by field.
    """
    try:
        with path.open("rb") as file:
            text = file.read(RECORD_LEN_MAX + 1)
        if len(text) > RECORD_LEN_MAX:
            raise InvalidArgumentError("RECORD_MALFORMED", f"longer than {RECORD_LEN_MAX} bytes")
        record = ImageRecord.model_validate_json(text)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidArgumentError("RECORD_MALFORMED", f"cannot be read: {error}") from error
    except pydantic.ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'record'}: {item['msg']}"
            for item in error.errors()
        )
        raise InvalidArgumentError("RECORD_MALFORMED", wrong) from error
    if record.image_id != path.name.removesuffix(SUFFIX):
        raise InvalidArgumentError(
            "RECORD_MALFORMED", f"image_id: {record.image_id!r} in the file {path.name}"
        )
    return record


def record_path(directory: Path, image_id: str) -> Path:
    """Where the record of one image is, if there is one.

    Raises:
        InvalidArgumentError: FIELD_INVALID: no image can have that id.
    """
    if not re.fullmatch(IMAGE_ID_PATTERN, image_id):
        raise InvalidArgumentError("FIELD_INVALID", f"image_id {image_id!r} is none")
    return directory / f"{image_id}{SUFFIX}"


def record_paths(directory: Path) -> list[Path]:
    """The record files of `directory`, in order. What is being written has another name."""
    return sorted(
        path for path in directory.iterdir() if path.name.endswith(SUFFIX) and path.name != SUFFIX
    )
