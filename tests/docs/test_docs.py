"""The pages under docs: what is generated is up to date, and no link or command leads nowhere."""

import re
import runpy
from pathlib import Path

import pytest
import yaml
from loraplex.cli.main import app
from loraplex.config.platform import read_config
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "cluster-configs" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_api_reference_is_that_of_the_gateway() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["api_page"]()
    assert (ROOT / "docs" / "api.md").read_text() == made, "run `python docs/make_api.py`"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.strip().lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = page if not file else (page.parent / file).resolve()
        assert there.exists(), f"{named(page)}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{named(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_exists(page: Path) -> None:
    text = page.read_text()
    found = set(re.findall(r"(?:^ {4}(?:\.venv/bin/)?|`)loraplex ([a-z][a-z-]+)", text, re.MULTILINE))
    shown = CliRunner().invoke(app, ["--help"]).output
    assert {command for command in found if not re.search(rf"\b{command}\b", shown)} == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_platform_file_is_one(page: Path) -> None:
    """Of YAML blocks those that have ``base_models``."""
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        if isinstance(content := yaml.safe_load(block), dict) and "base_models" in content:
            assert read_config(block)[1] == ()


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]
