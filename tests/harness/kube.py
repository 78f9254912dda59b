# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes API server for tests: etcd, kube-apiserver, no controllers and no kubelets.

KUBEBUILDER_ASSETS, the ecosystem's convention, names a directory with `etcd` and `kube-apiserver`.
Where it has an `apiextensions-apiserver` too, that one serves the custom resources, behind the same
address: a kube-apiserver before 1.25 knows no CEL rules. All listen on loopback; the admin's
certificate is a member of `system:masters`, every other account is what its RBAC says.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ASSETS_ENV = "KUBEBUILDER_ASSETS"
START_S_MAX = 120
EXTENSIONS = "apiextensions-apiserver"
_YEAR = dt.timedelta(days=365)


def assets() -> Path | None:
    """The directory that KUBEBUILDER_ASSETS names."""
    named = os.environ.get(ASSETS_ENV, "")
    return Path(named).resolve() if named else None


def missing() -> str | None:
    """Why there can be no API server here, or None."""
    found = assets()
    if found is None:
        return f"{ASSETS_ENV} is not set"
    lacks = [name for name in ("etcd", "kube-apiserver") if not os.access(found / name, os.X_OK)]
    return f"{found} has no {' and no '.join(lacks)}" if lacks else None


def free_port() -> int:
    """One that the kernel has given nobody yet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class RefusedError(Exception):
    """The server refused. `status`: of HTTP; the text is what it said."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class _Authority:
    """A CA and what it signs, as PEM files in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._write(name, self._build(self._subject, self._key, ca=True), self._key)

    @property
    def path(self) -> Path:
        """Its certificate."""
        return self.directory / f"{self.name}.crt"

    def issue(
        self, name: str, common_name: str, organization: str = "", directory: Path | None = None
    ) -> None:
        """A certificate for loopback, of a server and a client: NAME.crt and NAME.key."""
        names = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        if organization:
            names.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        key = ec.generate_private_key(ec.SECP256R1())
        self._write(name, self._build(x509.Name(names), key, ca=False), key, directory)

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _YEAR)
            .not_valid_after(now + _YEAR)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            sans = [
                x509.DNSName("localhost"),
                x509.DNSName("crds.kube-system.svc"),
                x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            ]
            uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(
        self,
        name: str,
        made: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        directory: Path | None = None,
    ) -> None:
        where = directory or self.directory
        (where / f"{name}.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (where / f"{name}.key").write_bytes(_pem(key))


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class ApiServer:
    """A running API server. `kubeconfig` is its admin's."""

    def __init__(self, directory: Path, *flags: str) -> None:
        """`flags`: further ones of kube-apiserver."""
        self.directory = directory
        self._flags = flags
        self.kubeconfig = directory / "kubeconfig"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {name: free_port() for name in ("etcd", "peer", "core", "extensions")}
        self._make_certificates()
        self._context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
        self._context.load_cert_chain(directory / "admin.crt", directory / "admin.key")

    @property
    def url(self) -> str:
        """Where it is served."""
        return f"https://127.0.0.1:{self._ports['core']}"

    @property
    def etcd_url(self) -> str:
        """Where its database is, for what only that can do."""
        return f"http://127.0.0.1:{self._ports['etcd']}"

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        media: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """One request as the admin.

        Raises:
            RefusedError: it was refused.
        """
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": media, "Accept": accept},
        )
        try:
            with urllib.request.urlopen(request, context=self._context, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise RefusedError(error.code, _message(error.read())) from None
        return json.loads(text) if text[:1] == b"{" else text.decode()

    def issue(self, directory: Path, name: str, common_name: str) -> None:
        """A certificate of the server's own CA, for loopback: NAME.crt and NAME.key there."""
        self._authority.issue(name, common_name, directory=directory)

    def start(self) -> None:
        """Start all of it and wait until it answers."""
        found = assets()
        assert found is not None
        ports = self._ports
        etcd, peer = self.etcd_url, f"http://127.0.0.1:{ports['peer']}"
        self._spawn(
            found / "etcd",
            *(f"--data-dir={self.directory / 'etcd'}", "--unsafe-no-fsync", "--log-level=error"),
            *(f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
            f"--initial-cluster=default={peer}",
        )
        self._spawn(
            found / "kube-apiserver",
            *self._common("core"),
            *("--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none"),
            *("--service-cluster-ip-range=10.0.0.0/24", "--authorization-mode=RBAC"),
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={self.directory / 'accounts.key'}",
            f"--service-account-key-file={self.directory / 'accounts.pub'}",
            f"--proxy-client-cert-file={self.directory / 'proxy.crt'}",
            f"--proxy-client-key-file={self.directory / 'proxy.key'}",
            *self._flags,
        )
        self._wait(self.url, "kube-apiserver")
        if (found / EXTENSIONS).exists():
            self._start_extensions(found / EXTENSIONS)

    def stop(self) -> None:
        """End all of it; what was written is gone with the directory."""
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def _start_extensions(self, program: Path) -> None:
        """The newer server of custom resources, reached through the core as an aggregated API."""
        config = str(self.kubeconfig)
        self._spawn(
            program,
            *self._common("extensions"),
            *("--etcd-prefix=/registry", f"--kubeconfig={config}"),
            *(f"--authentication-kubeconfig={config}", f"--authorization-kubeconfig={config}"),
            *("--authentication-skip-lookup", "--enable-priority-and-fairness=false"),
            "--disable-admission-plugins=ValidatingAdmissionPolicy,MutatingAdmissionPolicy",
        )
        port = self._ports["extensions"]
        self._wait(f"https://127.0.0.1:{port}", EXTENSIONS)
        spec = {"type": "ExternalName", "externalName": "localhost"}
        service = {"metadata": {"name": "crds"}, "spec": spec}
        self.request("POST", "/api/v1/namespaces/kube-system/services", service)
        authority = base64.b64encode((self.directory / "ca.crt").read_bytes()).decode()
        where = {"namespace": "kube-system", "name": "crds", "port": port}
        path = "/apis/apiregistration.k8s.io/v1/apiservices/v1.apiextensions.k8s.io"
        self.request(
            "PATCH",
            path,
            {"metadata": {"labels": None}, "spec": {"caBundle": authority, "service": where}},
            media="application/merge-patch+json",
        )
        self._until(lambda: _is_available(self.request("GET", path)), EXTENSIONS)

    def _common(self, name: str) -> tuple[str, ...]:
        at = self.directory
        return (
            f"--etcd-servers={self.etcd_url}",
            *("--bind-address=127.0.0.1", f"--secure-port={self._ports[name]}"),
            *(
                f"--tls-cert-file={at / 'server.crt'}",
                f"--tls-private-key-file={at / 'server.key'}",
            ),
            *(f"--client-ca-file={at / 'ca.crt'}", "--requestheader-allowed-names=front-proxy"),
            f"--requestheader-client-ca-file={at / 'front.crt'}",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        )

    def _make_certificates(self) -> None:
        authority = self._authority = _Authority(self.directory, "ca")
        authority.issue("server", "kube-apiserver")
        authority.issue("admin", "admin", "system:masters")
        _Authority(self.directory, "front").issue("proxy", "front-proxy")
        accounts = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        (self.directory / "accounts.key").write_bytes(_pem(accounts))
        (self.directory / "accounts.pub").write_bytes(
            accounts.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        user = {
            "client-certificate": str(self.directory / "admin.crt"),
            "client-key": str(self.directory / "admin.key"),
        }
        self.write_kubeconfig(self.kubeconfig, user)

    def write_kubeconfig(self, path: Path, user: dict[str, str]) -> None:
        """A kubeconfig of somebody: `user` as kubeconfig spells it, e.g. {"token": ...}."""
        cluster = {"server": self.url, "certificate-authority": str(self.directory / "ca.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "user"}}],
            "current-context": "tests",
        }
        path.write_text(yaml.safe_dump(config))

    def _spawn(self, program: Path, *arguments: str) -> None:
        # With the tests, however they end: setpriv is util-linux's.
        prefix = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.directory / f"{program.name}.log").open("wb") as log:
            self._processes[program.name] = subprocess.Popen(
                [*prefix, str(program), *arguments], stdout=log, stderr=log, process_group=0
            )

    def _wait(self, url: str, name: str) -> None:
        def is_ready() -> bool:
            where = f"{url}/readyz"
            with urllib.request.urlopen(where, context=self._context, timeout=5) as answer:
                return bool(answer.status == 200)

        self._until(is_ready, name)

    def _until(self, true: Any, name: str) -> None:
        deadline_s = time.monotonic() + START_S_MAX
        while True:
            with contextlib.suppress(OSError, RefusedError):
                if true():
                    return
            ended = self._processes[name].poll() is not None
            if ended or time.monotonic() > deadline_s:
                log = (self.directory / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} is not ready:\n{log[-2000:]}")
            time.sleep(0.05)


def _message(body: bytes) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(body).get("message", ""))
    return body.decode(errors="replace")


def _is_available(service: dict[str, Any]) -> bool:
    conditions = service.get("status", {}).get("conditions", ())
    return "service" in service["spec"] and any(
        each["type"] == "Available" and each["status"] == "True" and each["reason"] == "Passed"
        for each in conditions
    )


@contextlib.contextmanager
def serving(directory: Path, *flags: str) -> Iterator[ApiServer]:
    """A new API server for the length of the block, with what it writes in `directory`."""
    server = ApiServer(directory, *flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()
