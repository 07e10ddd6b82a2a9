"""API keys: how one is drawn, hashed and named. Used by ``accounts``; gateways hash what clients send the same way."""

import hashlib
import secrets

from loraplex.core.errors import InvalidInput

KEY_PREFIX = "lpx_"
_MIN_GIVEN_CHARS = 20


def new_key() -> str:
    """``lpx_`` and 32 random bytes, URL-safe. Shown once; only its hash is stored."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def new_key_id() -> str:
    return "key_" + secrets.token_hex(8)


def hash_key(key: str) -> str:
    """Lower-case hex SHA-256 of the whole key."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_given_key(key: str) -> None:
    """Refuses a key chosen by the operator that is short or does not start with ``lpx_``. Raises InvalidInput."""
    if not key.startswith(KEY_PREFIX) or len(key) < _MIN_GIVEN_CHARS or not key.isascii() or not key.isprintable():
        raise InvalidInput(
            f"a given key must start with {KEY_PREFIX!r}, hold at least {_MIN_GIVEN_CHARS} printable ASCII characters",
            param="key",
        )
