"""Kernels that draw the rows without a cut, and the noise and cost that all rows share; device code alone.

``race``: one program = one block of one row's vocabulary, read once, straight through; finds the block's best token.
``pick``: the best of a row's blocks. ``sampling`` launches them; rows with a cut are ``sampling_cut_kernels``'s.

Infinite logits count as the largest finite ones, NaN as the smallest; so every difference is a number or infinite.
Legend: B rows, N blocks of a row (NP: rounded up to a power of two).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels import noise

_MULTIPLIER_1 = tl.constexpr(noise.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(noise.MULTIPLIER_2)
_GOLDEN_64 = tl.constexpr(noise.GOLDEN_64)
_MULTIPLIER_64_1 = tl.constexpr(noise.MULTIPLIER_64_1)
_MULTIPLIER_64_2 = tl.constexpr(noise.MULTIPLIER_64_2)
_LARGEST_UNIFORM = tl.constexpr(noise.LARGEST_UNIFORM)
_TO_UNIT = tl.constexpr(2.0**-31)
LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)
_ONE_ULP = tl.constexpr(2.0**-23)


@triton.jit
def _mix(bits):
    bits ^= bits >> 16
    bits *= _MULTIPLIER_1
    bits ^= bits >> 15
    bits *= _MULTIPLIER_2
    return bits ^ (bits >> 16)


@triton.jit
def _splitmix_64(value):
    value += _GOLDEN_64
    value = (value ^ (value >> 30)) * _MULTIPLIER_64_1
    value = (value ^ (value >> 27)) * _MULTIPLIER_64_2
    return value ^ (value >> 31)


@triton.jit
def uniforms(ids, seed, index):
    """As ``noise``, bit for bit; ``ids`` int32, ``seed`` and ``index`` int64 scalars."""
    key = _splitmix_64(_splitmix_64(seed.to(tl.uint64)) + index.to(tl.uint64))
    bits = (ids.to(tl.uint32) * _MULTIPLIER_1) ^ key.to(tl.uint32)
    bits = _mix(_mix(bits) + (key >> 32).to(tl.uint32))
    uniform = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * _TO_UNIT
    return tl.minimum(uniform, _LARGEST_UNIFORM)


@triton.jit
def exponentials(uniform):
    """-log1p(-uniform) for 0 < uniform < 1, within 1e-7 of it.

    log1p(a) = e * log(2) + log1p(m) with 1 + a = 2**e * (1 + m), m in [-1/3, 1/3]. m is computed from a itself, so that
    a small a keeps its digits; log1p(m) = m - m**2 / 2 + m**3 * P(m), P by a minimax fit of the relative error.
    """
    a = -uniform
    e = ((1.0 + a).to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
    m = (a.to(tl.int32, bitcast=True) - e).to(tl.float32, bitcast=True)
    m += tl.fma((0x40800000 - e).to(tl.float32, bitcast=True), 0.25, -1.0)
    s = m * m
    odd = tl.fma(s, -0.128916666, -0.121842645)
    even = tl.fma(s, 0.139844462, 0.140058666)
    odd = tl.fma(odd, s, -0.166804865)
    even = tl.fma(even, s, 0.200104058)
    odd = tl.fma(odd, s, -0.249997973)
    p = tl.fma(tl.fma(even, m, odd), m, 0.333332151)
    p = tl.fma(tl.fma(p, m, -0.5), s, m)
    return -tl.fma(e.to(tl.float32) * _ONE_ULP, _LOG_2, p)


@triton.jit
def load_block(logits_ptr, row, stride, vocab_size, block, BLOCK: tl.constexpr):
    """(ids, logits in fp32, finite); what lies past the vocabulary is the smallest number."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    return ids, tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def race_costs(ids, x, reference, scale, seed, index):
    """(E / w, 1 / w): the least cost wins. w = exp((x - reference) / temperature), scale = log2(e) / temperature."""
    inverse = tl.exp2((reference - x) * scale)
    return exponentials(uniforms(ids, seed, index)) * inverse, inverse


@triton.jit
def emit(token, row, vocab_size, slot_ptr, token_ptr, last_token_ptr, LAST: tl.constexpr):
    # A row of nothing but minus infinity may yield an id past its end.
    token = tl.minimum(token, vocab_size - 1)
    tl.store(token_ptr + row, token.to(tl.int64))
    if LAST:
        tl.store(last_token_ptr + tl.load(slot_ptr + row), token)


@triton.jit(do_not_specialize=["step"])
def race_kernel(
    logits_ptr,
    stride,
    vocab_size,
    seed_ptr,
    index_ptr,
    step,
    temperature_ptr,
    cut_place_ptr,
    cost_ptr,
    reference_ptr,
    id_ptr,
    DRAWS: tl.constexpr,
    CUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N, B). The best token of each block: id, cost (the less the better) and the logit it is relative to.

    A greedy row's cost is minus its logit. Rows with a cut are left out."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if CUTS:  # noqa: SIM102 (known when compiled)
        if tl.load(cut_place_ptr + row) >= 0:
            return
    ids, x = load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
    costs = -x
    reference = tl.max(x, axis=0)
    if DRAWS:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature > 0.0:
            seed, index = tl.load(seed_ptr + row), tl.load(index_ptr + row) + step
            costs, _ = race_costs(ids, x, reference, LOG2_E / temperature, seed, index)
    cost, best = tl.min(costs, axis=0, return_indices=True)
    at = row * tl.num_programs(0) + block
    tl.store(cost_ptr + at, cost)
    tl.store(reference_ptr + at, reference)
    tl.store(id_ptr + at, block * BLOCK + best)


@triton.jit
def pick_kernel(
    vocab_size,
    temperature_ptr,
    cut_place_ptr,
    cost_ptr,
    reference_ptr,
    id_ptr,
    slot_ptr,
    token_ptr,
    last_token_ptr,
    num_blocks,
    LAST: tl.constexpr,
    NP: tl.constexpr,
):
    """Grid (B,). The best of a row's blocks; the first of equals."""
    row = tl.program_id(0)
    if tl.load(cut_place_ptr + row) >= 0:
        return
    block_N = tl.arange(0, NP)
    at_N = row * num_blocks + block_N
    present_N = block_N < num_blocks
    cost_N = tl.load(cost_ptr + at_N, mask=present_N, other=float("inf"))
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0.0:
        reference_N = tl.load(reference_ptr + at_N, mask=present_N, other=-3.4028234663852886e38)
        cost_N *= tl.exp2((tl.max(reference_N, axis=0) - reference_N) * (LOG2_E / temperature))
    _, best = tl.min(cost_N, axis=0, return_indices=True)
    token = tl.load(id_ptr + row * num_blocks + best)
    emit(token, row, vocab_size, slot_ptr, token_ptr, last_token_ptr, LAST)
