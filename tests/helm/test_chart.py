"""The chart over all value sets of ``ci/``: lint, render, and what Kubernetes, KubeRay, Serve and the platform say of
what comes out."""

import copy
import json
import runpy
from typing import Any

import helm_python
import pytest
import yaml
from loraplex.config.platform import parse_platform_config
from loraplex.telemetry.alerts import ALERTS
from loraplex.telemetry.dashboards import DASHBOARDS
from loraplex_deployments.gateway_app import APP_NAME, GRPC_SERVICERS
from loraplex_deployments.proxy import proxy_variables
from ray.serve.schema import ServeDeploySchema

from tests.helm.rendered import (
    CHART,
    NAME,
    VALUES,
    ci_values,
    notes,
    of_kind,
    platform_text,
    pod_templates,
    ray_service,
    render,
    serve_config,
    templates,
)
from tests.helm.schemas import errors

ALL = [path.name.removesuffix("-values.yaml") for path in VALUES]
assert ALL == ["cpu", "full", "minimal"]
_ERROR = 3
"""Severity of Helm's linter."""


def test_the_schema_is_that_of_the_platforms_config() -> None:
    generator = runpy.run_path(str(CHART.parent / "make_schema.py"))
    assert (CHART / "values.schema.json").read_text() == generator["values_schema"](), (
        "run `python helm/make_schema.py`"
    )


@pytest.mark.parametrize("name", ALL)
def test_lint_finds_nothing(name: str) -> None:
    report = helm_python.lint(CHART, ci_values(name), strict=True)
    assert not report["errors"]
    assert not [message for message in report["messages"] if message["severity"] >= _ERROR]


@pytest.mark.parametrize("name", ALL)
def test_every_manifest_is_valid(name: str) -> None:
    manifests = render(ci_values(name))
    assert [error for manifest in manifests for error in errors(manifest)] == []
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(set(names)) == len(names)


def test_the_full_set_renders_every_template() -> None:
    texts = templates(ci_values("full"))
    assert {name.rsplit("/", 1)[1] for name in texts} == {path.name for path in CHART.glob("templates/*.yaml")}
    empty = [name for name, text in texts.items() if not any(yaml.safe_load_all(text))]
    assert empty == ["loraplex/templates/storage.yaml"], "an existing claim is named"


def test_validation_finds_what_is_wrong() -> None:
    (service,) = [m for m in render(ci_values("full")) if m["kind"] == "RayService"]
    for path, value, message in (
        (("spec", "upgradeStrategi"), {}, "upgradeStrategi"),
        (("spec", "rayClusterConfig", "enableInTreeAutoscaling"), "yes", "boolean"),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "secret", "secret"),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "hostNetworking"), True, "hostNetworking"),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "volumes"), [{"nam": "x"}], "nam"),
    ):
        broken = copy.deepcopy(service)
        place = broken
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert any(message in error for error in errors(broken)), path


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "gatways"),
        (("image",), "tag"),
        (("secrets", "adminKey"), "value"),
        (("storage", "data"), "claim"),
        (("workerGroups", 0), "gpus"),
        (("autoscaling",), "enable"),
        (("platform",), "base_model"),
        (("platform",), "data_dir"),
        (("platform", "base_models", 0), "replica"),
        (("platform", "base_models", 0, "executor"), "dtyp"),
        (("platform", "traces"), "url"),
        (("platform", "controller", "fleet"), "autoscale"),
    ],
)
def test_an_unknown_key_fails_by_its_name(path: tuple[str | int, ...], key: str) -> None:
    values: Any = ci_values("full")
    place = values
    for step in path:
        place = place[step] if isinstance(step, int) else place.setdefault(step, {})
    place[key] = {}
    with pytest.raises(helm_python.HelmError, match=f"'{key}'"):
        render(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"secrets": {}}, "adminKey"),
        ({"gcsFaultTolerance": {"enabled": True, "redisAddress": ""}}, "redisAddress"),
        ({"gateways": {"replicas": 0}}, "minimum"),
    ],
)
def test_values_that_cannot_work_fail(change: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=message):
        render(ci_values("minimal") | change)


def test_worker_groups_that_cannot_be_fail() -> None:
    (group,) = ci_values("minimal")["workerGroups"]
    for groups, message in (
        ([group, group], "two are called h100"),
        ([group | {"replicas": 2}], "h100: replicas lies outside"),
        ([group | {"minReplicas": 2, "maxReplicas": 4}], "h100: replicas lies outside"),
        ([group | {"name": "gateways"}], "name"),
    ):
        with pytest.raises(helm_python.HelmError, match=message):
            render(ci_values("minimal") | {"workerGroups": groups, "autoscaling": {"enabled": True}})


def test_only_who_may_reaches_pods() -> None:
    """Of each policy: (who, ports)."""
    manifests = render(ci_values("full"))
    everything, gateways = (policy["spec"] for policy in of_kind(manifests, "NetworkPolicy"))

    def rules(entries: list[dict[str, Any]], way: str) -> list[tuple[Any, list[Any]]]:
        return [(rule.get(way), [port["port"] for port in rule.get("ports", ())]) for rule in entries]

    own = [{"podSelector": everything["podSelector"]}]
    (mine, all_ports), (operator, operators_ports) = rules(everything["ingress"], "from")
    assert (mine, all_ports) == (own, [])
    assert operator[0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-operator"}
    assert operators_ports == [8265, 52365, 8000]
    (clients, clients_ports), (monitoring, metrics_ports) = rules(gateways["ingress"], "from")
    values = ci_values("full")["networkPolicy"]
    assert (clients, clients_ports) == (values["clients"], ["http", "grpc"])
    assert metrics_ports == ["gateway-metrics"]
    assert monitoring[0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    (container,) = pod_templates(manifests)["gateways"]["spec"]["containers"]
    assert {*clients_ports, *metrics_ports} <= {port["name"] for port in container["ports"]}
    assert everything["policyTypes"] == ["Ingress", "Egress"]
    out = rules(everything["egress"], "to")
    assert [ports for _, ports in out] == [[], [53, 53], [5432, 6379, 443]]
    assert out[0][0] == own


@pytest.mark.parametrize("name", ALL)
def test_serve_and_the_platform_take_the_config(name: str) -> None:
    manifests = render(ci_values(name))
    config = ServeDeploySchema.model_validate(serve_config(manifests))
    assert [app.name for app in config.applications] == ["loraplex-control", APP_NAME]
    assert config.grpc_options.grpc_servicer_functions == list(GRPC_SERVICERS)
    platform = parse_platform_config(platform_text(manifests), source=name)
    assert config.http_options.port == platform.listen.http_port
    assert config.grpc_options.port == platform.listen.grpc_port
    gateways = ray_service(manifests)["rayClusterConfig"]["workerGroupSpecs"][0]
    assert gateways["replicas"] == platform.serve.gateways
    assert json.loads(json.loads(gateways["rayStartParams"]["resources"])) == platform.serve.gateway_resources
    mounted = {
        mount["mountPath"] for mount in pod_templates(manifests)["head"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert {platform.data_dir, str(platform.admin_key_path.parent)} <= mounted


def test_large_numbers_stay_whole() -> None:
    assert (
        parse_platform_config(platform_text(render(ci_values("full"))), source="").traces.max_total_bytes == 100 << 30
    )


@pytest.mark.parametrize("name", ALL)
def test_the_pods_environment_is_that_of_the_proxy(name: str) -> None:
    manifests = render(ci_values(name))
    config = parse_platform_config(platform_text(manifests), source=name)
    wanted = proxy_variables(config)
    for template in pod_templates(manifests).values():
        container = template["spec"]["containers"][0]
        given = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"].startswith("RAY_SERVE_")}
        assert given.keys() == wanted.keys()
        own = {name for name in given if name.endswith(("BINARY_PATH", "NBTHREAD", "MAXCONN"))}
        assert {name: given[name] for name in given.keys() - own} == {name: wanted[name] for name in given.keys() - own}


@pytest.mark.parametrize("name", ALL)
def test_pods_run_without_root_on_a_read_only_file_system(name: str) -> None:
    for group, template in pod_templates(render(ci_values(name))).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        (container,) = spec["containers"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", "/home/loraplex", "/dev/shm", "/var/lib/loraplex"}
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        secrets = [volume for volume in spec["volumes"] if "secret" in volume]
        assert bool(secrets) == (group == "head"), "keys lie on the head alone"


@pytest.mark.parametrize("name", ALL)
def test_no_second_cluster_beside_the_first(name: str) -> None:
    assert ray_service(render(ci_values(name)))["upgradeStrategy"] == {"type": "None"}


def test_selectors_meet_the_pods() -> None:
    manifests = render(ci_values("full"))
    labels = [template["metadata"]["labels"] for template in pod_templates(manifests).values()]

    def chosen(selector: dict[str, str]) -> list[str]:
        matching = [entry for entry in labels if selector.items() <= entry.items()]
        return [entry["app.kubernetes.io/component"] for entry in matching]

    services = {service["metadata"]["name"]: service for service in of_kind(manifests, "Service")}
    assert chosen(services[NAME]["spec"]["selector"]) == ["gateway"]
    assert {port["name"] for port in services[NAME]["spec"]["ports"]} == {"http", "grpc"}
    assert chosen(services[f"{NAME}-gateways"]["spec"]["selector"]) == ["gateway"]
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert [name for name, s in services.items() if wanted <= s["metadata"]["labels"].items()] == [f"{NAME}-gateways"]
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert [sorted(set(chosen(b["spec"]["selector"]["matchLabels"]))) for b in budgets] == [
        ["gateway"],
        ["head"],
        ["worker"],
    ]
    everything, gateways = (p["spec"]["podSelector"]["matchLabels"] for p in of_kind(manifests, "NetworkPolicy"))
    assert chosen(everything) == ["head", "gateway", "worker", "worker"]
    assert chosen(gateways) == ["gateway"]


def test_autoscaling_bounds_hold_only_with_the_autoscaler() -> None:
    values = ci_values("full")
    for enabled, wanted in ((True, (1, 4)), (False, (1, 1))):
        values["autoscaling"] = {"enabled": enabled}
        manifests = render(values)
        group = ray_service(manifests)["rayClusterConfig"]["workerGroupSpecs"][1]
        assert (group["minReplicas"], group["maxReplicas"]) == wanted
        fleet = parse_platform_config(platform_text(manifests), source="").controller.fleet
        assert fleet.autoscale == enabled, "what finds no room is the autoscaler's demand"
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {"accelerator_type:H100": 1}


def test_the_state_of_ray_lies_in_the_redis_that_is_named() -> None:
    def options(**values: Any) -> Any:
        given = {"enabled": True, "redisAddress": "redis://redis.data.svc:6379"} | values
        rendered = render(ci_values("minimal") | {"gcsFaultTolerance": given})
        assert not [error for manifest in rendered for error in errors(manifest)]
        return ray_service(rendered)["rayClusterConfig"].get("gcsFaultToleranceOptions")

    redis = {"backend": "redis", "redisAddress": "redis://redis.data.svc:6379"}
    assert options() == redis
    assert options(enabled=False) is None
    username, password = ({"valueFrom": {"secretKeyRef": {"name": "redis", "key": key}}} for key in ("user", "pass"))
    given = {"redisUsername": {"name": "redis", "key": "user"}, "redisPassword": {"name": "redis", "key": "pass"}}
    assert options(**given) == redis | {"redisUsername": username, "redisPassword": password}
    for wrong in ({"redisPassword": "letmein"}, {"externalStorageNamespace": "shared"}, {"redisAddress": ""}):
        with pytest.raises(helm_python.HelmError, match=next(iter(wrong))):
            options(**wrong)


def test_the_notes_name_what_is_there() -> None:
    manifests = render(ci_values("full"))
    text = notes(ci_values("full"))
    for kind, shown in (("RayService", f"get rayservice {NAME}"), ("Service", f"svc/{NAME} 8000:80\n")):
        assert NAME in {manifest["metadata"]["name"] for manifest in of_kind(manifests, kind)}
        assert shown in text
    assert "NO BASE MODEL" not in text
    assert "NO BASE MODEL" in notes(ci_values("full") | {"platform": {"base_models": []}})


def test_dashboards_show_the_release_first() -> None:
    boards = of_kind(render(ci_values("full")), "ConfigMap")
    assert {name for board in boards for name in board["data"]} == {f"{board.name}.json" for board in DASHBOARDS}
    for board in boards:
        ((name, text),) = board["data"].items()
        shown = json.loads(text)
        current = {variable["name"]: variable.get("current", {}) for variable in shown["templating"]["list"]}
        assert current["namespace"]["value"] == "ml"
        assert current["service"]["value"] == f"{NAME}-gateways"
        source = json.loads((CHART / "dashboards" / name).read_text())
        assert shown["panels"] == source["panels"]
        assert board["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_alerts_are_about_the_release_and_its_targets() -> None:
    values = ci_values("full")
    values["prometheusRule"] = {"enabled": True, "errorRatio": 0.125, "ttftSeconds": 7.5, "tpotSeconds": 0.375}
    (rules,) = of_kind(render(values), "PrometheusRule")
    (group,) = rules["spec"]["groups"]
    expressions = {rule["alert"]: rule["expr"] for rule in group["rules"]}
    assert set(expressions) == {alert.name for alert in ALERTS}
    assert not [text for text in expressions.values() if "LORAPLEX" in text]
    for text in expressions.values():
        assert text.count("loraplex_") == text.count(f'namespace="ml", service="{NAME}-gateways"')
    assert expressions["LoraplexErrors"].endswith("> 0.125")
    assert expressions["LoraplexSlowFirstToken"].endswith("> 7.5")
    assert expressions["LoraplexSlowTokens"].endswith("> 0.375")
    assert expressions["LoraplexQueue"].endswith("> 100")
