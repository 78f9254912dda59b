# SPDX-License-Identifier: Apache-2.0
"""The bill of materials names all that is pinned; the audit says what is known, or that it cannot.

Advisories are a local file here, the service is a local one.
"""

from __future__ import annotations

import http.server
import json
import re
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tools import audit, sbom

ROOT = Path(__file__).resolve().parent.parent.parent


def advisory(name: str, *events: Mapping[str, str], **fields: Any) -> dict[str, Any]:
    """An OSV advisory about a package of PyPI."""
    affected = {
        "package": {"ecosystem": "PyPI", "name": name},
        "ranges": [{"type": "ECOSYSTEM", "events": list(events)}],
    }
    return {"id": f"TEST-{name}", "affected": [affected], **fields}


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    path.write_text(
        "# pinned\nleft_pad==1.2.0 \\\n    --hash=sha256:" + "ab" * 32 + "\nright-pad==2.0\n"
    )
    return path


def test_the_bill_has_every_pin_and_every_native_library(tmp_path: Path) -> None:
    target = tmp_path / "bom" / "sbom.json"
    assert sbom.main([str(target)]) == 0
    bill = json.loads(target.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    names = {item["name"]: item for item in bill["components"]}
    locked = sbom.pins((ROOT / "requirements.lock").read_text())
    assert len(locked) > 50
    assert locked.items() <= {name: item.get("version") for name, item in names.items()}.items()
    cmake = (ROOT / "native" / "CMakeLists.txt").read_text()
    for package, (name, _, _) in sbom.NATIVE.items():
        assert package in cmake
        assert "version" in names[name], f"{package} is what the core was built with"
    references = {item["bom-ref"] for item in bill["components"]}
    assert len(references) == len(bill["components"])
    assert set(bill["dependencies"][0]["dependsOn"]) <= references


def test_the_lock_pins_each_file_and_tells_nobodys_index() -> None:
    """What is installed is what was resolved; a package that is asked for by name alone is none."""
    text = (ROOT / "requirements.lock").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = [line for line in lines if not line.startswith(" ")]
    assert len(pins) > 50
    hashes = sbom.hashes(text)
    for pin in pins:
        match = sbom.PIN.fullmatch(pin.removesuffix(" \\"))
        assert match, f"{pin}: neither an index nor a file may be named, and nothing but a version"
        assert hashes[sbom.normalised(match[1])], pin
    for line in lines:
        assert line in pins or re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?", line)
    setup = (ROOT / "tools" / "setup_python.sh").read_text()
    installs = [line for line in setup.splitlines() if "pip install" in line and "lock" in line]
    assert installs
    assert all("--require-hashes" in line for line in installs)


def test_the_bill_keeps_to_its_schema() -> None:
    """CycloneDX's own, strict: no field that it does not know."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bill = sbom.bill((ROOT / "requirements.lock").read_text(), project)
    validator = JsonStrictValidator(SchemaVersion.V1_5)
    assert validator.validate_str(json.dumps(bill)) is None
    assert validator.validate_str(json.dumps(bill | {"colour": "red"})) is not None
    python = [item for item in bill["components"] if item["purl"].startswith("pkg:pypi/")]
    assert len(python) > 50
    assert all(item["hashes"] for item in python)


def test_the_same_lock_gives_the_same_bill(lock: Path) -> None:
    project = {
        "name": "x",
        "version": "1",
        "license": "Apache-2.0",
        "dependencies": ["Left.Pad[a]>=1"],
    }
    first, second = (sbom.bill(lock.read_text(), project) for _ in range(2))
    assert first == second
    left = first["components"][0]
    assert left["purl"] == "pkg:pypi/left-pad@1.2.0"
    assert left["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert "pkg:pypi/left-pad@1.2.0" in first["dependencies"][0]["dependsOn"]


@pytest.mark.parametrize(
    ("events", "affected"),
    [
        ([{"introduced": "0"}], True),
        ([{"introduced": "0"}, {"fixed": "1.2.0"}], False),
        ([{"introduced": "0"}, {"fixed": "1.2.1"}], True),
        ([{"introduced": "1.3"}], False),
        ([{"introduced": "1.0"}, {"last_affected": "1.2.0"}], True),
        ([{"introduced": "1.0"}, {"last_affected": "1.1"}], False),
        ([{"introduced": "0", "fixed": "1.0"}, {"introduced": "1.1", "fixed": "1.10"}], True),
        ([{"fixed": "1.10"}, {"introduced": "1.1"}, {"fixed": "1.0"}, {"introduced": "0"}], True),
    ],
)
def test_ranges_are_ordered_as_versions(
    events: list[dict[str, str]], affected: bool, lock: Path, tmp_path: Path
) -> None:
    known = tmp_path / "known.json"
    known.write_text(json.dumps(advisory("Left-Pad", *events)))
    status = audit.main(["--advisories", str(known), "--lock", str(lock)])
    assert status == (audit.Exit.VULNERABLE if affected else audit.Exit.CLEAN)


def test_a_directory_of_advisories(
    lock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other ecosystems, withdrawn and ignored ones do not count; a named version does."""
    known = tmp_path / "known"
    known.mkdir()
    by_version = advisory("right-pad") | {"id": "TEST-named"}
    by_version["affected"][0]["versions"] = ["2.0"]
    npm = advisory("left-pad", {"introduced": "0"}) | {"id": "TEST-npm"}
    npm["affected"][0]["package"]["ecosystem"] = "npm"
    withdrawn = advisory("left-pad", {"introduced": "0"}, withdrawn="2026-01-01T00:00:00Z")
    (known / "a.json").write_text(json.dumps([by_version, npm]))
    (known / "b.json").write_text(json.dumps(withdrawn))
    arguments = ["--advisories", str(known), "--lock", str(lock)]
    assert audit.main(arguments) == audit.Exit.VULNERABLE
    assert "right-pad 2.0: TEST-named\n" in capsys.readouterr().out
    assert audit.main([*arguments, "--ignore", "TEST-named"]) == audit.Exit.CLEAN


@contextmanager
def service(body: bytes) -> Iterator[tuple[str, list[Any]]]:
    """Something that answers `body`; its URL, and what it was asked."""
    asked: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()
            thread.join()


def test_the_service_is_asked_once_about_everything(lock: Path) -> None:
    with service(b'{"results": [{}, {"vulns": [{"id": "TEST-1"}]}]}') as (url, asked):
        assert audit.main(["--service", url, "--lock", str(lock)]) == audit.Exit.VULNERABLE
    assert asked[0]["queries"][0] == {
        "package": {"ecosystem": "PyPI", "name": "left-pad"},
        "version": "1.2.0",
    }
    assert len(asked) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"results": []}', b'{"results": 3}', b"[]"])
def test_a_service_that_talks_nonsense_has_checked_nothing(
    body: bytes, lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with service(body) as (url, _):
        assert audit.main(["--service", url, "--lock", str(lock)]) == audit.Exit.NOT_CHECKED
    assert "NOTHING WAS CHECKED" in capsys.readouterr().err


def test_nobody_there_is_said(lock: Path, tmp_path: Path) -> None:
    arguments = ["--lock", str(lock)]
    # Port 9, discard, of loopback: nobody listens.
    offline = audit.main(["--service", "http://127.0.0.1:9/", *arguments])
    assert offline == audit.Exit.NOT_CHECKED
    missing = audit.main(["--advisories", str(tmp_path / "none.json"), *arguments])
    assert missing == audit.Exit.NOT_CHECKED
