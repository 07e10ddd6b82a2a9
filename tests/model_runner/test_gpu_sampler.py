"""The sampler on a CUDA device: what the CPU draws, and without waiting."""

import pytest
import torch
from loraplex.model_runner.sampler import Sampler

from tests.model_runner.sampling_rows import CPU, EVERYTHING, make_spec, open_row, params, random_logits


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
