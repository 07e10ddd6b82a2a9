"""Copies an adapter's two files from a URL that the operator approved into a staging directory.

Owns what "below an approved prefix" means: same scheme and host, path below the prefix by whole segments, nothing
percent-encoded, no ``..``; a part ``{tenant}`` of a prefix is the tenant's own name; local directories are walked from
the approved one without following a single symbolic link.
Knows nothing of the files' meaning. Blocking; called by the controller in a worker thread.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from loraplex.core.errors import BadConfig, InvalidInput, NotFound, PermissionDenied, Unavailable
from loraplex.core.ids import TenantName
from loraplex.object_storage.location import open_location
from loraplex.object_storage.retry import Retry, read_pieces
from loraplex.object_storage.url import SCHEMES, check_url
from loraplex.registry.lora_config import CONFIG_FILE
from loraplex.registry.tensors_file import TENSORS_FILE

_TENANT_PART = "{tenant}"
_PIECE_BYTES = 4 * 1024 * 1024
_RETRY = Retry(total_s=10.0)
"""A client waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovedPrefix:
    scheme: str
    host: str
    segments: tuple[str, ...]
    options: str
    """``?...`` for pyarrow.fs, or empty."""

    def of_tenant(self, tenant: TenantName) -> "ApprovedPrefix":
        """With the tenant's name, which is a plain word, in the place of ``{tenant}``."""
        return replace(self, segments=tuple(tenant if part == _TENANT_PART else part for part in self.segments))


def parse_prefixes(prefixes: tuple[str, ...]) -> tuple[ApprovedPrefix, ...]:
    """Raises BadConfig naming the prefix."""
    parsed = []
    for prefix in prefixes:
        check_url(prefix, param="registry.approved_url_prefixes")
        parts = urlsplit(prefix)
        if not parts.scheme or parts.fragment or (parts.scheme == "file" and (parts.netloc or parts.path in ("", "/"))):
            raise BadConfig(
                f"registry.approved_url_prefixes: {prefix!r} must look like s3://bucket/dir or file:///dir",
                param="registry.approved_url_prefixes",
            )
        if parts.scheme not in SCHEMES:
            raise BadConfig(
                f"registry.approved_url_prefixes: {parts.scheme}:// is not one of {', '.join(sorted(SCHEMES))}",
                param="registry.approved_url_prefixes",
            )
        parsed.append(
            ApprovedPrefix(
                scheme=parts.scheme,
                host=parts.netloc,
                segments=tuple(part for part in parts.path.split("/") if part),
                options=f"?{parts.query}" if parts.query else "",
            )
        )
    return tuple(parsed)


def fetch_adapter(
    url: str, prefixes: tuple[ApprovedPrefix, ...], tenant: TenantName, append: Callable[[str, bytes], None]
) -> None:
    """Hands both files to ``append(filename, piece)`` in order.

    Raises InvalidInput for a URL that is none, PermissionDenied for one that is not approved, NotFound when a file is
    missing, Unavailable when the source does not answer, and what ``append`` raises.
    """
    scheme, host, segments = _split(url)
    for prefix in (approved.of_tenant(tenant) for approved in prefixes):
        depth = len(prefix.segments)
        if (prefix.scheme, prefix.host) == (scheme, host) and segments[:depth] == prefix.segments:
            break
    else:
        raise PermissionDenied(f"{url!r} is not below a URL that the operator approved", param="url")
    if scheme == "file":
        opened = _open_local(prefix, segments[depth:])
    else:
        opened = _open_remote(prefix, segments)
    with opened as pieces:
        for filename in (CONFIG_FILE, TENSORS_FILE):
            try:
                for piece in pieces(filename):
                    append(filename, piece)
            except FileNotFoundError:
                raise NotFound(f"there is no {filename} at {url!r}", param="url") from None
            except OSError as error:
                raise Unavailable(f"cannot read {filename} at {url!r}") from error


def _split(url: str) -> tuple[str, str, tuple[str, ...]]:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidInput(f"not a URL: {error}", param="url") from None
    if not parts.scheme:
        raise InvalidInput("a URL with a scheme is needed, such as s3://bucket/dir", param="url")
    if parts.query or parts.fragment or "%" in url or "\\" in url or "@" in parts.netloc or not url.isprintable():
        raise InvalidInput("the URL must have no options, no escapes and no credentials", param="url")
    segments = tuple(parts.path.strip("/").split("/"))
    if any(segment in ("", ".", "..") for segment in segments):
        raise InvalidInput("the URL's path must have no '.', '..' or empty part", param="url")
    return parts.scheme, parts.netloc, segments


_Pieces = Callable[[str], Iterator[bytes]]
"""The content of a file by its name."""


@contextmanager
def _open_local(prefix: ApprovedPrefix, below: tuple[str, ...]) -> Iterator[_Pieces]:
    """Walks down by directory descriptors, so that no component can be swapped for a link meanwhile."""
    directory = Path("/", *prefix.segments)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Unavailable("the approved directory cannot be opened") from error
    try:
        for segment in below:
            try:
                child = os.open(segment, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                raise NotFound("there is no such directory below the approved one", param="url") from error
            os.close(descriptor)
            descriptor = child
        yield lambda filename: _local_pieces(descriptor, filename)
    finally:
        os.close(descriptor)


def _local_pieces(directory: int, filename: str) -> Iterator[bytes]:
    with _open_regular(directory, filename) as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _open_regular(directory: int, filename: str) -> BinaryIO:
    # O_NONBLOCK: a named pipe must not hang us before it is found out.
    file = os.open(filename, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(filename)
    return os.fdopen(file, "rb")


@contextmanager
def _open_remote(prefix: ApprovedPrefix, segments: tuple[str, ...]) -> Iterator[_Pieces]:
    url = f"{prefix.scheme}://{prefix.host}/{'/'.join(segments)}{prefix.options}"
    try:
        filesystem, path = open_location(url, param="registry.approved_url_prefixes")
    except BadConfig as error:
        raise Unavailable(f"the source of scheme {prefix.scheme!r} cannot be opened") from error
    yield lambda filename: read_pieces(filesystem, f"{path}/{filename}", _PIECE_BYTES, _RETRY)
