"""The same weights on a CUDA device: tokens and logits of a mixed batch equal the CPU's (fp32)."""

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_mixed_batch_equals_the_cpu(family: str, make_base: Any, add_adapter: Any, make_driver: Any) -> None:
    base = make_base(family)
    adapters = [
        add_adapter(base, "attention", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        add_adapter(base, "feed-forward", r=20, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]),
    ]
    runs = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        driver = make_driver(base.directory, device=device)
        for adapter in adapters:
            driver.load(adapter.manifest, adapter.path)
        names = [None, *(adapter.manifest.digest for adapter in adapters)]
        requests = [driver.open(list(range(3, 20 + 9 * index)), name) for index, name in enumerate(names)]
        driver.run(requests, num_tokens=12, chunk=7)
        logits = torch.stack([row.cpu() for request in requests for row in driver.sampler.logits[request.slot]])
        runs.append(([request.generated for request in requests], logits))
    (cpu_tokens, cpu_logits), (cuda_tokens, cuda_logits) = runs
    assert cpu_tokens == cuda_tokens
    assert (cpu_logits - cuda_logits).abs().max() <= 1e-3 * cpu_logits.abs().max()
