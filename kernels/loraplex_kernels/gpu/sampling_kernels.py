"""The sampling kernels: device code alone. ``sampling`` sizes the scratch and launches.

Loop nest of all but the last: one program = one block of one row's vocabulary, read once, straight through; what the
blocks found is combined by whoever needs it next (the programs of the following launch), so there is no other launch.

Search: the bound of top_k is the largest logit t with count(x >= t) >= k, that of top_p the largest with
mass(x >= t) >= p * mass. Both by the same search over the floats in order, as integers ("keys"): a launch sums the
weight (1, or the probability) above ``NUM_CUTS`` keys that divide the row's bracket evenly, the next one keeps the
part in which the answer lies. bf16 has 2**16 keys, fp32 2**32; a row that is done early costs its launches only.

Legend: B rows, R rows with a cut, N blocks of a row (NP: rounded up to a power of two), S = 16 sums of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels import noise

NUM_CUTS = 9
NUM_SUMS = 16
"""Sums at the lower end of the bracket and at each cut, rounded up to a power of two."""

_NUM_CUTS = tl.constexpr(NUM_CUTS)
_NUM_SUMS = tl.constexpr(NUM_SUMS)
_MULTIPLIER_1 = tl.constexpr(noise.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(noise.MULTIPLIER_2)
_GOLDEN_64 = tl.constexpr(noise.GOLDEN_64)
_MULTIPLIER_64_1 = tl.constexpr(noise.MULTIPLIER_64_1)
_MULTIPLIER_64_2 = tl.constexpr(noise.MULTIPLIER_64_2)
_LARGEST_UNIFORM = tl.constexpr(noise.LARGEST_UNIFORM)
_TO_UNIT = tl.constexpr(2.0**-31)
_LOG2_E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))


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
    """-log1p(-uniform); the quotient corrects the rounding of 1 - uniform (Kahan; see Goldberg 1991, theorem 4)."""
    rest = 1.0 - uniform
    taken = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    return tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / taken))


@triton.jit
def _relative_weights(x, largest, scale):
    """exp((x - largest) / temperature), scale = log2(e) / temperature; no NaN for infinite logits."""
    return tl.where(x == largest, 1.0, tl.exp2((x - largest) * scale))


@triton.jit
def _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK: tl.constexpr):
    """(ids, logits in fp32); NaN and what lies past the vocabulary count as minus infinity."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    return ids, tl.where(x == x, x, -_INF)


@triton.jit
def _key_of(x, SHIFT: tl.constexpr):
    """The place of a float among all floats in order; SHIFT 16: among those of bf16, rounded down."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value_of(key, SHIFT: tl.constexpr):
    if SHIFT > 0:
        key = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _row_stats(max_ptr, sum_ptr, place, num_blocks, scale, NP: tl.constexpr):
    """(largest logit, sum of the weights relative to it) of a row."""
    block_N = tl.arange(0, NP)
    present_N = block_N < num_blocks
    max_N = tl.load(max_ptr + place * num_blocks + block_N, mask=present_N, other=-float("inf"))
    sum_N = tl.load(sum_ptr + place * num_blocks + block_N, mask=present_N, other=0.0)
    largest = tl.max(max_N, axis=0)
    return largest, tl.sum(sum_N * _relative_weights(max_N, largest, scale), axis=0)


@triton.jit
def _narrowed(low, high, goal, share, sums_ptr, place, num_blocks, NP: tl.constexpr):
    """The bracket [low, high) and the goal after the sums of one launch. A negative goal: ``share`` of what lies above
    ``low``, which is known now."""
    if high - low > 1:
        block_N = tl.arange(0, NP)
        cut_S = tl.arange(0, _NUM_SUMS)
        at_NS = (place * num_blocks + block_N[:, None]) * _NUM_SUMS + cut_S[None, :]
        inside_NS = (block_N[:, None] < num_blocks) & (cut_S[None, :] <= _NUM_CUTS)
        sums_S = tl.sum(tl.load(sums_ptr + at_NS, mask=inside_NS, other=0.0).to(tl.float64), axis=0)
        if goal < 0.0:
            goal = share * tl.sum(tl.where(cut_S == 0, sums_S, 0.0), axis=0)
        key_S = low + (high - low) * cut_S.to(tl.int64) // (_NUM_CUTS + 1)
        # A cut equal to ``low`` tells nothing, and sums of all but equal masses may be rounded either way.
        tells_S = (cut_S <= _NUM_CUTS) & (key_S > low)
        enough_S = sums_S >= goal
        old_low = low
        low = tl.max(tl.where(tells_S & enough_S, key_S, old_low), axis=0)
        high = tl.min(tl.where(tells_S & (key_S > low) & (enough_S == 0), key_S, high), axis=0)
    return low, high, goal


@triton.jit
def stats_kernel(
    logits_ptr,
    stride,
    vocab_size,
    cut_rows_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    BLOCK: tl.constexpr,
):
    """Grid (N, R). Largest logit of each block, and the sum of the weights relative to it."""
    block, place = tl.program_id(0), tl.program_id(1)
    row = tl.load(cut_rows_ptr + place)
    scale = _LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
    _, x = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
    largest = tl.max(x, axis=0)
    tl.store(max_ptr + place * tl.num_programs(0) + block, largest)
    tl.store(sum_ptr + place * tl.num_programs(0) + block, tl.sum(_relative_weights(x, largest, scale), axis=0))


@triton.jit
def search_kernel(
    logits_ptr,
    stride,
    vocab_size,
    cut_rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    max_ptr,
    sum_ptr,
    old_bracket_ptr,
    old_goal_ptr,
    old_sums_ptr,
    bracket_ptr,
    goal_ptr,
    sums_ptr,
    BEGIN: tl.constexpr,
    SECOND: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    NP: tl.constexpr,
):
    """Grid (N, R). The first search is for top_k, or top_p in rows without top_k; the ``SECOND`` for top_p in rows
    that have both, over what top_k left. ``BEGIN``: the first launch of a search."""
    block, place = tl.program_id(0), tl.program_id(1)
    num_blocks = tl.num_programs(0)
    row = tl.load(cut_rows_ptr + place)
    scale = _LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    largest, mass = _row_stats(max_ptr, sum_ptr, place, num_blocks, scale, NP)
    top = _key_of(largest, SHIFT)
    counts = (top_k > 0) & (top_k < vocab_size)
    if BEGIN and not SECOND:
        low = _key_of(tl.cast(-_INF, tl.float32), SHIFT)
        high = low + 1
        goal = top_k.to(tl.float64)
        if counts:
            high = top + 1
        elif top_p < 1.0:
            goal = top_p * mass.to(tl.float64)
            # Less than 1 - p of the mass lies below this weight, even if every token did.
            negligible = (1.0 - top_p).to(tl.float32) * mass / vocab_size
            least = largest + (tl.log2(negligible) - 0.01) / scale
            low = tl.minimum(_key_of(tl.where(least == least, least, -_INF), SHIFT), top)
            high = top + 1
    else:
        low = tl.load(old_bracket_ptr + 2 * place)
        high = tl.load(old_bracket_ptr + 2 * place + 1)
        goal = tl.load(old_goal_ptr + place)
        low, high, goal = _narrowed(low, high, goal, top_p, old_sums_ptr, place, num_blocks, NP)
        if BEGIN and counts and top_p < 1.0:
            high = top + 1
            goal = tl.cast(-1.0, tl.float64)
    if block == 0:
        tl.store(bracket_ptr + 2 * place, low)
        tl.store(bracket_ptr + 2 * place + 1, high)
        tl.store(goal_ptr + place, goal)
    if high - low > 1:
        _, x = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
        weights = _relative_weights(x, largest, scale)
        if not SECOND:
            weights = tl.where(counts, 1.0, weights)
        sums_ptr += (place * num_blocks + block) * _NUM_SUMS
        for cut in tl.static_range(_NUM_CUTS + 1):
            least = _value_of(low + (high - low) * cut // (_NUM_CUTS + 1), SHIFT)
            tl.store(sums_ptr + cut, tl.sum(tl.where(x >= least, weights, 0.0), axis=0))


@triton.jit(do_not_specialize=["step"])
def race_kernel(
    logits_ptr,
    stride,
    vocab_size,
    seed_ptr,
    index_ptr,
    step,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    cut_place_ptr,
    max_ptr,
    sum_ptr,
    bracket_ptr,
    goal_ptr,
    sums_ptr,
    cost_ptr,
    reference_ptr,
    id_ptr,
    DRAWS: tl.constexpr,
    CUTS: tl.constexpr,
    SEARCHED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    NP: tl.constexpr,
):
    """Grid (N, B). The best token of each block: id, cost (the less the better) and the logit it is relative to.

    A greedy row's cost is minus its logit; a drawing row's is E / w, the weight relative to the reference."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_blocks = tl.num_programs(0)
    ids, x = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
    costs = -x
    reference = tl.max(x, axis=0)
    if DRAWS:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature > 0.0:
            scale = _LOG2_E / temperature
            floor = tl.cast(-_INF, tl.float32)
            min_p = tl.load(min_p_ptr + row).to(tl.float32)
            if CUTS:
                place = tl.load(cut_place_ptr + row)
                if place >= 0:
                    reference, _ = _row_stats(max_ptr, sum_ptr, place, num_blocks, scale, NP)
                    if SEARCHED:
                        low = tl.load(bracket_ptr + 2 * place)
                        high = tl.load(bracket_ptr + 2 * place + 1)
                        goal = tl.load(goal_ptr + place)
                        top_p = tl.load(top_p_ptr + row)
                        low, high, goal = _narrowed(low, high, goal, top_p, sums_ptr, place, num_blocks, NP)
                        floor = _value_of(low, SHIFT)
            seed, index = tl.load(seed_ptr + row), tl.load(index_ptr + row) + step
            inverse = tl.where(x == reference, 1.0, tl.exp2((reference - x) * scale))
            costs = exponentials(uniforms(ids, seed, index)) * inverse
            costs = tl.where((x >= floor) & (inverse * min_p <= 1.0), costs, _INF)
    # Past the vocabulary the cost is infinite and the ids are higher, so that these never win.
    cost, best = tl.min(costs, axis=0, return_indices=True)
    at = row * num_blocks + block
    tl.store(cost_ptr + at, cost)
    tl.store(reference_ptr + at, reference)
    tl.store(id_ptr + at, block * BLOCK + best)


@triton.jit
def pick_kernel(
    temperature_ptr,
    slot_ptr,
    cost_ptr,
    reference_ptr,
    id_ptr,
    token_ptr,
    last_token_ptr,
    num_blocks,
    LAST: tl.constexpr,
    NP: tl.constexpr,
):
    """Grid (B,). The best of a row's blocks; the first of equals."""
    row = tl.program_id(0)
    block_N = tl.arange(0, NP)
    at_N = row * num_blocks + block_N
    present_N = block_N < num_blocks
    cost_N = tl.load(cost_ptr + at_N, mask=present_N, other=float("inf"))
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0.0:
        reference_N = tl.load(reference_ptr + at_N, mask=present_N, other=-float("inf"))
        largest = tl.max(reference_N, axis=0)
        scale = _LOG2_E / temperature
        cost_N *= tl.where(reference_N == largest, 1.0, tl.exp2((largest - reference_N) * scale))
    _, best = tl.min(cost_N, axis=0, return_indices=True)
    token = tl.load(id_ptr + row * num_blocks + best)
    tl.store(token_ptr + row, token.to(tl.int64))
    if LAST:
        tl.store(last_token_ptr + tl.load(slot_ptr + row), token)
