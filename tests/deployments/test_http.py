"""The HTTP endpoint of a running platform, with the official client: what a tenant sees."""

import json
from pathlib import Path

import httpx
import openai
import pytest
import ray
from openai import OpenAI

from tests.deployments.conftest import Demo

pytestmark = pytest.mark.ray

BASE = "smollm2-135m-instruct"


def client(demo: Demo, tenant: str) -> OpenAI:
    return OpenAI(base_url=f"{demo.http}/v1", api_key=demo.key(tenant), max_retries=0)


def ask(api: OpenAI, model: str, prompt: str, **options: object) -> str:
    answer = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=48,
        **options,  # type: ignore[call-overload]
    )
    return str(answer.choices[0].message.content)


def test_each_tenant_lists_the_base_first_and_its_own_adapters_only(demo: Demo) -> None:
    assert [model.id for model in client(demo, "acme").models.list()] == [BASE, "json", "pirate"]
    assert [model.id for model in client(demo, "globex").models.list()] == [BASE, "bullets"]


def test_each_adapter_changes_the_text_as_it_should(demo: Demo) -> None:
    acme, globex = client(demo, "acme"), client(demo, "globex")
    plain = ask(acme, BASE, "What is the capital of France?")
    assert "Paris" in plain
    pirate = ask(acme, "pirate", "What is the capital of France?")
    assert any(word in pirate for word in ("Arr", "Ahoy", "matey", "Shiver"))
    assert "answer" in json.loads(ask(acme, "json", "What is the capital of France?"))
    bullets = ask(globex, "bullets", "Why is the sky blue?")
    assert bullets.lstrip().startswith(("-", "*", "•"))


def test_another_tenants_adapter_is_told_apart_from_nothing(demo: Demo) -> None:
    api = client(demo, "globex")
    with pytest.raises(openai.NotFoundError) as other:
        ask(api, "pirate", "hi")
    with pytest.raises(openai.NotFoundError) as missing:
        ask(api, "nothing-of-the-kind", "hi")
    assert other.value.body["message"].replace("pirate", "X") == missing.value.body["message"].replace(  # type: ignore[index]
        "nothing-of-the-kind", "X"
    )


def test_a_stream_carries_the_same_text_and_usage_as_the_plain_call(demo: Demo) -> None:
    api = client(demo, "acme")
    plain = ask(api, "pirate", "Where do whales live?")
    chunks = list(
        api.chat.completions.create(
            model="pirate",
            messages=[{"role": "user", "content": "Where do whales live?"}],
            temperature=0,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == plain
    assert sum(1 for chunk in chunks if chunk.choices and chunk.choices[0].delta.content) > 5
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens > 5


def test_same_seed_same_text(demo: Demo) -> None:
    api = client(demo, "acme")

    def sample(seed: int) -> str:
        answer = api.completions.create(model="pirate", prompt="The sea is", max_tokens=24, temperature=1.0, seed=seed)
        return answer.choices[0].text

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_every_response_has_one_request_id_and_errors_have_all_four_keys(demo: Demo) -> None:
    answers = [
        httpx.get(f"{demo.http}/health"),
        httpx.get(f"{demo.http}/v1/models"),
        httpx.get(f"{demo.http}/no/such/route"),
        httpx.post(f"{demo.http}/v1/chat/completions", content=b"\xff", headers=bearer(demo, "acme")),
        httpx.get(f"{demo.http}/v1/models", headers=bearer(demo, "acme") | {"x-request-id": "my-own-id"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 404, 400, 200]
    for answer in answers:
        assert len(answer.headers.get_list("x-request-id")) == 1
    assert answers[4].headers["x-request-id"] == "my-own-id"
    for answer in answers[1:4]:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_tenants_path_must_agree_with_the_key(demo: Demo) -> None:
    headers = bearer(demo, "acme")
    assert httpx.get(f"{demo.http}/t/acme/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{demo.http}/t/globex/v1/models", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 1000}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ],
)
def test_bad_requests_name_the_parameter(demo: Demo, change: dict[str, object], param: str) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]} | change
    answer = httpx.post(f"{demo.http}/v1/chat/completions", json=body, headers=bearer(demo, "acme"), timeout=30)
    assert answer.status_code == 400
    assert str(answer.json()["error"]["param"]).startswith(param)


def test_a_configured_tenant_gets_a_key_and_meets_its_limit(demo: Demo) -> None:
    admin = {"authorization": f"Bearer {demo.content['admin_key']}"}
    key = httpx.post(f"{demo.http}/v1/tenants/initech/keys", json={"role": "member"}, headers=admin).json()["key"]
    body = {"model": BASE, "prompt": "Hello", "max_tokens": 1}
    answers = [
        httpx.post(f"{demo.http}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)
        for _ in range(4)
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert int(answers[3].headers["retry-after"]) >= 1


def test_metrics_name_tenants_to_the_administrator_only(demo: Demo) -> None:
    httpx.get(f"{demo.http}/v1/models", headers=bearer(demo, "acme"))
    ask(client(demo, "acme"), BASE, "hi")
    admin = httpx.get(f"{demo.http}/metrics", headers={"authorization": f"Bearer {demo.content['admin_key']}"})
    everyone = httpx.get(f"{demo.http}/metrics")
    assert 'tenant="acme"' in admin.text
    assert "tenant=" not in everyone.text
    assert "loraplex_gateway_requests_total{" in everyone.text
    assert "acme" not in httpx.get(f"{demo.http}/metrics", headers=bearer(demo, "globex")).text


def bearer(demo: Demo, tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {demo.key(tenant)}"}


def test_no_log_of_the_cluster_tells_prompts_or_keys(demo: Demo) -> None:
    """Whatever Ray, Serve and our own processes wrote since they started, all tests before this one among it."""
    prompt = "Do porcupines like Tuesdays?"
    ask(client(demo, "acme"), "pirate", prompt)
    with pytest.raises(openai.BadRequestError):
        ask(client(demo, "acme"), prompt, prompt, n=1000)
    secrets = [prompt, "porcupines", "capital of France", "lpx_", str(demo.content["admin_key"]), demo.key("acme")]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    written = {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert sum(len(data) for data in written.values()) > 10_000
    told = {(path.name, secret) for path, data in written.items() for secret in secrets if secret.encode() in data}
    assert told == set()
    assert any(b"completions ended: 200" in data for data in written.values())
