"""Ranks as processes of this machine: for ``bench``, ``profile``, tests, and replicas on one node.

They are forked from a server process that has imported torch and started nothing: a rank is there in a fraction of a
second, and inherits no thread and no device.
"""

import multiprocessing
from multiprocessing.context import ForkServerProcess

from loraplex.model_runner.ranks.launcher import RankProcess, RankStart

_BODY = "loraplex.model_runner.ranks.worker"


class LocalLauncher:
    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([_BODY])

    @property
    def host(self) -> str:
        return "127.0.0.1"

    def launch(self, start: RankStart) -> RankProcess:
        process = self._context.Process(target=_run, args=(start,), name=f"rank {start.rank}", daemon=True)
        process.start()
        return _LocalProcess(process)


class _LocalProcess:
    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    def ended(self) -> str | None:
        code = self._process.exitcode
        if code is None:
            return None
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _run(start: RankStart) -> None:
    # torch: not needed in the process that launches.
    from loraplex.model_runner.ranks.worker import run_rank

    run_rank(start)
