"""What the tests of the fleet bench share."""

from pathlib import Path

import pytest
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Shape
from loraplex.cost.analytic import analytic_profile
from loraplex.cost.ceilings import Ceilings
from loraplex.model_runner.build import load_model_spec


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ceilings = Ceilings(
        name="cpu",
        source="assumed",
        measured=False,
        copy_bytes_per_s=5e9,
        gemm_flops_per_s=((1, 5e9), (64, 2e10)),
        host_bytes_per_s=2e9,
        memory_bytes=32 << 20,
        link_bytes_per_s=1e9,
        collective_s=2e-4,
    )
    model = load_model_spec("random:tiny-llama", BaseModelId("tiny"))
    path = tmp_path_factory.mktemp("fleet") / "cpu.json"
    path.write_bytes(analytic_profile([model], ceilings, [Shape(), Shape(tp=2), Shape(pp=2)], itemsize=4).to_json())
    return path
