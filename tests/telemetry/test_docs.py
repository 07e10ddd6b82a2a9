"""docs/telemetry.md says what the code does."""

import re
import runpy
from pathlib import Path

import msgspec
import yaml
from loraplex.telemetry.catalogue import CATALOGUE
from loraplex.telemetry.config import TelemetryConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tables_are_those_of_the_source() -> None:
    """After a change: python docs/make_telemetry.py"""
    text = (DOCS / "telemetry.md").read_text()
    assert runpy.run_path(str(DOCS / "make_telemetry.py"))["page"](text) == text
    assert all(f"`{spec.name}`" in text for spec in CATALOGUE)


def test_the_settings_are_the_defaults() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "telemetry.md").read_text(), re.DOTALL)
    assert yaml.safe_load(block)["telemetry"] == msgspec.to_builtins(TelemetryConfig())
