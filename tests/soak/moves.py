# SPDX-License-Identifier: Apache-2.0
"""Many moves of one microvm in a row, on every fault backend that can run here: `make soak-moves`.

Between two nodes and an orchestrator, each part a process; after each move the guest verifies
every page and every counter of its own, and its heartbeats must go on by one. The last line is
JSON; exit status 0 only if every move of every backend was proved unharmed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from godwit.client import AsyncClient
from godwit.models import Migration

from services.common.errors import GodwitError
from services.demo.cluster import Cluster, running_cluster
from services.demo.microvm_guest import MicrovmGuest, make_spec
from services.demo.microvm_run import why_no_kvm
from services.demo.microvm_verdict import MicrovmSetup, judge_microvm
from services.demo.moves import report_of, why_not_succeeded
from services.demo.verdict import MigrationReport
from tests.harness.microvm import why_not

MIB = 1 << 20
BACKENDS = (
    ("kvm", "kvm-userfault"),
    ("kvm", "exit-emulation"),
    ("kvm", "uffd"),
    ("thread", "uffd"),
    ("thread", "exit-sigsegv"),
)


async def _ignore(_migration: Migration) -> bool:
    return False


async def _run(
    name: str, cluster: Cluster, client: AsyncClient, args: argparse.Namespace
) -> dict[str, Any]:
    accel, _, backend = name.partition("/")
    spec = make_spec(
        name.replace("/", "-"),
        accel=accel,
        memory_bytes=args.memory_mib * MIB,
        workload_bytes=(args.memory_mib - 8) * MIB,
        vcpus=args.vcpus,
        fault_backend=backend,
        ops_per_second=args.ops_per_second,
    )
    guest = await MicrovmGuest.start(spec, "a", cluster=cluster, client=client)
    reports: list[MigrationReport] = []
    trouble = ""
    try:
        await guest.look()
        while len(reports) < args.moves and not trouble:
            migration = await guest.move("b" if guest.node == "a" else "a", on_step=_ignore)
            trouble = why_not_succeeded(migration)
            if not trouble:
                reports.append(report_of(migration))
                await guest.look()
    except GodwitError as error:
        trouble = f"on {guest.node}: {error}"
    setup = MicrovmSetup(
        vmm="",
        guest="",
        memory_bytes=spec.memory_bytes,
        page_count=guest.page_count,
        vcpus=spec.vcpus,
        fault_backend=backend,
    )
    return _result(judge_microvm(setup, guest.stays, reports), trouble)


def _result(report: dict[str, Any], trouble: str) -> dict[str, Any]:
    moves: list[dict[str, Any]] = report["migrations"]
    reasons = [*([trouble] if trouble else []), *report["reasons"]]
    pauses = sorted(float(move["pause_ms"]) for move in moves)
    gaps = sorted(float(move["guest_gap_ms"]) for move in moves if move["guest_gap_ms"])
    return {
        "moves": len(moves),
        "corrupt_pages": report["corrupt_pages"],
        "doubled_beats": report["doubled_beats"],
        "reasons": reasons,
        "pause_ms": _quantiles(pauses),
        "guest_gap_ms": _quantiles(gaps),
        "exits": sum(sum(move["exits"]) for move in moves),
        "demand_pages": sum(int(move["pages_demand"]) for move in moves),
        "verdict": "failed" if reasons else "ok",
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "min": values[0],
        "p50": round(statistics.median(values), 3),
        "p95": values[min(len(values) * 95 // 100, len(values) - 1)],
        "max": values[-1],
    }


async def _main(args: argparse.Namespace) -> int:
    results: dict[str, Any] = {}
    missing = why_no_kvm()
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
        cluster = await stack.enter_async_context(running_cluster(Path(directory) / "cluster"))
        client = await stack.enter_async_context(AsyncClient(cluster.rest_url))
        for accel, backend in BACKENDS:
            name = f"{accel}/{backend}"
            if args.backend and name not in args.backend:
                continue
            if why := why_not(accel, backend) or (missing if accel == "kvm" else ""):
                results[name] = {"skipped": why}
            else:
                results[name] = await _run(name, cluster, client, args)
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "cpus": os.cpu_count(),
                "memory_mib": args.memory_mib,
                "vcpus": args.vcpus,
                "backends": results,
            }
        )
    )
    verdicts = [result["verdict"] for result in results.values() if "verdict" in result]
    return 0 if verdicts and set(verdicts) == {"ok"} else 1


def main() -> None:
    """Run; exit with the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--moves", type=int, default=200)
    parser.add_argument("--memory-mib", type=int, default=72, help="72: 16 384 pages verified")
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--ops-per-second", type=int, default=20000, help="of each vCPU; 0: all")
    parser.add_argument("--backend", action="append", help="accel/backend; default: all")
    sys.exit(asyncio.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
