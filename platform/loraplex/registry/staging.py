"""Directories in which the files of one upload gather before they are checked. Emptied at every start.

Owns the upload ids (unguessable: whoever knows one may write to it) and the file sizes. Knows no tenant. Blocking;
called from worker threads, one call per upload at a time.
"""

import secrets
import shutil
from pathlib import Path

from loraplex.core.errors import BadAdapter, InvalidInput, PayloadTooLarge
from loraplex.registry.config import RegistryConfig
from loraplex.registry.lora_config import CONFIG_FILE
from loraplex.registry.store import translated_disk_errors
from loraplex.registry.tensors_file import TENSORS_FILE

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class StagingArea:
    def __init__(self, directory: Path, config: RegistryConfig) -> None:
        """Removes what an earlier process left behind."""
        self._directory = directory.absolute()
        self._limits = {CONFIG_FILE: config.max_config_bytes, TENSORS_FILE: config.max_adapter_bytes}
        with translated_disk_errors("uploads"):
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True, exist_ok=True)

    def create(self) -> str:
        """Returns the id of a new, empty upload. Raises StorageFull."""
        upload_id = "upl_" + secrets.token_urlsafe(24)
        with translated_disk_errors("the upload"):
            self.path(upload_id).mkdir()
        return upload_id

    def path(self, upload_id: str) -> Path:
        """``upload_id`` must come from ``create``."""
        return self._directory / upload_id

    def append(self, upload_id: str, filename: str, data: bytes) -> None:
        """Raises BadAdapter (pickle), InvalidInput (another file name), PayloadTooLarge, StorageFull."""
        limit = self._limits.get(filename)
        if limit is None:
            raise _wrong_file(filename)
        path = self.path(upload_id) / filename
        with translated_disk_errors("the upload"), path.open("ab") as file:
            if file.tell() + len(data) > limit:
                raise PayloadTooLarge(f"{filename} is larger than the allowed {limit} bytes", param=filename)
            file.write(data)

    def remove(self, upload_id: str) -> None:
        """Idempotent."""
        shutil.rmtree(self.path(upload_id), ignore_errors=True)


def _wrong_file(filename: str) -> InvalidInput:
    shown = filename if len(filename) <= 80 else filename[:77] + "..."
    if filename.lower().endswith(_PICKLE_SUFFIXES):
        return BadAdapter(
            f"{shown!r} is a pickle file, which is never loaded; save it as safetensors", param="filename"
        )
    return InvalidInput(f"unexpected file {shown!r}: an adapter is {CONFIG_FILE} and {TENSORS_FILE}", param="filename")
