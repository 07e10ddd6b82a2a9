"""The Dockerfile: hadolint finds nothing, and what it copies, installs and runs as fits repository and chart."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.helm.rendered import ROOT, ci_values, pod_templates, render

TEXT = (ROOT / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).parent / "hadolint"


def stages() -> dict[str, str]:
    """Instructions of each stage by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_hadolint_finds_nothing() -> None:
    assert HADOLINT.exists(), "hadolint is missing: pip install --constraint requirements.lock --editable '.[dev]'"
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_both_targets_run_as_the_charts_user_with_a_health_check() -> None:
    template = pod_templates(render(ci_values("minimal")))["head"]["spec"]
    user = template["securityContext"]["runAsUser"]
    for target in ("cpu", "cuda"):
        assert f"USER {user}:{user}\n" in stages()[target]
        assert "HEALTHCHECK" in stages()[target]
    homes = {entry["name"]: entry["value"] for entry in template["containers"][0]["env"]}
    assert f"HOME={homes['HOME']} " in stages()["base"]
    assert homes["RAY_SERVE_HAPROXY_BINARY_PATH"] == "/opt/loraplex/bin/loraplex-haproxy"
    assert "PATH=/opt/loraplex/bin:$PATH" in stages()["base"]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {package.split("/")[0] for package in packages["packages"]} <= copied


def test_everything_is_pinned() -> None:
    assert re.search(r"^ARG PYTHON_IMAGE=\S+:3\.11\.\d+-slim-\w+$", TEXT, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)) == {"${PYTHON_IMAGE}", "base", "packages"}
    # pip's constraint holds for the build's requirements as well; torch, a range in the lock, is named.
    for stage in ("wheel", "packages"):
        assert re.search(r"PIP_CONSTRAINT=\S+/requirements\.lock", stages()[stage])
    assert set(re.findall(r'"torch==\$\{TORCH\}(?:\+cpu)?"', TEXT)) == {'"torch==${TORCH}+cpu"', '"torch==${TORCH}"'}
    assert len(set(re.findall(r"^ARG TORCH=(\S+)$", TEXT, re.MULTILINE))) == 1
