"""Notebooks run from top to bottom and show pictures; they hold no logic, and are committed without outputs."""

import ast
import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOGIC = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.With, ast.Try, ast.comprehension)
READ = ("notebooks/data", "notebooks/results", "kernels/benchmarks/results")
"""What notebooks read of the repository, by paths from where they lie."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    pictures: int
    """At least."""
    words: tuple[str, ...]
    """In one of its pictures or tables each."""
    files: dict[str, int]
    """Written beside it -> bytes at least."""


SHOWN = {
    "01_plan_from_a_trace": Shown(pictures=3, words=("fluid bound",), files={"report.html": 20_000}),
    "02_multi_lora_throughput": Shown(
        pictures=10,
        words=(
            "Loraplex, 256 adapters: ",
            "vLLM 0.26, 256 adapters: 1,338",
            "Loraplex, rank 64: ",
            "all adapters fit, 2,000 adapters: ",
            "<td>cold-256</td>",
            "platform_cpu",
        ),
        files={},
    ),
    "03_replay_and_replan": Shown(
        pictures=5,
        words=("<td>in force</td>", "<td>before</td>", "<td>after</td>", "<td>after, predicted</td>", "code tp1"),
        files={"plan.yaml": 100},
    ),
    "04_train_and_serve": Shown(
        pictures=2,
        words=("<th>my-pirate</th>", "What is the capital of Italy?"),
        files={".loraplex/trained/pirate/adapter_model.safetensors": 100_000},
    ),
}
START_RAY = {"03_replay_and_replan", "04_train_and_serve"}
RUNS = [pytest.param(path, marks=pytest.mark.ray if path.stem in START_RAY else (), id=path.stem) for path in NOTEBOOKS]


def _read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_notebooks_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(SHOWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_hold_no_logic_and_no_outputs(path: Path) -> None:
    notebook = _read(path)
    nbformat.validate(notebook)
    for cell in _code(notebook):
        assert not cell.outputs
        assert cell.execution_count is None
        found = [type(node).__name__ for node in ast.walk(ast.parse(cell.source)) if isinstance(node, LOGIC)]
        assert not found, cell.source


def _processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder):
                found.append(process)
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", RUNS)
def test_they_run_and_show_pictures(path: Path, tmp_path: Path) -> None:
    """And end what they started. The long time limit is for a first run, which compiles the simulator."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in READ:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = copy.deepcopy(_read(path))
    NotebookClient(notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    shown = [output.data for cell in _code(notebook) for output in cell.outputs if "data" in output]
    pictures = [data["image/svg+xml"] for data in shown if "image/svg+xml" in data]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    expected = SHOWN[path.stem]
    assert len(pictures) >= expected.pictures
    assert all("<svg" in picture for picture in pictures)
    assert any("<table" in page for page in pages)
    for words in expected.words:
        assert any(words in one for one in (*pictures, *pages)), words
    for name, num_bytes in expected.files.items():
        assert (folder / name).stat().st_size >= num_bytes
    # Ray's own agents notice later than it that it has ended.
    _, alive = psutil.wait_procs(_processes_in(folder), timeout=30)
    assert not alive
