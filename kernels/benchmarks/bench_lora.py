"""What LoRA adds to a decode step on one GPU: all layers and projections of Llama-3.1-8B's shape, a CUDA graph a case.

A step here is its GEMMs and the operations between them (no attention, no sampling), with and without LoRA;
``added_ms`` is the difference. Weights and adapters of all layers are distinct, so that each step reads them from
memory. The floor is the time in which ``--bandwidth`` reads the step's adapters once. One layer of each case is checked
against the twins first. Variants change one choice at a time, so that one run tells which defaults to set. One JSON
object a line.

    python kernels/benchmarks/bench_lora.py                                  # defaults, all cases: about a minute
    python kernels/benchmarks/bench_lora.py --variants all --cases 64x64,256x32
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_lora.py --tiny        # any machine: does it run and is it right
"""

import argparse
import json
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from graph_timing import compile_apart, median_ms, relative_error
from loraplex_kernels import KvLayout
from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu.activation import silu_mul
from loraplex_kernels.gpu.lora import (
    LoraTable,
    LoraTiles,
    PendingExpand,
    Site,
    lora_expand_,
    lora_shrink,
    partial_elements,
    view_partial,
)
from loraplex_kernels.gpu.lora_random import Adapter, LayerShape, device_tiles, random_table
from loraplex_kernels.gpu.norm import add_rms_norm
from loraplex_kernels.gpu.rotary_kv import rotary_table, rotary_write_kv
from loraplex_kernels.gpu.twins import activation as activation_twin
from loraplex_kernels.gpu.twins import lora as lora_twin
from loraplex_kernels.gpu.twins import norm as norm_twin
from loraplex_kernels.gpu.twins import rotary_kv as rotary_twin
from loraplex_kernels.rotary import rotary_frequencies

TILE_ROWS = 16
EPS = 1e-5
MAX_ERROR = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    shape: LayerShape
    layout: KvLayout
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Case:
    rows: int
    adapters: int
    ranks: tuple[int, ...]
    """Of the adapters in turn."""

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.adapters}" + ("" if self.ranks == (16,) else f"r{'-'.join(map(str, self.ranks))}")

    @property
    def rank_cap(self) -> int:
        return 16 if max(self.ranks) <= 16 else 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """None: what ``tuning`` chooses."""

    side_stream: bool = True
    fused_norm: bool = True
    """Expand of o and down inside ``add_rms_norm``; otherwise alone, before it."""
    shrink: dict[str, int | bool] | None = None
    shrink_down: dict[str, int | bool] | None = None
    expand: dict[str, int | bool] | None = None
    heads: dict[str, int | bool] | None = None
    silu: dict[str, int | bool] | None = None
    norm: dict[str, int | bool] | None = None


VARIANTS = {
    "default": Variant(),
    "serial": Variant(side_stream=False),
    "norm_apart": Variant(fused_norm=False),
    "norm_apart_serial": Variant(fused_norm=False, side_stream=False),
    "norm_8_warps": Variant(norm={"num_warps": 8}),
    "norm_rank_16": Variant(norm={"rank_block": 16}),
    "shrink_8_warps_down": Variant(shrink_down={"block_k": 2048, "num_warps": 8}),
    "shrink_dot_256": Variant(shrink={"dot_block_k": 256}),
    "shrink_dot_1024": Variant(shrink={"dot_block_k": 1024}),
    "shrink_2_warps": Variant(shrink={"block_k": 512, "num_warps": 2, "dot_block_k": 256}),
    "shrink_keep": Variant(shrink={"evict_first": False}),
    "silu_256": Variant(silu={"block_n": 256, "num_warps": 2}),
    "silu_256_4_warps": Variant(silu={"block_n": 256, "num_warps": 4}),
    "silu_512_4_warps": Variant(silu={"block_n": 512, "num_warps": 4}),
    "silu_512_8_warps": Variant(silu={"block_n": 512, "num_warps": 8}),
    "silu_1024_8_warps": Variant(silu={"block_n": 1024, "num_warps": 8}),
    "heads_64": Variant(heads={"block_n": 64, "num_warps": 1}),
    "heads_128": Variant(heads={"block_n": 128, "num_warps": 2}),
    "heads_256_2_warps": Variant(heads={"block_n": 256, "num_warps": 2}),
    "heads_512_8_warps": Variant(heads={"block_n": 512, "num_warps": 8}),
    "expand_keep": Variant(silu={"evict_first": False}, heads={"evict_first": False}, norm={"evict_first": False}),
    "apart_expand_512": Variant(fused_norm=False, expand={"block_n": 512, "num_warps": 4}),
}
FIRST_VARIANTS = ("default", "serial", "norm_apart")


class Step:
    """The buffers of one case and its layers' operations."""

    def __init__(self, model: Model, case: Case, table: LoraTable, records: np.ndarray, weights: int) -> None:
        """``weights``: layers with GEMM weights of their own; 0 leaves the GEMMs out."""
        self.model, self.case, self.table = model, case, table
        shape, rows, device, dtype = model.shape, case.rows, model.device, model.dtype
        used = np.sort(records[np.arange(rows) % case.adapters]).astype(np.int32)
        ones = np.ones(rows, dtype=np.int32)
        self.tiles: LoraTiles = device_tiles(
            used, ones, ones, tile_rows=TILE_ROWS, rank_cap=case.rank_cap, device=device
        )
        self.x = {site: self._randn(rows, shape.inputs(site)) for site in Site}
        self.out = {site: self._randn(rows, sum(shape.outputs(site))) for site in Site}
        size = max(partial_elements(rows, shape.inputs(site), site, case.rank_cap) for site in Site)
        self.scratch = torch.full((size,), float("nan"), device=device)
        self.residual = self._randn(rows, shape.hidden)
        self.norm_weight = self._randn(shape.hidden)
        head_dim = model.layout.head_dim
        self.cos_sin = rotary_table(rotary_frequencies(head_dim, 5e5, None, device), 512, dtype)
        self.slots = torch.arange(rows, dtype=torch.int32, device=device)
        self.positions = self.slots % (2 * model.layout.page_size)
        self.page_table = torch.randperm(2 * rows, device=device).to(torch.int32).view(rows, 2)
        self.pages = torch.zeros(2 * rows * model.layout.elements_per_page, dtype=dtype, device=device)
        self.weights = [
            {site: self._randn(sum(shape.outputs(site)), shape.inputs(site)) for site in Site} for _ in range(weights)
        ]
        self.side = torch.cuda.Stream() if device.type == "cuda" else None

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.model.dtype, device=self.model.device).normal_(std=0.1)

    def run(self, layers: int, variant: Variant | None) -> None:
        """``layers`` layers; without LoRA where ``variant`` is None."""
        for layer in range(layers):
            for site in Site:
                self.run_site(layer, site, variant)

    def run_site(self, layer: int, site: Site, variant: Variant | None) -> None:
        """The projections of ``site`` and the operation that follows them."""
        lora = self._project(layer, site, variant)
        if site is Site.QKV:
            rotary_write_kv(
                self.out[site], self.positions, self.slots, self.page_table, self.cos_sin, self.pages,
                self.model.layout, layer, lora=lora, config=self._config("heads", variant),
            )  # fmt: skip
        elif site is Site.GATE_UP:
            silu_mul(self.out[site], self.x[Site.DOWN], lora=lora, config=self._config("silu", variant))
        else:
            self._norm(layer, site, variant, lora)

    def _norm(self, layer: int, site: Site, variant: Variant | None, lora: PendingExpand | None) -> None:
        out = self.out[site]
        if variant is not None and lora is not None and not variant.fused_norm:
            config = self._config("expand", variant)
            widths = self.model.shape.outputs(site)
            lora_expand_(out, lora.partial, self.table, layer, site, widths, self.tiles, config=config)
            lora = None
        target = self.x[Site.GATE_UP if site is Site.O else Site.QKV]
        config = None if lora is None else self._config("norm", variant)
        add_rms_norm(self.residual, out, self.norm_weight, EPS, target, lora=lora, config=config)

    def _project(self, layer: int, site: Site, variant: Variant | None) -> PendingExpand | None:
        x, out = self.x[site], self.out[site]
        weight = self.weights[layer % len(self.weights)][site] if self.weights else None
        if variant is None:
            if weight is not None:
                torch.mm(x, weight.t(), out=out)
            return None
        partial = view_partial(self.scratch, x.shape[0], x.shape[1], site, self.case.rank_cap)
        config = self._config("shrink", variant, site)
        if self.side is not None and variant.side_stream:
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                lora_shrink(x, self.table, layer, site, self.tiles, partial, config=config)
            if weight is not None:
                torch.mm(x, weight.t(), out=out)
            main.wait_stream(self.side)
        else:
            if weight is not None:
                torch.mm(x, weight.t(), out=out)
            lora_shrink(x, self.table, layer, site, self.tiles, partial, config=config)
        return PendingExpand(table=self.table, tiles=self.tiles, layer=layer, site=site, partial=partial)

    def _config(self, kind: str, variant: Variant | None, site: Site | None = None):
        """The default of ``tuning`` with the variant's changes; None for the default itself."""
        if variant is None:
            return None
        changes = getattr(variant, kind)
        if kind == "shrink" and site is Site.DOWN and variant.shrink_down is not None:
            changes = variant.shrink_down
        if changes is None:
            return None
        shape, tiles = self.model.shape, self.tiles
        if kind == "shrink":
            default = tuning.shrink_config(shape.inputs(site), TILE_ROWS, tiles.rank_cap)
        elif kind == "heads":
            head_dim = self.model.layout.head_dim
            default = tuning.heads_config(shape.q // head_dim, head_dim, tiles.num_tiles, TILE_ROWS)
        elif kind == "norm":
            default = tuning.norm_config(shape.hidden, lora=True)
        else:
            widest = shape.intermediate if kind == "silu" else shape.hidden
            default = tuning.expand_config(tiles.num_tiles, TILE_ROWS, widest)
        return replace(default, **changes)

    def check(self, layer: int, variant: Variant) -> float:
        """The largest relative error of the layer's operations against their twins, each on the same input."""
        errors = []
        for site in Site:
            lora = self._project(layer, site, variant)
            assert lora is not None
            if self.side is not None:
                torch.cuda.synchronize()
            twin = torch.zeros_like(lora.partial)
            lora_twin.lora_shrink(self.x[site], self.table, layer, site, self.tiles, twin)
            shrunk, expected_shrunk = lora.partial.sum(0), twin.sum(0)
            written = shrunk.isfinite()
            errors.append(relative_error(shrunk[written], expected_shrunk[written]))
            expected = replace(lora, partial=twin)
            out = self.out[site]
            if site is Site.QKV:
                sides = []
                for write, pending in ((rotary_write_kv, lora), (rotary_twin.rotary_write_kv, expected)):
                    qkv, pages = out.clone(), torch.zeros_like(self.pages)
                    write(
                        qkv, self.positions, self.slots, self.page_table, self.cos_sin, pages, self.model.layout, layer,
                        lora=pending,
                    )  # fmt: skip
                    sides.append((qkv, pages))
                errors += [relative_error(ours, theirs) for ours, theirs in zip(*sides, strict=True)]
            elif site is Site.GATE_UP:
                ours, theirs = torch.empty_like(self.x[Site.DOWN]), torch.empty_like(self.x[Site.DOWN])
                silu_mul(out, ours, lora=lora)
                activation_twin.silu_mul(out, theirs, lora=expected)
                errors.append(relative_error(ours, theirs))
            else:
                ours, theirs = torch.empty_like(self.residual), torch.empty_like(self.residual)
                for run, into, pending in ((add_rms_norm, ours, lora), (norm_twin.add_rms_norm, theirs, expected)):
                    run(self.residual.clone(), out, self.norm_weight, EPS, into, lora=pending)
                errors.append(relative_error(ours, theirs))
                ours, theirs = out.clone(), out.clone()
                widths = self.model.shape.outputs(site)
                lora_expand_(ours, lora.partial, self.table, layer, site, widths, self.tiles)
                lora_twin.lora_expand_(theirs, twin, self.table, layer, site, widths, self.tiles)
                errors.append(relative_error(ours, theirs))
        return max(errors)


def adapter_bytes(case: Case, shape: LayerShape, layers: int, itemsize: int) -> int:
    """Of the adapters that the rows of the case name, all layers and modules."""
    ranks = sum(case.ranks[index % len(case.ranks)] for index in range(min(case.rows, case.adapters)))
    return ranks * layers * itemsize * sum(inputs + outputs for inputs, outputs in shape.modules)


def build(job: tuple[Case, str | None, Site, int]) -> None:
    """Compiles the kernels of one site of a case and a variant (None: without LoRA), over an empty table."""
    case, variant, site, layers = job
    model = make_model(False, layers)
    entries = torch.zeros((case.adapters, layers * 7, 2), dtype=torch.int64, device=model.device)
    arena = torch.zeros(1 << 10, dtype=model.dtype, device=model.device)
    step = Step(model, case, LoraTable(arena=arena, entries=entries), np.arange(case.adapters), 0)
    step.run_site(0, site, None if variant is None else VARIANTS[variant])
    torch.cuda.synchronize()


def builds(cases: list[Case], variants: list[str], layers: int) -> list[tuple[Case, str | None, Site, int]]:
    """One job for all cases between which ``tuning`` makes no difference."""
    kinds = {(case.rows < 64, num_tiles(case) < 16, case.rank_cap): case for case in cases}
    return [(case, variant, site, layers) for case in kinds.values() for variant in (None, *variants) for site in Site]


def num_tiles(case: Case) -> int:
    rows_of = np.bincount(np.arange(case.rows) % case.adapters)
    return int((-(-rows_of // TILE_ROWS)).sum())


def make_model(tiny: bool, layers: int) -> Model:
    if tiny:
        return Model(
            shape=LayerShape(hidden=64, q=64, kv=32, intermediate=96),
            layout=KvLayout(num_layers=layers, num_kv_heads=2, head_dim=16, page_size=16),
            dtype=torch.float32,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
    return Model(
        shape=LayerShape(hidden=4096, q=4096, kv=1024, intermediate=14336),
        layout=KvLayout(num_layers=layers, num_kv_heads=8, head_dim=128, page_size=16),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )


def run_case(
    model: Model, case: Case, layers: int, variants: list[str], weights: list[dict[Site, torch.Tensor]],
    table: LoraTable, records: np.ndarray, bandwidth: float,
) -> dict[str, object]:  # fmt: skip
    step = Step(model, case, table, records, 0)
    error = step.check(layers - 1, VARIANTS["default"])
    if not error <= MAX_ERROR:
        raise SystemExit(f"{case.name}: relative error {error} against the twins")
    step.weights = weights
    base_ms = median_ms(lambda: step.run(layers, None), target_ms=30.0)
    num_bytes = adapter_bytes(case, model.shape, layers, model.dtype.itemsize)
    floor_ms = num_bytes / bandwidth * 1e3
    added: dict[str, float] = {}
    for name in variants:
        added[name] = median_ms(lambda name=name: step.run(layers, VARIANTS[name]), target_ms=30.0) - base_ms
    best = min(added, key=lambda name: added[name])
    return {
        "case": case.name,
        "tiles": step.tiles.num_tiles,
        "error": round(error, 6),
        "base_ms": round(base_ms, 4),
        "added_share": round(added[best] / base_ms, 4),
        "adapter_bytes": num_bytes,
        "floor_ms": round(floor_ms, 4),
        "added_ms": {name: round(value, 4) for name, value in added.items()},
        "best": best,
        "best_bytes_per_s": round(num_bytes / max(added[best], 1e-6) * 1e3),
        "best_floor_ratio": round(floor_ms / max(added[best], 1e-6), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="1x1,32x1,32x32,64x8,64x64,256x1,256x32,256x256", help="rows x adapters")
    parser.add_argument("--ranks", default="16", help="a list cycles over the adapters: 8,16,32,64; ; separates runs")
    parser.add_argument("--variants", default=",".join(FIRST_VARIANTS), help=f"all, or of {', '.join(VARIANTS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bandwidth", type=float, default=3.02e12, help="bytes/s of a large copy on this GPU")
    parser.add_argument("--processes", type=int, default=12, help="that compile ahead; 0: none")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for any machine")
    options = parser.parse_args()
    layers = 1 if options.tiny else options.layers
    cases = "1x1,3x2" if options.tiny else options.cases
    variants = list(VARIANTS) if options.variants == "all" else options.variants.split(",")
    model = make_model(options.tiny, layers)
    print(json.dumps(place()), flush=True)
    weights = Step(model, Case(1, 1, (16,)), *empty_table(model, layers), layers).weights
    for ranks_text in options.ranks.split(";"):
        ranks = tuple(int(rank) for rank in ranks_text.split(","))
        run = [Case(*(int(part) for part in text.split("x")), ranks) for text in cases.split(",")]
        start = time.perf_counter()
        if options.processes and not options.tiny:
            compile_apart(build, builds(run, variants, layers), options.processes)
        adapters = [Adapter(rank=ranks[index % len(ranks)]) for index in range(max(case.adapters for case in run))]
        table, records = random_table(model.shape, layers, adapters, dtype=model.dtype, device=model.device)
        print(json.dumps({"ranks": ranks, "ready_s": round(time.perf_counter() - start, 1)}), flush=True)
        for case in run:
            result = run_case(model, case, layers, variants, weights, table, records, options.bandwidth)
            print(json.dumps(result), flush=True)
        del table


def empty_table(model: Model, layers: int) -> tuple[LoraTable, np.ndarray]:
    entries = torch.zeros((1, layers * 7, 2), dtype=torch.int64, device=model.device)
    arena = torch.zeros(1 << 10, dtype=model.dtype, device=model.device)
    return LoraTable(arena=arena, entries=entries), np.zeros(1, dtype=np.int32)


def place() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    main()
