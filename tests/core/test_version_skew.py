"""Neighbouring versions: what an older peer sends decodes, what a newer one adds is ignored, and what cannot be
understood is refused in one line."""

import typing
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any

import msgspec
import pytest
from loraplex.core.control import ControlPlane, ControlSnapshot, QuotaShare, ReplicaRoute, TenantDemand
from loraplex.core.control_wire import (
    CONTROL_VERSION,
    control_methods,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from loraplex.core.errors import Conflict, InvalidInput
from loraplex.core.ids import BaseModelId, GatewayId, ReplicaId, RequestId, TenantName
from loraplex.core.plan import AdapterShare, Shape
from loraplex.core.wire import (
    GatewayFrame,
    Hello,
    LoadReport,
    ReplicaFrame,
    ReplicaInfo,
    decode_gateway_frame,
    decode_replica_frame,
    encode,
)
from loraplex.gateway.proto import loraplex_v1_pb2 as pb

pack = msgspec.msgpack.encode


def newer(kind: type[Any]) -> type[Any]:
    """The dataclass with a field that this version does not know, before all others."""
    return make_dataclass(
        kind.__name__,
        [("of_the_future", dict[str, int], field(default_factory=lambda: {"x": 1}))]
        + [(one.name, one.type, field(default=None)) for one in fields(kind)],
        kw_only=True,
    )


def values(one: Any) -> dict[str, Any]:
    return {name.name: getattr(one, name.name) for name in fields(one)}


ROUTE = ReplicaRoute(
    replica_id=ReplicaId("a-1"),
    base_model_id=BaseModelId("a"),
    address="h:1",
    group="g",
    shape=Shape(tp=2),
    adapters=(AdapterShare(tenant="acme", name="x"),),
    draining=True,
)
SNAPSHOT = ControlSnapshot(
    epoch=3, version=4, tenants=(), keys=(), adapters=(), base_models=(), routes=(ROUTE,), cluster_secret="s"
)
OPTIONAL = {
    ReplicaInfo: ("max_running", "max_step_tokens", "heartbeat_s", "protocol_version"),
    LoadReport: tuple(one.name for one in fields(LoadReport)),
    ReplicaRoute: ("group", "shape", "gpu", "adapters", "draining"),
}


def without(one: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values(one).items() if name not in names}


def test_frames_of_an_older_replica_get_defaults() -> None:
    info = ReplicaInfo(
        replica_id=ReplicaId("r"), base_model_id=BaseModelId("b"), max_context_tokens=9, num_pages=8, page_size=16
    )
    old = pack({"replica": without(info, OPTIONAL[ReplicaInfo]), "load": {}})
    assert decode_replica_frame(old) == ReplicaFrame(replica=info, load=LoadReport())


def test_fields_of_a_newer_peer_are_ignored_wherever_they_stand() -> None:
    load = LoadReport(credits=3, steps=7)
    future = newer(ReplicaFrame)(load=newer(LoadReport)(**values(load)), outputs=())
    assert decode_replica_frame(pack(future)) == ReplicaFrame(load=load)
    hello = Hello(gateway_id=GatewayId("g"))
    future = newer(GatewayFrame)(hello=newer(Hello)(**values(hello)), submits=(), aborts=(RequestId("r"),))
    assert decode_gateway_frame(pack(future)) == GatewayFrame(hello=hello, aborts=(RequestId("r"),))
    assert decode_gateway_frame(encode(GatewayFrame(hello=hello))) == GatewayFrame(hello=hello)


def test_a_snapshot_of_an_older_or_newer_controller_is_understood() -> None:
    old = values(SNAPSHOT) | {"routes": [without(ROUTE, OPTIONAL[ReplicaRoute])]}
    (route,) = decode_answer("snapshot", pack(old)).routes
    assert route == ReplicaRoute(replica_id=ROUTE.replica_id, base_model_id=ROUTE.base_model_id, address="h:1")
    future = newer(ControlSnapshot)(**values(SNAPSHOT) | {"routes": (newer(ReplicaRoute)(**values(ROUTE)),)})
    assert decode_answer("snapshot", pack(future)) == SNAPSHOT
    assert decode_answer("snapshot", encode_answer(SNAPSHOT)) == SNAPSHOT
    assert decode_answer("snapshot", encode_answer(None)) is None


def test_arguments_that_a_controller_does_not_know_are_ignored() -> None:
    demand = TenantDemand(tenant=TenantName("acme"), requests=1, tokens=2, running=3)
    share = QuotaShare(tenant=TenantName("acme"), share=0.5)
    request = encode_request("lease_quota", GatewayId("g"), (demand,), held=(share,))
    expected = ("lease_quota", {"gateway_id": "g", "demand": (demand,), "held": (share,)})
    assert decode_request(request) == expected
    newer_call = msgspec.msgpack.decode(request)
    newer_call["arguments"]["urgency"] = {"of": "the future"}
    newer_call["trace"] = "x"
    assert decode_request(pack(newer_call)) == expected


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"version": CONTROL_VERSION + 1}, Conflict, f"speaks control version {CONTROL_VERSION}, the caller"),
        ({"method": "drop_everything"}, InvalidInput, "no method 'drop_everything'"),
        ({"method": "__init__"}, InvalidInput, "no method"),
        ({"arguments": {}}, InvalidInput, "missing a required argument"),
        ({"arguments": {"tenant": 7}}, InvalidInput, "Expected `str`"),
        ({"version": "one"}, InvalidInput, "not a call"),
    ],
)
def test_what_cannot_be_understood_is_refused_in_one_line(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    request = msgspec.msgpack.decode(encode_request("usage", TenantName("acme"))) | change
    with pytest.raises(error, match=said) as refused:
        decode_request(pack(request))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", control_methods())
def test_every_call_of_the_control_plane_travels(method: str) -> None:
    hints = typing.get_type_hints(getattr(ControlPlane, method), include_extras=True)
    for hint in hints.values():
        msgspec.msgpack.Decoder(hint)
    assert len(control_methods()) > 20


def test_new_fields_of_what_travels_have_defaults() -> None:
    """Of what an older peer may send without them: all that came after the first version."""
    for kind, names in OPTIONAL.items():
        assert is_dataclass(kind)
        required = {one.name for one in msgspec.inspect.type_info(kind).fields if one.required}  # type: ignore[attr-defined]
        assert not required & set(names)


def test_grpc_requests_of_a_newer_client_are_understood() -> None:
    field_900_varint, field_901_string = b"\xa0\x38\x07", b"\xaa\x38\x02ok"
    sent = pb.GenerateRequest(model="m").SerializeToString() + field_900_varint + field_901_string
    parsed = pb.GenerateRequest.FromString(sent)
    assert parsed.model == "m"
    assert pb.GenerateRequest.FromString(b"") == pb.GenerateRequest()
