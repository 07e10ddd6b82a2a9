from pathlib import Path

import pytest
from loraplex.demo.base import prepare_demo_base


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_demo_base(tmp_path_factory.mktemp("cache"), print)
