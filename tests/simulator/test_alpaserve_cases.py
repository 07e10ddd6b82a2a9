"""The files of AlpaServe cases: recipes give the recorded arrivals bit for bit; what is wrong is named in one line."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.cli.main import app
from loraplex.core.errors import InvalidInput, LoraplexError, NotFound
from loraplex.simulator.alpaserve import Work
from loraplex.simulator.alpaserve_cases import Case, gamma_arrivals, load_cases
from typer.testing import CliRunner


def _sha256(work: Work) -> str:
    return hashlib.sha256(work.arrival_s.astype("<f8").tobytes() + work.model.astype("<i4").tobytes()).hexdigest()


def test_recipes_regenerate_the_recorded_arrivals_bit_for_bit(cases: dict[str, Case], cases_path: Path) -> None:
    seen = set()
    for source in json.loads(cases_path.read_text())["cases"]:
        case = cases[source["case"]]
        for part, work in (("arrivals_test", case.test_work), ("arrivals_train", case.training_work)):
            recipe = source[part]
            if isinstance(recipe, dict) and recipe["file"] not in seen:
                seen.add(recipe["file"])
                assert _sha256(work()) == recipe["sha256"], recipe["file"]
    assert len(seen) == 16


def test_a_recipe_goes_on_where_its_first_draw_ends_too_early() -> None:
    # cv 20: gaps so uneven that a batch of draws often ends before the duration.
    recipe = {"kind": "gamma", "duration": 5, "cv": 20}
    arrival_s, model = gamma_arrivals([3.0] * 40, recipe, where="here")
    for index in range(40):
        gaps = np.random.RandomState(index).gamma(1 / 400, 400 / 3.0, size=100_000)
        sums = np.cumsum(gaps)
        assert np.array_equal(arrival_s[model == index], sums[sums < 5])


def test_a_case_with_one_recipe_plans_and_is_scored_on_it(cases_path: Path, tmp_path: Path) -> None:
    document = json.loads(cases_path.read_text())
    case = document["cases"][0]
    for key in ("arrivals_test", "arrivals_train", "policies"):
        del case[key]
    case["arrivals_recipe"] = {"kind": "gamma", "duration": 20, "cv": 4}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"cases": [case]}))
    (found,) = load_cases(path, database=cases_path.parent / "profiling_database.csv")
    assert found.plans_on_test
    assert found.policies == {}
    assert _sha256(found.test_work()) == _sha256(found.training_work())
    assert found.test_work().arrival_s[-1] < 20


def test_training_and_test_arrivals_are_told_apart(cases: dict[str, Case]) -> None:
    assert cases["bert42_g24_r64_cv4_slo5"].plans_on_test
    honest = cases["azllmconv_x8_m16_g8_slo5_honest"]
    assert not honest.plans_on_test
    assert _sha256(honest.training_work()) != _sha256(honest.test_work())


def _change(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(case: dict[str, Any]) -> None:
        case[key] = value

    return change


def _change_model(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(case: dict[str, Any]) -> None:
        case["models"][0][key] = value

    return change


def _group_of_model(model: object) -> Callable[[dict[str, Any]], None]:
    def change(case: dict[str, Any]) -> None:
        case["policies"]["sr-greedy"]["placement"]["groups"][0]["models"] = [model]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("database", "nowhere"), "case bert42_g24_r64_cv4_slo5: database 'nowhere' is not in"),
        (_change("models", []), "models must be a list"),
        (_change("models", [{"type": "bert-9000", "slo_s": 1.0}]), r"models\[0\].type 'bert-9000' has no profile"),
        (_change_model("slo_s", -1.0), r"models\[0\]: slo_s must be a number above 0"),
        (_change("mem_budget_gib", None), "mem_budget_gib must be a number above 0, not None"),
        (_change("arrivals_test", {"kind": "poisson"}), "arrivals_recipe.kind 'poisson' is not 'gamma'"),
        (_change("arrivals_test", {"kind": "gamma", "cv": 4}), "arrivals_recipe: duration must be a number above 0"),
        (_change("arrivals_test", "arrivals/none.parquet"), "none.parquet do not exist"),
        (_change_model("rate", 0), r"models\[0\].rate must be a number above 0"),
        (_group_of_model(42), r"sr-greedy: groups\[0\] names model 42 of 42"),
        (_group_of_model("x"), r"sr-greedy: groups\[0\] names model 'x' of 42"),
    ],
)
def test_a_wrong_case_is_named(
    cases_path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    case = json.loads(cases_path.read_text())["cases"][0]
    change(case)
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"cases": [case]}))
    with pytest.raises(LoraplexError, match=message):
        [found.test_work() for found in load_cases(path, database=cases_path.parent / "profiling_database.csv")]


@pytest.mark.parametrize(
    ("times", "models", "message"),
    [
        ([0.0, 2.0, 1.0], [0, 0, 0], r"row 2: t 1.0 is negative, not finite or before the row above"),
        ([-1.0, 2.0, 3.0], [0, 0, 0], r"row 0: t -1.0"),
        ([0.0, float("nan"), 3.0], [0, 0, 0], r"row 1: t nan"),
        ([0.0, 1.0, 2.0], [0, 1, 42], r"row 2: no such model \(model 42 of 42\)"),
        ([], [], "has no rows"),
    ],
)
def test_wrong_arrivals_are_named_by_row(
    cases_path: Path, tmp_path: Path, times: list[float], models: list[int], message: str
) -> None:
    case = json.loads(cases_path.read_text())["cases"][0]
    case["arrivals_test"] = "bad.parquet"
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [case]}))
    columns = {"t": pa.array(times, pa.float64()), "model": pa.array(models, pa.int16())}
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    (found,) = load_cases(tmp_path / "cases.json", database=cases_path.parent / "profiling_database.csv")
    with pytest.raises(InvalidInput, match=message):
        found.test_work()


def test_missing_files_are_named(cases_path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.json"):
        list(load_cases(tmp_path / "none.json"))
    with pytest.raises(NotFound, match=r"none\.csv"):
        list(load_cases(cases_path, database=tmp_path / "none.csv"))
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(InvalidInput, match="is not JSON"):
        list(load_cases(tmp_path / "text.json"))


def test_the_command_prints_every_recorded_placement(cases_path: Path, cases: dict[str, Case]) -> None:
    result = CliRunner().invoke(app, ["simulate-alpaserve", "--cases", str(cases_path), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)["cases"]
    assert {name: set(policies) for name, policies in printed.items()} == {
        case.name: set(case.policies) for case in cases.values()
    }
    assert printed["early13b_m8_g8_r20"]["mp-ilp"] == {
        "goodput": cases["early13b_m8_g8_r20"].policies["mp-ilp"].goodput
    }
    assert "114 of 114 recorded goodputs reproduced exactly, largest difference 0.0" in result.stderr
