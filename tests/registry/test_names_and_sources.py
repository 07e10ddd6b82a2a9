"""Adapter names, upload file names, and registration by URL below approved prefixes."""

import os
from pathlib import Path

import pytest
from loraplex.core.errors import (
    BadAdapter,
    BadConfig,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    Unavailable,
)
from loraplex.core.ids import TenantName
from loraplex.registry.config import RegistryConfig
from loraplex.registry.names import check_adapter_name
from loraplex.registry.sources import fetch_adapter, parse_prefixes
from loraplex.registry.staging import StagingArea

from tests.object_storage.s3 import S3Server

FILES = {"adapter_config.json": b"config", "adapter_model.safetensors": b"tensors" * 1000}


@pytest.mark.parametrize("name", ["a", "0", "pirate-v2", "a.b_c-d", "a" * 63])
def test_good_names(name: str) -> None:
    check_adapter_name(name, {"base"})


@pytest.mark.parametrize(
    "name", ["", "../a", "a/b", "A", ".a", "-a", "a" * 64, "a b", "a\0", "a\n", "é", "base", "a@1"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_adapter_name(name, {"base"})
    assert caught.value.param == "name"


def test_staging_takes_two_files_in_pieces_and_forgets_the_past(tmp_path: Path) -> None:
    config = RegistryConfig(max_config_bytes=10, max_adapter_bytes=20)
    (tmp_path / "uploads" / "old").mkdir(parents=True)
    staging = StagingArea(tmp_path / "uploads", config)
    assert list((tmp_path / "uploads").iterdir()) == []
    upload = staging.create()
    assert upload != staging.create()
    for _ in range(2):
        staging.append(upload, "adapter_config.json", b"12345")
    assert (staging.path(upload) / "adapter_config.json").read_bytes() == b"1234512345"
    with pytest.raises(PayloadTooLarge, match=r"adapter_config\.json is larger than the allowed 10"):
        staging.append(upload, "adapter_config.json", b"6")
    for name in ("adapter_model.bin", "x.PT", "optimizer.pkl"):
        with pytest.raises(BadAdapter, match="pickle"):
            staging.append(upload, name, b"x")
    for name in ("../adapter_config.json", "/etc/passwd", "README.md", "", "a" * 500):
        with pytest.raises(InvalidInput, match="unexpected file"):
            staging.append(upload, name, b"x")
    staging.remove(upload)
    staging.remove(upload)
    assert not staging.path(upload).exists()


@pytest.fixture
def approved(tmp_path: Path) -> Path:
    root = tmp_path / "approved"
    for directory in (root / "team" / "one", tmp_path / "secret"):
        directory.mkdir(parents=True)
        for name, data in FILES.items():
            (directory / name).write_bytes(data)
    return root


def _fetch(url: str, prefix: str, tenant: str = "acme") -> dict[str, bytes]:
    got: dict[str, bytes] = {}

    def append(filename: str, piece: bytes) -> None:
        got[filename] = got.get(filename, b"") + piece

    fetch_adapter(url, parse_prefixes((prefix,)), TenantName(tenant), append)
    return got


def test_a_directory_below_the_approved_one(approved: Path) -> None:
    assert _fetch(f"file://{approved}/team/one", f"file://{approved}") == FILES
    assert _fetch(f"file://{approved}/team/one/", f"file://{approved}/team/one/") == FILES


def test_a_tenants_own_directory_is_closed_to_the_others(approved: Path) -> None:
    prefix = f"file://{approved}/{{tenant}}"
    assert _fetch(f"file://{approved}/team/one", prefix, "team") == FILES
    for path in ("team/one", "{tenant}/one", "acme/../team/one"):
        with pytest.raises((PermissionDenied, InvalidInput)):
            _fetch(f"file://{approved}/{path}", prefix, "acme")


@pytest.mark.parametrize(
    "path", ["{root}/../secret", "{root}/./team/one", "{root}/team//one", "{root}/%2e%2e/secret", "{root}/te\\am"]
)
def test_escapes_are_refused_by_form(approved: Path, path: str) -> None:
    with pytest.raises(InvalidInput):
        _fetch("file://" + path.format(root=approved), f"file://{approved}")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "file://{root}2/team",
        "file://other{root}/team/one",
        "s3://bucket/team",
        "http://169.254.169.254/latest",
        "FILE:///etc",
    ],
)
def test_what_is_not_approved_is_denied(approved: Path, url: str) -> None:
    with pytest.raises(PermissionDenied):
        _fetch(url.format(root=approved), f"file://{approved}")


@pytest.mark.parametrize("url", ["", "/etc/passwd", "file://{root}?x=1", "file://{root}#x", "s3://k:s@bucket/x", "//["])
def test_what_is_no_plain_url_is_invalid(approved: Path, url: str) -> None:
    with pytest.raises(InvalidInput):
        _fetch(url.format(root=approved), f"file://{approved}")


def test_symbolic_links_and_pipes_are_not_followed(approved: Path) -> None:
    (approved / "link").symlink_to(approved.parent / "secret")
    with pytest.raises(NotFound):
        _fetch(f"file://{approved}/link", f"file://{approved}")
    inner = approved / "inner"
    inner.mkdir()
    (inner / "adapter_config.json").symlink_to(approved.parent / "secret" / "adapter_config.json")
    with pytest.raises(Unavailable):
        _fetch(f"file://{inner}", f"file://{approved}")
    (inner / "adapter_config.json").unlink()
    os.mkfifo(inner / "adapter_config.json")
    with pytest.raises(NotFound, match=r"no adapter_config\.json"):
        _fetch(f"file://{inner}", f"file://{approved}")


def test_the_approved_directory_itself_may_be_a_link(approved: Path) -> None:
    (approved.parent / "alias").symlink_to(approved)
    assert _fetch(f"file://{approved.parent}/alias/team/one", f"file://{approved.parent}/alias") == FILES


def test_object_storage_with_the_operators_options(s3: S3Server) -> None:
    approved = s3.url("bucket/team")
    for name, content in FILES.items():
        s3.write(f"bucket/team/one/{name}", content)
    assert _fetch("s3://bucket/team/one", approved) == FILES
    with pytest.raises(NotFound, match=r"no adapter_config\.json"):
        _fetch("s3://bucket/team/two", approved)
    with pytest.raises(PermissionDenied):
        _fetch("s3://bucket/teams/one", "s3://bucket/team")
    with pytest.raises(PermissionDenied):
        _fetch("s3://other/team/one", "s3://bucket/team")


@pytest.mark.parametrize("prefix", ["/srv", "file:///", "file://host/srv", "srv", "s3://b/x#y"])
def test_bad_prefixes_are_config_errors(prefix: str) -> None:
    with pytest.raises(BadConfig, match="approved_url_prefixes"):
        parse_prefixes((prefix,))
