"""Drawing tokens on one GPU from bf16 logits of Llama-3's vocabulary, beside sampling by ``torch.sort``.

Every case is checked against the torch twin, then timed as a CUDA graph over distinct logits, more than the L2 cache
holds where there are rows enough; medians, milliseconds of one draw. The floor is one read of the logits at
``--bandwidth``. ``host_us`` is what the launches of one draw take of the host. Prints one JSON object a line.

    python kernels/benchmarks/bench_sampling.py                          # half a minute
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_sampling.py --tiny   # any machine: does it run and is it right
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from graph_timing import median_ms
from loraplex_kernels.gpu.sampling import SamplingBlocks, TokenDrawer
from loraplex_kernels.sampling import SamplingRows, draw_tokens

Kind = Mapping[str, float]
GREEDY: Kind = {"temperature": 0.0}
CASES: Mapping[str, tuple[Kind, ...]] = {
    "greedy": (GREEDY,),
    "temperature": ({"temperature": 0.8},),
    "top_p 0.9": ({"top_p": 0.9},),
    "top_k 50": ({"top_k": 50},),
    "top_k 50, top_p 0.9": ({"top_k": 50, "top_p": 0.9},),
    "mixed": (GREEDY, {"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 50}),
}
"""The kinds of the rows, in turns."""
FLAT_CASES = ("top_p 0.9", "top_k 50")


def sampling_rows(kinds: tuple[Kind, ...], num_rows: int, device: torch.device) -> SamplingRows:
    kind_of = [kinds[row % len(kinds)] for row in range(num_rows)]

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([kind.get(name, default) for kind in kind_of], dtype=dtype)

    temperature, top_p = column("temperature", 1.0, torch.float64), column("top_p", 1.0, torch.float64)
    top_k, min_p = column("top_k", 0, torch.int64), column("min_p", 0.0, torch.float64)
    cut = (temperature > 0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    return SamplingRows(
        slot=torch.arange(num_rows, device=device),
        seed=torch.arange(num_rows, device=device) + 1234,
        index=torch.zeros(num_rows, dtype=torch.int64, device=device),
        temperature=temperature.to(device),
        top_k=top_k.to(device),
        top_p=top_p.to(device),
        min_p=min_p.to(device),
        cut_rows=cut.nonzero().squeeze(1).to(device),
        cut_place=torch.where(cut, cut.cumsum(0) - 1, -1).to(device),
        num_drawing=int((temperature > 0).sum()),
    )


def random_logits(copies: int, num_rows: int, vocab_size: int, flat: bool, device: torch.device) -> torch.Tensor:
    """As a language model's: a normal bulk, and a head of some hundred likely tokens in random places above it. Flat:
    the bulk alone, of which a nucleus is tens of thousands of tokens."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.empty((copies, num_rows, vocab_size), dtype=torch.bfloat16, device=device)
    for copy in logits:
        bulk = torch.randn(copy.shape, generator=generator, device=device).mul_(2.0)
        if not flat:
            likely = torch.rand(copy.shape, generator=generator, device=device) < 200 / vocab_size
            above = torch.empty_like(bulk).exponential_(generator=generator)
            bulk += likely * (6.0 + 2.0 * above)
        copy.copy_(bulk)
    return logits


def sort_and_draw(logits_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The plain way: sort, cut the sorted rows by top_k and top_p, race with the device's own random numbers."""
    if rows.num_drawing == 0:
        return logits_BV.argmax(dim=-1)
    scaled_BV = logits_BV.float() / rows.temperature.clamp(min=1e-5).float().unsqueeze(1)
    if rows.cut_rows.numel():
        falling_BV, ids_BV = scaled_BV.sort(dim=-1, descending=True)
        place_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
        top_k_B1 = torch.where(rows.top_k > 0, rows.top_k, logits_BV.shape[1]).unsqueeze(1)
        falling_BV = falling_BV.masked_fill_(place_V >= top_k_B1, -torch.inf)
        probs_BV = falling_BV.softmax(dim=-1)
        before_BV = probs_BV.cumsum(dim=-1) - probs_BV
        probs_BV.masked_fill_(before_BV >= rows.top_p.float().unsqueeze(1), 0.0)
        probs_BV = torch.empty_like(probs_BV).scatter_(1, ids_BV, probs_BV)
    else:
        probs_BV = scaled_BV.softmax(dim=-1)
    drawn_B = probs_BV.div_(torch.empty_like(probs_BV).exponential_()).argmax(dim=-1)
    return torch.where(rows.temperature > 0, drawn_B, logits_BV.argmax(dim=-1))


def host_us(draw: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        draw()
        times.append(time.perf_counter() - start)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return round(statistics.median(times) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--bandwidth", type=float, default=3.0e12, help="bytes a second of the device's memory")
    parser.add_argument("--block", type=int, default=SamplingBlocks().block)
    parser.add_argument("--warps", type=int, default=SamplingBlocks().num_warps)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab_size, batches = (500, (1, 3)) if arguments.tiny else (128256, (1, 32, 256))
    blocks = SamplingBlocks(block=256 if arguments.tiny else arguments.block, num_warps=arguments.warps)
    drawer = TokenDrawer(vocab_size, device, blocks=blocks)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    print(json.dumps({"device": name, "torch": torch.__version__, "vocab": vocab_size, "block": blocks.block}))
    for num_rows in batches:
        copies = 1 if arguments.tiny else 4
        for case, kinds, flat in [(c, k, False) for c, k in CASES.items()] + [(c, CASES[c], True) for c in FLAT_CASES]:
            logits = random_logits(copies, num_rows, vocab_size, flat, device)
            rows = sampling_rows(kinds, num_rows, device)
            ours = drawer.draw_tokens(logits[0], rows, 3)
            equal = int((ours == draw_tokens(logits[0], rows, 3)).sum())

            def draw_all(rows: SamplingRows = rows, logits: torch.Tensor = logits) -> None:
                for copy in logits:
                    drawer.draw_tokens(copy, rows, 3)

            def draw_once(rows: SamplingRows = rows, logits: torch.Tensor = logits) -> None:
                drawer.draw_tokens(logits[0], rows, 3)

            def sort_all(rows: SamplingRows = rows, logits: torch.Tensor = logits) -> None:
                for copy in logits:
                    sort_and_draw(copy, rows)

            ms = median_ms(draw_all) / copies
            peer_ms = median_ms(sort_all) / copies
            floor_ms = num_rows * vocab_size * 2 / arguments.bandwidth * 1e3
            result = {
                "case": case,
                "flat": flat,
                "rows": num_rows,
                "equal_to_twin": equal,
                "ms": round(ms, 4),
                "floor_ms": round(floor_ms, 4),
                "times_floor": round(ms / floor_ms, 2),
                "sort_ms": round(peer_ms, 4),
                "sort_over_ours": round(peer_ms / ms, 2),
                "host_us": host_us(draw_once, 1 if arguments.tiny else 20),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
