"""Brings adapters from the artifact source into host memory, a few at a time, off the engine's thread.

Knows which adapters are staged or on their way; when to stage or drop is the engine's decision. Called by
``engine_loop`` from its own thread, and from the server's to begin before the engine has looked at the request.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import BadAdapter, ExecutorLost, LoraplexError
from loraplex.core.ids import Digest
from loraplex.core.step import Executor
from loraplex.replica.failures import request_failure

STAGING_FAILED = "the adapter could not be read"
FILE_DAMAGED = "the stored file of the adapter is not what was registered; register the adapter again"

_log = logging.getLogger(__name__)


class ArtifactSource(Protocol):
    def open(self, digest: Digest) -> AbstractContextManager[tuple[AdapterManifest, str]]:
        """Manifest and local path of the safetensors file, which stays there meanwhile; blocks, any thread.

        Raises a LoraplexError: NotFound, Unavailable, StorageFull, BadAdapter.
        """


class AdapterStager:
    def __init__(
        self,
        executor: Executor,
        source: ArtifactSource,
        *,
        num_threads: int,
        on_staged: Callable[[Digest, int], None],
        on_failed: Callable[[Digest, LoraplexError], None],
    ) -> None:
        """``on_staged`` (digest, pages that it takes) and ``on_failed`` (digest, error) are called on a staging
        thread; each ``request`` that finds the adapter neither staged nor under way ends in exactly one of them."""
        self._executor = executor
        self._source = source
        self._on_staged = on_staged
        self._on_failed = on_failed
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="stage-adapter")
        self._lock = threading.Lock()
        self._known: set[Digest] = set()
        self._closed = False

    def request(self, digest: Digest) -> None:
        """Begins to stage, unless that is under way or done. Any thread; does not block on the work."""
        with self._lock:
            if digest not in self._known and not self._closed:
                self._known.add(digest)
                self._threads.submit(self._stage, digest)

    def unstage(self, digest: Digest) -> None:
        """Drops a staged adapter from host memory. Any thread."""
        with self._lock:
            self._known.discard(digest)
            self._executor.unstage_adapter(digest)

    def close(self) -> None:
        """Waits for what is under way; begins nothing more."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _stage(self, digest: Digest) -> None:
        try:
            with self._source.open(digest) as (manifest, path):
                expected = self._executor.model.base_model_id
                if manifest.base_model_id != expected:
                    raise BadAdapter(f"the adapter is of base {manifest.base_model_id}, this replica serves {expected}")
                num_pages = self._executor.adapter_pages(manifest)
                self._stage_file(manifest, path)
        except ExecutorLost:
            # The engine loop notices as well, and ends: its requests go on elsewhere and must not fail here.
            _log.warning("staging adapter %s ended with the executor", digest)
        except Exception as error:
            _log.warning("staging adapter %s failed: %s", digest, error, exc_info=not isinstance(error, LoraplexError))
            with self._lock:
                self._known.discard(digest)
            self._on_failed(digest, request_failure(error, STAGING_FAILED))
        else:
            self._on_staged(digest, num_pages)

    def _stage_file(self, manifest: AdapterManifest, path: str) -> None:
        try:
            self._executor.stage_adapter(manifest, path)
        except BadAdapter as error:
            # The file passed the intake, so what is wrong with it came later; the executor's words may hold the path.
            _log.error("the file of adapter %s is damaged: %s", manifest.digest, error)
            raise BadAdapter(FILE_DAMAGED) from error
