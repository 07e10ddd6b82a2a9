"""A real S3 server process (moto's) behind a gate: closed, nobody gets through, as when the network is away."""

import contextlib
import importlib.util
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pyarrow.fs as pafs
from loraplex_deployments.ports import free_port

ACCESS_KEY, SECRET_KEY = "AKIDLORAPLEXTEST", "s3cr3t-of-the-test"
_START_TIMEOUT_S = 60.0
_SERVER = (
    "import sys; sys.argv = ['moto_server', '-H', '127.0.0.1', '-p', '{port}']; from moto.server import main; main()"
)


class S3Server:
    """Takes any credentials. ``url`` is reached through the gate, with credentials from a file."""

    def __init__(self) -> None:
        """Raises RuntimeError when the server is not installed, saying what brings it."""
        if any(importlib.util.find_spec(name) is None for name in ("moto", "flask", "flask_cors")):
            raise RuntimeError(
                "the tests need an S3 server: pip install -c requirements.lock 'moto[s3]' flask flask-cors"
            )
        self._directory = tempfile.TemporaryDirectory(prefix="loraplex-s3-")
        root = Path(self._directory.name)
        self.credentials_file = root / "credentials"
        self.credentials_file.write_text(
            f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        )
        port = free_port()
        self._log = (root / "log").open("wb")
        environment = os.environ | {"AWS_ACCESS_KEY_ID": "server", "AWS_SECRET_ACCESS_KEY": "server"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER.format(port=port)], stdout=self._log, stderr=self._log, env=environment
        )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
                    break
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    said = (root / "log").read_text()[-2000:]
                    raise RuntimeError(f"the S3 server did not start: {said}") from error
                time.sleep(0.1)
        self._direct = pafs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            region="us-east-1",
            endpoint_override=f"http://127.0.0.1:{port}",
            allow_bucket_creation=True,
        )
        self.gate = Gate(port)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.gate.port}"

    def url(self, path: str) -> str:
        """Of ``bucket/...``; the bucket is made."""
        self._direct.create_dir(path.partition("/")[0])
        options = f"region=us-east-1&endpoint_override={self.endpoint}&credentials_file={self.credentials_file}"
        return f"s3://{path}?{options}"

    def names(self, path: str) -> list[str]:
        """Of all objects below it, sorted."""
        found = self._direct.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
        return sorted(info.path for info in found if info.type == pafs.FileType.File)

    def read(self, path: str) -> bytes:
        with self._direct.open_input_stream(path) as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        with self._direct.open_output_stream(path) as stream:
            stream.write(content)

    def remove(self) -> None:
        self.gate.shut()
        self._process.terminate()
        self._process.wait(timeout=30)
        self._log.close()
        self._directory.cleanup()


class Gate:
    """Passes TCP connections on to ``server_port`` while it is open; it is made open."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.port = free_port()
        self._open: _OpenGate | None = None
        self.open()

    def open(self) -> None:
        if self._open is None:
            self._open = _OpenGate(self.port, self._server_port)

    def shut(self) -> None:
        """Cuts what is on its way; later connections are refused."""
        if self._open is not None:
            self._open.close()
            self._open = None


class _OpenGate:
    def __init__(self, port: int, server_port: int) -> None:
        self._server_port = server_port
        self._listening = socket.create_server(("127.0.0.1", port))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._closing = threading.Event()
        self._peer: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(timeout=0.02):
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._pass_on(key.fileobj)
        for end in (*self._peer, self._listening):
            end.close()
        self._selector.close()

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        server = socket.create_connection(("127.0.0.1", self._server_port))
        self._peer |= {client: server, server: client}
        for end in (client, server):
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        peer = self._peer.get(end)
        if peer is None:
            return
        data = b""
        with contextlib.suppress(OSError):
            data = end.recv(1 << 18)
            peer.sendall(data)
        if not data:
            for one in (end, peer):
                self._peer.pop(one)
                self._selector.unregister(one)
                one.close()
