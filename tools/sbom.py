# SPDX-License-Identifier: Apache-2.0
"""Write the software bill of materials: CycloneDX 1.5 JSON, of what is pinned and what is linked.

Python: requirements.lock, with the licence that each package states where it is installed; what
pyproject.toml asks for directly is required, the rest of the lock comes with it. Native: what
pkg-config says of the libraries that the C core is linked with, on the machine that builds it.
The same input gives the same bytes, but for the serial number, which is derived from them.

Usage: python -m tools.sbom [FILE]      default: stdout

Source: https://cyclonedx.org/docs/1.5/json/, https://github.com/package-url/purl-spec.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NATIVE = {
    "libnghttp2": ("nghttp2", "MIT", "HTTP/2"),
    "liblz4": ("lz4", "BSD-2-Clause", "compression of bulk pages"),
    "libssl": ("openssl", "Apache-2.0", "TLS"),
    "libcrypto": ("openssl-crypto", "Apache-2.0", "keys and signatures"),
}
"""pkg-config's name: name, licence, what for. The list of native/CMakeLists.txt."""
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")

Json = dict[str, Any]


def normalised(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, str]:
    """Version by normalised name."""
    return {normalised(name): version for name, version in PIN.findall(lock)}


def hashes(lock: str) -> dict[str, list[str]]:
    """Of every file that the index has of it; none where the lock has none."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", lock)
    return {
        normalised(match[1]): _HASH.findall(entry)
        for entry in entries
        if (match := PIN.match(entry))
    }


def _licence(name: str) -> Json | None:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if "License-Expression" in metadata:
        return {"expression": metadata["License-Expression"]}
    # A whole licence text is sometimes put there.
    if "License" in metadata and 0 < len(metadata["License"]) < 64:
        return {"license": {"name": metadata["License"]}}
    classifiers = metadata.get_all("Classifier") or []
    names = [item.rsplit(" :: ", 1)[1] for item in classifiers if item.startswith("License ::")]
    return {"license": {"name": names[-1]}} if names else None


def python_components(lock: str) -> list[Json]:
    """One a pin."""
    known_hashes = hashes(lock)
    components = []
    for name, version in sorted(pins(lock).items()):
        purl = f"pkg:pypi/{name}@{version}"
        component: Json = {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": version,
            "purl": purl,
        }
        if (licence := _licence(name)) is not None:
            component["licenses"] = [licence]
        if known := known_hashes.get(name):
            component["hashes"] = [{"alg": "SHA-256", "content": item} for item in sorted(known)]
        components.append(component)
    return components


def native_components() -> list[Json]:
    """As this machine has them; a library that pkg-config does not know has no version."""
    components = []
    for package, (name, licence, what_for) in NATIVE.items():
        done = subprocess.run(
            ["pkg-config", "--modversion", package], capture_output=True, text=True, check=False
        )
        component: Json = {
            "type": "library",
            "bom-ref": f"native:{package}",
            "name": name,
            "description": what_for,
            "licenses": [{"license": {"id": licence}}],
        }
        if done.returncode == 0:
            version = done.stdout.strip()
            component |= {"version": version, "purl": f"pkg:generic/{name}@{version}"}
        components.append(component)
    return components


def bill(lock: str, project: Json) -> Json:
    """The whole document."""
    python, native = python_components(lock), native_components()
    components = [*python, *native]
    direct = {normalised(re.split(r"[\[<>=!~; ]", item)[0]) for item in project["dependencies"]}
    root = f"pkg:pypi/{project['name']}@{project['version']}"
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(components, sort_keys=True))
    needed = [item["bom-ref"] for item in python if item["name"] in direct]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": project["name"],
                "version": project["version"],
                "purl": root,
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": components,
        "dependencies": [
            {"ref": root, "dependsOn": [*needed, *(item["bom-ref"] for item in native)]}
        ],
    }


def main(argv: Sequence[str]) -> int:
    """Write it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements.lock").read_text()
    text = json.dumps(bill(lock, project), indent=1) + "\n"
    if argv:
        target = Path(argv[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(f"{target}: {text.count('bom-ref') - 1} components")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
