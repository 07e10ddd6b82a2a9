"""How a base asks for the paced executor instead of a real one. Composed by ``config``; read by the deployment."""

from typing import Annotated

import msgspec


class PacedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which times the executor keeps: those of one base on one type of GPU in one shape."""

    profile: str = "h100-80gb"
    """A shipped cost profile, or a file of ``loraplex profile``."""
    base: str = "llama3-8b"
    """The base's name in the profile. It may be larger than the base's own ``model``, which is what clients,
    tokenizer and intake see."""
    gpu: str | None = None
    """The GPU's name in the profile; may be left out where the profile has one."""
    factor: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """How many times slower than the profile: 4 on a machine that cannot keep up with the real pace."""
    tp: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Of the shape whose times it keeps."""
    pp: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Likewise."""
