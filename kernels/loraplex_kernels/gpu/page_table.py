"""Scattered writes into the page table of all slots.

The table lives on the device for the whole life of an executor; a step adds a few entries. Called by model_runner.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

_BLOCK = 256


@triton.jit(do_not_specialize=["num_updates"])
def _write_kernel(table_ptr, updates_ptr, num_updates, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < num_updates
    index = tl.load(updates_ptr + i, mask=live, other=0)
    page = tl.load(updates_ptr + num_updates + i, mask=live, other=0)
    tl.store(table_ptr + index, page, mask=live)


def write_page_table(table_SP: torch.Tensor, updates_2U: torch.Tensor) -> None:
    """``table.view(-1)[updates[0]] = updates[1]``.

    ``table_SP``: int32, dense, below 2**31 entries. ``updates_2U``: (2, U) int32, U >= 1; indices are distinct and
    inside the table.
    """
    num_updates = updates_2U.shape[1]
    _write_kernel[(triton.cdiv(num_updates, _BLOCK),)](table_SP, updates_2U, num_updates, BLOCK=_BLOCK)
