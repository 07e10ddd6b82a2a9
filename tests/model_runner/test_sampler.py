"""The batched sampler against plain per-row references in numpy, and against chance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.core.request import SamplingParams
from loraplex.core.step import SampledToken
from loraplex.model_runner.sampler import MIN_LOGPROB, Sampler

from tests.model_runner.sampling_rows import (
    CPU,
    EOS,
    EVERYTHING,
    Array,
    make_spec,
    many_params,
    open_row,
    params,
    random_logits,
    reference_distribution,
    reference_edit,
    reference_token,
    run_alone,
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
