"""The model of the reference figures."""

import pytest
from loraplex.core.model import ModelSpec

from tests.cost.llama import LLAMA_8B


@pytest.fixture
def llama_8b() -> ModelSpec:
    return LLAMA_8B
