"""The operations that ``bench_epilogues`` times: their inputs, launch parameters, bytes and twins."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import triton
from loraplex_kernels import KvLayout
from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu.activation import silu_mul
from loraplex_kernels.gpu.lora import PendingExpand, Site, lora_expand_, lora_shrink, partial_elements, view_partial
from loraplex_kernels.gpu.lora_random import Adapter, LayerShape, device_tiles, random_table
from loraplex_kernels.gpu.norm import add_rms_norm, embed, rms_norm
from loraplex_kernels.gpu.rotary_kv import rotary_table, rotary_write_kv
from loraplex_kernels.gpu.twins import activation as activation_twin
from loraplex_kernels.gpu.twins import lora as lora_twin
from loraplex_kernels.gpu.twins import norm as norm_twin
from loraplex_kernels.gpu.twins import rotary_kv as rotary_twin
from loraplex_kernels.rotary import rotary_frequencies

EPS = 1e-5
PREFILL_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    shape: LayerShape
    layout: KvLayout
    dtype: torch.dtype
    device: torch.device
    vocabulary: int

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One case: its bytes, launch parameters, and how to make inputs, run and compute the reference."""

    num_bytes: int
    configs: Mapping[str, object]
    make: Callable[[], tuple[torch.Tensor, ...]]
    run: Callable[[tuple[torch.Tensor, ...], object], torch.Tensor]
    """Returns what is compared; may change its inputs."""
    twin: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]


def norms(warps: tuple[int, ...]) -> dict[str, object]:
    return {"default": None, **{f"{count}_warps": tuning.NormConfig(num_warps=count) for count in warps}}


def expands(configs: tuple[tuple[int, int, int], ...]) -> dict[str, object]:
    """Of (columns, warps, blocks of a program)."""
    return {
        "default": None,
        **{
            f"{block}x{warps}wx{blocks}": tuning.ExpandConfig(
                block_n=block, num_warps=warps, blocks=blocks, evict_first=False
            )
            for block, warps, blocks in configs
        },
    }


def elementwise(model: Model, num_tokens: int) -> Iterator[tuple[str, Bench]]:
    """Without LoRA."""
    hidden, inner, item = model.shape.hidden, model.shape.intermediate, model.dtype.itemsize

    def run_norm(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
        x, weight, out = tensors
        rms_norm(x, weight, EPS, out, config=config)
        return out

    def twin_norm(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x, weight, out = tensors
        norm_twin.rms_norm(x, weight, EPS, out)
        return out

    yield (
        "rms_norm",
        Bench(
            num_bytes=2 * num_tokens * hidden * item,
            configs=norms((4, 8, 16)),
            make=lambda: (model.randn(num_tokens, hidden), model.randn(hidden), model.randn(num_tokens, hidden)),
            run=run_norm,
            twin=twin_norm,
        ),
    )

    def make_add() -> tuple[torch.Tensor, ...]:
        x, delta, out = (model.randn(num_tokens, hidden) for _ in range(3))
        return x, delta, model.randn(hidden), out

    def run_add(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
        x, delta, weight, out = tensors
        add_rms_norm(x, delta, weight, EPS, out, config=config)
        return out

    def twin_add(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x, delta, weight, out = tensors
        norm_twin.add_rms_norm(x, delta, weight, EPS, out)
        return out

    yield (
        "add_rms_norm",
        Bench(
            num_bytes=4 * num_tokens * hidden * item,
            configs=norms((4, 8, 16)),
            make=make_add,
            run=run_add,
            twin=twin_add,
        ),
    )

    def run_silu(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
        silu_mul(*tensors, config=config)
        return tensors[1]

    def twin_silu(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        activation_twin.silu_mul(*tensors)
        return tensors[1]

    yield (
        "silu_mul",
        Bench(
            num_bytes=3 * num_tokens * inner * item,
            configs={
                "default": None,
                **{
                    f"{rows}x{block}x{warps}w": tuning.RowsConfig(block_rows=rows, block_n=block, num_warps=warps)
                    for rows, block, warps in ((1, 1024, 4), (1, 2048, 4), (1, 2048, 8), (1, 512, 2), (4, 512, 4))
                },
            },
            make=lambda: (model.randn(num_tokens, 2 * inner), model.randn(num_tokens, inner)),
            run=run_silu,
            twin=twin_silu,
        ),
    )

    def make_embed() -> tuple[torch.Tensor, ...]:
        ids = torch.randint(-1, model.vocabulary, (num_tokens,), device=model.device).to(torch.int32)
        slots = torch.randint(0, 64, (num_tokens,), device=model.device).to(torch.int32)
        last = torch.randint(0, model.vocabulary, (64,), device=model.device).to(torch.int32)
        rows = (model.randn(num_tokens, hidden) for _ in range(2))
        return ids, slots, last, model.randn(model.vocabulary, hidden), model.randn(hidden), *rows

    def run_embed(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
        *inputs, residual, out = tensors
        embed(*inputs, EPS, residual, out, config=config)
        return out

    def twin_embed(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        *inputs, residual, out = tensors
        norm_twin.embed(*inputs, EPS, residual, out)
        return out

    yield (
        "embed",
        Bench(
            num_bytes=3 * num_tokens * hidden * item,
            configs=norms((4, 8)),
            make=make_embed,
            run=run_embed,
            twin=twin_embed,
        ),
    )
    yield "rotary_write_kv", rotary_bench(model, num_tokens, None, ((256, 2, 1), (512, 4, 1), (1024, 4, 1)))


def rotary_bench(
    model: Model, num_tokens: int, lora: PendingExpand | None, blocks: tuple[tuple[int, int, int], ...]
) -> Bench:
    layout, shape, item = model.layout, model.shape, model.dtype.itemsize
    columns = shape.q + 2 * shape.kv
    pages_needed = triton.cdiv(num_tokens, layout.page_size)
    cos_sin = rotary_table(rotary_frequencies(layout.head_dim, 5e5, None, model.device), num_tokens, model.dtype)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=model.device)
    slots = torch.zeros_like(positions)
    table = torch.randperm(pages_needed, device=model.device).to(torch.int32)[None]

    def make() -> tuple[torch.Tensor, ...]:
        pages = torch.zeros(pages_needed * layout.elements_per_page, dtype=model.dtype, device=model.device)
        return model.randn(num_tokens, columns), pages

    def run(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
        qkv, pages = tensors
        rotary_write_kv(qkv, positions, slots, table, cos_sin, pages, layout, 0, lora=lora, config=config)
        return qkv

    def twin(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        qkv, pages = tensors
        rotary_twin.rotary_write_kv(qkv, positions, slots, table, cos_sin, pages, layout, 0, lora=lora)
        return qkv

    return Bench(num_bytes=2 * num_tokens * columns * item, configs=expands(blocks), make=make, run=run, twin=twin)


def prefill_lora(model: Model, num_tokens: int, num_adapters: int, rank: int) -> Iterator[tuple[str, Bench]]:
    """Shrink of every input, and what follows it, in tiles of 64 tokens."""
    shape, item, device = model.shape, model.dtype.itemsize, model.device
    table, records = random_table(shape, 1, [Adapter(rank=rank)] * num_adapters, dtype=model.dtype, device=device)
    rank_cap = 16 if rank <= 16 else 64
    tokens = np.diff(np.linspace(0, num_tokens, num_adapters + 1).astype(np.int32)).astype(np.int32)
    ones = np.ones(num_adapters, dtype=np.int32)
    tiles = device_tiles(
        records.astype(np.int32), ones, tokens, tile_rows=PREFILL_ROWS, rank_cap=rank_cap, device=device
    )

    def partial_of(site: Site) -> torch.Tensor:
        inputs = shape.inputs(site)
        scratch = torch.zeros(partial_elements(num_tokens, inputs, site, rank_cap), device=device)
        return view_partial(scratch, num_tokens, inputs, site, rank_cap)

    def shrink(site: Site) -> Bench:
        inputs, ranks = shape.inputs(site), rank * site.num_modules

        def run(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
            x, partial = tensors
            lora_shrink(x, table, 0, site, tiles, partial, config=config)
            return partial

        def twin(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
            x, partial = tensors
            lora_twin.lora_shrink(x, table, 0, site, tiles, partial)
            return partial

        configs = {
            f"{block}x{warps}w{stages}s": tuning.ShrinkConfig(
                block_k=block, num_warps=warps, num_stages=stages, evict_first=False
            )
            for block, warps, stages in ((64, 4, 3), (64, 4, 4), (64, 4, 2), (128, 4, 2), (128, 4, 3), (128, 8, 3))
        }
        return Bench(
            num_bytes=num_tokens * (inputs * item + ranks * 4),
            configs={"default": None, **configs},
            make=lambda: (model.randn(num_tokens, inputs), partial_of(site)),
            run=run,
            twin=twin,
        )

    def pending(site: Site) -> PendingExpand:
        partial = partial_of(site)
        lora_shrink(model.randn(num_tokens, shape.inputs(site)), table, 0, site, tiles, partial)
        return PendingExpand(table=table, tiles=tiles, layer=0, site=site, partial=partial)

    for site in Site:
        yield f"lora_shrink_{site.name.lower()}", shrink(site)
    blocks = ((64, 4, 4), (64, 8, 8), (64, 4, 1), (128, 8, 4), (32, 4, 16))
    for site in (Site.O, Site.DOWN):
        lora = pending(site)
        widths = shape.outputs(site)

        def run(tensors: tuple[torch.Tensor, ...], config: object, lora=lora, site=site, widths=widths) -> torch.Tensor:
            lora_expand_(tensors[0], lora.partial, table, 0, site, widths, tiles, config=config)
            return tensors[0]

        def twin(tensors: tuple[torch.Tensor, ...], lora=lora, site=site, widths=widths) -> torch.Tensor:
            lora_twin.lora_expand_(tensors[0], lora.partial, table, 0, site, widths, tiles)
            return tensors[0]

        yield (
            f"lora_expand_{site.name.lower()}",
            Bench(
                num_bytes=2 * num_tokens * shape.hidden * item,
                configs=expands(blocks),
                make=lambda: (model.randn(num_tokens, shape.hidden),),
                run=run,
                twin=twin,
            ),
        )
    down = pending(Site.DOWN)
    weight = model.randn(shape.hidden)

    def run_norm(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
        residual, delta, out = tensors
        add_rms_norm(residual, delta, weight, EPS, out, lora=down, tile_config=config)
        return out

    def twin_norm(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        residual, delta, out = tensors
        norm_twin.add_rms_norm(residual, delta, weight, EPS, out, lora=down)
        return out

    tiled = {
        f"{rows}x{block}x{warps}w": tuning.RowsConfig(block_rows=rows, block_n=block, num_warps=warps)
        for rows, block, warps in ((16, 256, 4), (16, 512, 4), (16, 512, 8), (16, 128, 4), (32, 256, 8), (32, 128, 4))
    }
    yield (
        "add_rms_norm_lora",
        Bench(
            num_bytes=4 * num_tokens * shape.hidden * item,
            configs={"default": None, **tiled},
            make=lambda: tuple(model.randn(num_tokens, shape.hidden) for _ in range(3)),
            run=run_norm,
            twin=twin_norm,
        ),
    )
    gate_up = pending(Site.GATE_UP)

    def run_silu(tensors: tuple[torch.Tensor, ...], config: object) -> torch.Tensor:
        silu_mul(*tensors, lora=gate_up, config=config)
        return tensors[1]

    def twin_silu(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        activation_twin.silu_mul(*tensors, lora=gate_up)
        return tensors[1]

    inner = shape.intermediate
    yield (
        "silu_mul_lora",
        Bench(
            num_bytes=3 * num_tokens * inner * item,
            configs=expands(blocks),
            make=lambda: (model.randn(num_tokens, 2 * inner), model.randn(num_tokens, inner)),
            run=run_silu,
            twin=twin_silu,
        ),
    )
    heads = rotary_bench(model, num_tokens, pending(Site.QKV), ((64, 8, 8), (64, 8, 4), (64, 4, 4), (64, 4, 1)))
    yield "rotary_write_kv_lora", heads
