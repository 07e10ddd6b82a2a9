"""Who may ask for which model with which key, read from a key file, and which of them stands for whom in a trace.

The key file is what ``loraplex serve`` writes for its demo: ``{"http", "grpc", "tenants": [{"name", "key", "models"}],
"admin_key"}``. Owns that format; called by the CLI (addresses and keys) and by the schedule.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from loraplex.core.errors import BadConfig, NotFound
from loraplex.traces.arrivals import TraceRequest


class KeyFileTenant(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant of a key file. ``models``: the base first, then its adapters."""

    name: str
    key: str
    models: tuple[str, ...]


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of other programs are ignored."""

    http: str
    """Base URL without ``/v1``."""
    grpc: str = ""
    """host:port."""
    tenants: tuple[KeyFileTenant, ...] = ()
    admin_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One model as one tenant asks for it."""

    tenant: str
    model: str
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Which target stands for one (tenant, adapter) of a trace."""

    trace_tenant: str | None
    trace_adapter: str | None
    target: Target
    requests: int


def read_key_file(path: str | os.PathLike[str]) -> KeyFile:
    """Raises NotFound when there is no such file, BadConfig naming file and field when it is not a key file."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"no key file {os.fspath(path)}") from error
    except OSError as error:
        raise BadConfig(f"key file {os.fspath(path)}: {error.strerror}") from error
    try:
        return msgspec.json.decode(data, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"key file {os.fspath(path)}: {error}") from error


def targets_of(key_file: KeyFile) -> tuple[Target, ...]:
    """Every (tenant, model) of the file, in its order."""
    return tuple(
        Target(tenant=tenant.name, model=model, key=tenant.key)
        for tenant in key_file.tenants
        for model in tenant.models
    )


def assign_targets(requests: Sequence[TraceRequest], targets: Sequence[Target]) -> tuple[Assignment, ...]:
    """Maps each (tenant, adapter) of the trace to a target, busiest first. Depends on the arguments alone.

    A trace tenant with the name of an available one keeps it; the others, busiest first, take turns over the available
    tenants. Within a tenant an adapter (or, for plain base requests, the base) of an available name keeps it; the
    others take turns over the tenant's models, so that the trace's skew over tenants and adapters survives as far as
    there are different ones. Raises BadConfig without targets.
    """
    if not targets:
        raise BadConfig("no tenant with a model to send requests to")
    by_tenant: dict[str, list[Target]] = {}
    for target in targets:
        by_tenant.setdefault(target.tenant, []).append(target)
    tenant_counts = Counter(request.tenant for request in requests)
    turns = list(by_tenant)
    num_turns = 0
    tenants: dict[str | None, str] = {}
    for tenant, _ in _busiest_first(tenant_counts):
        if tenant in by_tenant:
            tenants[tenant] = tenant
        else:
            tenants[tenant] = turns[num_turns % len(turns)]
            num_turns += 1
    base_models = {(request.tenant, request.adapter): request.base_model for request in requests}
    pair_counts = Counter((request.tenant, request.adapter) for request in requests)
    next_model: Counter[str] = Counter()
    assignments = []
    for (tenant, adapter), count in _busiest_first(pair_counts):
        name = tenants[tenant]
        wanted = adapter if adapter is not None else base_models[tenant, adapter]
        choices = [target for target in by_tenant[name] if target.model == wanted]
        if not choices:
            choices = [by_tenant[name][next_model[name] % len(by_tenant[name])]]
            next_model[name] += 1
        assignments.append(Assignment(trace_tenant=tenant, trace_adapter=adapter, target=choices[0], requests=count))
    return tuple(assignments)


_K = TypeVar("_K")


def _busiest_first(counts: Counter[_K]) -> list[tuple[_K, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], repr(item[0])))
