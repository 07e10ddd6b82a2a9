"""Recorded AlpaServe cases."""

from pathlib import Path

import pytest
from loraplex.simulator.alpaserve_cases import Case, load_cases

CASES_PATH = Path(__file__).parent / "data" / "alpaserve" / "cases.json"


@pytest.fixture(scope="session")
def cases_path() -> Path:
    return CASES_PATH


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return {case.name: case for case in load_cases(CASES_PATH)}
