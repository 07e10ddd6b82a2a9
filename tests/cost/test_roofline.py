"""The figures of ARCHITECTURE section 8 from the ceilings, and what must hold of any step."""

from dataclasses import replace

import numpy as np
import pytest
from loraplex.core.adapter import AdapterBlock
from loraplex.core.errors import BadConfig
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.ceilings import ceilings_of, ceilings_of_device, known_gpus
from loraplex.cost.roofline import Part, load_s, roofline, stage_costs
from loraplex.cost.work import AdapterWork, StepWork, step_work

from tests.cost.llama import LLAMA_8B

H100 = ceilings_of("h100-80gb")
RANK_16 = AdapterWork.of_blocks(
    [AdapterBlock(layer=layer, module=m, lora_rank=16, scale=1.0) for layer in range(32) for m in LORA_MODULES],
    LLAMA_8B,
)


def _steps(steps: list[list[tuple[int, int, int]]], sizes: int) -> StepWork:
    """Rows as (start, tokens, adapter or -1); every row samples."""
    rows = [(step, *row) for step, members in enumerate(steps) for row in members]
    step, start, tokens, adapter = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return step_work(
        LLAMA_8B,
        step=step,
        start=start,
        num_tokens=tokens,
        samples=np.ones(len(rows), dtype=bool),
        adapter=adapter,
        sizes=[RANK_16] * sizes,
        num_steps=len(steps),
    )


def _reference(adapters: int) -> StepWork:
    """256 requests of 256 + 128 tokens: 8 prefill steps of 32 whole prompts, then 127 decode steps of all."""
    which = [request % adapters if adapters else -1 for request in range(256)]
    prefills = [[(0, 256, which[r]) for r in range(first, first + 32)] for first in range(0, 256, 32)]
    return _steps(prefills + [[(256 + i, 1, a) for a in which] for i in range(127)], adapters)


@pytest.mark.parametrize(("adapters", "tokens_per_s"), [(0, 12_400), (1, 11_400), (32, 11_000), (256, 8_700)])
def test_reference_workload(adapters: int, tokens_per_s: float) -> None:
    ideal_s = float(roofline(LLAMA_8B, _reference(adapters), H100).ideal_s.sum())
    assert 256 * 128 / ideal_s == pytest.approx(tokens_per_s, rel=0.05)


@pytest.mark.parametrize(("requests", "adapters", "step_ms"), [(1, 0, 5.0), (32, 0, 5.4), (32, 32, 6.3), (64, 32, 6.8)])
def test_decode_steps(requests: int, adapters: int, step_ms: float) -> None:
    """Without the outputs of unfused LoRA: weights, KV and adapters alone."""
    rows = [(320, 1, r % adapters if adapters else -1) for r in range(requests)]
    cost = roofline(LLAMA_8B, _steps([rows], adapters), H100)
    seconds = float((cost.ideal_s - cost.parts[Part.LORA_OUTPUTS].seconds)[0])
    assert 1e3 * seconds == pytest.approx(step_ms, rel=0.02)


def test_bytes_of_a_decode_step() -> None:
    cost = roofline(LLAMA_8B, _steps([[(319, 1, 0), (319, 1, 0), (319, 1, 1)]], 2), H100)
    layer = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
    assert cost.parts[Part.GEMM].num_bytes == [2 * 32 * layer]
    assert cost.parts[Part.GEMM].flops == [2 * 3 * 32 * layer]
    assert cost.parts[Part.LM_HEAD].num_bytes == [2 * 4096 * 128256]
    assert cost.parts[Part.ATTENTION].num_bytes == [3 * 321 * LLAMA_8B.kv_elements_per_token * 2]
    # An adapter that two rows use is read once, and computed twice.
    assert cost.parts[Part.ADAPTERS].num_bytes == [2 * 83_886_080]
    assert cost.parts[Part.ADAPTERS].flops == [3 * 83_886_080]
    assert load_s(83_886_080, H100) == pytest.approx(1.55e-3, rel=0.01)


def test_prefill_attends_to_what_the_mask_leaves() -> None:
    whole = _steps([[(0, 256, -1)]], 0)
    assert whole.attended_pairs == [256 * 257 / 2]
    chunks = _steps([[(0, 100, -1), (100, 156, -1)]], 0)
    assert chunks.attended_pairs == whole.attended_pairs
    assert chunks.kv_read_tokens == [100 + 256]


def test_sliding_window() -> None:
    spec = ModelSpec(**{name: getattr(LLAMA_8B, name) for name in ModelSpec.__slots__} | {"sliding_window": 24})
    rows = [(0, 50), (10, 20), (100, 1), (0, 24)]
    work = step_work(
        spec,
        step=np.zeros(4, dtype=np.int64),
        start=np.array([start for start, _ in rows]),
        num_tokens=np.array([tokens for _, tokens in rows]),
        samples=np.zeros(4, dtype=bool),
        adapter=np.full(4, -1),
        sizes=[],
        num_steps=1,
    )
    pairs = sum(min(start + i + 1, 24) for start, tokens in rows for i in range(tokens))
    read = sum(len({k for i in range(n) for k in range(max(0, s + i - 23), s + i + 1)}) for s, n in rows)
    assert work.attended_pairs == [pairs]
    assert work.kv_read_tokens == [read]
    assert work.num_sampled == [0]


def test_many_steps_at_once_are_each_alone() -> None:
    steps = [[(0, 512, -1)], [(10, 1, 0), (400, 1, 1), (7, 30, 1)], [(5, 1, -1)] * 7]
    together = roofline(LLAMA_8B, _steps(steps, 2), H100).ideal_s
    alone = [roofline(LLAMA_8B, _steps([step], 2), H100).ideal_s[0] for step in steps]
    assert together.tolist() == alone


@pytest.mark.parametrize("shape", [Shape(tp=2), Shape(pp=2), Shape(tp=2, pp=3)])
def test_shapes_share_the_work(shape: Shape) -> None:
    """Bytes and FLOPs of all GPUs together are those of one, but for what tensor parallelism holds twice."""
    work = _reference(4)
    one = roofline(LLAMA_8B, work, H100)
    stages = stage_costs(LLAMA_8B, work, H100, shape)
    assert len(stages) == shape.pp
    for part in (Part.GEMM, Part.ATTENTION, Part.LM_HEAD):
        for field in ("num_bytes", "flops"):
            total = sum(getattr(stage.parts[part], field) for stage in stages if part in stage.parts) * shape.tp
            np.testing.assert_allclose(total, getattr(one.parts[part], field))
    adapters = sum(stage.parts[Part.ADAPTERS].num_bytes for stage in stages) * shape.tp
    assert np.all(adapters >= 0.999 * one.parts[Part.ADAPTERS].num_bytes)
    assert np.all(adapters <= shape.tp * 1.001 * one.parts[Part.ADAPTERS].num_bytes)
    assert all(np.all(stage.parts[Part.COLLECTIVES].seconds > 0) for stage in stages[:-1])


@pytest.mark.parametrize(("gpu", "least", "most"), [("h100-80gb", 1.7, 1.95), ("l40s-48gb", 1.0, 1.2)])
def test_tensor_parallelism_gains_little_over_a_slow_link(gpu: str, least: float, most: float) -> None:
    prefill = _steps([[(0, 8192, -1)]], 0)
    one, two = (roofline(LLAMA_8B, prefill, ceilings_of(gpu), tp=tp).ideal_s[0] for tp in (1, 2))
    assert least < one / two < most


def test_ceilings() -> None:
    rates = H100.flops_per_s(np.array([1.0, 256.0, 1448.1546878700494, 8192.0, 1e6]))
    assert rates.tolist() == pytest.approx([519e12, 519e12, 609.5e12, 700e12, 700e12])
    assert {ceilings_of(gpu).measured for gpu in known_gpus()} == {True, False}
    assert ceilings_of_device("NVIDIA H100 80GB HBM3") is H100
    assert ceilings_of_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert ceilings_of_device("Tesla T4") is None
    with pytest.raises(BadConfig, match="h100-80gb"):
        ceilings_of("h100")
    with pytest.raises(BadConfig, match="no link"):
        roofline(LLAMA_8B, _steps([[(0, 1, -1)]], 0), replace(H100, link_bytes_per_s=0.0), tp=2)
