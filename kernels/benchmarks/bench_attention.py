"""Paged attention on one GPU: decode and prefill of Llama-3.1-8B's shape, over the block sizes worth trying.

Every case is checked against the twin (relative L2 error), then timed as a CUDA graph over the layers of a model with
their own keys and values, enough of them that no cache holds them; medians. Decode is compared with the time that its
key and value bytes take at ``--bandwidth``, prefill with torch's flash attention on the same lengths, dense in memory.
Prints one JSON object a line: the place, then each case with its best launch parameters and all others.

    python kernels/benchmarks/bench_attention.py                     # about a minute, most of it compilation
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_attention.py --tiny    # any machine: does it run and is it right
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
import triton
from loraplex_kernels import KvLayout
from loraplex_kernels.gpu import attention
from loraplex_kernels.gpu.attention import AttentionBlocks, decode_scratch
from loraplex_kernels.gpu.attention_tiles import (
    PART_FIELDS,
    DecodeCut,
    build_decode_parts,
    build_prefill_tiles,
    decode_concurrency,
)
from loraplex_kernels.gpu.twins import attention as twins

DTYPE = torch.bfloat16
MAX_ERROR = 1e-2
CACHE_BYTES = 256 << 20
"""A replay reads more than this between two reads of the same key: several times the L2 cache."""

DECODE_BLOCKS = [
    AttentionBlocks(keys=keys, num_warps=warps, num_stages=stages)
    for keys, warps, stages in (
        (32, 4, 5),
        (32, 4, 3),
        (32, 2, 3),
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 5),
        (128, 8, 3),
    )
]
PREFILL_BLOCKS = [
    AttentionBlocks(rows=rows, keys=keys, num_warps=warps, num_stages=stages, max_registers=registers)
    for rows, keys, warps, stages, registers in (
        (64, 32, 4, 2, 128),
        (64, 32, 4, 2, None),
        (64, 32, 4, 3, 128),
        (64, 16, 4, 4, 128),
        (64, 64, 4, 3, None),
        (64, 64, 4, 2, None),
        (64, 128, 4, 2, None),
        (128, 32, 8, 3, 128),
        (128, 64, 8, 3, None),
        (128, 128, 8, 3, None),
    )
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    layout: KvLayout
    num_heads: int

    @property
    def scale(self) -> float:
        return self.layout.head_dim**-0.5

    @property
    def q_size(self) -> int:
        return self.num_heads * self.layout.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.layout.num_kv_heads * self.layout.head_dim

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self.layout.num_kv_heads * self.layout.head_dim * DTYPE.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    rows: int
    context: int
    longest: int | None = None
    """Of the last row; None: as the others."""

    @property
    def lengths(self) -> list[int]:
        return [self.context] * (self.rows - 1) + [self.longest or self.context]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCase:
    prompts: int
    tokens: int
    prefix: int = 0


LLAMA_8B = Model(layout=KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, page_size=16), num_heads=32)
DECODE_CASES = [
    *(
        DecodeCase(rows=rows, context=context)
        for rows, context in ((256, 320), (64, 1024), (32, 320), (8, 1024), (1, 320), (1, 8192), (16, 8192), (1, 32768))
    ),
    *(DecodeCase(rows=rows, context=320, longest=8192) for rows in (256, 64, 32, 8, 2)),
]
PREFILL_CASES = [
    PrefillCase(prompts=32, tokens=256),
    PrefillCase(prompts=16, tokens=512),
    PrefillCase(prompts=8, tokens=1024),
    PrefillCase(prompts=1, tokens=8192),
    PrefillCase(prompts=4, tokens=2048, prefix=2048),
]
TINY = Model(layout=KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, page_size=4), num_heads=6)


class Bench:
    """One arena for all cases, filled once."""

    def __init__(
        self,
        model: Model,
        max_pages: int,
        device: torch.device,
        bandwidth: float,
        repeats: int,
        *,
        as_in_graphs: bool = True,
    ) -> None:
        """``as_in_graphs``: decode steps have room for the parts of any lengths, not for their own alone."""
        self.model = model
        self.as_in_graphs = as_in_graphs
        self.device = device
        self.bandwidth = bandwidth
        self.repeats = repeats
        self.max_pages = max_pages
        elements = max_pages * model.layout.elements_per_page
        self.arena = torch.empty(elements, dtype=DTYPE, device=device).normal_()

    def page_table(self, lengths: Sequence[int]) -> torch.Tensor:
        """Random pages; as wide as a multiple of 16, as the table of a server is."""
        counts = [-(-length // self.model.layout.page_size) for length in lengths]
        table = torch.zeros((len(counts), -(-max(counts) // 16) * 16), dtype=torch.int32, device=self.device)
        pages = torch.randperm(self.max_pages, device=self.device)[: sum(counts)].to(torch.int32)
        for row, own in enumerate(pages.split(counts)):
            table[row, : len(own)] = own
        return table

    def decode(self, case: DecodeCase, variants: Iterable[tuple[AttentionBlocks, int]]) -> dict[str, Any]:
        model, layout, lengths = self.model, self.model.layout, case.lengths
        q = torch.randn(case.rows, model.qkv_size, device=self.device).to(DTYPE)
        out = torch.empty(case.rows, model.q_size, dtype=DTYPE, device=self.device)
        layer_bytes = sum(lengths) * model.kv_bytes
        num_tables = math.ceil(CACHE_BYTES / (layer_bytes * layout.num_layers)) if self.repeats > 1 else 1
        tables = [self.page_table(lengths) for _ in range(num_tables)]
        picked = sorted({0, case.rows // 2, case.rows - 1})
        expected = torch.full_like(out, torch.nan)
        whole = build_decode_parts(
            [lengths[row] for row in picked], picked, picked, DecodeCut(block_keys=16, concurrency=1)
        )
        twins.decode_attention(
            q, torch.from_numpy(whole), tables[0], self.arena, layout, 1, expected, None, scale=model.scale
        )

        def measure(blocks: AttentionBlocks, concurrency: int) -> dict[str, Any]:
            cut = DecodeCut(block_keys=blocks.keys, concurrency=concurrency)
            live = build_decode_parts(lengths, range(case.rows), range(case.rows), cut)
            num_parts = cut.capacity(case.rows) if self.as_in_graphs else len(live)
            parts = torch.zeros((num_parts, PART_FIELDS), dtype=torch.int32, device=self.device)
            parts[: len(live)] = torch.from_numpy(live)
            scratch = decode_scratch(len(parts), case.rows, model.num_heads, layout, self.device)

            def run(layer: int, table: torch.Tensor) -> None:
                attention.decode_attention(
                    q, parts, table, self.arena, layout, layer, out, scratch, scale=model.scale, blocks=blocks
                )

            error = self.check(lambda: run(1, tables[0]), out, expected, torch.tensor(picked))
            calls = [(layer, table) for table in tables for layer in range(layout.num_layers)]
            ms = self.time(lambda: [run(*call) for call in calls]) / len(calls)
            return {
                **_shown(blocks, "keys", "num_warps", "num_stages"),
                "concurrency": concurrency,
                "parts": len(live),
                "layer_us": round(ms * 1e3, 2),
                "tb_per_s": round(layer_bytes / ms / 1e9, 3),
                "share_of_bandwidth": round(layer_bytes / ms / 1e9 / self.bandwidth, 3),
                "error": error,
            }

        return _ranked({"op": "decode", **asdict(case)}, [measure(*variant) for variant in variants])

    def prefill(self, case: PrefillCase, variants: Iterable[AttentionBlocks]) -> dict[str, Any]:
        model, layout = self.model, self.model.layout
        total = case.prompts * case.tokens
        q = torch.randn(total, model.qkv_size, device=self.device).to(DTYPE)
        out = torch.empty(total, model.q_size, dtype=DTYPE, device=self.device)
        table = self.page_table([case.prefix + case.tokens] * case.prompts)
        layers = range(min(4, layout.num_layers))
        keys_seen = case.tokens * case.prefix + case.tokens * (case.tokens + 1) // 2
        flops = 4 * model.q_size * keys_seen * case.prompts

        def measure(blocks: AttentionBlocks) -> dict[str, Any]:
            block_tokens = blocks.rows // (model.num_heads // layout.num_kv_heads)
            host_tiles = build_prefill_tiles(
                [case.prefix] * case.prompts,
                [case.tokens] * case.prompts,
                [prompt * case.tokens for prompt in range(case.prompts)],
                range(case.prompts),
                block_tokens,
            )
            tiles = torch.from_numpy(host_tiles).to(self.device)
            options = {"block_tokens": block_tokens, "scale": model.scale}

            def run(layer: int) -> None:
                attention.prefill_attention(q, tiles, table, self.arena, layout, layer, out, blocks=blocks, **options)

            expected = torch.full_like(out, torch.nan)
            picked = tiles[[0, len(tiles) // 2, -1]]
            twins.prefill_attention(q, picked, table, self.arena, layout, 1, expected, **options)
            error = self.check(lambda: run(1), out, expected, (~expected[:, 0].isnan()).nonzero()[:, 0])
            ms = self.time(lambda: [run(layer) for layer in layers]) / len(layers)
            return {
                **_shown(blocks, "rows", "keys", "num_warps", "num_stages", "max_registers"),
                "layer_us": round(ms * 1e3, 2),
                "tflop_per_s": round(flops / ms / 1e9, 1),
                "error": error,
            }

        result = _ranked({"op": "prefill", **asdict(case)}, [measure(blocks) for blocks in variants])
        if self.device.type == "cuda":
            ms = self.time(self.flash(case, q))
            result["flash"] = {"layer_us": round(ms * 1e3, 2), "tflop_per_s": round(flops / ms / 1e9, 1)}
        return result

    def flash(self, case: PrefillCase, q: torch.Tensor) -> Callable[[], object]:
        """torch's flash attention with the keys dense in memory: the same work without pages."""
        model, head_dim = self.model, self.model.layout.head_dim
        length = case.prefix + case.tokens
        shape = (case.prompts * length, model.layout.num_kv_heads, head_dim)
        k, v = (torch.randn(shape, device=self.device).to(DTYPE) for _ in range(2))
        starts = torch.arange(case.prompts + 1, dtype=torch.int32, device=self.device)
        args = (starts * case.tokens, starts * length, case.tokens, length, 0.0, True, False)
        q_TNH = q[:, : model.q_size].view(-1, model.num_heads, head_dim)
        return lambda: torch.ops.aten._flash_attention_forward(q_TNH, k, v, *args, scale=model.scale)

    def check(self, run: Callable[[], None], out: torch.Tensor, expected: torch.Tensor, tokens: torch.Tensor) -> float:
        out.fill_(torch.nan)
        run()
        ours, reference = out[tokens.long()].double(), expected[tokens.long()].double()
        error = float((ours - reference).norm() / reference.norm())
        if not error <= MAX_ERROR or bool(out.isnan().any()):
            raise SystemExit(f"wrong result: relative error {error}, {int(out.isnan().sum())} NaN")
        return float(f"{error:.2e}")

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds, median."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


def _shown(blocks: AttentionBlocks, *names: str) -> dict[str, int | None]:
    return {name: getattr(blocks, name) for name in names}


def _ranked(case: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """``measured`` holds the default first."""
    ranked = sorted(measured, key=lambda result: float(result["layer_us"]))
    return {**case, "default": measured[0], "best": ranked[0], "all": ranked}


def decode_variants(model: Model, num_sms: int) -> list[tuple[AttentionBlocks, int]]:
    """The default blocks and concurrency first."""
    concurrency = decode_concurrency(model.layout.num_kv_heads, num_sms)
    return [
        (blocks, number)
        for number in (concurrency, concurrency * 2 // 3, concurrency * 4 // 3)
        for blocks in DECODE_BLOCKS
    ]


def compile_variants(variants: list[tuple[str, AttentionBlocks]]) -> None:
    """Runs each once on a small problem, which leaves its binary in Triton's cache."""
    device = torch.device("cuda")
    bench = Bench(LLAMA_8B, 4, device, 1.0, repeats=1)
    model, layout = bench.model, bench.model.layout
    q = torch.zeros(1, model.qkv_size, dtype=DTYPE, device=device)
    out = torch.empty(1, model.q_size, dtype=DTYPE, device=device)
    table = bench.page_table([16])
    nothing = torch.zeros((1, PART_FIELDS), dtype=torch.int32, device=device)
    scratch = decode_scratch(1, 1, model.num_heads, layout, device)
    args = (table, bench.arena, layout, 0, out)
    for op, blocks in variants:
        if op == "prefill":
            attention.prefill_attention(
                q, nothing[:, :4].contiguous(), *args, block_tokens=1, scale=model.scale, blocks=blocks
            )
        else:
            attention.decode_attention(q, nothing, *args, scratch, scale=model.scale, blocks=blocks)
    torch.cuda.synchronize()


def run_tiny(device: torch.device) -> None:
    bench = Bench(TINY, 32, device, 1.0, repeats=1)
    blocks = AttentionBlocks(rows=32, keys=16, num_warps=4, num_stages=2)
    decode = bench.decode(DecodeCase(rows=2, context=37), [(blocks, 1), (replace(blocks, keys=32), 4)])
    prefill = bench.prefill(PrefillCase(prompts=2, tokens=13, prefix=5), [blocks])
    print(json.dumps(decode))
    print(json.dumps(prefill))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--bandwidth", type=float, default=3.02, help="TB/s that a copy reaches on this GPU")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--exact", action="store_true", help="decode without the programs that a graph has to spare")
    parser.add_argument("--tiny", action="store_true", help="a smoke test, also under the interpreter")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.tiny:
        run_tiny(device)
        return
    properties = torch.cuda.get_device_properties(device)
    print(json.dumps({"gpu": properties.name, "torch": torch.__version__, "triton": triton.__version__}), flush=True)
    decode = [] if args.only == "prefill" else DECODE_CASES
    prefill = [] if args.only == "decode" else PREFILL_CASES
    variants = decode_variants(LLAMA_8B, properties.multi_processor_count)
    ordered = [("decode", blocks) for blocks in DECODE_BLOCKS if decode]
    ordered += [("prefill", blocks) for blocks in PREFILL_BLOCKS if prefill]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_variants, [ordered[start :: args.jobs] for start in range(args.jobs)]))
    page_size = LLAMA_8B.layout.page_size
    pages = [sum(-(-length // page_size) for length in case.lengths) for case in decode]
    pages += [case.prompts * -(-(case.prefix + case.tokens) // page_size) for case in prefill]
    bench = Bench(LLAMA_8B, max(pages), device, args.bandwidth, args.repeats, as_in_graphs=not args.exact)
    for case in decode:
        print(json.dumps(bench.decode(case, variants)), flush=True)
    for prompts in prefill:
        print(json.dumps(bench.prefill(prompts, PREFILL_BLOCKS)), flush=True)


if __name__ == "__main__":
    main()
