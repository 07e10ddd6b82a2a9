"""Rows for the sampler: sampling parameters, logits, and what plain numpy makes of them, one row at a time."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.request import SamplingParams
from loraplex.core.step import RowStart, SampledToken
from loraplex.model_runner.sampler import Sampler
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
