"""A group whose ranks run the Triton kernels equals transformers + PEFT: interpreted on the CPU, compiled with CUDA."""

from typing import Any

import pytest

pytest.importorskip("triton")

from loraplex.core.plan import Shape

from tests.model_runner.test_gpu_executor import ADAPTERS, CUDA, DEVICE, prompt
from tests.model_runner.threaded_group import ThreadedGroup

PAGES = {"num_pages": 200, "page_size": 16}
LAST_LAYER = {"r": 8, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]}
"""Of a model with two layers: its first stage holds nothing of the adapter."""


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        pytest.param("llama", Shape(tp=2, pp=1), id="2x1"),
        pytest.param("qwen3", Shape(tp=1, pp=2), id="1x2"),
        pytest.param("qwen2", Shape(tp=2, pp=2), id="2x2", marks=pytest.mark.slow),
    ],
)
def test_mixed_batches_equal_transformers(
    family: str, shape: Shape, make_base: Any, add_adapter: Any, make_driver: Any, check: Any
) -> None:
    base = make_base(family, num_hidden_layers=shape.pp, intermediate_size=64)
    kinds = ADAPTERS if shape.pp == 1 else {**ADAPTERS, "last": LAST_LAYER}
    adapters = {name: add_adapter(base, name, **options) for name, options in kinds.items()}

    def group(sampler: Any) -> ThreadedGroup:
        return ThreadedGroup(str(base.directory), shape, sampler, device=DEVICE, cuda_graphs=False, **PAGES)

    driver = make_driver(base.directory, group=group, **PAGES)
    for adapter in adapters.values():
        driver.load(adapter.manifest, adapter.path)
    names = [None, *(adapter.manifest.digest for adapter in adapters.values())]
    requests = [driver.open(prompt(5 + 7 * index, index), name) for index, name in enumerate(names)]
    driver.run(requests, num_tokens=40 if CUDA else 2, chunk=24)
    for request in requests:
        check(base, driver, request)
