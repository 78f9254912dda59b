# SPDX-License-Identifier: Apache-2.0
"""The agent's arrival engine for one VMM, for benchmarks: demand lane only, no Python in the path.

    python -m tests.bench.engine SOCKET PAGE_SERVER_PORT PAGE_MAP

Prints a line when it listens; goes when the VMM does.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from services.common.vm_spec import PAGE_BYTES
from services.fault_agent.handoff import FD_COUNT_MAX, MESSAGE_LEN_MAX, Expected, accept
from services.pagecore.api import Arrival, ArrivalConfig
from services.pagecore.native import NativePageCore
from tests.bench.serve import GENERATION, IMAGE_ID


def _arm(message: bytes, fds: list[int], port: int, page_map: str) -> Arrival:
    said = json.loads(message)
    ram_fd = os.dup(fds[said["fds"].index("memory")])
    status = os.fstat(ram_fd)
    expected = Expected(
        pid=said["pid"],
        memory=(status.st_dev, status.st_ino),
        memory_bytes=status.st_size,
        vcpu_count=said["vcpu_count"],
    )
    faults = accept(message, fds, expected)
    arrival = NativePageCore().create_arrival(
        ArrivalConfig(
            page_size_bytes=PAGE_BYTES,
            epoch=2,
            page_map_path=page_map,
            session_id="bench",
            image_id=IMAGE_ID,
            page_host="127.0.0.1",
            page_port=port,
            uffds=faults.uffds,
            ram_fd=ram_fd,
            regions=faults.regions,
            exit_channel_fd=faults.exit_channel_fd,
            exit_doorbell_fd=faults.exit_doorbell_fd,
            install_method=faults.install_method,
        )
    )
    arrival.start()
    arrival.open_gate(GENERATION)
    return arrival


def main() -> None:
    """Serve one hand-off."""
    path, port, page_map = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print("listening", flush=True)
        connection, _ = listener.accept()
    message, fds, _, _ = socket.recv_fds(connection, MESSAGE_LEN_MAX, FD_COUNT_MAX)
    arrival = _arm(message, fds, port, page_map)
    while connection.recv(1):
        pass
    arrival.close()


if __name__ == "__main__":
    main()
