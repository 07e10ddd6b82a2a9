"""A way to a server that falls silent: connections come about, and nothing is answered on any of them."""

import contextlib
import socket
import threading


class Relay:
    """Listens on 127.0.0.1 at ``port`` and passes on what comes, to ``server_port`` and back."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._silent = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self.num_accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        self._silent.set()

    def speak(self) -> None:
        """Connections from before and from the silence are closed: what they carried is lost."""
        self._hang_up()
        self._silent.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._hang_up()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.num_accepted += 1
                self._sockets.append(client)
                if self._silent.is_set():
                    continue
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets.append(server)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._silent.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _hang_up(self) -> None:
        while self._sockets:
            one = self._sockets.pop()
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
