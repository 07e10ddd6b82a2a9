"""Reads AlpaServe cases: models, SLOs, profiles, arrivals (from a file or by recipe) and recorded placements.

Owns the format of ``cases.json`` and of the profiling database beside it. Called by the commands ``simulate-alpaserve``
and ``plan-alpaserve``.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loraplex.core.errors import InvalidInput, NotFound
from loraplex.simulator import alpaserve
from loraplex.simulator.alpaserve import Group, Layout, Profiles, StageProfile, Work

DATABASE_FILE = "profiling_database.csv"
_MAX_REQUESTS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Groups, or several sets of them with the times from which each holds."""

    groups: tuple[tuple[Group, ...], ...]
    start_s: tuple[float, ...] = ()
    """As many as sets of groups; empty: there is one."""

    def goodput(self, work: Work, profiles: Profiles) -> float:
        if self.start_s:
            accepted = alpaserve.simulate_schedule(work, self.start_s, self.groups, profiles)
        else:
            accepted = alpaserve.simulate(work, self.groups[0], profiles)
        return alpaserve.goodput(work, accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPolicy:
    goodput: float | None
    search_wall_s: float | None
    feasible: bool
    """False where the record says that the placement breaks the budget."""
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    num_devices: int
    devices_per_node: int
    memory_gib: float
    """Weight budget of a GPU."""
    model_types: tuple[str, ...]
    model_names: tuple[str, ...]
    slo_s: tuple[float, ...]
    rates: tuple[float, ...]
    """[M] requests per second, as the case gives them; NaN where it does not."""
    profiles: Profiles
    policies: Mapping[str, RecordedPolicy]
    """Empty for a case without recorded results."""
    _source: Mapping[str, Any]
    _folder: Path

    def test_work(self) -> Work:
        """What placements are scored on. Errors as ``training_work``."""
        return self._work("test")

    def training_work(self) -> Work:
        """What a planner may see: the test arrivals, unless the case has its own. NotFound for a missing file,
        InvalidInput for arrivals that are no arrivals of this case's models."""
        return self._work("train")

    @property
    def plans_on_test(self) -> bool:
        return self._arrivals("train") == self._arrivals("test")

    def _arrivals(self, part: str) -> object:
        """A path, or a recipe."""
        for key in (f"arrivals_{part}", f"arrivals_{part}_recipe", "arrivals_recipe"):
            if self._source.get(key) is not None:
                return self._source[key]
        if part == "train":
            return self._arrivals("test")
        raise InvalidInput(f"case {self.name}: neither arrivals_test nor arrivals_recipe is given", param="cases")

    def _work(self, part: str) -> Work:
        where, source = f"case {self.name}", self._arrivals(part)
        if isinstance(source, Mapping):
            arrival_s, model = gamma_arrivals(self.rates, source, where=where)
        elif isinstance(source, str):
            arrival_s, model = _read_arrivals(self._folder / source, len(self.model_types))
        else:
            raise InvalidInput(f"{where}: arrivals are neither a path nor a recipe", param="cases")
        return Work(
            model_types=self.model_types,
            slo_s=np.array(self.slo_s, dtype=np.float64),
            arrival_s=arrival_s,
            model=model,
        )


def load_cases(path: Path, *, database: Path | None = None) -> Iterator[Case]:
    """The cases of ``path``, with the profiles of ``database`` (by default the file beside it). NotFound for a missing
    file, InvalidInput naming the case and key that is wrong."""
    database = database or path.parent / DATABASE_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}", param="cases") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}", param="cases") from error
    cases = document.get("cases") if isinstance(document, Mapping) else None
    if not isinstance(cases, Sequence) or isinstance(cases, str):
        raise InvalidInput(f"{path} has no list 'cases'", param="cases")
    profiles = _read_profiles(database)
    for index, source in enumerate(cases):
        yield _case(source, index, profiles, path.parent, database)


def gamma_arrivals(
    rates: Sequence[float], recipe: Mapping[str, Any], *, where: str
) -> tuple[alpaserve.Seconds, alpaserve.Indices]:
    """([R] seconds, [R] model), merged by time. Model i has its own numpy ``RandomState(i)`` and gaps of Gamma shape
    1 / cv^2 and scale cv^2 / rate, summed up to ``duration``. InvalidInput for another recipe."""
    if recipe.get("kind") != "gamma":
        raise InvalidInput(f"{where}: arrivals_recipe.kind {recipe.get('kind')!r} is not 'gamma'", param="cases")
    duration_s = _positive(recipe, "duration", f"{where}: arrivals_recipe")
    cv = _positive(recipe, "cv", f"{where}: arrivals_recipe")
    times: list[alpaserve.Seconds] = []
    for index, rate in enumerate(rates):
        if not (math.isfinite(rate) and rate > 0):
            raise InvalidInput(f"{where}: models[{index}].rate must be a number above 0", param="cases")
        if rate * duration_s > _MAX_REQUESTS:
            raise InvalidInput(f"{where}: models[{index}].rate x duration exceeds {_MAX_REQUESTS:,}", param="cases")
        random = np.random.RandomState(index)
        batch = int(1.2 * rate * duration_s) + 16
        gaps = random.gamma(1 / cv**2, cv**2 / rate, size=batch)
        sums = np.cumsum(gaps)
        while sums[-1] < duration_s:
            # Summed anew from the first gap, so that each partial sum rounds as in one pass.
            gaps = np.concatenate([gaps, random.gamma(1 / cv**2, cv**2 / rate, size=batch)])
            sums = np.cumsum(gaps)
        times.append(sums[: np.searchsorted(sums, duration_s, side="left")])
    arrival_s = np.concatenate(times)
    model = np.repeat(np.arange(len(times), dtype=np.int32), [len(t) for t in times])
    if not len(arrival_s):
        raise InvalidInput(f"{where}: arrivals_recipe gives no request", param="cases")
    order = np.argsort(arrival_s, kind="stable")
    return arrival_s[order], model[order]


def _case(source: Any, index: int, profiles: Mapping[str, Profiles], folder: Path, database: Path) -> Case:
    name = source.get("case") if isinstance(source, Mapping) else None
    if not isinstance(name, str):
        raise InvalidInput(f"cases[{index}] has no name 'case'", param="cases")
    where = f"case {name}"
    models = source.get("models")
    if not isinstance(models, Sequence) or not models or not all(isinstance(model, Mapping) for model in models):
        raise InvalidInput(f"{where}: models must be a list with one object for each model", param="cases")
    if source.get("database") not in profiles:
        raise InvalidInput(f"{where}: database {source.get('database')!r} is not in {database}", param="cases")
    types = tuple(str(model.get("type")) for model in models)
    found = profiles[source["database"]]
    known = {model_type for model_type, _ in found}
    for position, model_type in enumerate(types):
        if model_type not in known:
            raise InvalidInput(f"{where}: models[{position}].type {model_type!r} has no profile", param="cases")
    policies = {
        policy: RecordedPolicy(
            goodput=recorded.get("goodput"),
            search_wall_s=recorded.get("search_wall_s"),
            feasible=recorded.get("feasible") is not False,
            placement=_placement(recorded.get("placement"), len(models), f"{where}: {policy}"),
        )
        for policy, recorded in (source.get("policies") or {}).items()
    }
    return Case(
        name=name,
        num_devices=int(_positive(source, "num_devices", where)),
        devices_per_node=int(_positive(source, "devices_per_node", where)),
        memory_gib=_positive(source, "mem_budget_gib", where),
        model_types=types,
        model_names=tuple(str(model.get("name", f"m{i}")) for i, model in enumerate(models)),
        slo_s=tuple(_positive(model, "slo_s", f"{where}: models[{i}]") for i, model in enumerate(models)),
        rates=tuple(float(model.get("rate", math.nan)) for model in models),
        profiles=found,
        policies=policies,
        _source=source,
        _folder=folder,
    )


def _placement(source: Any, num_models: int, where: str) -> Placement:
    if not isinstance(source, Mapping):
        raise InvalidInput(f"{where}: placement is missing", param="cases")
    sets = [source] if "groups" in source else source.get("placements", [])
    starts = tuple(source.get("start_times", ()))
    groups = tuple(_groups(one, num_models, where) for one in sets)
    if not groups or len(starts) not in (0, len(groups)) or (not starts and len(groups) > 1):
        raise InvalidInput(f"{where}: placement needs groups, or placements with as many start_times", param="cases")
    return Placement(groups=groups, start_s=starts)


def _groups(source: Mapping[str, Any], num_models: int, where: str) -> tuple[Group, ...]:
    groups = []
    for index, group in enumerate(source["groups"]):
        try:
            layout, models = Layout(int(group["dp"]), int(group["op"]), int(group["pp"])), tuple(group["models"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{where}: groups[{index}] lacks dp, op, pp or models", param="cases") from error
        for model in models:
            if not isinstance(model, int) or not 0 <= model < num_models:
                raise InvalidInput(f"{where}: groups[{index}] names model {model!r} of {num_models}", param="cases")
        groups.append(Group(layout, models))
    return tuple(groups)


def _positive(source: Mapping[str, Any], key: str, where: str) -> float:
    value = source.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise InvalidInput(f"{where}: {key} must be a number above 0, not {value!r}", param="cases")
    return float(value)


def _read_profiles(path: Path) -> dict[str, Profiles]:
    """By database; rows of batch size 1 only."""
    stages: dict[str, dict[tuple[str, Layout], dict[int, tuple[float, float]]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if int(row["batch_size"]) != 1:
                    continue
                layout = Layout(int(row["dp"]), int(row["op"]), int(row["pp"]))
                values = float(row["stage_latency_s"]), float(row["stage_weight_gib_per_gpu"])
                stages.setdefault(row["database"], {}).setdefault((row["model"], layout), {})[int(row["stage"])] = (
                    values
                )
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}", param="profiles") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidInput(f"{path} is not a profiling database: {error!r}", param="profiles") from error
    databases: dict[str, Profiles] = {}
    for database, found in stages.items():
        databases[database] = {
            key: StageProfile(
                latency_s=tuple(of_stage[s][0] for s in sorted(of_stage)),
                weight_gib=tuple(of_stage[s][1] for s in sorted(of_stage)),
            )
            for key, of_stage in found.items()
            if sorted(of_stage) == list(range(key[1].pp))
        }
    return databases


def _read_arrivals(path: Path, num_models: int) -> tuple[alpaserve.Seconds, alpaserve.Indices]:
    try:
        table = pq.read_table(path, columns=["t", "model"])
    except FileNotFoundError as error:
        raise NotFound(f"arrivals {path} do not exist", param="cases") from error
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} is not a Parquet file of arrivals (t, model): {error}", param="cases") from error
    arrival_s = table["t"].to_numpy().astype(np.float64)
    model = table["model"].to_numpy().astype(np.int32)
    if not len(arrival_s):
        raise InvalidInput(f"{path} has no rows", param="cases")
    # NaN fails both comparisons.
    late = ~(np.diff(arrival_s, prepend=0.0) >= 0) | ~np.isfinite(arrival_s)
    wrong = late | (model < 0) | (model >= num_models)
    if wrong.any():
        row = int(np.argmax(wrong))
        what = f"t {arrival_s[row]} is negative, not finite or before the row above" if late[row] else "no such model"
        raise InvalidInput(f"{path} row {row}: {what} (model {model[row]} of {num_models})", param="cases")
    return arrival_s, model
