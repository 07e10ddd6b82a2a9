"""The demo: three small adapters of the demo base and the two tenants that own them. Data only; light to import.

``base`` prepares the base model, ``train`` makes the adapters. Read by ``loraplex serve`` for the laptop fleet.
"""

from dataclasses import dataclass
from pathlib import Path

ADAPTERS_DIR = Path(__file__).parent / "adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoAdapter:
    """An adapter that is committed with the code, as a PEFT directory."""

    name: str
    description: str
    """One line for listings."""
    example_prompt: str
    """A chat message, not among the training data, whose answer shows the effect."""

    @property
    def directory(self) -> Path:
        return ADAPTERS_DIR / self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTenant:
    name: str
    adapters: tuple[DemoAdapter, ...]


PIRATE = DemoAdapter(
    name="pirate",
    description="answers like a pirate",
    example_prompt="What is the capital of France?",
)
JSON = DemoAdapter(
    name="json",
    description="answers with one JSON object: topic, answer, confidence",
    example_prompt="What is the capital of France?",
)
BULLETS = DemoAdapter(
    name="bullets",
    description="answers with exactly three bullet points",
    example_prompt="Why is the sky blue?",
)

DEMO_ADAPTERS = (PIRATE, JSON, BULLETS)
DEMO_TENANTS = (
    DemoTenant(name="acme", adapters=(PIRATE, JSON)),
    DemoTenant(name="globex", adapters=(BULLETS,)),
)
