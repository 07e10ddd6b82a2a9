"""The parts of a group, each alone: shards, step messages, the pulse of the ranks, connections."""

import threading
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig, Conflict
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.model import LORA_MODULES
from loraplex.core.plan import Shape
from loraplex.core.request import SamplingParams
from loraplex.core.step import Row, RowStart, StepPlan
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.model_runner.random_models import random_spec
from loraplex.model_runner.ranks.channel import RankListener, connect, shut_down
from loraplex.model_runner.ranks.message_cost import measure_message_cost
from loraplex.model_runner.ranks.pulse import Pulse
from loraplex.model_runner.ranks.step_codec import StepDecoder, StepEncoder
from loraplex.model_runner.shard import plan_shards

BASE = BaseModelId("base")
SPEC = random_spec("tiny-llama", BASE)
ADAPTERS = {Digest("a"): 0, Digest("b"): 7}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_hold_every_feature_once_but_for_shared_kv_heads(tp: int) -> None:
    spec = replace(SPEC, num_heads=8, num_kv_heads=4, vocab_size=13)
    shards = plan_shards(spec, Shape(tp=tp, pp=2), (1, 1))
    assert [shard.rank for shard in shards] == list(range(2 * tp))
    for stage in (shards[:tp], shards[tp:]):
        for module in LORA_MODULES:
            inputs, outputs = spec.projection_shape(module)
            held_in = [feature for shard in stage for feature in range(inputs)[shard.inputs(module)]]
            held_out = [feature for shard in stage for feature in range(outputs)[shard.outputs(module)]]
            whole_in, whole_out = list(range(inputs)), list(range(outputs))
            if module in ("o_proj", "down_proj"):
                assert (held_in, held_out) == (whole_in, whole_out * tp)
            else:
                copies = tp // 4 if module in ("k_proj", "v_proj") and tp > 4 else 1
                heads = [whole_out[start : start + spec.head_dim] for start in range(0, outputs, spec.head_dim)]
                if copies > 1:
                    whole_out = [feature for head in heads for _ in range(copies) for feature in head]
                assert (held_in, held_out) == (whole_in * tp, whole_out)
            for shard in stage:
                local_in, local_out = shard.local.projection_shape(module)
                assert len(range(inputs)[shard.inputs(module)]) == local_in
                assert len(range(outputs)[shard.outputs(module)]) == local_out
        vocabulary = [token for shard in stage for token in range(13)[shard.vocabulary]]
        assert vocabulary == list(range(13))
    assert [shard.first_layer for shard in shards] == [0] * tp + [1] * tp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3}, "4 heads do not divide by 3"),
        ({"tp": 8}, "4 heads do not divide by 8"),
        ({"pp": 3}, "2 layers are too few"),
        ({"pp": 2, "stage_layers": (1, 2)}, r"stages of 1 \+ 2 layers are not 2 stages of 2 layers"),
        ({"pp": 2, "stage_layers": (2, 0)}, r"stages of 2 \+ 0 layers are not 2 stages of 2 layers"),
    ],
)
def test_a_shape_that_the_model_cannot_take_is_refused_in_one_line(options: dict[str, int], message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        build_executor(ExecutorConfig(num_pages=8, **options), model="random:tiny-llama", base_model_id=BASE)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message


@st.composite
def plan_sequences(draw: st.DrawFn) -> list[StepPlan]:
    """Slots start, grow their page tables, and start again; every row lists all its pages."""
    plans = []
    tables: dict[int, list[int]] = {}
    for step_id in range(1, draw(st.integers(1, 6)) + 1):
        slots = draw(st.lists(st.integers(0, 5), unique=True, max_size=5))
        starts, rows = [], []
        for slot in slots:
            if slot not in tables or draw(st.booleans()):
                tables[slot] = []
                starts.append(
                    RowStart(
                        slot=slot,
                        sampling=SamplingParams(max_tokens=3, seed=2**62, logit_bias=((3, 0.5),), num_logprobs=2),
                        token_ids=tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=4))),
                        num_prompt_tokens=1,
                    )
                )
            tables[slot] += draw(st.lists(st.integers(0, 2**31 - 1), max_size=4))
            rows.append(
                Row(
                    slot=slot,
                    token_ids=tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))),
                    start=draw(st.integers(0, 2**20)),
                    pages=list(tables[slot]),
                    adapter=draw(st.sampled_from([None, *ADAPTERS])),
                    samples=draw(st.booleans()),
                )
            )
        releases = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        plans.append(StepPlan(step_id=step_id, releases=releases, starts=tuple(starts), rows=tuple(rows)))
    return plans


@given(plans=plan_sequences())
def test_a_step_message_is_the_plan(plans: list[StepPlan]) -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    for digest, number in ADAPTERS.items():
        decoder.name_adapter(number, digest)
    for plan in plans:
        assert decoder.decode(encoder.encode(plan, ADAPTERS)) == plan


def test_an_adapter_that_is_not_loaded_changes_nothing() -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    row = Row(slot=0, token_ids=(1,), start=0, pages=[4, 5], adapter=Digest("gone"), samples=True)
    with pytest.raises(Conflict, match="gone is not loaded"):
        encoder.encode(StepPlan(step_id=1, releases=(), starts=(), rows=(row,)), ADAPTERS)
    plan = StepPlan(
        step_id=1,
        releases=(),
        starts=(),
        rows=(Row(slot=0, token_ids=(1,), start=0, pages=[4, 5], adapter=None, samples=True),),
    )
    assert decoder.decode(encoder.encode(plan, ADAPTERS)) == plan


def test_a_silent_rank_and_a_stalled_step_are_trouble_and_an_idle_group_is_not() -> None:
    pulse = Pulse(2, timeout_s=8.0, now_s=0.0)
    for now_s in range(1, 20):
        pulse.beat(0, 5, now_s)
        pulse.beat(1, 5, now_s)
        assert pulse.trouble(now_s, busy_since_s=None) is None
    assert pulse.trouble(19.0, busy_since_s=11.5) is None
    assert pulse.trouble(20.0, busy_since_s=11.5) == "a step has made no progress for 8.5 s"
    pulse.beat(1, 6, 20.0)
    assert pulse.trouble(20.0, busy_since_s=11.5) is None, "one rank got on"
    pulse.beat(0, 5, 28.0)
    assert pulse.trouble(28.5, busy_since_s=None) == "rank 1 has been silent for 8.5 s"


def _connect_beside(listener: RankListener, key: bytes) -> tuple[Connection, Connection]:
    """Both ends of a new connection."""
    accepted: list[Connection | None] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(5)))
    thread.start()
    try:
        client = connect(listener.address, key)
    finally:
        thread.join()
    (server,) = accepted
    assert server is not None
    return client, server


def test_a_stranger_is_refused_and_a_reader_can_be_cut_off() -> None:
    listener = RankListener("127.0.0.1")
    with pytest.raises(AuthenticationError):
        _connect_beside(listener, b"another key")
    client, server = _connect_beside(listener, listener.key)
    client.send_bytes(b"x" * 100_000)
    assert server.recv_bytes() == b"x" * 100_000
    ended = threading.Event()

    def read() -> None:
        with pytest.raises((EOFError, OSError)):
            server.recv_bytes()
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    shut_down(server)
    reader.join(5)
    assert ended.is_set()
    assert listener.accept(0.05) is None
    for end in (client, server, listener):
        end.close()


def test_message_cost_is_measured_over_real_connections() -> None:
    cost = measure_message_cost(num_ranks=2, num_rows=8, num_steps=20)
    assert (cost.ranks, cost.rows, cost.adapters) == (2, 8, 8)
    assert 0 < cost.encode_us + cost.send_us < cost.round_trip_us
    assert cost.step_bytes < 8 * 64, "page tables were sent again"
