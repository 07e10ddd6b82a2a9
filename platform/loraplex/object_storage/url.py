"""What a URL of ours may say. Light: configs import it."""

from urllib.parse import parse_qsl, urlsplit

from loraplex.core.errors import BadConfig

SCHEMES = frozenset({"file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
"""Those that pyarrow.fs opens."""
S3_OPTIONS = frozenset({"region", "endpoint_override", "scheme", "credentials_file", "profile"})


def check_url(url: str, *, param: str) -> None:
    """Raises BadConfig, which does not show the URL, when it carries credentials or is none; ``param``: whose it is.

    A path without ``://`` passes.
    """
    if "://" not in url:
        return
    scheme = url.partition("://")[0]
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        raise BadConfig(f"{param}: not a URL of scheme {scheme}", param=param) from None
    user, at, _ = parts.netloc.rpartition("@")
    # Elsewhere a name alone is no secret: a container of Azure's, a user of HDFS.
    if at and (parts.scheme == "s3" or ":" in user):
        raise BadConfig(
            f"{param}: credentials do not belong into a URL; give them in the environment, or in a file that "
            "?credentials_file= names",
            param=param,
        )
    unknown = sorted(options.keys() - S3_OPTIONS) if parts.scheme == "s3" else []
    if unknown:
        raise BadConfig(
            f"{param}: unknown option {unknown[0]!r}; s3:// knows {', '.join(sorted(S3_OPTIONS))}", param=param
        )
