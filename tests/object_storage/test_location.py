"""URLs: credentials come by reference and are shown nowhere; an endpoint of one's own; clear errors."""

import pyarrow.fs as pafs
import pytest
from loraplex.core.errors import BadConfig
from loraplex.object_storage.location import open_location
from loraplex.object_storage.retry import Retry, read_pieces
from loraplex.registry.config import RegistryConfig
from loraplex.registry.sources import parse_prefixes
from loraplex.traces.config import TraceConfig

from tests.object_storage.s3 import ACCESS_KEY, SECRET_KEY, S3Server


def test_credentials_from_a_file_and_from_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with_file = s3.url("credentials/some")
    s3.write("credentials/some/thing", b"x" * 10)
    bare = with_file.partition("&credentials_file=")[0]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    for url in (with_file, bare, bare.replace("some?", "some/?")):
        filesystem, path = open_location(url, param="it")
        assert path == "credentials/some"
        assert b"".join(read_pieces(filesystem, f"{path}/thing", 4, Retry(total_s=5))) == b"x" * 10


def test_a_section_of_the_file(s3: S3Server) -> None:
    url = s3.url("credentials/x") + "&profile=traces"
    with pytest.raises(BadConfig, match=r"has no 'traces'") as caught:
        open_location(url, param="traces.url")
    s3.credentials_file.write_text(
        s3.credentials_file.read_text()
        + f"[traces]\naws_access_key_id=x\naws_secret_access_key={SECRET_KEY}\naws_session_token=t\n"
    )
    filesystem, _ = open_location(url, param="traces.url")
    assert filesystem.get_file_info("credentials").type == pafs.FileType.Directory
    assert SECRET_KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read credentials_file"),
        (f"{SECRET_KEY}\n", "is no file of AWS credentials"),
        (f"[default]\naws_access_key_id = x\n{SECRET_KEY} here\n", "is no file of AWS credentials"),
        (f"[default]\naws_secret_access_key = {SECRET_KEY}\n", "has no 'aws_access_key_id'"),
        (f"[other]\naws_secret_access_key = {SECRET_KEY}\n", "has no 'default'"),
    ],
)
def test_bad_files_of_credentials(
    content: str | None, message: str, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path_factory.mktemp("credentials") / "file"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadConfig, match=message) as caught:
        open_location(f"s3://bucket/x?region=r&credentials_file={file}", param="registry.artifact_url")
    assert "\n" not in caught.value.message
    assert SECRET_KEY not in f"{caught.value}{caught.value.__cause__}{caplog.text}"


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    url = f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket/prefix"
    attempts = [
        lambda: open_location(url, param="it"),
        lambda: RegistryConfig(artifact_url=url),
        lambda: TraceConfig(url=url),
        lambda: parse_prefixes((url,)),
        lambda: TraceConfig(url=f"s3://bucket/prefix?secret_key={SECRET_KEY}"),
    ]
    for attempt in attempts:
        with pytest.raises(BadConfig, match=r"credentials do not belong|unknown option 'secret_key'") as caught:
            attempt()
        assert SECRET_KEY not in str(caught.value)
        assert ACCESS_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["abfs://container@account.dfs.core.windows.net/dir", "hdfs://user@namenode:8020/dir", "gs://anonymous@bucket/dir"],
)
def test_a_name_before_the_host_is_no_credential_but_of_s3(url: str) -> None:
    RegistryConfig(artifact_url=url)
    (prefix,) = parse_prefixes((url,))
    assert f"{prefix.scheme}://{prefix.host}/" in f"{url}/"
    for secret in (url.replace("@", ":word@"), "s3://" + url.partition("://")[2]):
        with pytest.raises(BadConfig, match="credentials do not belong"):
            RegistryConfig(artifact_url=secret)


@pytest.mark.parametrize("url", ["https://hub.example/adapters", "S4://bucket/dir"])
def test_prefixes_that_nothing_opens_are_refused_at_the_start(url: str) -> None:
    with pytest.raises(BadConfig, match=r"approved_url_prefixes: .*:// is not one of abfs, .* s3"):
        parse_prefixes((url,))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3:///prefix", "s3://BUCKET/PREFIX"),
        ("s3://bucket/prefix?regoin=x", "unknown option 'regoin'; s3:// knows credentials_file, endpoint_override"),
        ("s3://bucket/prefix?region=r&profile=x", "profile= goes with credentials_file="),
        ("nosuch://bucket/x", "nosuch://bucket/x"),
        ("s3://[bucket/x", "not a URL"),
    ],
)
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(BadConfig, match=message.replace("?", r"\?")) as caught:
        open_location(url, param="it")
    assert caught.value.message.startswith("it: ")
