"""The gRPC endpoint of a running platform, through Serve's proxy, with a real channel."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from loraplex.demo import JSON
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.gateway.proto import loraplex_v1_pb2_grpc as rpc

from tests.deployments.conftest import Demo

pytestmark = pytest.mark.ray


def request(model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model,
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="What is the capital of France?")]),
        sampling=pb.SamplingOptions(temperature=0, max_tokens=40),
    )


def metadata(demo: Demo, tenant: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {demo.key(tenant)}")]


def test_generate_streams_text_and_ends_with_usage(demo: Demo) -> None:
    with grpc.insecure_channel(demo.grpc) as channel:
        parts = list(rpc.LoraplexStub(channel).Generate(request("pirate"), metadata=metadata(demo, "acme")))
    assert len(parts) > 5
    text = "".join(delta.text for part in parts for delta in part.deltas)
    assert any(word in text for word in ("Arr", "Ahoy", "matey", "Shiver"))
    assert parts[-1].usage.completion_tokens == sum(len(delta.token_ids) for part in parts for delta in part.deltas)


def test_errors_have_canonical_codes(demo: Demo) -> None:
    with grpc.insecure_channel(demo.grpc) as channel:
        stub = rpc.LoraplexStub(channel)
        with pytest.raises(grpc.RpcError) as unknown_key:
            list(stub.Generate(request("pirate"), metadata=[("authorization", "Bearer nope")]))
        assert unknown_key.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as other_tenant:
            list(stub.Generate(request("pirate"), metadata=metadata(demo, "globex")))
        assert other_tenant.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as bad:
            list(stub.Generate(pb.GenerateRequest(model="pirate"), metadata=metadata(demo, "acme")))
        assert bad.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_an_adapter_is_registered_used_and_deleted(demo: Demo) -> None:
    def parts() -> list[pb.RegisterAdapterRequest]:
        chunks = [pb.RegisterAdapterRequest(name="mine")]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            data = (JSON.directory / name).read_bytes()
            chunks += [
                pb.RegisterAdapterRequest(chunk=pb.FileChunk(filename=name, data=data[start : start + 65536]))
                for start in range(0, len(data), 65536)
            ]
        return chunks

    key = metadata(demo, "globex")
    with grpc.insecure_channel(demo.grpc) as channel:
        stub = rpc.LoraplexStub(channel)
        adapter = stub.RegisterAdapter(iter(parts()), metadata=key)
        assert (adapter.name, adapter.version, adapter.current) == ("mine", 1, True)
        assert "mine" in [model.id for model in stub.ListModels(pb.ListModelsRequest(), metadata=key).models]
        text = "".join(delta.text for part in stub.Generate(request("mine"), metadata=key) for delta in part.deltas)
        assert text.startswith("{")
        stub.DeleteAdapter(pb.DeleteAdapterRequest(name="mine"), metadata=key)
        assert "mine" not in [model.id for model in stub.ListModels(pb.ListModelsRequest(), metadata=key).models]


def test_health_and_reflection(demo: Demo) -> None:
    with grpc.insecure_channel(demo.grpc) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="loraplex.v1.Loraplex")
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert "loraplex.v1.Loraplex" in ProtoReflectionDescriptorDatabase(channel).get_services()
