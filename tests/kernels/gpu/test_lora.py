"""Shrink and expand over tiles against dense products in fp64; construction of tiles against a plain loop."""

import time
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu.lora import (
    LoraTable,
    LoraTiles,
    PendingExpand,
    Site,
    build_tiles,
    lora_expand_,
    lora_shrink,
    partial_elements,
    view_partial,
)
from loraplex_kernels.gpu.lora_project import LoraProjections
from loraplex_kernels.gpu.lora_random import Adapter, LayerShape, device_tiles, random_table
from loraplex_kernels.gpu.lora_tiles import decode_tile_rows
from loraplex_kernels.gpu.tuning import Schedule
from loraplex_kernels.gpu.twins import lora as twins

from tests.kernels.gpu.check import assert_close, run_tiny_benchmark, sum_rows_alike

SMALL = LayerShape(hidden=72, q=80, kv=24, intermediate=1032)
"""Nothing is a multiple of a block, and down has two splits."""
LARGE = LayerShape(hidden=4096, q=4096, kv=1024, intermediate=14336)
LAYER = 1


@dataclass(frozen=True)
class Case:
    adapters: tuple[Adapter, ...]
    rows: tuple[tuple[int, int], ...]
    """(adapter or -1, tokens) of each row."""
    rank_cap: int
    tile_rows: int = 16
    num_tiles: int | None = None


CASES = {
    "all_bodies": Case(
        (Adapter(rank=16), Adapter(rank=8, missing=frozenset({1, 3, 5, 6}))), ((-1, 2), (0, 18), (1, 1), (-1, 1)), 16
    ),
    "dead_tiles": Case((Adapter(rank=16),), ((-1, 1), (0, 1)), 16, num_tiles=4),
    "single_rows": Case(
        (Adapter(rank=16), Adapter(rank=8, missing=frozenset({0, 3, 4, 6}))),
        ((-1, 1), (0, 1), (1, 1), (0, 1)),
        16,
        1,
        num_tiles=5,
    ),
    "single_rows_small_ranks": Case(
        (Adapter(rank=8), Adapter(rank=8, missing=frozenset({0, 3, 4, 6}))), ((-1, 1), (0, 1), (1, 1)), 8, 1
    ),
    "single_rows_large_ranks": Case((Adapter(rank=88), Adapter(rank=24)), ((0, 1), (1, 1), (-1, 1)), 64, 1),
    "mixed_ranks": Case((Adapter(rank=64), Adapter(rank=8), Adapter(rank=24)), ((0, 1), (1, 2), (2, 1)), 64),
    "planes": Case((Adapter(rank=88), Adapter(rank=16)), ((0, 1), (1, 2)), 64),
    "small_prefill": Case((Adapter(rank=16), Adapter(rank=8)), ((0, 1), (-1, 3), (1, 40), (0, 1)), 16, 32),
    "prefill": Case((Adapter(rank=16, missing=frozenset({2})), Adapter(rank=8)), ((-1, 3), (0, 70), (1, 1)), 16, 64),
    "prefill_large_ranks": Case((Adapter(rank=72), Adapter(rank=24)), ((0, 5), (1, 30)), 64, 64),
}


def make(
    case: Case, shape: LayerShape, dtype: torch.dtype, device: torch.device, offset: int = 0
) -> tuple[LoraTable, LoraTiles, list[list[int]]]:
    """Table, tiles, and of each token the records that it uses."""
    table, firsts = random_table(shape, LAYER + 1, case.adapters, dtype=dtype, device=device, offset=offset)
    records = np.array([-1 if adapter < 0 else firsts[adapter] for adapter, _ in case.rows], dtype=np.int32)
    planes = np.array([0 if adapter < 0 else case.adapters[adapter].planes for adapter, _ in case.rows], dtype=np.int32)
    tokens = np.array([tokens for _, tokens in case.rows], dtype=np.int32)
    tiles = device_tiles(
        records,
        planes,
        tokens,
        tile_rows=case.tile_rows,
        rank_cap=case.rank_cap,
        device=device,
        num_tiles=case.num_tiles,
    )
    used = [
        list(range(record, record + count))
        for record, count, repeat in zip(records.tolist(), planes.tolist(), tokens.tolist(), strict=True)
        for _ in range(repeat)
    ]
    return table, tiles, used


def dense(
    x_TK: torch.Tensor,
    out_TO: torch.Tensor,
    table: LoraTable,
    used: list[list[int]],
    site: Site,
    widths: tuple[int, ...],
) -> torch.Tensor:
    """``out + x A^T B`` token by token in fp64."""
    expected = out_TO.double()
    column = 0
    for index, width in enumerate(widths):
        for token, records in enumerate(used):
            for record in records:
                module = site.first_module + index
                a_RK = twins.lora_block(table, record, LAYER, module, 0, x_TK.shape[1]).double()
                b_RO = twins.lora_block(table, record, LAYER, module, 1, width).double()
                expected[token, column : column + width] += a_RK @ x_TK[token].double() @ b_RO
        column += width
    return expected


def run(
    x_TK: torch.Tensor,
    out_TO: torch.Tensor,
    table: LoraTable,
    tiles: LoraTiles,
    site: Site,
    widths: tuple[int, ...],
    *,
    add: bool = True,
) -> None:
    """``add``: to ``out_TO``; otherwise it is written."""
    num_tokens, in_features = x_TK.shape
    size = partial_elements(num_tokens, in_features, site, tiles.rank_cap)
    scratch = torch.full((size + 1,), float("nan"), device=x_TK.device)
    partial = view_partial(scratch, num_tokens, in_features, site, tiles.rank_cap)
    for plane in range(tiles.max_planes):
        lora_shrink(x_TK, table, LAYER, site, tiles, partial, plane=plane)
        lora_expand_(out_TO, partial, table, LAYER, site, widths, tiles, plane=plane, add=add or plane > 0)
    assert bool(scratch[-1].isnan())


@pytest.mark.parametrize("name", CASES)
def test_against_dense_products(name: str, device: torch.device) -> None:
    check_case(CASES[name], SMALL, Site.QKV, torch.float32, device)


@pytest.mark.parametrize("site", [Site.O, Site.GATE_UP, Site.DOWN], ids=lambda site: site.name.lower())
def test_the_other_sites(site: Site, device: torch.device) -> None:
    check_case(CASES["all_bodies"], SMALL, site, torch.float32, device)


@pytest.mark.parametrize("name", ["planes", "single_rows", "prefill", "prefill_large_ranks"])
def test_splits(name: str, device: torch.device) -> None:
    check_case(CASES[name], SMALL, Site.DOWN, torch.float32, device)


@pytest.mark.parametrize("name", ["all_bodies", "single_rows", "prefill"])
def test_bf16(name: str, device: torch.device) -> None:
    check_case(CASES[name], SMALL, Site.QKV, torch.bfloat16, device)


def check_case(
    case: Case, shape: LayerShape, site: Site, dtype: torch.dtype, device: torch.device, offset: int = 0
) -> None:
    table, tiles, used = make(case, shape, dtype, device, offset)
    widths = shape.outputs(site)
    x_TK = torch.randn(len(used), shape.inputs(site)).to(device, dtype)
    before = torch.randn(len(used), sum(widths)).to(device, dtype)
    out_TO = before.clone()
    run(x_TK, out_TO, table, tiles, site, widths)
    assert_close(out_TO, dense(x_TK, before, table, used, site, widths))
    base = torch.tensor([not records for records in used], device=device)
    assert torch.equal(out_TO[base], before[base])
    again = before.clone()
    run(x_TK, again, table, tiles, site, widths)
    assert torch.equal(out_TO, again)
    alone = torch.full_like(before, float("nan"))
    run(x_TK, alone, table, tiles, site, widths, add=False)
    assert_close(alone, dense(x_TK, torch.zeros_like(before), table, used, site, widths))
    assert bool((alone[base] == 0).all())


def test_a_token_does_not_depend_on_its_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``tile_rows`` and ``rank_cap`` are always the same."""
    sum_rows_alike(monkeypatch)
    alone = Case((Adapter(rank=16),), ((0, 1),), 64, 64)
    among = Case((Adapter(rank=16),), ((0, 5),), 64, 64)
    x_TK = torch.randn(5, SMALL.intermediate).to(device)
    results = []
    for case in (alone, among):
        table, tiles, used = make(case, SMALL, torch.float32, device)
        out = torch.zeros(len(used), SMALL.hidden, device=device)
        run(x_TK[: len(used)], out, table, tiles, Site.DOWN, (SMALL.hidden,))
        results.append(out[0])
    assert torch.equal(*results)


def test_the_twin_agrees(device: torch.device) -> None:
    table, tiles, used = make(CASES["planes"], SMALL, torch.float32, device)
    widths = SMALL.outputs(Site.QKV)
    x_TK = torch.randn(len(used), SMALL.hidden, device=device)
    ours, twin = torch.zeros(2, len(used), sum(widths), device=device)
    run(x_TK, ours, table, tiles, Site.QKV, widths)
    partial = torch.full((1, len(used), 3 * tiles.rank_cap), float("nan"), device=device)
    for plane in range(tiles.max_planes):
        twins.lora_shrink(x_TK, table, LAYER, Site.QKV, tiles, partial, plane=plane)
        twins.lora_expand_(twin, partial, table, LAYER, Site.QKV, widths, tiles, plane=plane)
    assert_close(ours, twin)


@pytest.mark.gpu
@pytest.mark.parametrize("site", Site, ids=lambda site: site.name.lower())
@pytest.mark.parametrize("name", CASES)
def test_large_shapes(name: str, site: Site, dtype: torch.dtype, device: torch.device) -> None:
    check_case(CASES[name], LARGE, site, dtype, device)


@pytest.mark.gpu
def test_blocks_beyond_2_31_elements(device: torch.device) -> None:
    check_case(CASES["all_bodies"], LARGE, Site.QKV, torch.bfloat16, device, offset=1 << 31)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([-1, 0, 3, 7]), st.integers(1, 40)), max_size=12),
    tile_rows=st.sampled_from([16, 32, 64]),
    spare=st.integers(0, 3),
)
def test_tiles_cover_each_token_once(rows: list[tuple[int, int]], tile_rows: int, spare: int) -> None:
    records = np.array([record for record, _ in rows], dtype=np.int32)
    tokens = np.array([tokens for _, tokens in rows], dtype=np.int32)
    planes = np.where(records >= 0, records + 1, 0).astype(np.int32)
    exact = build_tiles(records, planes, tokens, tile_rows)
    tiles = build_tiles(records, planes, tokens, tile_rows, exact.num_live + spare)
    assert tiles.num_live == exact.num_live
    assert tiles.fields.shape == (4, exact.num_live + spare)
    assert tiles.fields.dtype == tiles.token_record.dtype == np.int32
    owner = [record for record, count in rows for _ in range(count)]
    assert tiles.token_record.tolist() == owner
    covered: list[int] = []
    for record, row, count, plane_count in tiles.fields[:, : tiles.num_live].T.tolist():
        assert 1 <= count <= tile_rows
        assert plane_count == (record + 1 if record >= 0 else 0)
        assert owner[row : row + count] == [record] * count
        covered += range(row, row + count)
    assert covered == list(range(len(owner)))
    assert tiles.fields[:, tiles.num_live :].T.tolist() == [[-1, 0, 0, 0]] * spare
    changes = 1 + int((records[1:] != records[:-1]).sum()) if rows else 0
    assert tiles.num_live <= changes + len(owner) // tile_rows


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(-1, 20), min_size=1, max_size=64))
def test_rows_that_share_few_adapters_take_tiles_of_one_row(rows: list[int]) -> None:
    """Where tiles of 16 rows are at least half as many as rows."""
    records, ones = np.sort(np.array(rows, dtype=np.int32)), np.ones(len(rows), dtype=np.int32)
    tiles = build_tiles(records, ones, ones, 16)
    assert decode_tile_rows(len(rows), tiles.num_live) == (1 if 2 * tiles.num_live >= len(rows) else 16)


@pytest.mark.parametrize("tile_rows", [1, 16, 32, 64])
@pytest.mark.parametrize("how", ["beside", "serial", "batch_invariant"])
def test_projections_leave_their_lora_to_what_follows(how: str, tile_rows: int, device: torch.device) -> None:
    """Whatever the schedule: the GEMM's output, and what is pending, make the whole projection."""
    case = Case((Adapter(rank=16), Adapter(rank=8)), ((-1, 1), (0, 1), (0, 1), (1, 1)), 16, tile_rows)
    table, tiles, used = make(case, SMALL, torch.float32, device)
    schedule = Schedule.BESIDE if how == "beside" else Schedule.SERIAL
    inputs, outputs = {site: SMALL.inputs(site) for site in Site}, {site: SMALL.outputs(site) for site in Site}
    for site, widths in outputs.items():
        projections = LoraProjections(table, inputs, outputs, len(used), batch_invariant=how == "batch_invariant")
        x_TK = torch.randn(len(used), SMALL.inputs(site)).to(device)
        gemm_TO = torch.randn(len(used), sum(widths)).to(device)
        with patch.object(tuning, "schedule", lambda *_, schedule=schedule: schedule):
            out_TO, lora = projections.project(gemm_TO.clone, x_TK, LAYER, site, tiles)
        assert_close(twins.expanded(out_TO, lora, widths), dense(x_TK, gemm_TO, table, used, site, widths))
        assert (lora is None) <= (how == "batch_invariant" or site.num_modules == 1)


@pytest.mark.parametrize("how", ["beside", "serial", "batch_invariant", "large_tiles", "planes"])
@pytest.mark.parametrize("site", [Site.O, Site.DOWN], ids=lambda site: site.name.lower())
def test_partial_sums_are_added_at_once_or_left_shrunk(how: str, site: Site, device: torch.device) -> None:
    """With a scratch that what follows sums over the shards, of which the first ranks of the splits are read."""
    tile_rows = 32 if how == "large_tiles" else 1
    adapters = (Adapter(rank=72 if how == "planes" else 16), Adapter(rank=8))
    case = Case(adapters, ((-1, 1), (0, 1), (0, 1), (1, 1)), 64 if how == "planes" else 16, tile_rows)
    table, tiles, used = make(case, SMALL, torch.float32, device)
    inputs, outputs = {site: SMALL.inputs(site) for site in Site}, {site: SMALL.outputs(site) for site in Site}
    projections = LoraProjections(
        table, inputs, outputs, len(used), batch_invariant=how == "batch_invariant", partial_sums=True
    )
    x_TK = torch.randn(len(used), SMALL.inputs(site)).to(device)
    gemm_TO = torch.randn(len(used), SMALL.hidden).to(device)
    scratch = torch.zeros(partial_elements(len(used), SMALL.inputs(site), site, 64), device=device)
    schedule = Schedule.BESIDE if how == "beside" else Schedule.SERIAL
    with patch.object(tuning, "schedule", lambda *_: schedule):
        out_TO, lora = projections.project(gemm_TO.clone, x_TK, LAYER, site, tiles, scratch=scratch)
    assert_close(
        twins.expanded(out_TO, lora, (SMALL.hidden,)), dense(x_TK, gemm_TO, table, used, site, (SMALL.hidden,))
    )
    if how in ("beside", "serial"):
        assert isinstance(lora, PendingExpand)
        assert torch.equal(out_TO, gemm_TO)
        assert lora.partial.data_ptr() == scratch.data_ptr()
    else:
        assert lora is None
        assert bool((scratch == 0).all())


def test_too_few_tiles() -> None:
    with pytest.raises(ValueError, match="2 tiles do not fit in 1"):
        build_tiles(*np.array([[0, 1], [1, 1], [1, 1]], dtype=np.int32), 16, 1)


def test_tiles_of_256_rows_take_little_time() -> None:
    rows = np.arange(256, dtype=np.int32) // 8
    ones = np.ones(256, dtype=np.int32)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        build_tiles(rows, ones, ones, 16, 64)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, *results = run_tiny_benchmark("bench_lora", monkeypatch, capsys)
    assert [result["case"] for result in results] == ["1x1", "3x2", "2x2+17"]
    assert all(result["error"] <= 1e-5 and set(result["added_ms"]) == {"default"} for result in results)
