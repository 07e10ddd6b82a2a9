"""Gives every distinct name of a trace a dense index, in order of first appearance. Owned by one pass over a trace."""

from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Name = TypeVar("Name", bound=Hashable)


class NameTable(Generic[Name]):
    """Indices 0, 1, 2, ...; an index never changes its name."""

    def __init__(self) -> None:
        self._index: dict[Name, int] = {}
        self._names: tuple[Name, ...] = ()

    @property
    def names(self) -> tuple[Name, ...]:
        """By index. A later value of this property starts with every earlier one."""
        if len(self._names) != len(self._index):
            self._names = tuple(self._index)
        return self._names

    def index_of(self, name: Name) -> int:
        return self._index.setdefault(name, len(self._index))


def column_indices(column: pa.ChunkedArray, table: NameTable[str]) -> npt.NDArray[np.int32]:
    """Index per row of a string or dictionary column, -1 for null. [rows] int32."""
    parts = []
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        of_code = np.full(len(encoded.dictionary) + 1, -1, dtype=np.int32)  # the last one is read by code -1
        names = encoded.dictionary.to_pylist()
        used, first = np.unique(codes, return_index=True)
        for code in used[np.argsort(first)]:
            name = names[code] if code >= 0 else None
            if name is not None:
                of_code[code] = table.index_of(name)
        parts.append(of_code[codes])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def pair_indices(
    first: npt.NDArray[np.int32], second: npt.NDArray[np.int32], table: NameTable[tuple[int, int]]
) -> npt.NDArray[np.int32]:
    """Index per row of (first, second), both at least -1. All [rows] int32."""
    keys = (first.astype(np.int64) + 1 << 32) | (second.astype(np.int64) + 1)
    unique, at, inverse = np.unique(keys, return_index=True, return_inverse=True)
    of_key = np.empty(len(unique), dtype=np.int32)
    for position in np.argsort(at):
        row = at[position]
        of_key[position] = table.index_of((int(first[row]), int(second[row])))
    return of_key[inverse]
