"""The sampling kernels: device code alone. ``sampling`` sizes the scratch and launches.

Loop nest of ``stats``, ``collect`` and ``race``: one program = one block of one row's vocabulary, read once, straight
through. Rows without a cut: ``race`` finds the best token of each block, ``pick`` the best of a row's blocks. Rows with
a cut (top_k, top_p, min_p): ``stats`` sums groups of tokens, ``bound`` derives a logit below which no token is kept,
``collect`` gathers the candidates above it, ``finish`` searches the exact bound among them and races those it leaves.
  top_k: of the groups' largest logits, the k-th largest is such a bound;
  top_p: a logit t is, if the groups all below t and, of the others, the lesser of their mass and of what it would be
  were all their tokens at t, make less than (1 - p) of the mass.
Where more candidates come than fit (flat distributions), ``finish`` searches and races the whole row: slow and right.

The exact bound of top_k is the largest logit t with count(x >= t) >= k, that of top_p the largest with
mass(x >= t) >= p * mass: a bisection over the floats in order, as integers ("keys"; those of bf16 are 16 bits wide).

Infinite logits count as the largest finite ones, NaN as the smallest; so every difference is a number or infinite.
Legend: B rows, R rows with a cut, N blocks of a row (NP: rounded up to a power of two), G groups of a row (GP), C
candidates at most.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels import noise

GROUP = 64
"""Tokens that share a largest logit and a mass in ``bound``."""

_GROUP = tl.constexpr(GROUP)
_MULTIPLIER_1 = tl.constexpr(noise.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(noise.MULTIPLIER_2)
_GOLDEN_64 = tl.constexpr(noise.GOLDEN_64)
_MULTIPLIER_64_1 = tl.constexpr(noise.MULTIPLIER_64_1)
_MULTIPLIER_64_2 = tl.constexpr(noise.MULTIPLIER_64_2)
_LARGEST_UNIFORM = tl.constexpr(noise.LARGEST_UNIFORM)
_TO_UNIT = tl.constexpr(2.0**-31)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_INF = tl.constexpr(float("inf"))
_FIXED_ONE = tl.constexpr(2.0**40)
"""Masses of candidates are summed as integers of this unit: the order in which they were collected does not matter."""
_ONE_ULP = tl.constexpr(2.0**-23)
_BIG_ID = tl.constexpr(2**31 - 1)


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
def _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK: tl.constexpr):
    """(ids, logits in fp32, finite); what lies past the vocabulary is the smallest number."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    return ids, tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)


@triton.jit
def _costs(ids, x, reference, scale, seed, index):
    """(E / w, 1 / w): the least cost wins. w = exp((x - reference) / temperature), scale = log2(e) / temperature."""
    inverse = tl.exp2((reference - x) * scale)
    return exponentials(uniforms(ids, seed, index)) * inverse, inverse


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
def _emit(token, row, vocab_size, slot_ptr, token_ptr, last_token_ptr, LAST: tl.constexpr):
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
    ids, x = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
    costs = -x
    reference = tl.max(x, axis=0)
    if DRAWS:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature > 0.0:
            seed, index = tl.load(seed_ptr + row), tl.load(index_ptr + row) + step
            costs, _ = _costs(ids, x, reference, _LOG2_E / temperature, seed, index)
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
        cost_N *= tl.exp2((tl.max(reference_N, axis=0) - reference_N) * (_LOG2_E / temperature))
    _, best = tl.min(cost_N, axis=0, return_indices=True)
    token = tl.load(id_ptr + row * num_blocks + best)
    _emit(token, row, vocab_size, slot_ptr, token_ptr, last_token_ptr, LAST)


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
    scale = _LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
    _, x = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
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
    scale = _LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    max_ptr += place * num_blocks
    block_N = tl.arange(0, NP)
    lowest = tl.cast(-_LARGEST, tl.float32)
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
    ids, x = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
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
        ids, x = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
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
    scale = _LOG2_E / tl.load(temperature_ptr + row).to(tl.float32)
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
        costs, inverse = _costs(ids, x, largest, scale, seed, index)
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
        best_costs = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
        best_ids = tl.full((BLOCK,), 0, dtype=tl.int32)
        for block in range(tl.cdiv(vocab_size, BLOCK)):
            ids_V, x_V = _load_block(logits_ptr, row, stride, vocab_size, block, BLOCK)
            costs_V, inverse_V = _costs(ids_V, x_V, largest, scale, seed, index)
            better = (ids_V < vocab_size) & (x_V >= floor) & (inverse_V * min_p <= 1.0) & (costs_V < best_costs)
            best_costs = tl.where(better, costs_V, best_costs)
            best_ids = tl.where(better, ids_V, best_ids)
        token = tl.min(tl.where(best_costs == tl.min(best_costs, axis=0), best_ids, _BIG_ID), axis=0)
    _emit(token, row, vocab_size, slot_ptr, token_ptr, last_token_ptr, LAST)
