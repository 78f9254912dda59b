# SPDX-License-Identifier: Apache-2.0
"""Own the VMs of one node: start them, move them away, receive them.

    python -m services.fault_agent --node NAME --listen 127.0.0.1:0 --state-dir DIR --ram-dir DIR \
        --images-dir DIR --page-server-control HOST:PORT [--orchestrator HOST:PORT]

One process per node. Its VMMs are not its children in any way that matters: they live on when it
ends, by whatever signal, and the next agent takes hold of them by its journal. While a guest's
memory is on its way here, this process answers its page faults: without it the guest waits.

SIGTERM therefore means "take no VM and finish receiving", not "exit": it ends once no arrival needs
it, after --drain-s seconds, or at a second SIGTERM. Departures need it for nothing: the page server
serves them.

--peer-bytes-per-s-max limits what the guests that arrive from one host fetch in bulk, all together;
they share it by the bandwidth_weight of their specs. What a guest waits for is never limited.

With --collapse the memory of a guest that has arrived whole is put into huge pages, for KVM to map;
what cannot be, and why, is logged.

With --respawn it runs in a child of the process that was started, which has imported all it needs
and forks the next one when this one is killed: the guest waits for milliseconds, not for Python.

When it answers it prints one line on stdout: `listening grpc=ADDRESS metrics=ADDRESS`. Exit status:
0 drained; 2 bad configuration; 3 it ended while guests wait for pages (each is logged; start it
again at once); 1 a bug.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.common import grpc_server, health, hooks, lifecycle, metrics, respawn
from services.common.errors import GodwitError, InvalidArgumentError
from services.common.lifecycle import ExitStatus
from services.common.listen import INSECURE_FLAG, Address, parse_address, parse_listen
from services.common.peer_tls import ORCHESTRATOR_NAME, add_tls_option, open_certificates
from services.common.privileges import capabilities
from services.common.privileges.capabilities import Capability, parse_capability
from services.common.privileges.option import add_sandbox_option
from services.fault_agent import registration
from services.fault_agent.agent_metrics import AgentCollector, guest_held_seconds
from services.fault_agent.arrival_engine import ArrivalEngines
from services.fault_agent.drivers.api import Driver
from services.fault_agent.drivers.microvm import PROGRAM as MICROVM
from services.fault_agent.drivers.microvm import MicrovmDriver
from services.fault_agent.drivers.qemu import QemuDriver
from services.fault_agent.freezer import Freezer, find_cgroup2
from services.fault_agent.journal import Role
from services.fault_agent.node import Node, NodeConfig, open_node
from services.fault_agent.recovery import recover
from services.fault_agent.security import Security
from services.fault_agent.servicer import FaultAgentServicer
from services.pagecore.api import PageCore

log = logging.getLogger(__name__)

PROGRAM = "fault_agent"
DRAIN_POLL_S = 0.1
DRAIN_REPORT_S = 10.0
NODE_NAME_LEN_MAX = 63
BYTES_PER_S_MAX = 1 << 50
TOKEN_FLAG = "--orchestrator-token-file"  # noqa: S105 - a word


KEPT = (Capability.NET_ADMIN, Capability.SYS_PTRACE)
"""And what --keep-capability adds. A VMM has at most these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the process is told from outside, already checked."""

    node: NodeConfig
    listen: Address
    metrics: Address
    orchestrator: str
    """host:port where the node registers; empty: it does not."""
    qemu: str
    """Name or path of the QEMU to start."""
    drain_s: float
    """How long SIGTERM waits for arrivals. Seconds, > 0."""
    microvm: str = MICROVM
    """Name or path of the godwit-microvm to start."""
    respawn: bool = False
    """Whether a parent stays that forks the next one when this one is killed."""
    capabilities: tuple[Capability, ...] = KEPT
    """What it keeps, as far as it has it."""
    tls_dir: Path | None = None
    """Certificates of this node; None: plaintext."""
    orchestrator_token_file: Path | None = None
    """Where the token is that this node registers with; None: by its certificate, or unasked."""

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> Config:
        """Parse and check the command line; exits with BAD_CONFIG on any error."""
        parser = argparse.ArgumentParser(
            prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--node", required=True, metavar="NAME")
        parser.add_argument("--listen", required=True, metavar="HOST:PORT")
        parser.add_argument("--metrics", default="127.0.0.1:0", metavar="HOST:PORT")
        parser.add_argument("--state-dir", required=True, type=Path, metavar="DIR")
        parser.add_argument("--ram-dir", required=True, type=Path, metavar="DIR")
        parser.add_argument("--images-dir", type=Path, metavar="DIR")
        parser.add_argument("--page-server-control", required=True, metavar="HOST:PORT")
        parser.add_argument("--orchestrator", default="", metavar="HOST:PORT")
        parser.add_argument(
            TOKEN_FLAG,
            type=Path,
            metavar="FILE",
            help="a bearer token of this node, for an orchestrator that asks for one; it is read"
            " again each time",
        )
        parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PROGRAM")
        parser.add_argument("--microvm", default=MICROVM, metavar="PROGRAM")
        parser.add_argument("--collapse", action="store_true")
        parser.add_argument("--peer-bytes-per-s-max", type=int, default=0, metavar="BYTES")
        parser.add_argument("--drain-s", type=float, default=3600.0, metavar="SECONDS")
        parser.add_argument(
            "--arrival-lease-s",
            type=float,
            default=900.0,
            metavar="SECONDS",
            help="how long memory is kept for a guest of which nothing is heard before its state"
            " has come",
        )
        parser.add_argument("--respawn", action="store_true")
        parser.add_argument(
            "--keep-capability",
            action="append",
            default=[],
            metavar="NAME",
            help="keep this one too: sys_admin for taps in namespaces, dac_override for disks of"
            " other users; repeat it",
        )
        add_sandbox_option(parser)
        parser.add_argument(INSECURE_FLAG, action="store_true", dest="insecure_plaintext")
        add_tls_option(parser)
        args = parser.parse_args(argv)
        if not args.drain_s > 0:
            parser.error(f"--drain-s must be > 0, got {args.drain_s}")
        if not args.arrival_lease_s > 0:
            parser.error(f"--arrival-lease-s must be > 0, got {args.arrival_lease_s}")
        if not 0 <= args.peer_bytes_per_s_max <= BYTES_PER_S_MAX:
            parser.error(f"--peer-bytes-per-s-max must be 0..{BYTES_PER_S_MAX}")
        try:
            orchestrator = str(parse_address(args.orchestrator)) if args.orchestrator else ""
            _check_token_file(args.orchestrator_token_file, orchestrator, args.tls_dir)
            return cls(
                node=NodeConfig(
                    name=_node_name(args.node),
                    # A VMM changes its directory: what it is told must not depend on ours.
                    state_dir=args.state_dir.absolute(),
                    ram_dir=args.ram_dir.absolute(),
                    images_dir=(args.images_dir or args.state_dir / "images").absolute(),
                    page_server_control=str(parse_address(args.page_server_control)),
                    peer_bytes_per_s_max=args.peer_bytes_per_s_max,
                    collapse=args.collapse,
                    sandbox=args.sandbox,
                    arrival_lease_s=args.arrival_lease_s,
                ),
                listen=parse_listen(
                    args.listen,
                    insecure_plaintext=args.insecure_plaintext,
                    tls=args.tls_dir is not None,
                ),
                metrics=parse_listen(args.metrics, insecure_plaintext=args.insecure_plaintext),
                orchestrator=orchestrator,
                orchestrator_token_file=args.orchestrator_token_file,
                qemu=args.qemu,
                drain_s=args.drain_s,
                microvm=args.microvm,
                respawn=args.respawn,
                capabilities=_kept(args.keep_capability),
                tls_dir=args.tls_dir,
            )
        except GodwitError as error:
            parser.error(str(error))


def _check_token_file(path: Path | None, orchestrator: str, tls_dir: Path | None) -> None:
    if path is None:
        return
    if not orchestrator:
        raise InvalidArgumentError("FIELD_INVALID", f"{TOKEN_FLAG} is for --orchestrator")
    if tls_dir is None and not parse_address(orchestrator).is_loopback:
        raise InvalidArgumentError(
            "FIELD_INVALID",
            f"{TOKEN_FLAG}: a token goes over TLS only, or to this machine, not to {orchestrator}",
        )


def _kept(further: Sequence[str]) -> tuple[Capability, ...]:
    return (*KEPT, *(parse_capability(text) for text in further))


def _node_name(text: str) -> str:
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    if not 0 < len(text) <= NODE_NAME_LEN_MAX or not set(text) <= allowed:
        raise InvalidArgumentError("FIELD_INVALID", f"--node must be [a-z0-9-], got {text!r}")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """An agent that answers."""

    node: Node
    grpc: Address
    metrics: Address
    health: health.Health


@contextlib.asynccontextmanager
async def _security(
    config: Config, core: PageCore, registry: CollectorRegistry
) -> AsyncIterator[Security | None]:
    certificates = open_certificates(config.tls_dir)
    if certificates is None:
        yield None
        return
    from services.common.certificates import Kind
    from services.common.tls_metrics import TlsCollector, open_identity

    certificates.require(Kind.NODE, config.node.name)
    with contextlib.closing(open_identity(core, certificates)) as identity:
        security = Security(certificates, identity, config.node.state_dir)
        registry.register(TlsCollector(certificates, identity))
        async with certificates.kept():
            yield security


@contextlib.asynccontextmanager
async def serving(config: Config, core: PageCore) -> AsyncIterator[Serving]:
    """Serve for the length of the block.

    Order: the VMs of the predecessor are taken up before anybody is answered: evidence given
    earlier would say less than this node can prove.

    Raises:
        GodwitError: STATE_DIR_LOCKED, LISTEN_FAILED, CERTIFICATE_UNREADABLE,
            CERTIFICATE_OF_ANOTHER.
    """
    registry = metrics.new_registry()
    drivers: dict[str, Driver] = {
        "microvm": MicrovmDriver(config.microvm),
        "qemu": QemuDriver(config.qemu),
    }
    async with (
        contextlib.AsyncExitStack() as stack,
        open_node(
            config.node,
            pagecore=core,
            drivers=drivers,
            violations=metrics.invariant_violations(registry),
            held=guest_held_seconds(registry),
            freezer=Freezer(find_cgroup2()),
            security=await stack.enter_async_context(_security(config, core, registry)),
        ) as node,
    ):
        registry.register(AgentCollector(node))
        certificates = node.security.certificates if node.security else None
        engines = ArrivalEngines(node)
        stack.callback(engines.close)
        await recover(node, engines)
        servicer = FaultAgentServicer(node, engines)
        service = servicer.service()
        node.start_task(servicer.leases.expire(engines), "arrival leases")
        async with (
            grpc_server.serving(config.listen, [service], certificates=certificates) as server,
            metrics.serving(registry, config.metrics) as metrics_address,
        ):
            yield Serving(
                node=node, grpc=server.address, metrics=metrics_address, health=server.health
            )


def arrivals_in_need(node: Node) -> list[str]:
    """VMs whose page faults this process has to answer."""
    return [
        vm.vm_id
        for vm in node.known_vms()
        if vm.record.role in (Role.ARRIVING, Role.ARRIVED)
        and vm.same_boot
        and vm.record.arriving is not None
        and not vm.record.arriving.unregistered
    ]


async def drain(running: Serving, drain_s: float, again: asyncio.Event) -> ExitStatus:
    """Take no VM and wait until no arrival needs this process, or `again` is set."""
    node = running.node
    node.draining = True
    # Not `drain()`: what is needed to finish an arrival is still answered.
    await running.health.set_serving(False)
    deadline = time.monotonic() + drain_s
    report_at = time.monotonic()
    while needed := arrivals_in_need(node):
        now = time.monotonic()
        if now >= deadline or again.is_set():
            for vm_id in needed:
                log.error("%s waits for its memory: start the agent again", vm_id)
            return ExitStatus.GUESTS_DEPEND
        if now >= report_at:
            report_at = now + DRAIN_REPORT_S
            log.info("draining: %s still arriving", ", ".join(needed))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_POLL_S):
                await again.wait()
    log.info("drained")
    return ExitStatus.OK


def _nobody(_text: str) -> None:
    """There is no successor to be told."""


async def run(config: Config, core: PageCore, tell: respawn.Tell = _nobody) -> ExitStatus:
    """Serve until SIGTERM or SIGINT, then drain. `tell`: where it listens, for a successor."""
    if why_not := core.why_no_filter(config.node.sandbox):
        log.warning("system calls of page threads are not filtered: %s", why_not)
    with lifecycle.stop_on_signal() as stop:
        async with serving(config, core) as running:
            tasks = {}
            if config.orchestrator:
                tasks["registration"] = lambda: registration.keep_registered(
                    config.orchestrator,
                    config.node.name,
                    running.grpc,
                    running.node.peer_tls(ORCHESTRATOR_NAME),
                    config.orchestrator_token_file,
                )
            tell(f"{running.grpc} {running.metrics}")
            print(  # noqa: T201 - the supervisor and the tests read it
                f"listening grpc={running.grpc} metrics={running.metrics}", flush=True
            )
            async with lifecycle.background(tasks):
                lifecycle.spare_collector()
                await stop.wait()
                again = asyncio.Event()
                loop = asyncio.get_running_loop()
                for number in lifecycle.STOP_SIGNALS:
                    loop.add_signal_handler(signal.Signals(number), again.set)
                return await drain(running, config.drain_s, again)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the container image and of `godwit fault-agent`."""
    config = Config.from_argv(sys.argv[1:] if argv is None else argv)
    # With --respawn the parent's too: a child has what its parent has.
    capabilities.keep_only(config.capabilities)
    # After the command line is known to be good: it loads the native module.
    from services.pagecore.native import NativePageCore

    core = NativePageCore()

    def live(told: str, tell: respawn.Tell) -> int:
        hooks.hold_gil_on_signal()
        return lifecycle.run(PROGRAM, lambda: run(_where(config, told), core, tell))

    if not config.respawn:
        return live("", _nobody)
    return respawn.keep_alive(live)


def _where(config: Config, told: str) -> Config:
    """Listen where the predecessor did: its ports may have been chosen by the kernel."""
    if not told:
        return config
    grpc, prometheus = map(parse_address, told.split())
    return dataclasses.replace(config, listen=grpc, metrics=prometheus)
