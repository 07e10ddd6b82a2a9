"""Many functions stand for few adapters, as in AlpaServe (OSDI'23, section 6.2)."""

from collections.abc import Iterable
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loraplex.core.errors import BadConfig
from loraplex.traces.names import NameTable, column_indices, pair_indices


class MappingStrategy(StrEnum):
    """Function i of F (by first appearance) becomes, of A adapters,"""

    STRIPE = "stripe"
    """adapter i mod A"""
    ROUND_ROBIN = "round-robin"
    """adapter floor(A * i / F): neighbours together; the name is AlpaServe's"""


class AdapterMapping:
    """Which adapter each (tenant, adapter) of a source stands for; its tenant is that of its first function."""

    def __init__(self, tables: Iterable[pa.Table], *, adapters: int, strategy: MappingStrategy) -> None:
        """Walks the source once. Raises BadConfig when it has fewer functions than ``adapters``."""
        self._tenants, self._names = NameTable[str](), NameTable[str]()
        self._functions = functions = NameTable[tuple[int, int]]()
        for table in tables:
            self._function_indices(table)
        num = len(functions.names)
        if not 0 < adapters <= num:
            raise BadConfig(f"{num} functions cannot stand for {adapters} adapters", param="adapters")
        index = np.arange(num)
        self._adapter_of = index % adapters if strategy is MappingStrategy.STRIPE else adapters * index // num
        digits = len(str(adapters - 1))
        self._labels = pa.array([f"adapter-{index:0{digits}d}" for index in range(adapters)])
        first_function = np.unique(self._adapter_of, return_index=True)[1]
        self._tenant_of = np.array([functions.names[first][0] for first in first_function], dtype=np.int32)

    def apply(self, table: pa.Table) -> pa.Table:
        """``table`` with its columns ``tenant`` and ``adapter_name`` replaced."""
        adapter = self._adapter_of[self._function_indices(table)].astype(np.int32)
        tenant = self._tenant_of[adapter]
        columns = {
            "tenant": pa.DictionaryArray.from_arrays(
                pa.array(tenant, mask=tenant < 0), pa.array(self._tenants.names, pa.string())
            ),
            "adapter_name": pa.DictionaryArray.from_arrays(pa.array(adapter), self._labels),
        }
        for name, column in columns.items():
            table = table.set_column(table.column_names.index(name), name, column)
        return table

    def _function_indices(self, table: pa.Table) -> npt.NDArray[np.int32]:
        tenant = column_indices(table.column("tenant"), self._tenants)
        name = column_indices(table.column("adapter_name"), self._names)
        return pair_indices(tenant, name, self._functions)
