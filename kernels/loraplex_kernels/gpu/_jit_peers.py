"""The kernel of ``peers``: one program = one token's row. Legend: D features of a row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit_rows import normed


@triton.jit
def add_peers_rms_norm_kernel(
    residual_ptr, weight_ptr, out_ptr, parts_ptr, flags_ptr, count_ptr, eps,
    RANK: tl.constexpr, WORLD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BUFFERS: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,). Flags hold how many exchanges of the row a rank has announced, and grow until they wrap."""
    token = tl.program_id(0).to(tl.int64)
    row = token * D
    column_D = tl.arange(0, BLOCK_D)
    present_D = column_D < D
    weight_D = tl.load(weight_ptr + column_D, mask=present_D, other=0.0).to(tl.float32)
    residual_D = tl.load(residual_ptr + row + column_D, mask=present_D, other=0.0)
    count = tl.load(count_ptr + token) + 1
    # This rank's part was written by an earlier kernel of the stream: whoever sees the flag sees the part.
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            flag_ptr = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int32)) + token * WORLD + RANK
            tl.atomic_xchg(flag_ptr, count, sem="release", scope="sys")
    own_ptr = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + token * WORLD
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            # A peer may be one exchange ahead already.
            while tl.atomic_add(own_ptr + peer, 0, sem="acquire", scope="sys") - count < 0:
                pass
    x_D = residual_D.to(tl.float32)
    for part in tl.static_range(WORLD * BUFFERS):
        part_ptr = tl.load(parts_ptr + part).to(tl.pointer_type(residual_ptr.dtype.element_ty))
        part_ptr = tl.multiple_of(part_ptr, 16)
        x_D += tl.load(part_ptr + row + column_D, mask=present_D, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(count_ptr + token, count)
    sum_D = x_D.to(residual_D.dtype)
    tl.store(residual_ptr + row + column_D, sum_D, mask=present_D)
    tl.store(out_ptr + row + column_D, normed(sum_D.to(tl.float32), weight_D, eps, D).to(sum_D.dtype), mask=present_D)
