"""cuBLASLt by ctypes: ``x W^T`` by an algorithm of the caller's choice, and which algorithms there are for a size.

torch always takes the library's first proposal, which for some tens to hundreds of rows is often not its fastest. Needs
the CUDA build of torch, whose library is the one that is called. Called by ``dense``.
Source: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
Legend: T tokens, K input features, N output features.
"""

import ctypes
from ctypes import byref, c_char, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache

import torch

_COMPUTE_32F = 68
_R_32F = 0
_TYPES = {torch.bfloat16: 14, torch.float16: 2}
_DESC_TRANSA = 3
_PREF_MAX_WORKSPACE_BYTES = 1
_PREF_REDUCTION_SCHEME_MASK = 3
_ORDERED_REDUCTIONS = 6
"""Split sums through the workspace, in fp32 or in the output's type; not through counters in the output."""
_WORKSPACE_BYTES = 32 << 20

ALGORITHM_BYTES = 64
"""Of an algorithm's description, which holds for one version of the library."""


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_char * ALGORITHM_BYTES),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@cache
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "0").split(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{major}")
    library.cublasLtGetVersion.restype = c_size_t
    return library


def library_version() -> int:
    """Raises OSError where torch has no cuBLASLt."""
    return int(_library().cublasLtGetVersion())


class CublasLt:
    """One device's handle and workspace. For one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError where torch has no cuBLASLt."""
        self._library = _library()
        self._handle = c_void_p()
        self._call("cublasLtCreate", byref(self._handle))
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._one, self._zero = c_float(1.0), c_float(0.0)
        self._operation = self._transposed_product()
        self._layout_of: dict[tuple[int, int, int], c_void_p] = {}

    def algorithms(
        self, num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype, most: int
    ) -> list[bytes]:
        """The library's proposals, its first choice first, all with a fixed order of sums."""
        preference = c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            for attribute, value in (
                (_PREF_MAX_WORKSPACE_BYTES, c_uint64(_WORKSPACE_BYTES)),
                (_PREF_REDUCTION_SCHEME_MASK, c_uint32(_ORDERED_REDUCTIONS)),
            ):
                self._call(
                    "cublasLtMatmulPreferenceSetAttribute", preference, c_int(attribute), byref(value),
                    c_size_t(ctypes.sizeof(value)),
                )  # fmt: skip
            found, count = (_Heuristic * most)(), c_int()
            weight, x, out = self._layouts(num_tokens, in_features, out_features, dtype)
            self._call(
                "cublasLtMatmulAlgoGetHeuristic", self._handle, self._operation, weight, x, out, out, preference,
                c_int(most), found, byref(count),
            )  # fmt: skip
        finally:
            self._call("cublasLtMatmulPreferenceDestroy", preference)
        return [ctypes.string_at(byref(entry), ALGORITHM_BYTES) for entry in found[: count.value] if entry.state == 0]

    def matmul(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor, algorithm: bytes) -> None:
        """``out = x W^T`` on the current stream, dense tensors of one 16-bit dtype. RuntimeError where the algorithm is
        not for this size."""
        (num_tokens, in_features), out_features = x_TK.shape, weight_NK.shape[0]
        weight, x, out = self._layouts(num_tokens, in_features, out_features, x_TK.dtype)
        self._call(
            "cublasLtMatmul", self._handle, self._operation, byref(self._one),
            c_void_p(weight_NK.data_ptr()), weight, c_void_p(x_TK.data_ptr()), x, byref(self._zero),
            c_void_p(out_TN.data_ptr()), out, c_void_p(out_TN.data_ptr()), out,
            ctypes.create_string_buffer(algorithm, ALGORITHM_BYTES),
            c_void_p(self._workspace.data_ptr()), c_size_t(_WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream(x_TK.device).cuda_stream),
        )  # fmt: skip

    def _layouts(
        self, num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype
    ) -> tuple[c_void_p, c_void_p, c_void_p]:
        """Of weight, x and out, which the library reads by columns: (K, N) transposed, (K, T), (N, T)."""
        kind = _TYPES[dtype]
        return (
            self._layout(kind, in_features, out_features),
            self._layout(kind, in_features, num_tokens),
            self._layout(kind, out_features, num_tokens),
        )

    def _transposed_product(self) -> c_void_p:
        operation = c_void_p()
        self._call("cublasLtMatmulDescCreate", byref(operation), c_int(_COMPUTE_32F), c_int(_R_32F))
        transposed = c_int32(1)
        self._call("cublasLtMatmulDescSetAttribute", operation, c_int(_DESC_TRANSA), byref(transposed), c_size_t(4))
        return operation

    def _layout(self, kind: int, rows: int, columns: int) -> c_void_p:
        layout = self._layout_of.get((kind, rows, columns))
        if layout is None:
            layout = self._layout_of[kind, rows, columns] = c_void_p()
            shape = c_uint64(rows), c_uint64(columns), c_int64(rows)
            self._call("cublasLtMatrixLayoutCreate", byref(layout), c_int(kind), *shape)
        return layout

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: status {status}")
