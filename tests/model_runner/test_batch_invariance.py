"""Batch-invariant steps: the bits of a request's logits do not depend on what runs beside it.

Interpreted on the CPU in fp32; on a GPU also in bf16, with graphs, at sizes for which other steps take other blocks.
Without the switch nothing of the kind is promised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.gpu.check import sum_rows_alike

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"r": 16, "lora_alpha": 8, "target_modules": PROJECTIONS},
    "large": {"r": 80, "lora_alpha": 6, "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"]},
}
SUBJECTS = [None, "attention", "everything", "large"]
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LARGE = {
    "num_hidden_layers": 3,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 199, (length,), generator=generator).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """The other requests: adapters of those that decode when the subject comes, and of those that come after it."""

    early: Sequence[str | None] = ()
    late: Sequence[str | None] = ()
    tokens: int = 5
    """Of their prompts; each has one more than the one before."""
    subject_last: bool = False
    """Among the rows of its adapter."""

    def open(self, driver: Any, names: Sequence[str | None], seed: int) -> list[Any]:
        return [driver.open(prompt(self.tokens + index, seed + index), name) for index, name in enumerate(names)]


def logits_among(driver: Any, adapter: str | None, company: Company, *, num_tokens: int) -> torch.Tensor:
    """(num_tokens, V): of a prompt beside decode rows, of one token beside prompts, and of one token beside others."""
    early, late = company.open(driver, company.early, 10), company.open(driver, company.late, 20)
    subject = driver.open(prompt(11, 1), adapter)
    driver.run(early, num_tokens=1)

    def step(shares: list[tuple[Any, int]], own: int) -> None:
        driver.step([*shares, (subject, own)] if company.subject_last else [(subject, own), *shares])

    step([(request, 1) for request in early], len(subject.prompt))
    step([*((request, 1) for request in early), *((request, len(request.prompt)) for request in late)], 1)
    while len(subject.generated) < num_tokens:
        step([(request, 1) for request in [*early, *late]], 1)
    return torch.stack(driver.sampler.logits[subject.slot]).cpu()


@pytest.fixture
def invariant_driver(make_base: Any, add_adapter: Any, make_driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(family, **config changes) and driver options -> a driver of a random model with all adapters loaded."""
    sum_rows_alike(monkeypatch)

    def make(family: str, changes: dict[str, Any], **options: Any) -> Any:
        base = make_base(family, **changes)
        adapters = [add_adapter(base, name, **settings) for name, settings in ADAPTERS.items()]
        driver = make_driver(
            base.directory, page_size=16, device=DEVICE, kernels=True, batch_invariant=True, max_rows=256, **options
        )
        for adapter in adapters:
            driver.load(adapter.manifest, adapter.path)
        return driver

    return make


@pytest.mark.parametrize("subject", [None, "everything"])
def test_a_request_does_not_depend_on_its_company(subject: str | None, invariant_driver: Any) -> None:
    driver = invariant_driver("qwen3", TINY)
    alone = logits_among(driver, subject, Company(), num_tokens=3)
    assert alone.isfinite().all()
    company = Company(early=["attention", None], late=["large", "everything"], subject_last=True)
    assert torch.equal(logits_among(driver, subject, company, num_tokens=3), alone)


def test_chunks_of_a_prompt_do_not_matter(invariant_driver: Any) -> None:
    """As long as each has two tokens."""
    driver = invariant_driver("llama", TINY)
    results = []
    for chunk in (100, 15):
        request = driver.open(prompt(21, 1), "everything")
        driver.run([request], num_tokens=2, chunk=chunk)
        results.append(torch.stack(driver.sampler.logits[request.slot]))
    assert torch.equal(results[1], results[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "graphs"), [("llama", True), ("qwen3", False)])
def test_steps_of_any_size_give_the_same_bits(family: str, graphs: bool, invariant_driver: Any) -> None:
    """bf16; companies of 1 to 8 and of 200, prompts that take the step to thousands of tokens."""
    driver = invariant_driver(
        family, LARGE, dtype=torch.bfloat16, cuda_graphs=graphs, num_pages=8000, max_step_tokens=16384
    )
    companies = [
        *(Company(late=[SUBJECTS[index % 4] for index in range(count)]) for count in range(1, 8)),
        Company(early=[SUBJECTS[index % 4] for index in range(7)], tokens=90, subject_last=True),
        Company(early=SUBJECTS, late=SUBJECTS, tokens=600, subject_last=True),
        Company(early=["everything"] * 100 + ["large"] * 30, late=["attention"] * 70, tokens=20),
    ]
    for subject in SUBJECTS:
        alone = logits_among(driver, subject, Company(), num_tokens=6)
        # Twice, so that graphs are captured and replayed.
        for company in [Company(), *companies, *companies]:
            among = logits_among(driver, subject, company, num_tokens=6)
            assert torch.equal(among, alone), (subject, company, (among != alone).any(-1).tolist())
            driver.close_all()
