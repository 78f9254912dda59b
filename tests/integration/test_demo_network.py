# SPDX-License-Identifier: Apache-2.0
"""The demo's network: taps join its bridge, every frame is seen, crashed runs leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from services.demo.network import RARP, Frame, FrameRecorder, demo_network, remove_stale
from services.fault_agent.drivers.tap import NAMESPACES, TapError, open_tap

pytestmark = pytest.mark.requires("tap", "netns", "root")

GUEST_MAC = "52:54:00:00:00:07"
CRASHING = """
import signal
from services.demo.network import demo_network
with demo_network() as network:
    print(network.netns, flush=True)
    signal.pause()
"""


def rarp(source: str) -> bytes:
    """An announcement as QEMU sends it, behind the virtio-net header that the tap wants."""
    return (
        bytes(10) + b"\xff" * 6 + bytes.fromhex(source.replace(":", "")) + b"\x80\x35" + bytes(46)
    )


def test_a_frame_is_seen_at_its_tap_at_its_time() -> None:
    """Goal: tell which VMM announced, and when. The stamp is the kernel's, not the reader's."""
    with demo_network() as network, FrameRecorder(network.netns) as recorder:
        taps = [open_tap(network.netns, network.bridge, f"tap{i}") for i in range(2)]
        try:
            before_ns = time.monotonic_ns()
            os.write(taps[1], rarp(GUEST_MAC))
            after_ns = time.monotonic_ns()
            seen: list[Frame] = []
            while not any(frame.interface == network.bridge for frame in seen):
                time.sleep(0.01)
                seen = [frame for frame in recorder.frames if frame.source == GUEST_MAC]
        finally:
            for tap in taps:
                os.close(tap)

    came_in = [frame for frame in seen if frame.interface == "tap1" and not frame.outgoing]
    assert [frame.ethertype for frame in came_in] == [RARP]
    assert before_ns <= came_in[0].t_ns <= after_ns
    assert not any(frame.interface == "tap0" and not frame.outgoing for frame in seen)
    assert not (NAMESPACES / network.netns).exists()


def test_the_bridge_keeps_its_address_when_a_tap_joins() -> None:
    """A bridge without an address of its own takes a port's; the guest would ping a stale MAC."""

    def address() -> str:
        command = ["ip", "-n", network.netns, "-br", "link", "show", network.bridge]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2]

    with demo_network() as network:
        first = address()
        for i in range(4):
            os.close(open_tap(network.netns, network.bridge, f"tap{i}"))
            assert address() == first


def test_a_tap_that_cannot_be_says_which_step_failed() -> None:
    with demo_network() as network:
        for arguments, step in [
            (("no-such-namespace", network.bridge, "tap0"), "namespace no-such-namespace"),
            ((network.netns, "no-such-br", "tap0"), "add tap tap0 to bridge no-such-br"),
            ((network.netns, network.bridge, "x" * 16), "name"),
        ]:
            with pytest.raises(TapError) as caught:
                open_tap(*arguments)
            assert caught.value.metadata["step"] == step
        tap = open_tap(network.netns, network.bridge, "tap0")
        with pytest.raises(TapError, match="make tap tap0"):
            open_tap(network.netns, network.bridge, "tap0")
        os.close(tap)


def test_what_a_killed_run_left_is_removed_and_a_living_one_is_not() -> None:
    with subprocess.Popen([sys.executable, "-c", CRASHING], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        name = other.stdout.readline().decode().strip()
        try:
            assert name not in remove_stale()
            assert (NAMESPACES / name).exists()
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
    assert name in remove_stale()
    assert not (NAMESPACES / name).exists()
