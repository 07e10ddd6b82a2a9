"""Opens a URL as a ``pyarrow.fs`` file system.

S3 is opened by our own rules: an endpoint of one's own, time limits, credentials by reference alone. These come from
``?credentials_file=FILE`` (the format of AWS, ``&profile=`` names the section; read at each opening, so that a new
file takes effect), else from where the AWS SDK looks: ``AWS_ACCESS_KEY_ID`` and its companions, ``~/.aws``, the role of
the machine or of the service account. Other schemes are opened as pyarrow does.
"""

import configparser
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from loraplex.core.errors import BadConfig, Unavailable
from loraplex.object_storage.retry import is_transient
from loraplex.object_storage.url import check_url

_CONNECT_TIMEOUT_S = 5.0
_REQUEST_TIMEOUT_S = 30.0
"""Without a byte."""
_SDK_ATTEMPTS = 2
"""Within one call, at most a second apart: for a piece of a long transfer. Longer absences are ``retry``'s."""


def open_location(url: str, *, param: str) -> tuple[pafs.FileSystem, str]:
    """(file system, path in it). ``param``: the setting that holds the URL, for errors.

    Raises BadConfig for a URL that is none, has credentials in it, or names a file of credentials that has none;
    Unavailable when the region of a bucket must be asked for and nobody answers.
    """
    check_url(url, param=param)
    try:
        if url.startswith("s3://"):
            return _open_s3(url, param)
        filesystem, path = pafs.FileSystem.from_uri(url)
        return filesystem, path
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise Unavailable(f"{param}: the object store does not answer") from error
        raise BadConfig(f"{param}: {url.partition('?')[0]}: {error}", param=param) from error


def _open_s3(url: str, param: str) -> tuple[pafs.FileSystem, str]:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    bucket = parts.netloc
    if not bucket:
        raise BadConfig(f"{param}: s3://BUCKET/PREFIX is meant", param=param)
    arguments: dict[str, object] = _credentials(options, param)
    if "region" in options:
        arguments["region"] = options["region"]
    elif "endpoint_override" not in options:
        arguments["region"] = pafs.resolve_s3_region(bucket)
    for name in ("endpoint_override", "scheme"):
        if name in options:
            arguments[name] = options[name]
    filesystem = pafs.S3FileSystem(
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_SDK_ATTEMPTS),
        **arguments,
    )
    return filesystem, f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")


def _credentials(options: dict[str, str], param: str) -> dict[str, object]:
    """Of the file that the URL names; empty when it names none."""
    file = options.get("credentials_file")
    if file is None:
        if "profile" in options:
            raise BadConfig(f"{param}: profile= goes with credentials_file=", param=param)
        return {}
    profile = options.get("profile", "default")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(file, encoding="utf-8") as stream:
            parser.read_file(stream)
        section = parser[profile]
        found: dict[str, object] = {
            "access_key": section["aws_access_key_id"],
            "secret_key": section["aws_secret_access_key"],
        }
    except OSError as error:
        raise BadConfig(f"{param}: cannot read credentials_file {file}: {error.strerror}", param=param) from None
    except KeyError as error:
        raise BadConfig(f"{param}: credentials_file {file} has no {error} (profile {profile})", param=param) from None
    except (configparser.Error, UnicodeDecodeError):
        # Their texts quote the file.
        raise BadConfig(f"{param}: credentials_file {file} is no file of AWS credentials", param=param) from None
    if "aws_session_token" in section:
        found["session_token"] = section["aws_session_token"]
    return found
