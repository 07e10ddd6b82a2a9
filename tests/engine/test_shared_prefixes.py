"""What is computed once for all who begin alike, and who waits for it."""

import pytest
from loraplex.core.errors import (
    LoraplexError,
)
from loraplex.testing.steps import run_step

from tests.engine.harness import A, B, Harness, make


def test_equal_prefixes_of_one_tenant_are_computed_once() -> None:
    harness = Harness()
    requests = [harness.add(make("a", prompt=17))]
    harness.run()
    requests.append(harness.add(make("b", prompt=17)))
    requests.append(harness.add(make("c", prompt=(*range(9), 99, 98, 97))))
    requests.append(harness.add(make("d", prompt=16)))
    harness.run()
    cached = {name: outputs[0].num_cached_tokens for name, outputs in harness.outputs.items()}
    # At least one token is computed: of 16 known tokens only the first three pages can be shared.
    assert cached == {"a": 0, "b": 16, "c": 8, "d": 12}
    assert all(output.num_cached_tokens == 0 for output in harness.outputs["b"][1:])
    harness.check(*requests)


def test_generated_tokens_are_found_again_by_the_next_turn() -> None:
    harness = Harness()
    first = harness.add(make("a", prompt=8, max_tokens=9))
    harness.run()
    turn = (*first.prompt_token_ids, *harness.tokens["a"], 5, 6, 7)
    harness.add(make("b", prompt=turn))
    harness.run()
    assert harness.outputs["b"][0].num_cached_tokens == 16


@pytest.mark.parametrize("other", [{"salt": "other"}, {"adapter": A}, {"tenant": "u", "adapter": B}])
def test_nothing_is_shared_across_salts_and_adapters(other: dict[str, str]) -> None:
    harness = Harness()
    harness.stage(A)
    harness.stage(B)
    harness.add(make("a", prompt=17))
    harness.run()
    harness.add(make("b", prompt=17, **other))  # type: ignore[arg-type]
    harness.run()
    assert harness.outputs["b"][0].num_cached_tokens == 0


def test_equal_prompts_that_come_at_once_are_computed_once() -> None:
    world = Harness(max_step_tokens=16, overdue_s=100)
    siblings = [world.add(make(f"s{i}", prompt=40, max_tokens=6)) for i in range(5)]
    other = world.add(make("other", prompt=(100, 101, 102, 103), max_tokens=6))
    world.step(3)
    assert set(world.tokens) == {"s0", "other"}, "who waits for pages holds nobody up"
    world.run()
    world.check(*siblings, other)
    prefilled = sum(len(row.token_ids) for plan in world.plans for row in plan.rows if len(row.token_ids) > 1)
    assert prefilled == 40 + 4 * 4 + 4, "the prompt once, its last page for each sibling, and the other's"


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_when_the_request_that_computes_for_others_ends_they_go_on(end: str) -> None:
    world = Harness(max_step_tokens=16, overdue_s=100)
    first, second, third = (world.add(make(f"s{i}", prompt=40)) for i in range(3))
    world.step()
    assert world.running_rows() == 1
    if end == "abort":
        world.engine.abort(first.request_id)
    else:
        assert world.engine.schedule(world.now_s).plan is not None
        (output,) = world.engine.step_failed(LoraplexError("it broke"))
        assert output.request_id == first.request_id
    world.run()
    world.check(second, third)


def test_nobody_waits_for_equal_pages_longer_than_until_it_is_overdue() -> None:
    world = Harness(max_step_tokens=64, overdue_s=4)
    world.add(make("patient", prompt=40, arrival_s=100.0))
    rows = []
    for index in range(6):
        # One that goes first each time, and is given up in the very step that computes it.
        hasty = world.add(make(f"hasty{index}", prompt=40, arrival_s=float(index)))
        world.now_s += 1.0
        plan = world.engine.schedule(world.now_s).plan
        assert plan is not None
        rows.append(len(plan.rows))
        world.engine.abort(hasty.request_id)
        world.take(world.engine.complete(run_step(world.executor, plan), world.now_s))
    assert rows[:4] == [1, 1, 1, 2]
    world.run()


def test_an_online_request_does_not_wait_for_what_an_offline_one_computes() -> None:
    world = Harness(max_step_tokens=8)
    world.add(make("offline", prompt=40, offline=True))
    world.step()
    world.add(make("online", prompt=40))
    world.step()
    assert world.running_rows() == 1
    assert world.plans[-1].rows[0].start == 8, "it goes on where the other is"


def test_prefix_cache_can_be_off() -> None:
    harness = Harness(prefix_cache=False)
    for name in "ab":
        harness.add(make(name, prompt=17))
        harness.run()
    assert harness.outputs["b"][0].num_cached_tokens == 0
    assert harness.engine.load_report().num_free_pages == 64
