# SPDX-License-Identifier: Apache-2.0
"""Informer, work queue and Lease against the real server: cuts, expiry, conflicts, two of them."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import yaml

from services.orchestrator.kubernetes.api import Api, ConflictError, Kind, connect, key_of
from services.orchestrator.kubernetes.informer import Informer
from services.orchestrator.kubernetes.lease import Lease
from services.orchestrator.kubernetes.settings import LeaseTimes
from services.orchestrator.kubernetes.workqueue import WorkQueue
from tests.harness.kube import ApiServer, serving

pytestmark = [pytest.mark.requires("kube"), pytest.mark.asyncio]

MAPS = Kind(group="", version="v1", plural="configmaps", name="ConfigMap")
NAMESPACE = "following"


@pytest.fixture(scope="module")
def server(kube_server: ApiServer) -> ApiServer:
    kube_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    return kube_server


@pytest_asyncio.fixture
async def api(server: ApiServer) -> AsyncIterator[Api]:
    made = Api(await connect(server.kubeconfig))
    yield made
    await made.close()


class Cuttable:
    """A wire to the server that can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_cut = False
        self.port = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.close()
            return
        there, back = await asyncio.open_connection(*self._to)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
        finally:
            sink.close()

    def cut(self) -> None:
        self.is_cut = True
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def cuttable(server: ApiServer, directory: Path) -> AsyncIterator[tuple[Api, Cuttable]]:
    where = urlsplit(server.url)
    assert where.hostname
    assert where.port
    wire = Cuttable(where.hostname, where.port)
    listener = await asyncio.start_server(wire.carry, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port}"
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    api = Api(await connect(path))
    try:
        yield api, wire
    finally:
        await api.close()
        wire.cut()
        listener.close()


async def until(true: Any) -> None:
    async with asyncio.timeout(60):
        while True:
            if true():
                return
            await asyncio.sleep(0.02)


def config_map(name: str, text: str = "") -> Any:
    return {"metadata": {"name": name}, "data": {"text": text}}


async def test_what_happened_during_a_cut_is_heard_after_it(
    server: ApiServer, api: Api, tmp_path: Path
) -> None:
    for name in ("stays", "changes", "goes"):
        await api.create(MAPS, config_map(name), namespace=NAMESPACE)
    async with cuttable(server, tmp_path) as (cut_api, wire):
        informer = Informer(cut_api, MAPS, namespace=NAMESPACE)
        heard: list[str] = []
        informer.on_change.append(lambda found: heard.append(found["metadata"]["name"]))
        async with informer.running():
            await informer.listed()
            await until(lambda: "goes" in heard)
            wire.cut()
            heard.clear()
            await api.patch(MAPS, f"{NAMESPACE}/changes", {"data": {"text": "new"}})
            await api.delete(MAPS, f"{NAMESPACE}/goes")
            await api.create(MAPS, config_map("comes"), namespace=NAMESPACE)
            compact(server)
            wire.is_cut = False
            await until(lambda: {"changes", "goes", "comes"} <= set(heard))
            assert "stays" not in heard
            assert informer.get(f"{NAMESPACE}/goes") is None
            changed = informer.get(f"{NAMESPACE}/changes")
            assert changed is not None
            assert changed["data"]["text"] == "new"


async def test_a_version_that_is_forgotten_is_listed_again(tmp_path: Path) -> None:
    """410 in the middle: the server has thrown away what came after the version we have.

    Without its cache the server asks etcd, which forgets when it is told to.
    """
    with serving(tmp_path, "--watch-cache=false") as server:
        api = Api(await connect(server.kubeconfig))
        versions: list[str] = []

        class Old(Api):
            async def watch(
                self, kind: Kind, resource_version: str, *, namespace: str = "", selector: str = ""
            ) -> AsyncIterator[tuple[str, Any]]:
                versions.append(resource_version)
                version = "1" if len(versions) == 1 else resource_version
                async for each in super().watch(
                    kind, version, namespace=namespace, selector=selector
                ):
                    yield each

        informer = Informer(Old(api.client), MAPS, namespace="kube-system")
        await asyncio.to_thread(compact, server)
        async with informer.running():
            await until(lambda: len(versions) == 2)
        assert informer.list_count == 2
        assert informer.get("kube-system/extension-apiserver-authentication") is not None
        await api.close()


async def test_many_writers_and_one_that_converges(api: Api) -> None:
    """Each write gives the version that was read: none is lost, and it ends right."""
    await api.create(MAPS, config_map("contended", "0"), namespace=NAMESPACE)
    key = f"{NAMESPACE}/contended"
    informer = Informer(api, MAPS, namespace=NAMESPACE)
    conflicts = 0

    async def reconcile(key: str) -> None:
        nonlocal conflicts
        found = informer.get(key)
        if not found or found["metadata"]["name"] != "contended":
            return
        wanted = {"mirror": found["data"]["text"]}
        if found["data"].get("mirror") == wanted["mirror"]:
            return
        metadata = {"resourceVersion": found["metadata"]["resourceVersion"]}
        try:
            await api.patch(MAPS, key, {"metadata": metadata, "data": wanted})
        except ConflictError:
            conflicts += 1
            raise

    queue = WorkQueue(reconcile, what="map")
    informer.on_change.append(lambda found: queue.add(key_of(found)))

    async def write(number: int) -> None:
        for step in range(20):
            await api.patch(MAPS, key, {"data": {"text": f"{number}.{step}"}})

    async with informer.running(), queue.running():
        await informer.listed()
        await asyncio.gather(*(write(number) for number in range(4)))
        last = (await api.get(MAPS, key))["data"]["text"]

        def right() -> bool:
            found = informer.get(key)
            return bool(found and found["data"].get("mirror") == last)

        await until(right)
    assert conflicts > 0


async def test_a_lease_has_one_holder_and_is_given_back(api: Api) -> None:
    times = LeaseTimes(duration_s=30.0, renew_s=20.0, retry_s=0.05)
    key = f"{NAMESPACE}/given-back"
    order: list[str] = []

    async def hold(name: str, release: asyncio.Event) -> None:
        async with Lease(api, key, name, times).held():
            order.append(f"{name} holds")
            await release.wait()
            order.append(f"{name} ends")

    releases = {name: asyncio.Event() for name in ("one", "two")}
    tasks = [asyncio.create_task(hold(name, event)) for name, event in releases.items()]
    await until(lambda: order)
    await asyncio.sleep(0.3)
    assert len(order) == 1
    first = order[0].split()[0]
    releases[first].set()
    await until(lambda: len(order) == 3)
    second = "two" if first == "one" else "one"
    assert order == [f"{first} holds", f"{first} ends", f"{second} holds"]
    releases[second].set()
    await asyncio.gather(*tasks)


async def test_a_dead_holders_lease_is_taken_after_its_duration(
    server: ApiServer, api: Api, tmp_path: Path
) -> None:
    times = LeaseTimes(duration_s=2.0, renew_s=1.0, retry_s=0.1)
    key = f"{NAMESPACE}/taken"
    async with (
        cuttable(server, tmp_path) as (cut_api, wire),
        Lease(cut_api, key, "one", times).held() as lost,
    ):
        assert not lost.is_set()
        wire.cut()
        async with Lease(api, key, "two", times).held():
            # It gave up before anybody else could have it.
            assert lost.is_set()


def compact(server: ApiServer) -> None:
    """Make etcd forget all versions but the last."""
    url = server.etcd_url
    body = json.dumps({"key": "AA==", "range_end": "AA==", "limit": 1, "keys_only": True}).encode()
    with urllib.request.urlopen(f"{url}/v3/kv/range", data=body) as answer:
        revision = json.loads(answer.read())["header"]["revision"]
    body = json.dumps({"revision": revision, "physical": True}).encode()
    with (
        suppress(urllib.error.HTTPError),  # compacted already
        urllib.request.urlopen(f"{url}/v3/kv/compaction", data=body),
    ):
        pass
