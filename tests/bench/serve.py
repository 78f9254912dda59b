# SPDX-License-Identifier: Apache-2.0
"""A page server over one memory file, for benchmarks: prints its port, serves until killed."""

from __future__ import annotations

import os
import signal
import sys

from services.pagecore.api import ImageState, ServeImage, ServeRegion
from services.pagecore.native import NativePageCore

IMAGE_ID = "bench"
GENERATION = 1


def main() -> None:
    """Serve the file."""
    ram_fd = os.open(sys.argv[1], os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(ram_fd)
    region = ServeRegion(gpa=0, size_bytes=status.st_size, file_offset=0, page_size_bytes=4096)
    server = NativePageCore().create_page_server(host="127.0.0.1", port=0)
    server.put_image(
        ServeImage(
            image_id=IMAGE_ID,
            vm_id="bench",
            boot_id="bench",
            epoch=1,
            inode=status.st_ino,
            generation=GENERATION,
            state=ImageState.FROZEN,
            ram_fd=ram_fd,
            regions=[region],
        )
    )
    server.start()
    print(server.port, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
