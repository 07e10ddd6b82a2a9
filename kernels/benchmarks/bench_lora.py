"""What LoRA adds to a step on one GPU, of decode or with a prompt in it: all layers and projections of Llama-3.1-8B's
shape, a CUDA graph a case.

A step here is its GEMMs and the operations between them (no attention, no sampling), with and without LoRA;
``added_ms`` is the difference, the median over rounds in which they alternate. Weights and adapters of all layers are
distinct, so that each step reads them from memory. The floor is the time in which ``--bandwidth`` reads the step's
adapters once. One layer of each case is checked against the twins first. Variants change the choices of ``tuning``, so
that one run tells which defaults to set. One JSON object a line.

    python kernels/benchmarks/bench_lora.py                                  # defaults, all cases: about a minute
    python kernels/benchmarks/bench_lora.py --variants all --cases 64x64,256x32
    python kernels/benchmarks/bench_lora.py --tp 2                           # as one GPU of a group runs its shard
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_lora.py --tiny        # any machine: does it run and is it right
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from graph_timing import alternating_ms, compile_apart, median_ms, relative_error
from lora_cases import Case, adapter_bytes
from lora_variants import VARIANTS, Variant, chosen
from loraplex_kernels import KvLayout
from loraplex_kernels.gpu.activation import silu_mul
from loraplex_kernels.gpu.lora import LoraTable, LoraTiles, PendingExpand, Site, lora_expand_, lora_shrink, view_partial
from loraplex_kernels.gpu.lora_project import LoraProjections
from loraplex_kernels.gpu.lora_random import Adapter, LayerShape, device_tiles, random_table
from loraplex_kernels.gpu.lora_tiles import decode_tile_rows, mixed_tile_rows
from loraplex_kernels.gpu.norm import add_rms_norm
from loraplex_kernels.gpu.rotary_kv import rotary_table, rotary_write_kv
from loraplex_kernels.gpu.twins import activation as activation_twin
from loraplex_kernels.gpu.twins import lora as lora_twin
from loraplex_kernels.gpu.twins import norm as norm_twin
from loraplex_kernels.gpu.twins import rotary_kv as rotary_twin
from loraplex_kernels.rotary import rotary_frequencies

EPS = 1e-5
MAX_ERROR = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    shape: LayerShape
    layout: KvLayout
    dtype: torch.dtype
    device: torch.device
    sharded: bool
    """Of o and down a part that is to be summed: what LoRA adds goes into it, or into a buffer beside it."""


class Step:
    """The buffers of one case and its layers' operations."""

    def __init__(self, model: Model, case: Case, table: LoraTable, records: np.ndarray, weights: int) -> None:
        """``weights``: layers with GEMM weights of their own; 0 leaves the GEMMs out."""
        self.model, self.case, self.table = model, case, table
        shape, rows, device, dtype = model.shape, case.num_tokens, model.device, model.dtype
        used = np.sort(records[np.arange(case.rows) % case.adapters]).astype(np.int32)
        lengths = np.ones(case.rows, dtype=np.int32)
        if case.prompt:
            used, lengths = np.insert(used, 0, records[0]), np.insert(lengths, 0, case.prompt)
        self.tiles_of: dict[int, LoraTiles] = {
            tile_rows: device_tiles(
                used, np.ones_like(used), lengths, tile_rows=tile_rows, rank_cap=case.rank_cap(tile_rows), device=device
            )
            for tile_rows in (1, 16, 32, 64)
        }
        self.tile_rows = mixed_tile_rows(rows) if case.prompt else decode_tile_rows(rows, self.tiles_of[16].num_tiles)
        self.x = {site: self._randn(rows, shape.inputs(site)) for site in Site}
        self.out = {site: self._randn(rows, sum(shape.outputs(site))) for site in Site}
        self.projections = LoraProjections(
            table,
            {site: shape.inputs(site) for site in Site},
            {site: shape.outputs(site) for site in Site},
            rows,
            partial_sums=model.sharded,
        )
        self.added = {site: self._randn(rows, shape.hidden) for site in (Site.O, Site.DOWN) if model.sharded}
        self.residual = self._randn(rows, shape.hidden)
        self.norm_weight = self._randn(shape.hidden)
        head_dim = model.layout.head_dim
        self.cos_sin = rotary_table(rotary_frequencies(head_dim, 5e5, None, device), 512, dtype)
        # Two pages a slot: the prompt's tokens fill theirs, each other row has one to itself.
        in_prompt, two_pages = torch.arange(case.prompt), 2 * model.layout.page_size
        first = -(-case.prompt // two_pages)
        num_slots = first + case.rows
        own = torch.arange(first, num_slots)
        self.slots = torch.cat((in_prompt // two_pages, own)).to(device, torch.int32)
        self.positions = torch.cat((in_prompt % two_pages, own % two_pages)).to(device, torch.int32)
        self.page_table = torch.randperm(2 * num_slots, device=device).to(torch.int32).view(num_slots, 2)
        self.pages = torch.zeros(2 * num_slots * model.layout.elements_per_page, dtype=dtype, device=device)
        self.weights = [
            {site: self._randn(sum(shape.outputs(site)), shape.inputs(site)) for site in Site} for _ in range(weights)
        ]

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.model.dtype, device=self.model.device).normal_(std=0.1)

    def tiles(self, variant: Variant) -> LoraTiles:
        return self.tiles_of[variant.tile_rows or self.tile_rows]

    def run(self, layers: int, variant: Variant | None) -> None:
        """``layers`` layers; without LoRA where ``variant`` is None."""
        with chosen(variant):
            for layer in range(layers):
                for site in Site:
                    self.follow(layer, site, self._project(layer, site, variant))

    def run_site(self, site: Site, variant: Variant | None) -> None:
        with chosen(variant):
            self.follow(0, site, self._project(0, site, variant))

    def _project(self, layer: int, site: Site, variant: Variant | None) -> PendingExpand | torch.Tensor | None:
        if variant is None:
            self._gemm(layer, site)
            return None
        tiles = self.tiles(variant)
        return self.projections.project(
            lambda: self._gemm(layer, site), self.x[site], layer, site, tiles, added_TO=self.added.get(site)
        )[1]

    def _gemm(self, layer: int, site: Site) -> torch.Tensor:
        if self.weights:
            torch.mm(self.x[site], self.weights[layer % len(self.weights)][site].t(), out=self.out[site])
        return self.out[site]

    def follow(self, layer: int, site: Site, lora: PendingExpand | torch.Tensor | None) -> None:
        """The operation after the projections of ``site``."""
        out = self.out[site]
        if site is Site.QKV:
            rotary_write_kv(
                out, self.positions, self.slots, self.page_table, self.cos_sin, self.pages, self.model.layout, layer,
                lora=lora,
            )  # fmt: skip
        elif site is Site.GATE_UP:
            silu_mul(out, self.x[Site.DOWN], lora=lora)
        else:
            target = self.x[Site.GATE_UP if site is Site.O else Site.QKV]
            add_rms_norm(self.residual, out, self.norm_weight, EPS, target, lora=lora)

    def parts(self, layers: int, variant: Variant) -> dict[str, float]:
        """Microseconds of each operation, alone and over all layers."""
        tiles = self.tiles(variant)
        operations: dict[str, Callable[[int], None]] = {}
        for site in Site:
            name, x = site.name.lower(), self.x[site]
            partial = torch.zeros_like(view_partial(self.projections.scratch, *x.shape, site, tiles.rank_cap))
            added, widths = torch.zeros_like(self.out[site]), self.model.shape.outputs(site)

            def shrink(layer: int, x=x, site=site, partial=partial) -> None:
                lora_shrink(x, self.table, layer, site, tiles, partial)

            def expand(layer: int, added=added, site=site, partial=partial, widths=widths) -> None:
                lora_expand_(added, partial, self.table, layer, site, widths, tiles, add=False)

            def fused(layer: int, site=site, partial=partial) -> None:
                pending = PendingExpand(table=self.table, tiles=tiles, layer=layer, site=site, partial=partial)
                self.follow(layer, site, pending)

            def added_to(layer: int, site=site, added=added) -> None:
                self.follow(layer, site, added)

            def base(layer: int, site=site) -> None:
                self.follow(layer, site, None)

            operations |= {f"shrink_{name}": shrink, f"expand_{name}": expand, f"fused_{name}": fused}
            operations |= {f"added_{name}": added_to, f"base_{name}": base}

        def all_layers(operation: Callable[[int], None]) -> None:
            for layer in range(layers):
                operation(layer)

        with chosen(variant):
            return {
                name: round(median_ms(lambda run=run: all_layers(run), repeats=3, target_ms=4.0) * 1e3 / layers, 2)
                for name, run in operations.items()
            }

    def check(self, layer: int, variant: Variant) -> float:
        """The largest relative error of the layer's operations against their twins, each on the same input."""
        with chosen(variant):
            return max(self._errors(layer, variant))

    def _errors(self, layer: int, variant: Variant) -> Iterator[float]:
        tiles = self.tiles(variant)
        for site in Site:
            lora = self._project(layer, site, variant)
            x, out, widths = self.x[site], self.out[site].clone(), self.model.shape.outputs(site)
            twin = torch.zeros_like(view_partial(self.projections.scratch, *x.shape, site, tiles.rank_cap))
            lora_twin.lora_shrink(x, self.table, layer, site, tiles, twin)
            expected = PendingExpand(table=self.table, tiles=tiles, layer=layer, site=site, partial=twin)
            if isinstance(lora, torch.Tensor):
                expanded = torch.zeros_like(out)
                lora_twin.lora_expand_(expanded, twin, self.table, layer, site, widths, tiles)
                yield relative_error(lora, expanded)
            elif lora is None:  # added to the output, so the twin must not add it again
                expanded = torch.zeros_like(out, dtype=torch.float32)
                lora_twin.lora_expand_(expanded, twin, self.table, layer, site, widths, tiles)
                out = (out.float() - expanded).to(out.dtype)
            sides = []
            for ours in (True, False):
                pending, source = (lora, self.out[site].clone()) if ours else (expected, out)
                result = torch.full_like(self.x[Site.DOWN if site is Site.GATE_UP else Site.QKV], float("nan"))
                if site is Site.QKV:
                    result = torch.zeros_like(self.pages)
                    (rotary_write_kv if ours else rotary_twin.rotary_write_kv)(
                        source, self.positions, self.slots, self.page_table, self.cos_sin, result, self.model.layout,
                        layer, lora=pending,
                    )  # fmt: skip
                    result = torch.cat((result, source[:, : widths[0]].flatten()))
                elif site is Site.GATE_UP:
                    (silu_mul if ours else activation_twin.silu_mul)(source, result, lora=pending)
                else:
                    (add_rms_norm if ours else norm_twin.add_rms_norm)(
                        self.residual.clone(), source, self.norm_weight, EPS, result, lora=pending
                    )
                sides.append(result)
            yield relative_error(*sides)


def build(job: tuple[Case, str | None, Site, int, int]) -> None:
    """Compiles the kernels of one site of a case and a variant (None: without LoRA), over an empty table."""
    case, variant, site, layers, tp = job
    model = make_model(False, layers, tp)
    entries = torch.zeros((case.adapters, layers * 7, 2), dtype=torch.int64, device=model.device)
    arena = torch.zeros(1 << 10, dtype=model.dtype, device=model.device)
    step = Step(model, case, LoraTable(arena=arena, entries=entries), np.arange(case.adapters), 0)
    step.run_site(site, None if variant is None else VARIANTS[variant])
    torch.cuda.synchronize()


def builds(
    cases: list[Case], variants: list[str], layers: int, tp: int
) -> list[tuple[Case, str | None, Site, int, int]]:
    """One job for all cases between which ``tuning`` makes no difference."""
    kinds = {
        (
            case.num_tokens <= 32,
            case.num_tokens < 64,
            case.num_tokens // 1024,
            case.adapters == case.rows,
            case.prompt > 0,
            case.rank_cap(1),
        ): case
        for case in cases
    }
    choices = (None, *variants)
    return [(case, variant, site, layers, tp) for case in kinds.values() for variant in choices for site in Site]


def make_model(tiny: bool, layers: int, tp: int) -> Model:
    """What one of ``tp`` GPUs has of each layer."""
    whole, heads, head_dim = LayerShape(hidden=4096, q=4096, kv=1024, intermediate=14336), 8, 128
    if tiny:
        whole, heads, head_dim = LayerShape(hidden=64, q=64, kv=32, intermediate=96), 2, 16
    return Model(
        shape=replace(whole, q=whole.q // tp, kv=whole.kv // tp, intermediate=whole.intermediate // tp),
        layout=KvLayout(num_layers=layers, num_kv_heads=heads // tp, head_dim=head_dim, page_size=16),
        dtype=torch.float32 if tiny else torch.bfloat16,
        device=torch.device("cuda" if torch.cuda.is_available() or not tiny else "cpu"),
        sharded=tp > 1,
    )


def run_case(
    model: Model, case: Case, layers: int, variants: list[str], weights: list[dict[Site, torch.Tensor]],
    table: LoraTable, records: np.ndarray, bandwidth: float, parts: bool, repeats: int,
) -> dict[str, object]:  # fmt: skip
    step = Step(model, case, table, records, 0)
    # The twins go through the tiles one by one.
    checked = variants if case.num_tokens <= 64 else variants[:1]
    errors = {name: step.check(layers - 1, VARIANTS[name]) for name in checked}
    wrong = {name: error for name, error in errors.items() if not error <= MAX_ERROR}
    if wrong:
        raise SystemExit(f"{case.name}: relative errors {wrong} against the twins")
    step_parts = step.parts(layers, Variant()) if parts else {}
    step.weights = weights
    choices = [None, *(VARIANTS[name] for name in variants)]
    base, *others = alternating_ms(
        [lambda variant=variant: step.run(layers, variant) for variant in choices], repeats=repeats, target_ms=20.0
    )
    base_ms = statistics.median(base)
    added = {
        name: statistics.median(ours - without for ours, without in zip(times, base, strict=True))
        for name, times in zip(variants, others, strict=True)
    }
    num_bytes = adapter_bytes(case, model.shape, layers, model.dtype.itemsize)
    floor_ms = num_bytes / bandwidth * 1e3
    best = min(added, key=lambda name: added[name])
    return {
        "case": case.name,
        "tile_rows": step.tile_rows,
        "tiles": step.tiles_of[step.tile_rows].num_tiles,
        "error": round(max(errors.values()), 6),
        "base_ms": round(base_ms, 4),
        "added_share": round(added[best] / base_ms, 4),
        "adapter_bytes": num_bytes,
        "floor_ms": round(floor_ms, 4),
        "added_ms": {name: round(value, 4) for name, value in added.items()},
        "best": best,
        "best_bytes_per_s": round(num_bytes / max(added[best], 1e-6) * 1e3),
        "best_floor_ratio": round(floor_ms / max(added[best], 1e-6), 3),
        "parts_us": step_parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", default="1x1,32x1,32x32,64x8,64x64,256x1,256x32,256x256", help="rows x adapters + tokens of a prompt"
    )
    parser.add_argument("--ranks", default="16", help="a list cycles over the adapters: 8,16,32,64; ; separates runs")
    parser.add_argument("--variants", default="default", help=f"all, or of {', '.join(VARIANTS)}")
    parser.add_argument("--parts", action="store_true", help="also times each operation alone")
    parser.add_argument(
        "--tp", type=int, default=1, choices=(1, 2, 4, 8), help="GPUs that share each layer; tiny: 1, 2"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bandwidth", type=float, default=3.02e12, help="bytes/s of a large copy on this GPU")
    parser.add_argument(
        "--repeats", type=int, default=10, help="rounds in which a step with and without LoRA alternate"
    )
    parser.add_argument("--processes", type=int, default=12, help="that compile ahead; 0: none")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for any machine")
    options = parser.parse_args()
    layers = 1 if options.tiny else options.layers
    cases = "1x1,3x2,2x2+17" if options.tiny else options.cases
    variants = list(VARIANTS) if options.variants == "all" else options.variants.split(",")
    model = make_model(options.tiny, layers, options.tp)
    print(json.dumps(place()), flush=True)
    weights = Step(model, Case(1, 1, (16,)), *empty_table(model, layers), layers).weights
    for ranks_text in options.ranks.split(";"):
        ranks = tuple(int(rank) for rank in ranks_text.split(","))
        run = [Case.parse(text, ranks) for text in cases.split(",")]
        start = time.perf_counter()
        if options.processes and not options.tiny:
            compile_apart(build, builds(run, variants, layers, options.tp), options.processes)
        adapters = [Adapter(rank=ranks[index % len(ranks)]) for index in range(max(case.adapters for case in run))]
        table, records = random_table(model.shape, layers, adapters, dtype=model.dtype, device=model.device)
        print(json.dumps({"ranks": ranks, "ready_s": round(time.perf_counter() - start, 1)}), flush=True)
        for case in run:
            result = run_case(
                model,
                case,
                layers,
                variants,
                weights,
                table,
                records,
                options.bandwidth,
                options.parts,
                options.repeats,
            )
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
