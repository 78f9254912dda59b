# SPDX-License-Identifier: Apache-2.0
"""Requests made up from our OpenAPI: whatever comes, the answer is one that the document has.

schemathesis runs as a command: its plug-in for pytest does not know ours yet. What it makes up
follows from the document alone, so that a run can be repeated.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.harness.fake_fleet import VM, FakeFleet, fake_fleet

RUN_S_MAX = 400.0
PAGED = (
    *("nodes", "vms", "migrations", "operations", "policies", "limits", "queue"),
    *("operations/{operation_id}/vms", "vms/{vm}/userfault-bitmap"),
)
TOKENS = "".join(
    f"""
[[operations]]
include-name = "GET /v1/{path}"  # page_token is nobody's to make up
checks.positive_data_acceptance.enabled = false
"""
    for path in PAGED
)
CONFIG = """\
[[operations]]
include-name = "POST /v1/vms"  # docs/vm-spec.md says more of a spec than a schema can
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "POST /v1/migrations/{migration_id}:break-glass"  # must have something printed
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "PATCH /v1/limits"  # a limit's key has a kind and a name
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "POST /v1/nodes/{node}:drain"  # windows are times of day
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "POST /v1/nodes/{node}:undrain"  # windows are times of day
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "POST /v1/operations:batch"  # windows are times of day
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "POST /v1/operations:rebalance"  # windows are times of day
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "PUT /v1/nodes/{name}/placement"  # labels and taints have names
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "PUT /v1/policies/{name}"  # a policy says something
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "DELETE /v1/policies/{name}"  # If-Match is an etag that was read
checks.positive_data_acceptance.enabled = false

[[operations]]
include-name = "PUT /v1/vms/{vm}/placement"  # the same
checks.positive_data_acceptance.enabled = false
"""


async def _run(fleet: FakeFleet, directory: Path, config: str, arguments: Iterable[str]) -> None:
    """Run schemathesis; fails with its report."""
    path = directory / "schemathesis.toml"
    await asyncio.to_thread(path.write_text, config)
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        f"--config-file={path}",
        "run",
        f"{fleet.http.base_url}/openapi.json",
        "--generation-deterministic",
        "--continue-on-failure",
        "--no-color",
        "--warnings=off",
        "--exclude-path=/v1/events",  # it has no end
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
        env=os.environ | {"NO_PROXY": "*"},
    )
    try:
        async with asyncio.timeout(RUN_S_MAX):
            report, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, report.decode()


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S_MAX + 60)
async def test_any_request_has_an_answer_of_the_document(tmp_path: Path) -> None:
    """Right ones and wrong ones; no 5xx, and no answer but those that are described."""
    async with fake_fleet(tmp_path, listening=True) as fleet:
        migration_id = await fleet.migrate()
        await fleet.ended(migration_id)
        await _run(fleet, tmp_path, CONFIG + TOKENS, ["--phases=coverage"])
        there = f'[parameters]\nvm = "{VM}"\nname = "a"\nmigration_id = "{migration_id}"\n'
        await _run(
            fleet,
            tmp_path,
            f"{there}\n{CONFIG}{TOKENS}",
            # Of what is there; the VM stays.
            ["--phases=fuzzing", "--max-examples=4", "--exclude-method=DELETE"],
        )
