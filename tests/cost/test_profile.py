"""Profile files: reading, naming what is wrong, and what simulator and planner ask of them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.analytic import analytic_profile
from loraplex.cost.ceilings import ceilings_of
from loraplex.cost.loads import Tier
from loraplex.cost.profile import CostProfile
from loraplex.cost.step_cost import StepComposition

H100 = "h100-80gb"


@pytest.fixture
def profile(llama_8b: ModelSpec) -> CostProfile:
    return analytic_profile([llama_8b], ceilings_of(H100), [Shape(), Shape(tp=2)])


def test_files_round_trip(profile: CostProfile, tmp_path: Path) -> None:
    as_json, as_yaml = tmp_path / "p.json", tmp_path / "p.yaml"
    as_json.write_bytes(profile.to_json())
    as_yaml.write_bytes(msgspec.yaml.encode(profile))
    assert CostProfile.load(as_json) == CostProfile.load(str(as_yaml)) == profile


_MISSING = object()


def _broken(profile: CostProfile, path: str, value: object) -> bytes:
    data: Any = json.loads(profile.to_json())
    *parents, last = (int(word) if word.isdecimal() else word for word in path.split("."))
    place = data
    for key in parents:
        place = place[key]
    if value is _MISSING:
        del place[last]
    else:
        place[last] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, r"format"),
        ("steps.1.cost.interval.row_s", -1e-6, r"p\.json: steps\[1\]\.cost\.interval\.row_s: "),
        ("steps.1.cost.latency.token_knots", [0, 1], r"p\.json: steps\[1\]\.cost\.latency\.token_knots: "),
        ("steps.1.cost.interval.row_ms", 1, r"`row_ms` - at `\$\.steps\[1\]\.cost\.interval`"),
        ("steps.1.gpu", "h101", r"p\.json: steps\[1\]\.gpu: 'h101'"),
        ("steps.1.base", "gpt", r"p\.json: steps\[1\]\.base: 'gpt'"),
        ("steps.1.shape", {"tp": 0, "pp": 1}, r"p\.json: steps\[1\]\.shape: "),
        ("steps.1.shape", {"tp": 1, "pp": 1}, r"p\.json: steps\[1\]: .* comes twice"),
        ("gpus.0.loads.host.bytes_per_s", 0, r"host\.bytes_per_s"),
        ("bases", _MISSING, r"bases"),
        ("bases.0.model.num_layers", "many", r"num_layers"),
    ],
)
def test_one_line_says_what_is_wrong(
    profile: CostProfile, tmp_path: Path, key: str, value: object, message: str
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(_broken(profile, key, value))
    with pytest.raises(BadConfig, match=message) as caught:
        CostProfile.load(path)
    assert "\n" not in caught.value.message
    assert "p.json" in caught.value.message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        CostProfile.load(tmp_path / "absent.json")
    with pytest.raises(BadConfig, match=r"'h100' is not known \(known: h100-80gb"):
        CostProfile.load("h100")
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(BadConfig, match=r"p\.yaml: not a cost profile"):
        CostProfile.load(tmp_path / "p.yaml")


def test_what_is_not_known(profile: CostProfile) -> None:
    with pytest.raises(BadConfig, match=r"shape \(4, 1\) \(known: \(1, 1\), \(2, 1\)\)"):
        profile.step_cost("llama3-8b", H100, Shape(tp=4))
    with pytest.raises(BadConfig, match=r"no base 'x' \(known: llama3-8b\)"):
        profile.step_cost("x", H100, Shape())
    with pytest.raises(BadConfig, match=r"no GPU 'x' \(known: h100-80gb\)"):
        profile.memory("llama3-8b", "x", Shape())


def test_joined_and_renamed(profile: CostProfile, llama_8b: ModelSpec) -> None:
    other = analytic_profile([llama_8b], ceilings_of("h100-pcie"), [Shape()])
    both = CostProfile.joined([profile, other])
    assert both.shapes("llama3-8b", "h100-pcie") == (Shape(),)
    assert both.shapes("llama3-8b", H100) == (Shape(), Shape(tp=2))
    assert CostProfile.joined([both, profile]).steps == both.steps
    mine = both.renamed("llama3-8b", BaseModelId("chat"))
    assert mine.step_cost("chat", H100, Shape()) == profile.step_cost("llama3-8b", H100, Shape())
    assert mine.base("chat").model.hidden_size == 4096
    with pytest.raises(BadConfig, match="no base 'llama3-8b'"):
        mine.base("llama3-8b")


def test_load_times_add_up(profile: CostProfile) -> None:
    num_bytes = profile.adapter_bytes("llama3-8b", 16)
    assert num_bytes == 83_886_080
    host, disk, store = (profile.load_time(H100, num_bytes, tier) for tier in (Tier.HOST, Tier.DISK, Tier.STORE))
    assert host == pytest.approx(num_bytes / 54e9 + 1e-4)
    assert disk == pytest.approx(host + num_bytes / 2e9 + 0.005)
    assert store == pytest.approx(disk + num_bytes / 1e9 + 0.03)
    halved = profile.load_time(H100, num_bytes, shape=Shape(tp=2))
    assert halved == pytest.approx(num_bytes / 2 / 54e9 + 1e-4)


def test_shipped_profile_answers_the_planner() -> None:
    shipped = CostProfile.load(H100)
    for base, shape, fits in (
        ("llama3-8b", Shape(), True),
        ("llama3-70b", Shape(), False),
        ("llama3-70b", Shape(tp=2), True),
        ("llama3-70b", Shape(pp=4), True),
    ):
        assert shipped.memory(base, H100, shape).fits is fits
        assert shipped.step_cost(base, H100, shape).latency_s(StepComposition.of(decode_rows=1, kv_tokens=100))[0] > 0
