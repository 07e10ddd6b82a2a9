"""Calls of the control plane as bytes (msgpack), so that neighbouring versions understand each other during an upgrade.

Arguments travel by name, with the version of this protocol; what a side does not know it ignores, what it lacks gets
its default. ``ControlPlane`` says which methods there are, and their types; ``loraplex_deployments`` carries them.
"""

import functools
import inspect
import typing
from typing import Any

import msgspec

from loraplex.core.control import ControlPlane
from loraplex.core.errors import Conflict, InvalidInput

CONTROL_VERSION = 1
"""Grows with a change that an older side would misunderstand; such a side is refused."""


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    method: str
    arguments: dict[str, msgspec.Raw]
    version: int


class _Method(typing.NamedTuple):
    signature: inspect.Signature
    """Without self."""
    types: dict[str, Any]
    answer: "msgspec.msgpack.Decoder[Any]"


def encode_request(method: str, *args: Any, **kwargs: Any) -> bytes:
    """``args`` and ``kwargs`` as the method of ``ControlPlane`` takes them."""
    arguments = _method(method).signature.bind(*args, **kwargs).arguments
    return msgspec.msgpack.encode({"method": method, "arguments": arguments, "version": CONTROL_VERSION})


def decode_request(data: bytes) -> tuple[str, dict[str, Any]]:
    """The method and its arguments by name. Conflict for a peer of an incompatible version; InvalidInput for a method
    that there is not, or arguments that are not its."""
    try:
        request = msgspec.msgpack.decode(data, type=_Request)
    except msgspec.DecodeError as error:
        raise InvalidInput(f"not a call of the control plane: {error}") from None
    if request.version != CONTROL_VERSION:
        raise Conflict(
            f"the controller speaks control version {CONTROL_VERSION}, the caller {request.version}", code="version"
        )
    known = _method(request.method)
    try:
        arguments = {
            name: msgspec.msgpack.decode(value, type=known.types[name])
            for name, value in request.arguments.items()
            if name in known.signature.parameters
        }
        known.signature.bind(**arguments)
    except (msgspec.DecodeError, TypeError) as error:
        raise InvalidInput(f"{request.method}: {error}") from None
    return request.method, arguments


def encode_answer(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def decode_answer(method: str, data: bytes) -> Any:
    """Of the type that ``ControlPlane`` declares. Raises msgspec.DecodeError on anything else."""
    return _method(method).answer.decode(data)


def control_methods() -> tuple[str, ...]:
    return tuple(name for name, _ in inspect.getmembers(ControlPlane, inspect.isfunction) if not name.startswith("_"))


@functools.cache
def _method(name: str) -> _Method:
    if name not in control_methods():
        raise InvalidInput(f"the control plane has no method {name!r}")
    function = getattr(ControlPlane, name)
    signature = inspect.signature(function)
    types = typing.get_type_hints(function, include_extras=True)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    return _Method(signature.replace(parameters=parameters), types, msgspec.msgpack.Decoder(types["return"]))
