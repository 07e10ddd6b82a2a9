"""Dense projections: torch's GEMM, or where a table of measured sizes names one, another algorithm of cuBLASLt.

Tables lie beside this file, one for a GPU and a version of the library (``kernels/benchmarks/tune_gemms.py`` writes
them); where none fits, torch decides. All replicas of a kind of GPU choose alike, so that they give the same tokens.
Called by model_runner. Legend: T tokens, K input features, N output features.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex_kernels.gpu.cublaslt import CublasLt, library_version
from loraplex_kernels.linear import linear_into

_TABLES = Path(__file__).parent / "gemms"

Size = tuple[int, int, int]
"""T, K, N."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTable:
    gpu: str
    cublaslt: int
    """Version of the library."""
    algorithms: Mapping[Size, bytes]
    """In bf16."""

    @classmethod
    def load(cls, path: Path) -> "GemmTable":
        """ValueError when it is not such a table."""
        fields = json.loads(path.read_text())
        return cls(
            gpu=fields["gpu"],
            cublaslt=fields["cublaslt"],
            algorithms={_size(text): bytes.fromhex(algorithm) for text, algorithm in fields["algorithms"].items()},
        )

    def save(self, path: Path) -> None:
        algorithms = {"x".join(map(str, size)): algorithm.hex() for size, algorithm in self.algorithms.items()}
        fields = {"gpu": self.gpu, "cublaslt": self.cublaslt, "algorithms": algorithms}
        path.write_text(json.dumps(fields, indent=1) + "\n")


class DenseProjections:
    """Of one executor, whose steps run on one stream at a time: owns the library's workspace."""

    def __init__(self, device: torch.device) -> None:
        self._library: CublasLt | None = None
        self._algorithms: Mapping[Size, bytes] = {}
        if device.type != "cuda":
            return
        try:
            table = find_table(_TABLES, torch.cuda.get_device_name(device), library_version())
        except OSError:
            return
        if table is not None:
            self._library, self._algorithms = CublasLt(device), table.algorithms

    def into(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor) -> torch.Tensor:
        """``x W^T`` in ``out_TN``, which it returns; all dense. ``weight_NK``: of ``pack_weight``."""
        if self._library is not None and x_TK.dtype == torch.bfloat16:
            algorithm = self._algorithms.get((*x_TK.shape, weight_NK.shape[0]))
            if algorithm is not None:
                self._library.matmul(x_TK, weight_NK, out_TN, algorithm)
                return out_TN
        return linear_into(x_TK, weight_NK, out_TN)


def find_table(folder: Path, gpu: str, version: int) -> GemmTable | None:
    """The one in ``folder`` for this GPU and version of cuBLASLt."""
    tables = (GemmTable.load(path) for path in sorted(folder.glob("*.json")))
    return next((table for table in tables if (table.gpu, table.cublaslt) == (gpu, version)), None)


def _size(text: str) -> Size:
    tokens, in_features, out_features = (int(part) for part in text.split("x"))
    return tokens, in_features, out_features
