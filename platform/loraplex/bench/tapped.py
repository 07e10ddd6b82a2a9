"""A model in our engine whose logits are kept: what a comparison with another implementation looks at.

Requests run through scheduler, driver and executor as any others do. Only the sampler is watched, and may be told what
to draw, so that positions stay comparable where choices differ. Called by ``against_transformers`` and by
``loraplex.demo.parity``.

Shape legend: B rows of the step, T generated tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.core.adapter import AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import BaseModelId, RequestId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.core.step import RowStart
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.sampler import Sampler
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import check_adapter
from loraplex.replica.driver import StepDriver

_BASE = BaseModelId("tapped")
_TENANT = TenantName("tapped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    adapter: str | None
    """By name; None: the plain base."""
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    token_ids: tuple[int, ...]
    logits: torch.Tensor
    """(T, V) fp32 on the CPU, of the position before each token."""


class TappedEngine:
    def __init__(
        self, model: str, config: ExecutorConfig, engine: EngineConfig, *, adapters: Mapping[str, Path]
    ) -> None:
        """``adapters``: PEFT directories by name; they are checked as the registry does, and staged. Raises BadConfig,
        BadAdapter."""
        taps: list[_LogitTap] = []

        def tapped(spec: ModelSpec, device: torch.device) -> _LogitTap:
            taps.append(_LogitTap(Sampler(spec, device)))
            return taps[0]

        self._executor = build_executor(config, model=model, base_model_id=_BASE, sampler=tapped)
        (self._tap,) = taps
        spec = self._executor.model
        self._engine = Engine(engine, model=spec, arena=self._executor.arena)
        self._driver = StepDriver(
            self._engine, self._executor, clock=SystemClock(), unstage=self._executor.unstage_adapter
        )
        self._num_requests = 0
        self._adapters: dict[str, AdapterRef] = {}
        for name, directory in adapters.items():
            manifest = check_adapter(
                directory, bases={_BASE: spec}, digest_salt="00" * 16, config=RegistryConfig()
            ).manifest
            self._executor.stage_adapter(manifest, str(directory / "adapter_model.safetensors"))
            self._engine.adapter_staged(manifest.digest, self._executor.adapter_pages(manifest), 0.0)
            self._adapters[name] = AdapterRef(tenant=_TENANT, name=name, version=1, digest=manifest.digest)

    def generate(
        self, prompts: Sequence[Prompt], num_tokens: int, *, forced: Sequence[Sequence[int]] | None = None
    ) -> list[Continuation]:
        """Of all prompts, submitted at once: greedy, or with the ``forced`` tokens, ``num_tokens`` for each prompt.
        LoraplexError when a request fails."""
        seeds = range(self._num_requests + 1, self._num_requests + len(prompts) + 1)
        self._num_requests += len(prompts)
        self._tap.clear()
        if forced is not None:
            self._tap.forced.update(zip(seeds, forced, strict=True))
        tokens: dict[RequestId, list[int]] = {}
        for seed, prompt in zip(seeds, prompts, strict=True):
            request_id = RequestId(f"tapped-{seed}")
            tokens[request_id] = []
            self._engine.add(
                EngineRequest(
                    request_id=request_id,
                    tenant=_TENANT,
                    base_model_id=_BASE,
                    adapter=None if prompt.adapter is None else self._adapters[prompt.adapter],
                    prompt_token_ids=prompt.token_ids,
                    sampling=SamplingParams(max_tokens=num_tokens, seed=seed, temperature=0.0, ignore_eos=True),
                    arrival_s=0.0,
                    cache_salt="tapped",
                ),
                0.0,
            )
        while self._engine.num_unfinished:
            for output in self._driver.step().outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise LoraplexError(f"request {output.request_id} failed: {output.error}")
                tokens[output.request_id] += [token.token_id for token in output.tokens]
        # What is still in flight is nobody's.
        while self._driver.step().progressed:
            pass
        return [
            Continuation(token_ids=tuple(chosen), logits=self._tap.logits(seed))
            for seed, chosen in zip(seeds, tokens.values(), strict=True)
        ]

    def close(self) -> None:
        self._executor.close()


class _LogitTap:
    """A sampler that keeps the logits that it is given. It knows requests by their seeds, which greedy ones do not
    need otherwise."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._seeds: dict[int, int] = {}
        """Of the slots."""
        self._logits: dict[int, list[torch.Tensor]] = {}
        self.forced: dict[int, Sequence[int]] = {}
        """By seed: the tokens to draw; empty: whatever the sampler draws."""

    def clear(self) -> None:
        """Forgets all requests; none may be running."""
        self._logits.clear()
        self.forced.clear()

    def logits(self, seed: int) -> torch.Tensor:
        """(T, V), as in a ``Continuation``."""
        return torch.stack(self._logits[seed]).float().cpu()

    def start(self, start: RowStart) -> None:
        seed = self._seeds[start.slot] = start.sampling.seed
        # A preempted request starts again behind the tokens that it has.
        self._logits[seed] = self._logits.get(seed, [])[: len(start.token_ids) - start.num_prompt_tokens]
        self._sampler.start(start)

    def release(self, slot: int) -> None:
        self._sampler.release(slot)

    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        seeds = [self._seeds[slot] for slot in slots]
        positions = [len(self._logits[seed]) for seed in seeds]
        for seed, logits_V in zip(seeds, logits_BV, strict=True):
            self._logits[seed].append(logits_V.clone())
        if not self.forced:
            return self._sampler.draw(logits_BV, slots, last_token=last_token)
        tokens = [self.forced[seed][position] for seed, position in zip(seeds, positions, strict=True)]
        tokens_B = torch.tensor(tokens, dtype=torch.int64, device=logits_BV.device)
        if last_token is not None:
            last_token[torch.tensor(slots, device=last_token.device)] = tokens_B.int()
        return Drawn(slots, tokens_B, None)
