"""Kernels that draw the rows with a cut (top_k, top_p, min_p); device code alone. ``sampling`` launches them.

``stats`` sums groups of tokens (one program = one block of a row), ``bound`` derives a logit below which no token is
kept, ``collect`` gathers the candidates above it, ``finish`` searches the exact bound among them and races those that
it leaves.
  top_k: of the groups' largest logits, the k-th largest is such a bound;
  top_p: a logit t is, if the groups all below t and, of the others, the lesser of their mass and of what it would be
  were all their tokens at t, make less than (1 - p) of the mass.
Where more candidates come than fit (flat distributions), ``finish`` searches and races the whole row: slow and right.

The exact bound of top_k is the largest logit t with count(x >= t) >= k, that of top_p the largest with
mass(x >= t) >= p * mass: a bisection over the floats in order, as integers ("keys"; those of bf16 are 16 bits wide).
Legend: R rows with a cut, N blocks of a row (NP: rounded up to a power of two), G groups of a row (GP), C candidates
at most.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu.sampling_kernels import LARGEST, LOG2_E, emit, load_block, race_costs

GROUP = 64
"""Tokens that share a largest logit and a mass in ``bound``."""

_GROUP = tl.constexpr(GROUP)
_FIXED_ONE = tl.constexpr(2.0**40)
"""Masses of candidates are summed as integers of this unit: the order in which they were collected does not matter."""
_BIG_ID = tl.constexpr(2**31 - 1)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _key_of(x, BF16: tl.constexpr):
    """The place of a float among all floats in order; BF16: among those of bf16, rounded down."""
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    if BF16:
        key = key >> 16
    return key


@triton.jit
def _value_of(key, BF16: tl.constexpr):
    if BF16:
        key = (key << 16) | tl.where(key < 0, 0xFFFF, 0)
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def stats_kernel(
    logits_ptr,
    stride,
    vocab_size,
    cut_rows_ptr,
    temperature_ptr,
    max_ptr,
    group_max_ptr,
    group_mass_ptr,
    BLOCK: tl.constexpr,
):
    """Grid (N, R). The largest logit of each block and of each group; the groups' masses relative to their block's."""
    block, place = tl.program_id(0), tl.program_id(1)
    row = tl.load(cut_rows_ptr + place)
    scale = LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
    _, x = load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
    largest = tl.max(x, axis=0)
    at = place * tl.num_programs(0) + block
    tl.store(max_ptr + at, largest)
    at_G = at * (BLOCK // _GROUP) + tl.arange(0, BLOCK // _GROUP)
    tl.store(group_max_ptr + at_G, tl.max(tl.reshape(x, (BLOCK // _GROUP, _GROUP)), axis=1))
    weights = tl.exp2((x - largest) * scale)
    tl.store(group_mass_ptr + at_G, tl.sum(tl.reshape(weights, (BLOCK // _GROUP, _GROUP)), axis=1))


@triton.jit
def bound_kernel(
    vocab_size,
    cut_rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    max_ptr,
    group_max_ptr,
    group_mass_ptr,
    bound_ptr,
    mass_ptr,
    count_ptr,
    num_blocks,
    num_groups,
    NP: tl.constexpr,
    GP: tl.constexpr,
):
    """Grid (R,). A logit that no kept token lies below, the largest logit, and the mass relative to that."""
    place = tl.program_id(0)
    row = tl.load(cut_rows_ptr + place)
    scale = LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    max_ptr += place * num_blocks
    block_N = tl.arange(0, NP)
    lowest = tl.cast(-LARGEST, tl.float32)
    largest = tl.max(tl.load(max_ptr + block_N, mask=block_N < num_blocks, other=-3.4028234663852886e38), axis=0)
    group_G = tl.arange(0, GP)
    present_G = group_G < num_groups
    max_G = tl.load(group_max_ptr + place * num_groups + group_G, mask=present_G, other=-float("inf"))
    block_max_G = tl.load(max_ptr + group_G // (num_groups // num_blocks), mask=present_G, other=-3.4028234663852886e38)
    mass_G = tl.load(group_mass_ptr + place * num_groups + group_G, mask=present_G, other=0.0)
    mass_G *= tl.exp2((block_max_G - largest) * scale)
    mass = tl.sum(mass_G, axis=0)
    low, high = _key_of(lowest, True), _key_of(largest, True) + 1
    if (top_k > 0) & (top_k < vocab_size):
        while high - low > 1:
            middle = (low + high) >> 1
            enough = tl.sum((max_G >= _value_of(middle, True)).to(tl.int32), axis=0) >= top_k
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    elif top_p < 1.0:
        # A little less, for what rounding does to sums.
        negligible = (1.0 - top_p).to(tl.float32) * mass * 0.99
        while high - low > 1:
            middle = (low + high) >> 1
            bound = _value_of(middle, True)
            below_G = _GROUP * tl.exp2((bound - largest) * scale)
            below_G = tl.where(max_G < bound, mass_G, tl.minimum(mass_G, below_G))
            enough = tl.sum(below_G, axis=0) <= negligible
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    else:
        low = _key_of(tl.maximum(tl.minimum(largest + (tl.log2(min_p) - 0.01) / scale, largest), lowest), True)
    tl.store(bound_ptr + 2 * place, tl.maximum(_value_of(low, True), lowest))
    tl.store(bound_ptr + 2 * place + 1, largest)
    tl.store(mass_ptr + place, mass)
    tl.store(count_ptr + place, 0)


@triton.jit
def collect_kernel(
    logits_ptr,
    stride,
    vocab_size,
    cut_rows_ptr,
    max_ptr,
    bound_ptr,
    count_ptr,
    value_ptr,
    id_ptr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N, R). Appends what is not below the bound to the row's candidates, as long as they fit; counts all."""
    block, place = tl.program_id(0), tl.program_id(1)
    row = tl.load(cut_rows_ptr + place)
    bound = tl.load(bound_ptr + 2 * place)
    if tl.load(max_ptr + place * tl.num_programs(0) + block) < bound:
        return
    ids, x = load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
    found = (x >= bound) & (ids < vocab_size)
    count = found.to(tl.int32)
    first = tl.atomic_add(count_ptr + place, tl.sum(count, axis=0), sem="relaxed")
    if first < CANDIDATES:
        at = first + tl.cumsum(count, axis=0) - 1
        fits = found & (at < CANDIDATES)
        tl.store(value_ptr + place * CANDIDATES + at, x, mask=fits)
        tl.store(id_ptr + place * CANDIDATES + at, ids, mask=fits)


@triton.jit
def _search_candidates(x, weights, low, high, goal, BF16: tl.constexpr):
    """The largest key in [low, high) such that the weights (int64) of what is not below it reach ``goal`` (fp64)."""
    while high - low > 1:
        middle = (low + high) >> 1
        reached = tl.sum(tl.where(x >= _value_of(middle, BF16), weights, 0), axis=0)
        enough = reached.to(tl.float64) >= goal
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low


@triton.jit
def _row_sums(logits_ptr, row, stride, vocab_size, largest, scale, a, b, c, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Counts or masses of a row's logits not below each of three values."""
    sum_a = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_b = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_c = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(tl.cdiv(vocab_size, BLOCK)):
        ids, x = load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
        weights = (ids < vocab_size).to(tl.float32)
        if not COUNT:
            weights *= tl.exp2((x - largest) * scale)
        sum_a += tl.where(x >= a, weights, 0.0)
        sum_b += tl.where(x >= b, weights, 0.0)
        sum_c += tl.where(x >= c, weights, 0.0)
    return tl.sum(sum_a, axis=0), tl.sum(sum_b, axis=0), tl.sum(sum_c, axis=0)


@triton.jit
def _search_row(
    logits_ptr,
    row,
    stride,
    vocab_size,
    largest,
    scale,
    low,
    high,
    goal,
    COUNT: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``_search_candidates`` over a whole row, in quarters since each step reads it."""
    while high - low > 1:
        width = high - low
        first, second, third = low + (width >> 2), low + (width >> 1), low + ((3 * width) >> 2)
        sum_1, sum_2, sum_3 = _row_sums(
            logits_ptr,
            row,
            stride,
            vocab_size,
            largest,
            scale,
            _value_of(first, BF16),
            _value_of(second, BF16),
            _value_of(third, BF16),
            COUNT,
            BLOCK,
        )
        # ``low`` itself is known to be enough, whatever way its sum is rounded.
        enough_1 = (first == low) | (sum_1.to(tl.float64) >= goal)
        enough_2 = enough_1 & (sum_2.to(tl.float64) >= goal)
        enough_3 = enough_2 & (sum_3.to(tl.float64) >= goal)
        low = tl.where(enough_3, third, tl.where(enough_2, second, tl.where(enough_1, first, low)))
        high = tl.where(enough_3, high, tl.where(enough_2, third, tl.where(enough_1, second, first)))
    return low


@triton.jit(do_not_specialize=["step"])
def finish_kernel(
    logits_ptr,
    stride,
    vocab_size,
    seed_ptr,
    index_ptr,
    step,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    cut_rows_ptr,
    bound_ptr,
    mass_ptr,
    count_ptr,
    value_ptr,
    id_ptr,
    slot_ptr,
    token_ptr,
    last_token_ptr,
    LAST: tl.constexpr,
    BF16: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R,). The exact bound of top_k, then of top_p over what is left; the race among what they and min_p keep."""
    place = tl.program_id(0)
    row = tl.load(cut_rows_ptr + place)
    scale = LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
    seed, index = tl.load(seed_ptr + row), tl.load(index_ptr + row) + step
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    largest = tl.load(bound_ptr + 2 * place + 1)
    counted = (top_k > 0) & (top_k < vocab_size)
    low, high = _key_of(tl.load(bound_ptr + 2 * place), BF16), _key_of(largest, BF16) + 1
    mass = tl.load(mass_ptr + place).to(tl.float64)
    count = tl.load(count_ptr + place)
    if count <= CANDIDATES:
        lane = tl.arange(0, CANDIDATES)
        present = lane < count
        x = tl.load(value_ptr + place * CANDIDATES + lane, mask=present, other=-3.4028234663852886e38)
        ids = tl.load(id_ptr + place * CANDIDATES + lane, mask=present, other=0)
        if counted:
            low = _search_candidates(x, present.to(tl.int64), low, high, top_k.to(tl.float64), BF16)
        if top_p < 1.0:
            weights = tl.where(present, tl.exp2((x - largest) * scale) * _FIXED_ONE, 0.0).to(tl.int64)
            goal = top_p * mass * _FIXED_ONE
            if counted:
                goal = top_p * tl.sum(tl.where(x >= _value_of(low, BF16), weights, 0), axis=0).to(tl.float64)
            low = _search_candidates(x, weights, low, high, goal, BF16)
        costs, inverse = race_costs(ids, x, largest, scale, seed, index)
        keeps = present & (x >= _value_of(low, BF16)) & (inverse * min_p <= 1.0)
        costs = tl.where(keeps, costs, _INF)
        token = tl.min(tl.where(keeps & (costs == tl.min(costs, axis=0)), ids, _BIG_ID), axis=0)
    else:
        if counted:
            goal = top_k.to(tl.float64)
            low = _search_row(logits_ptr, row, stride, vocab_size, largest, scale, low, high, goal, True, BF16, BLOCK)
        if top_p < 1.0:
            goal = top_p * mass
            if counted:
                least = _value_of(low, BF16)
                left, _, _ = _row_sums(
                    logits_ptr, row, stride, vocab_size, largest, scale, least, least, least, False, BLOCK
                )
                goal = top_p * left.to(tl.float64)
            low = _search_row(logits_ptr, row, stride, vocab_size, largest, scale, low, high, goal, False, BF16, BLOCK)
        floor = _value_of(low, BF16)
        bestrace_costs = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
        best_ids = tl.full((BLOCK,), 0, dtype=tl.int32)
        for block in range(tl.cdiv(vocab_size, BLOCK)):
            ids_V, x_V = load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
            costs_V, inverse_V = race_costs(ids_V, x_V, largest, scale, seed, index)
            better = (ids_V < vocab_size) & (x_V >= floor) & (inverse_V * min_p <= 1.0) & (costs_V < bestrace_costs)
            bestrace_costs = tl.where(better, costs_V, bestrace_costs)
            best_ids = tl.where(better, ids_V, best_ids)
        token = tl.min(tl.where(bestrace_costs == tl.min(bestrace_costs, axis=0), best_ids, _BIG_ID), axis=0)
    emit(token, row, vocab_size, slot_ptr, token_ptr, last_token_ptr, LAST)
