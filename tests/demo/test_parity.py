"""The demo base and adapters in our engine against transformers and PEFT. ``make figures`` runs it over all prompts."""

from pathlib import Path

import pytest
from loraplex.demo.parity import run_parity


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("num_prompts", "max_tokens"), [(2, 24), pytest.param(20, 64, marks=pytest.mark.slow)])
def test_tokens_and_logits_equal_the_reference(demo_base: Path, num_prompts: int, max_tokens: int) -> None:
    agreements = run_parity(demo_base, num_prompts=num_prompts, max_tokens=max_tokens)
    assert len(agreements) == 4
    for agreement in agreements:
        assert agreement.equal_alone == agreement.equal_mixed == agreement.prompts == num_prompts, agreement
        assert agreement.max_relative_logit_error < 1e-3, agreement
