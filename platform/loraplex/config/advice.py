"""What is allowed in a config and may still surprise, and where its data will lie; ``config check`` prints both.

Looks at this machine's files, which on a cluster is the head's; changes nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from loraplex.config.platform import DEMO_MODEL, BaseModelConfig, PlatformConfig
from loraplex.config.problems import Problem
from loraplex.core.errors import LoraplexError
from loraplex.cost.profile import CostProfile

_FIRST_FREE_PORT = 1024


def warnings(config: PlatformConfig) -> Iterator[Problem]:
    """Paths are those of the file."""
    for name in ("http_port", "grpc_port"):
        port = getattr(config.listen, name)
        if 0 < port < _FIRST_FREE_PORT and os.geteuid() != 0:
            yield Problem(f"listen.{name}", f"{port} is below {_FIRST_FREE_PORT}, which most systems keep for root")
    if config.listen.host.startswith("127.") and config.ray.address != "local":
        yield Problem("listen.host", f"{config.listen.host}: nobody outside a node reaches the gateways on it")
    if not _is_writable(config.root):
        yield Problem("data_dir", f"{config.root} cannot be written by this user")
    key = config.admin_key_path
    if key.exists() and key.stat().st_mode & 0o077:
        yield Problem("admin_key_file", f"{key} is readable by other users of this machine")
    for index, base in enumerate(config.base_models):
        yield from _of_base(base, f"base_models[{index}]")
    yield from _of_planning(config)
    if not config.tenants and not config.demo:
        yield Problem("tenants", "there are none: nobody can ask for anything before `loraplex tenant create`")


def notes(config: PlatformConfig) -> Iterator[str]:
    """Where artifacts and traces lie, and how they get there."""
    if config.registry.artifact_url and "://" in config.registry.artifact_url:
        yield f"adapters are stored at {config.registry.artifact_url}, from where every node fetches them"
    else:
        where = config.registry.artifact_url or config.root / "artifacts"
        yield f"adapters are stored at {where} on the controller's node, which sends them to others in pieces"
    yield f"traces are written to {config.trace_url} by the controller, to which gateways send them"


def _of_base(base: BaseModelConfig, path: str) -> Iterator[Problem]:
    on_gpu = base.executor.device.startswith("cuda")
    if on_gpu and base.num_gpus == 0:
        yield Problem(
            f"{path}.num_gpus", f"is 0 but executor.device is {base.executor.device}: Ray hides all GPUs from it"
        )
    if base.num_gpus > 0 and not on_gpu and base.paced is None:
        yield Problem(f"{path}.executor.device", f"is {base.executor.device}: the GPU that it reserves stays idle")
    for name, value in (("model", base.model), ("tokenizer", base.tokenizer)):
        named = value is None or value == DEMO_MODEL or value.startswith("random:")
        if not named and not Path(str(value)).expanduser().exists():
            yield Problem(f"{path}.{name}", f"{value} does not exist on this machine; every node of a replica needs it")


def _of_planning(config: PlatformConfig) -> Iterator[Problem]:
    planning, path = config.controller.fleet.planning, "controller.fleet.planning"
    if config.controller.fleet.mode != "off" and not planning.profiles:
        yield Problem(f"{path}.profiles", "there are none: layouts are not planned, adapters move all the same")
    profiles = []
    for name in planning.profiles:
        try:
            profiles.append(CostProfile.load(name))
        except LoraplexError as error:
            yield Problem(f"{path}.profiles", error.message)
    known = {base.model.base_model_id for profile in profiles for base in profile.bases}
    for base in config.base_models:
        name = planning.profile_bases.get(base.id, base.id)
        if known and name not in known:
            said = ", ".join(sorted(known))
            yield Problem(f"{path}.profile_bases", f"no profile has a base {name!r} (they have {said}), for {base.id}")


def _is_writable(folder: Path) -> bool:
    """Or could be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
