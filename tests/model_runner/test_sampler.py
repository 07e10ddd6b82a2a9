"""The batched sampler against plain per-row references in numpy, and against chance."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.request import SamplingParams
from loraplex.core.step import RowStart, SampledToken
from loraplex.model_runner.sampler import MIN_LOGPROB, Sampler
from loraplex.model_runner.sampling_slots import MIN_TEMPERATURE
from loraplex_kernels.noise import exponentials, row_keys

Array = npt.NDArray[np.float64]

CPU = torch.device("cpu")
EOS = 3


def make_spec(vocab_size: int) -> ModelSpec:
    return ModelSpec(
        base_model_id=BaseModelId("test"),
        family="llama",
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=vocab_size,
        max_context_tokens=4096,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        eos_token_ids=(EOS,),
    )


def params(**kwargs: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1000, "seed": 1} | kwargs))  # type: ignore[arg-type]


def open_row(
    sampler: Sampler, slot: int, sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int] = ()
) -> None:
    sampler.start(
        RowStart(slot=slot, sampling=sampling, token_ids=(*prompt, *output), num_prompt_tokens=len(prompt)),
    )


def random_logits(num_rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(seed)) * scale


def reference_edit(logits: Array, sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Array:
    """Penalties, bias and min_tokens of one row, token by token."""
    row = logits.astype(np.float64).copy()
    for token in set(prompt) | set(output):
        row[token] = (
            (row[token] / sampling.repetition_penalty) if row[token] > 0 else row[token] * sampling.repetition_penalty
        )
    for token, count in Counter(output).items():
        row[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    for token, value in sampling.logit_bias:
        row[token] += value
    if len(output) < sampling.min_tokens:
        for token in {EOS, *sampling.stop_token_ids}:
            row[token] = -np.inf
    return row


def reference_distribution(row: Array, sampling: SamplingParams) -> Array:
    """Temperature, top_k, top_p, min_p of one edited row by sorting; probabilities by token id."""
    scaled = row / sampling.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if sampling.top_k > 0:
        probs[order[sampling.top_k :]] = 0.0
        probs /= probs.sum()
    if sampling.top_p < 1.0:
        kept, mass = 0, 0.0
        while kept < len(order) and mass < sampling.top_p:
            mass += probs[order[kept]]
            kept += 1
        probs[order[max(kept, 1) :]] = 0.0
        probs /= probs.sum()
    probs[probs < sampling.min_p * probs.max()] = 0.0
    result: Array = probs / probs.sum()
    return result


def reference_token(row: Array, sampling: SamplingParams, index: int) -> tuple[int, float]:
    """The token, and by what factor it beats the second (minus one)."""
    if sampling.temperature < MIN_TEMPERATURE:
        return int(row.argmax()), 1.0
    noise = exponentials(row_keys(torch.tensor([sampling.seed]), torch.tensor([index])), len(row))[0].double().numpy()
    scores = reference_distribution(row, sampling) / noise
    second, first = np.sort(scores)[-2:]
    return int(scores.argmax()), float(first / max(second, 1e-300) - 1.0)


def many_params(vocab_size: int) -> st.SearchStrategy[SamplingParams]:
    token = st.integers(0, vocab_size - 1)
    return st.builds(
        params,
        seed=st.integers(0, 2**63 - 1),
        temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
        top_k=st.sampled_from([0, 0, 1, 3, 10, vocab_size, vocab_size + 7]),
        top_p=st.sampled_from([1.0, 1.0, 0.95, 0.6, 0.05]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.4]),
        logit_bias=st.lists(
            st.tuples(token, st.sampled_from([-100.0, -1.0, 2.5, 5.0])), max_size=3, unique_by=lambda b: b[0]
        ).map(tuple),
        min_tokens=st.sampled_from([0, 0, 2, 6]),
        stop_token_ids=st.lists(token, max_size=2).map(tuple),
        num_logprobs=st.sampled_from([None, None, 0, 1, 5]),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_batch_equals_per_row_reference(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([7, 50, 1500]))
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=12)
    rows = data.draw(st.lists(st.tuples(many_params(vocab_size), tokens, tokens), min_size=1, max_size=5))
    sampler = Sampler(make_spec(vocab_size), CPU)
    outputs = []
    for slot, (sampling, prompt, output) in enumerate(rows):
        open_row(sampler, slot, sampling, [0, *prompt], output)
        outputs.append(list(output))
    for step in range(3):
        logits_BV = random_logits(len(rows), vocab_size, data.draw(st.integers(0, 10_000)))
        before = logits_BV.clone()
        drawn = sampler.draw(logits_BV, range(len(rows))).result()
        assert torch.equal(before, logits_BV), "the caller's logits changed"
        for slot, (sampling, prompt, _) in enumerate(rows):
            edited = reference_edit(logits_BV[slot].numpy(), sampling, [0, *prompt], outputs[slot])
            expected, margin = reference_token(edited, sampling, len(outputs[slot]))
            assert drawn[slot].slot == slot
            if margin > 1e-5:
                assert drawn[slot].token_id == expected, (step, sampling)
            check_logprobs(drawn[slot], edited, sampling)
            outputs[slot].append(drawn[slot].token_id)


def check_logprobs(token: SampledToken, edited: Array, sampling: SamplingParams) -> None:
    if sampling.num_logprobs is None:
        assert token.logprob is None
        assert token.top_logprobs == ()
        return
    logprobs = edited - edited.max()
    logprobs = logprobs - np.log(np.exp(logprobs).sum())
    logprobs = np.maximum(logprobs, MIN_LOGPROB)
    assert token.logprob == pytest.approx(logprobs[token.token_id], abs=1e-3)
    values = [entry.logprob for entry in token.top_logprobs]
    assert len(values) == min(sampling.num_logprobs, len(edited))
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(np.sort(logprobs)[::-1][: len(values)], abs=1e-3)
    for entry in token.top_logprobs:
        assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=1e-3)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 8, "top_p": 0.9, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling: dict[str, float]) -> None:
    """Chi-square at p = 0.001 over 8000 draws with fixed seeds: one per request, then many of one request."""
    vocab_size, num_requests, num_steps = 20, 2000, 4
    logits_V = random_logits(1, vocab_size, seed=5, scale=1.2)[0]
    sampler = Sampler(make_spec(vocab_size), CPU)
    for slot in range(num_requests):
        open_row(sampler, slot, params(seed=slot, **sampling), [0])
    logits_BV = logits_V.expand(num_requests, -1)
    counts = np.zeros(vocab_size)
    for _ in range(num_steps):
        for token in sampler.draw(logits_BV, range(num_requests)).result():
            counts[token.token_id] += 1
    expected = reference_distribution(logits_V.double().numpy(), params(**sampling)) * num_requests * num_steps
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    # Wilson-Hilferty: the 99.9 % quantile of chi-square.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.0902 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < limit


def run_alone(
    sampling: SamplingParams, prompt: Sequence[int], logits_SV: torch.Tensor, resume_at: int | None = None
) -> list[SampledToken]:
    """Tokens of one request over the steps of ``logits_SV``; moved to a new sampler before step ``resume_at``."""
    sampler = Sampler(make_spec(logits_SV.shape[1]), CPU)
    open_row(sampler, 0, sampling, prompt)
    tokens: list[SampledToken] = []
    for step in range(logits_SV.shape[0]):
        if step == resume_at:
            sampler = Sampler(make_spec(logits_SV.shape[1]), CPU)
            open_row(sampler, 0, sampling, prompt, [token.token_id for token in tokens])
        tokens += sampler.draw(logits_SV[step : step + 1], [0]).result()
    return tokens


EVERYTHING = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.4,
    "logit_bias": ((5, 3.0), (7, -2.0)),
    "min_tokens": 6,
    "stop_token_ids": (9,),
    "num_logprobs": 3,
}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, EVERYTHING], ids=["plain", "greedy", "everything"])
@pytest.mark.parametrize("resume_at", [1, 4, 9])
def test_resume_is_identical(sampling: dict[str, object], resume_at: int) -> None:
    logits_SV = random_logits(12, 300, seed=2)
    request = params(seed=77, **sampling)
    assert run_alone(request, [1, 2, 5], logits_SV) == run_alone(request, [1, 2, 5], logits_SV, resume_at)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_the_rows_beside_it(data: st.DataObject) -> None:
    vocab_size, num_steps = 2500, 4
    watched = data.draw(many_params(vocab_size))
    logits_SV = random_logits(num_steps, vocab_size, data.draw(st.integers(0, 1000)), scale=1.0)
    alone = run_alone(watched, [1, 2], logits_SV)
    sampler = Sampler(make_spec(vocab_size), CPU)
    open_row(sampler, 100, watched, [1, 2])
    others: list[int] = []
    for step in range(num_steps):
        release: bool = data.draw(st.booleans())
        if others and release:
            sampler.release(others.pop())
        if data.draw(st.booleans()):
            others.append(step)
            open_row(sampler, step, data.draw(many_params(vocab_size)), [0, 1])
        slots = data.draw(st.permutations([100, *others]))
        logits_BV = random_logits(len(slots), vocab_size, step)
        logits_BV[slots.index(100)] = logits_SV[step]
        drawn = sampler.draw(logits_BV, slots).result()
        assert [token.slot for token in drawn] == list(slots)
        token = drawn[slots.index(100)]
        assert token.token_id == alone[step].token_id
        assert token.logprob == alone[step].logprob


def test_same_seed_same_text_other_seed_other_text() -> None:
    logits_SV = random_logits(20, 500, seed=1, scale=1.0)
    texts = [[t.token_id for t in run_alone(params(seed=seed), [1], logits_SV)] for seed in (4, 4, 5)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.999}, {"top_k": 3000, "top_p": 0.99}, {"top_k": 256}, {"top_k": 257}, {"top_k": 4097}]
)
def test_flat_distribution_needs_more_than_the_window(sampling: dict[str, float]) -> None:
    """Nuclei and k larger than the window of most likely tokens; next to a row that the window suffices for."""
    vocab_size = 5000
    request = params(seed=3, **sampling)
    sampler = Sampler(make_spec(vocab_size), CPU)
    open_row(sampler, 0, request, [1])
    open_row(sampler, 1, params(seed=3, top_k=2), [1])
    logits_BV = random_logits(2, vocab_size, seed=8, scale=0.5)
    for index in range(30):
        drawn = sampler.draw(logits_BV, [0, 1]).result()
        expected, margin = reference_token(logits_BV[0].double().numpy(), request, index)
        assert margin < 1e-6 or drawn[0].token_id == expected
        assert drawn[1].token_id in logits_BV[1].topk(2).indices.tolist()


def test_the_outcome_withstands_rounding() -> None:
    """What another batch shape does to logits changes no token, also deep in the tail of a flat distribution."""
    vocab_size, num_rows = 50_000, 200
    logits_BV = random_logits(num_rows, vocab_size, 3, scale=1.0)
    nudged_BV = logits_BV + 1e-5 * torch.randn(logits_BV.shape, generator=torch.Generator().manual_seed(4))
    drawn = []
    for logits in (logits_BV, nudged_BV):
        sampler = Sampler(make_spec(vocab_size), CPU)
        for slot in range(num_rows):
            open_row(sampler, slot, params(seed=slot), [0])
        drawn.append([token.token_id for token in sampler.draw(logits, range(num_rows)).result()])
    assert len(set(drawn[0])) > num_rows // 2
    assert drawn[0] == drawn[1]


def test_min_tokens_holds_back_every_stop_id() -> None:
    sampler = Sampler(make_spec(10), CPU)
    logits_BV = torch.zeros((1, 10))
    logits_BV[0, EOS], logits_BV[0, 4], logits_BV[0, 8] = 9.0, 8.0, 1.0
    open_row(sampler, 0, params(temperature=0, min_tokens=2, stop_token_ids=(4,), num_logprobs=10), [1])
    first = sampler.draw(logits_BV, [0]).result()[0]
    assert first.token_id == 8
    assert {entry.token_id for entry in first.top_logprobs[-2:]} == {EOS, 4}
    assert first.top_logprobs[-1].logprob == MIN_LOGPROB
    assert [sampler.draw(logits_BV, [0]).result()[0].token_id for _ in range(2)] == [8, EOS]


def test_a_row_with_every_token_masked_still_yields_a_token() -> None:
    sampler = Sampler(make_spec(5), CPU)
    open_row(sampler, 0, params(min_tokens=1, stop_token_ids=(0, 1, 2, 3, 4), num_logprobs=0), [1])
    token = sampler.draw(random_logits(1, 5, seed=1), [0]).result()[0]
    assert 0 <= token.token_id < 5
    assert token.logprob is not None
    assert math.isfinite(token.logprob)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_yield_a_valid_id_and_leave_the_neighbour_alone(temperature: float) -> None:
    sampler = Sampler(make_spec(50), CPU)
    logits_BV = random_logits(2, 50, seed=4)
    open_row(sampler, 1, params(temperature=temperature, top_p=0.9), [1])
    alone = sampler.draw(logits_BV[1:], [1]).result()[0].token_id
    open_row(sampler, 0, params(temperature=temperature, top_p=0.9, num_logprobs=1), [1])
    open_row(sampler, 1, params(temperature=temperature, top_p=0.9), [1])
    logits_BV[0] = math.nan
    drawn = sampler.draw(logits_BV, [0, 1]).result()
    assert 0 <= drawn[0].token_id < 50
    assert drawn[0].logprob == MIN_LOGPROB
    assert drawn[1].token_id == alone


def test_a_reused_slot_starts_clean() -> None:
    sampler = Sampler(make_spec(30), CPU)
    logits_BV = random_logits(1, 30, seed=6)
    best = int(logits_BV.argmax())
    open_row(sampler, 0, params(temperature=0, presence_penalty=2.0, frequency_penalty=2.0), [best], [best] * 9)
    assert sampler.draw(logits_BV, [0]).result()[0].token_id != best
    sampler.release(0)
    open_row(sampler, 0, params(temperature=0, presence_penalty=0.01), [best])
    assert sampler.draw(logits_BV, [0]).result()[0].token_id == best
    sampler.release(0)
    sampler.release(0)
    with pytest.raises(KeyError):
        sampler.draw(logits_BV, [0]).result()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, EVERYTHING], ids=["plain", "greedy", "everything"])
def test_results_may_be_read_after_later_draws(sampling: dict[str, object]) -> None:
    """Two draws ahead, and after the slot was given to another request."""
    logits_SV = random_logits(6, 300, seed=12)
    request = params(seed=5, **sampling)
    expected = run_alone(request, [1, 2], logits_SV)
    sampler = Sampler(make_spec(300), CPU)
    open_row(sampler, 0, request, [1, 2])
    drawn = [sampler.draw(row[None], [0]) for row in logits_SV]
    sampler.release(0)
    open_row(sampler, 0, params(temperature=0, presence_penalty=1.0), [4])
    sampler.draw(logits_SV[:1], [0])
    assert [result.tokens.item() for result in drawn] == [token.token_id for token in expected]
    assert [token for result in drawn for token in result.result()] == expected


def test_last_token_gets_the_tokens_of_the_rows_and_no_others() -> None:
    sampler = Sampler(make_spec(40), CPU)
    for slot in (6, 1, 4):
        open_row(sampler, slot, params(seed=slot), [0])
    last_token = torch.full((8,), -7, dtype=torch.int32)
    drawn = sampler.draw(random_logits(3, 40, seed=1), [6, 1, 4], last_token=last_token)
    assert last_token[[6, 1, 4]].tolist() == drawn.tokens.tolist() == [token.token_id for token in drawn.result()]
    assert last_token[[0, 2, 3, 5, 7]].tolist() == [-7] * 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}, EVERYTHING], ids=str
)
def test_cuda_draws_what_the_cpu_draws(sampling: dict[str, object]) -> None:
    vocab_size = 32000
    logits_SBV = random_logits(24, vocab_size, seed=9).view(8, 3, vocab_size)
    tokens = {}
    for device in (CPU, torch.device("cuda")):
        sampler = Sampler(make_spec(vocab_size), device)
        for slot in range(3):
            open_row(sampler, slot, params(seed=slot, **sampling), [1, 2, 5])
        drawn = [sampler.draw(logits_BV.to(device), [2, 0, 1]) for logits_BV in logits_SBV]
        tokens[device.type] = [[token.token_id for token in step.result()] for step in drawn]
    assert tokens["cpu"] == tokens["cuda"]


@pytest.mark.gpu
def test_cuda_draws_never_wait_for_the_device() -> None:
    """Rows of every kind come and go; only ``result`` may wait."""
    vocab_size, device = 32000, torch.device("cuda")
    kinds: list[dict[str, object]] = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}, EVERYTHING]
    logits_BV = random_logits(len(kinds), vocab_size, seed=9).to(device, torch.bfloat16)
    last_token = torch.full((len(kinds),), -1, dtype=torch.int32, device=device)
    sampler = Sampler(make_spec(vocab_size), device)
    drawn = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for num_rows in (1, 3, 4, 5, 5, 2):
            for slot in range(num_rows):
                open_row(sampler, slot, params(seed=slot, **kinds[slot]), [1, 2, 5], [7])
            for _ in range(3):
                drawn.append(sampler.draw(logits_BV[:num_rows], range(num_rows), last_token=last_token))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tokens = [[token.token_id for token in step.result()] for step in drawn]
    assert [step.tokens.tolist() for step in drawn] == tokens
    assert last_token[:2].tolist() == tokens[-1]


@pytest.mark.gpu
def test_cuda_results_wait_for_their_own_step_alone() -> None:
    """A result is there while work that was submitted after its draw still runs."""
    device = torch.device("cuda")
    sampler = Sampler(make_spec(32000), device)
    open_row(sampler, 0, params(seed=3), [1])
    logits_BV = random_logits(1, 32000, seed=9).to(device)
    for _ in range(2):  # The first draw compiles.
        drawn = sampler.draw(logits_BV, [0])
        torch.cuda._sleep(2_000_000_000)  # About a second of the device's clock.
        later = torch.cuda.Event()
        later.record()
        token = drawn.result()[0].token_id
        finished = later.query()
        torch.cuda.synchronize()
    assert 0 <= token < 32000
    assert not finished
