"""The operations between GEMMs, with and without a pending expand, against plain torch in fp64 or their twins."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loraplex_kernels import rotary_angles, rotary_frequencies
from loraplex_kernels.gpu.activation import silu_mul
from loraplex_kernels.gpu.lora import PendingExpand, Site, lora_shrink, partial_elements, view_partial
from loraplex_kernels.gpu.lora_random import Adapter, LayerShape, device_tiles, random_table
from loraplex_kernels.gpu.norm import add_rms_norm, embed, rms_norm
from loraplex_kernels.gpu.rotary_kv import rotary_table, rotary_write_kv
from loraplex_kernels.gpu.twins import activation as activation_twin
from loraplex_kernels.gpu.twins import lora as lora_twin
from loraplex_kernels.gpu.twins import norm as norm_twin
from loraplex_kernels.gpu.twins import rotary_kv as rotary_twin
from loraplex_kernels.kv import KvLayout
from loraplex_kernels.rotary import apply_rotary_

from tests.kernels.gpu.check import assert_close, run_tiny_benchmark

LAYER = 1
SMALL = LayerShape(hidden=72, q=9 * 16, kv=3 * 16, intermediate=136)
SMALL_KV = KvLayout(num_layers=2, num_kv_heads=3, head_dim=16, page_size=16)
LARGE = LayerShape(hidden=4096, q=4096, kv=1024, intermediate=14336)
LARGE_KV = KvLayout(num_layers=2, num_kv_heads=8, head_dim=128, page_size=16)
NUM_TOKENS = 8
EPS = 1e-5

LORA: dict[str, tuple[int, int] | str | None] = {
    "base": None,
    "added": "added",
    "single_rows": (16, 1),
    "single_rows_large_ranks": (64, 1),
    "decode": (16, 16),
    "decode_large_ranks": (64, 16),
    "single_rows_small_ranks": (8, 1),
    "small_prefill": (16, 32),
    "prefill": (16, 64),
    "prefill_large_ranks": (64, 64),
}


def pending(
    name: str, site: Site, shape: LayerShape, dtype: torch.dtype, device: torch.device
) -> PendingExpand | torch.Tensor | None:
    """Tiles: two base tokens, three of one adapter, one of one without k, o and up, one, a base token; a dead tile."""
    kind = LORA[name]
    if kind is None:
        return None
    if isinstance(kind, str):
        return random(NUM_TOKENS, sum(shape.outputs(site)), dtype=dtype, device=device)
    rank_cap, tile_rows = kind
    adapters = (Adapter(rank=rank_cap), Adapter(rank=8, missing=frozenset({1, 3, 5})), Adapter(rank=min(16, rank_cap)))
    table, records = random_table(shape, LAYER + 1, adapters, dtype=dtype, device=device)
    of_token = np.array([-1, -1, *[records[0]] * 3, records[1], records[2], -1], dtype=np.int32)
    ones = np.ones(NUM_TOKENS, dtype=np.int32)
    tiles = device_tiles(
        of_token, np.minimum(of_token + 1, 1), ones, tile_rows=tile_rows, rank_cap=rank_cap, device=device,
        num_tiles=9 if tile_rows == 1 else 6,
    )  # fmt: skip
    x_TK = torch.randn(NUM_TOKENS, shape.inputs(site)).to(device, dtype)
    size = partial_elements(NUM_TOKENS, x_TK.shape[1], site, rank_cap)
    scratch = torch.full((size,), float("nan"), device=device)
    partial = view_partial(scratch, NUM_TOKENS, x_TK.shape[1], site, rank_cap)
    lora_shrink(x_TK, table, LAYER, site, tiles, partial)
    return PendingExpand(table=table, tiles=tiles, layer=LAYER, site=site, partial=partial)


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype)


def poison(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def check_silu_mul(name: str, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = random(NUM_TOKENS, 2 * shape.intermediate, dtype=dtype, device=device)
    out, expected = poison(2, NUM_TOKENS, shape.intermediate, dtype=dtype, device=device)
    lora = pending(name, Site.GATE_UP, shape, dtype, device)
    before = gate_up.clone()
    shrunk = None
    if isinstance(lora, PendingExpand) and lora.tiles.tile_rows > 16:
        size = partial_elements(NUM_TOKENS, shape.intermediate, Site.DOWN, lora.tiles.rank_cap)
        view = view_partial(
            torch.zeros(size, device=device), NUM_TOKENS, shape.intermediate, Site.DOWN, lora.tiles.rank_cap
        )
        shrunk = replace(lora, site=Site.DOWN, partial=view)
    silu_mul(gate_up, out, lora=lora, shrink=shrunk)
    activation_twin.silu_mul(gate_up, expected, lora=lora)
    assert_close(out, expected)
    assert torch.equal(gate_up, before)
    if shrunk is not None:
        expected_shrunk = torch.zeros_like(shrunk.partial)
        lora_twin.lora_shrink(out, shrunk.table, LAYER, Site.DOWN, shrunk.tiles, expected_shrunk)
        assert_close(shrunk.partial.sum(0), expected_shrunk.sum(0))


def check_add_rms_norm(name: str, site: Site, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
    before, delta = random(2, NUM_TOKENS, shape.hidden, dtype=dtype, device=device)
    weight = random(shape.hidden, dtype=dtype, device=device)
    out, expected = poison(2, NUM_TOKENS, shape.hidden, dtype=dtype, device=device)
    lora = pending(name, site, shape, dtype, device)
    residual, expected_residual = before.clone(), before.clone()
    add_rms_norm(residual, delta, weight, EPS, out, lora=lora)
    norm_twin.add_rms_norm(expected_residual, delta, weight, EPS, expected, lora=lora)
    assert_close(residual, expected_residual)
    assert_close(out, expected)


def check_rotary(
    name: str, normed: bool, shape: LayerShape, layout: KvLayout, dtype: torch.dtype, device: torch.device
) -> None:
    pages = 9
    frequencies = rotary_frequencies(layout.head_dim, 10000.0, None, device)
    cos_sin = rotary_table(frequencies, 64, dtype)
    table = torch.randperm(pages)[:8].view(4, 2).to(device, torch.int32)
    # The last token is padding: whatever its position is, nothing of it may be read or written.
    slots = torch.tensor([2, 1, 0, 3, 2, 2, 1, -1], dtype=torch.int32, device=device)
    positions = torch.tensor([0, 17, 31, 5, 15, 16, 18, 1 << 30], dtype=torch.int32, device=device)
    weights = random(2, layout.head_dim, dtype=dtype, device=device) if normed else (None, None)
    lora = pending(name, Site.QKV, shape, dtype, device)
    before = random(NUM_TOKENS, shape.q + 2 * shape.kv, dtype=dtype, device=device)
    results = []
    for write, where in (
        (rotary_write_kv, positions),
        (rotary_twin.rotary_write_kv, torch.where(slots >= 0, positions, 0)),
    ):
        qkv = before.clone()
        arena = torch.full((pages * layout.elements_per_page,), 9.0, dtype=dtype, device=device)
        write(
            qkv, where, slots, table, cos_sin, arena, layout, LAYER,
            q_norm_H=weights[0], k_norm_H=weights[1], eps=EPS, lora=lora,
        )  # fmt: skip
        results.append((qkv, arena))
    (qkv, arena), (expected_qkv, expected_arena) = results
    assert_close(qkv[:-1, : shape.q], expected_qkv[:-1, : shape.q])
    assert torch.equal(qkv[:, shape.q :], before[:, shape.q :])
    written = arena.view(pages, layout.num_layers, -1, layout.page_size, layout.head_dim)
    expected_written = expected_arena.view_as(written)
    assert_close(written[:, LAYER], expected_written[:, LAYER])
    assert bool((written[:, 0] == 9.0).all())
    untouched = (expected_written == 9.0).all(-1)
    assert bool((written[untouched] == 9.0).all())
    assert int((~untouched).sum()) == 7 * 2 * layout.num_kv_heads


@pytest.mark.parametrize("name", LORA)
def test_silu_mul(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check_silu_mul(name, SMALL, dtype, device)


@pytest.mark.parametrize("site", [Site.O, Site.DOWN], ids=["o", "down"])
@pytest.mark.parametrize("name", LORA)
def test_add_rms_norm(name: str, site: Site, dtype: torch.dtype, device: torch.device) -> None:
    check_add_rms_norm(name, site, SMALL, dtype, device)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head_norm"])
@pytest.mark.parametrize("name", LORA)
def test_rotary_write_kv(name: str, normed: bool, dtype: torch.dtype, device: torch.device) -> None:
    check_rotary(name, normed, SMALL, SMALL_KV, dtype, device)


def test_rotation_is_that_of_the_cpu(device: torch.device) -> None:
    """Not the twin but the operation that serves the CPU."""
    frequencies = rotary_frequencies(16, 10000.0, None, torch.device("cpu"))
    positions = torch.tensor([0, 3, 40], dtype=torch.int32)
    qkv = torch.randn(3, 15 * 16)
    expected = qkv.clone()
    apply_rotary_(expected.view(3, 15, 16)[:, :12], rotary_angles(positions.long(), frequencies, torch.float32))
    ours, arena = qkv.to(device), torch.zeros(3 * SMALL_KV.elements_per_page, device=device)
    rotary_write_kv(
        ours,
        positions.to(device),
        torch.zeros(3, dtype=torch.int32, device=device),
        torch.arange(3, dtype=torch.int32, device=device)[None],
        rotary_table(frequencies.to(device), 64, torch.float32),
        arena,
        SMALL_KV,
        0,
    )
    pages = arena.cpu().view(3, 2, 2, 3, 16, 16)
    assert_close(ours.cpu()[:, :144], expected[:, :144])
    for token, position in enumerate(positions.tolist()):
        keys, values = pages[position // 16, 0, :, :, position % 16]
        assert_close(keys.flatten(), expected[token, 144:192])
        assert torch.equal(values.flatten(), qkv[token, 192:])


def test_rms_norm(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(5, 72, dtype=dtype, device=device), random(72, dtype=dtype, device=device)
    out = poison(5, 72, dtype=dtype, device=device)
    rms_norm(x, weight, EPS, out)
    exact = x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert_close(out, exact.to(out.dtype))
    rms_norm(x, weight, EPS, x)
    assert torch.equal(x, out)


def test_embed_takes_tokens_that_only_the_device_knows(dtype: torch.dtype, device: torch.device) -> None:
    embedding, weight = random(10, 72, dtype=dtype, device=device), random(72, dtype=dtype, device=device)
    ids = torch.tensor([3, -1, -1, 9, -1], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 2, 0, 1, -1], dtype=torch.int32, device=device)
    last = torch.tensor([7, 5, 8], dtype=torch.int32, device=device)
    residual, out = poison(2, 5, 72, dtype=dtype, device=device)
    embed(ids, slots, last, embedding, weight, EPS, residual, out)
    assert torch.equal(residual, embedding[[3, 8, 7, 9, 0]])
    expected = poison(5, 72, dtype=dtype, device=device)
    norm_twin.rms_norm(residual, weight, EPS, expected)
    assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LORA)
def test_large_shapes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check_silu_mul(name, LARGE, dtype, device)
    check_add_rms_norm(name, Site.O, LARGE, dtype, device)
    check_add_rms_norm(name, Site.DOWN, LARGE, dtype, device)
    check_rotary(name, False, LARGE, LARGE_KV, dtype, device)
    check_rotary(name, True, LARGE, LARGE_KV, dtype, device)


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_tiny_benchmark("bench_epilogues", monkeypatch, capsys)
    assert {result["operation"] for result in results} >= {"embed", "rotary_write_kv", "silu_mul", "silu_mul_lora"}
    assert all(result["error"] <= 1e-5 and result["best_us"] > 0 for result in results)
