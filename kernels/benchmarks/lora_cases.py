"""What ``bench_lora`` runs: steps by their rows, adapters and prompt."""

from dataclasses import dataclass
from typing import Self

from loraplex_kernels.gpu.lora_random import LayerShape


@dataclass(frozen=True, slots=True)
class Case:
    rows: int
    """Of one token each, their adapters in turn."""
    adapters: int
    ranks: tuple[int, ...]
    """Of the adapters in turn."""
    prompt: int = 0
    """Tokens of one more row, with the first adapter."""

    @classmethod
    def parse(cls, text: str, ranks: tuple[int, ...]) -> Self:
        rows, _, rest = text.partition("x")
        adapters, _, prompt = rest.partition("+")
        return cls(int(rows), int(adapters), ranks, int(prompt or 0))

    @property
    def num_tokens(self) -> int:
        return self.rows + self.prompt

    @property
    def num_adapters(self) -> int:
        """In the step."""
        return min(max(self.rows, 1), self.adapters)

    @property
    def name(self) -> str:
        prompt = f"+{self.prompt}" if self.prompt else ""
        ranks = "" if self.ranks == (16,) else f"r{'-'.join(map(str, self.ranks))}"
        return f"{self.rows}x{self.adapters}{prompt}{ranks}"

    def rank_cap(self, tile_rows: int) -> int:
        return next(cap for cap in ((8, 16, 64) if tile_rows == 1 else (16, 64)) if max(self.ranks) <= cap)


def adapter_bytes(case: Case, shape: LayerShape, layers: int, itemsize: int) -> int:
    """Of the adapters that the rows of the case name, all layers and modules."""
    ranks = sum(case.ranks[index % len(case.ranks)] for index in range(case.num_adapters))
    return ranks * layers * itemsize * sum(inputs + outputs for inputs, outputs in shape.modules)
