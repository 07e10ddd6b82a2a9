"""The operations between GEMMs on one GPU: decode and prefill sizes of Llama-3.1-8B's shape, over launch parameters.

Every case is checked against its twin, then timed as a CUDA graph over several copies of its tensors, more than the L2
cache holds; medians. The floor is the time in which ``--bandwidth`` moves the bytes that the operation has to read and
write once. Prefill LoRA runs one adapter over every token (``1``) or 32 in turn. One JSON object a line: each case with
its best launch parameters and all others (``default``: what ``tuning`` chooses).

    python kernels/benchmarks/bench_epilogues.py                                  # under a minute
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_epilogues.py --tiny        # any machine: does it run
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import triton
from graph_timing import compile_apart, median_ms, relative_error
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
MAX_ERROR = 1e-2
CACHE_BYTES = 128 << 20
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


CASES = ("decode-1", "decode-32", "decode-256", "prefill-8192", "lora-8192-1-16", "lora-8192-32-16", "lora-8192-1-64")
TINY_CASES = ("decode-2", "lora-70-2-16", "lora-5-1-64")


def benches(model: Model, case: str) -> Iterator[tuple[str, Bench]]:
    kind, *sizes = case.split("-")
    numbers = [int(size) for size in sizes]
    return prefill_lora(model, *numbers) if kind == "lora" else elementwise(model, *numbers)


def measure(model: Model, case: str, bandwidth: float, max_configs: int | None) -> None:
    on_gpu = model.device.type == "cuda"
    for name, bench in benches(model, case):
        inputs = bench.make()
        expected = bench.twin(tuple(tensor.clone() for tensor in inputs))
        actual = bench.run(tuple(tensor.clone() for tensor in inputs), None)
        if expected.dim() == 3:  # partial sums over splits
            expected, actual = expected.sum(0), actual.sum(0)
        error = relative_error(actual, expected)
        if not error <= MAX_ERROR:
            raise SystemExit(f"{case} {name}: relative error {error} against the twin")
        del actual, expected
        copies = [inputs]
        if on_gpu:
            own = sum(tensor.nbytes for tensor in inputs)
            copies += [bench.make() for _ in range(min(31, CACHE_BYTES // own))]

        def step(config: object, bench: Bench = bench, copies: list[tuple[torch.Tensor, ...]] = copies) -> None:
            for tensors in copies:
                bench.run(tensors, config)

        times = {
            key: median_ms(lambda config=config, step=step: step(config), repeats=5) * 1e3 / len(copies)
            for key, config in list(bench.configs.items())[:max_configs]
        }
        best = min(times, key=lambda key: times[key])
        floor_us = bench.num_bytes / bandwidth * 1e6
        result = {
            "case": case,
            "operation": name,
            "error": round(error, 6),
            "bytes": bench.num_bytes,
            "floor_us": round(floor_us, 2),
            "best": best,
            "best_us": round(times[best], 2),
            "bytes_per_s": round(bench.num_bytes / times[best] * 1e6),
            "floor_ratio": round(floor_us / times[best], 3),
            "us": {key: round(value, 2) for key, value in times.items()},
        }
        print(json.dumps(result), flush=True)


def build(case: str) -> None:
    """Compiles the kernels of a case: one launch of each of its launch parameters."""
    for _, bench in benches(make_model(False), case):
        inputs = bench.make()
        for config in bench.configs.values():
            bench.run(inputs, config)
    torch.cuda.synchronize()


def make_model(tiny: bool) -> Model:
    if tiny:
        return Model(
            shape=LayerShape(hidden=64, q=64, kv=32, intermediate=96),
            layout=KvLayout(num_layers=1, num_kv_heads=2, head_dim=16, page_size=16),
            dtype=torch.float32,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            vocabulary=50,
        )
    return Model(
        shape=LayerShape(hidden=4096, q=4096, kv=1024, intermediate=14336),
        layout=KvLayout(num_layers=1, num_kv_heads=8, head_dim=128, page_size=16),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        vocabulary=32768,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="decode-T, prefill-T or lora-T-ADAPTERS-RANK")
    parser.add_argument("--bandwidth", type=float, default=3.02e12, help="bytes/s of a large copy on this GPU")
    parser.add_argument("--processes", type=int, default=7, help="that compile ahead; 0: none")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for any machine")
    options = parser.parse_args()
    cases = list(TINY_CASES) if options.tiny else options.cases.split(",")
    model = make_model(options.tiny)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "triton": triton.__version__}), flush=True)
    if options.processes and not options.tiny:
        compile_apart(build, cases, options.processes)
    for case in cases:
        measure(model, case, options.bandwidth, 2 if options.tiny else None)


if __name__ == "__main__":
    main()
