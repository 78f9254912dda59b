# SPDX-License-Identifier: Apache-2.0
"""A real PostgreSQL for tests: made once a session, a database of its own for each test.

The server's programs are the distribution's, its directory is a temporary one, it listens on a Unix
socket there and nowhere else, and its settings are those that it would have. In memory, where there
is room: a sync costs nothing there, and no test takes the power away. It refuses to run as root, so
for root it runs as `postgres`, or as `nobody`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

START_S_MAX = 120
PR_SET_PDEATHSIG = 1
SWEEP_AFTER_S = 3600.0
ROOM_BYTES = 1 << 30
PROGRAMS = ("initdb", "postgres", "psql", "pg_isready", "pg_basebackup")
_SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "autovacuum": "off",
    "logging_collector": "off",
    "max_wal_senders": "4",
    "max_wal_size": "64MB",
    "min_wal_size": "32MB",
}
_numbers = itertools.count()


@functools.cache
def programs() -> Path | None:
    """The directory of the newest server installed; Debian keeps it off PATH."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found += [path.parent for path in sorted(versions, key=lambda path: int(path.parts[-3]))]
    whole = [each for each in found if all((each / name).exists() for name in PROGRAMS)]
    return whole[-1] if whole else None


def missing() -> str | None:
    """Why there can be no server here, or None."""
    return None if programs() else "no initdb on PATH or in /usr/lib/postgresql/*/bin"


def _user() -> str | None:
    """Whom the server runs as; None: as whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise RuntimeError("there is neither a user postgres nor a user nobody")


class Server:
    """A running server. Its superuser is `godwit`, who needs no password."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        self.last = ""
        """Name of the database that was made last."""

    def url(self, database: str = "postgres") -> str:
        """For `--store`."""
        return f"postgresql://godwit@/{database}?host={self.directory}"

    def run(self, program: str, *arguments: str) -> str:
        """Run one of its programs as its user; what it printed."""
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            user=_user(),
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_S_MAX,
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr or done.stdout}")
        return done.stdout

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run SQL as its superuser; the rows, a line each, columns by `|`."""
        where = ("-h", str(self.directory), "-U", "godwit", "-d", database)
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *where, "-c", statement).strip()

    def create(self, template: str = "template1") -> str:
        """A new database, as `template` is; its name."""
        name = f"t{next(_numbers)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        self.last = name
        return name

    def replica(self, where: Path) -> Server:
        """A standby of this server, streaming, started; `where`: a new directory()."""
        self.run(
            "pg_basebackup",
            *("-h", str(self.directory), "-U", "godwit", "-D", str(where / "data")),
            *("-R", "--no-sync", "--checkpoint=fast", "--wal-method=stream"),
        )
        made = Server(where)
        made.start()
        return made

    def start(self, **settings: str) -> None:
        """Start it and wait until it answers."""
        options = [
            word
            for name, value in {**_SETTINGS, **settings}.items()
            for word in ("-c", f"{name}={value}")
        ]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(self._programs / "postgres"),
                    *("-D", str(self.directory / "data"), "-k", str(self.directory), *options),
                ],
                user=_user(),
                cwd=self.directory,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=_end_with_us(os.getpid()),  # noqa: PLW1509 - takes no lock
            )
        deadline_s = time.monotonic() + START_S_MAX
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError((self.directory / "log").read_text())
            time.sleep(0.05)

    def _answers(self) -> bool:
        ask = [str(self._programs / "pg_isready"), "-q", "-h", str(self.directory), "-U", "godwit"]
        return subprocess.run([*ask, "-d", "postgres"], check=False).returncode == 0

    def stop(self) -> None:
        """Stop it at once; everything that was committed is on the disk."""
        if self.process:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(START_S_MAX)
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        """Send it, and all that it has started, a signal."""
        for pid in self._pids():
            os.kill(pid, number)

    def rss_kib(self) -> int:
        """Memory of its processes, what they share counted once: their proportional set sizes."""
        total = 0
        for pid in self._pids():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total

    def _pids(self) -> list[int]:
        """The server and its children, each of which is a session of its own."""
        assert self.process is not None
        found = [self.process.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = stat.read_text().rpartition(")")[2].split()[1]
                if int(parent) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found

    @property
    def _programs(self) -> Path:
        found = programs()
        assert found is not None
        return found


def _memory() -> str | None:
    """A file system in memory; None: there is none, or too little room."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > ROOM_BYTES:
            return "/dev/shm"
    return None


def _end_with_us(parent: int) -> Callable[[], None]:
    """For a child, before it becomes the server: killed, we could not stop it.

    After the change of its user, which would undo it; kept over the exec. The thread that starts
    the server has to live as long as it: here that is the main one.
    """
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _sweep(at: Path) -> None:
    """Remove what servers left whose tests were killed: a server ends with them, its files stay."""
    for left in at.glob("godwit-pg-*"):
        with contextlib.suppress(OSError, ValueError):
            if time.time() - left.stat().st_mtime < SWEEP_AFTER_S:
                continue
            pid_file = left / "data" / "postmaster.pid"
            pid = int(pid_file.read_text().split()[0]) if pid_file.exists() else 0
            if not pid or not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def directory(at: Path | None = None) -> Iterator[Path]:
    """A new directory that the server's user may use, and its socket's name is short enough for.

    In `at`, else in memory where there is room.
    """
    made = Path(tempfile.mkdtemp(prefix="godwit-pg-", dir=at or _memory()))
    _sweep(made.parent)
    try:
        if user := _user():
            shutil.chown(made, user)
            # The socket, for a root without capabilities too; the data have a mode of their own.
            made.chmod(0o711)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def serving(at: Path | None = None, **settings: str) -> Iterator[Server]:
    """A new server for the length of the block."""
    with directory(at) as where:
        server = Server(where)
        server.run(
            "initdb",
            *("-D", str(where / "data"), "-U", "godwit", "--auth=trust"),
            *("--no-sync", "--no-instructions", "--encoding=UTF8", "--locale=C"),
        )
        try:
            server.start(**settings)
            yield server
        finally:
            server.stop()
