"""What the demo adapters learn: plain facts from ``data/facts.jsonl`` told in three styles.

Knows nothing of models. Called by ``train``.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FACTS_FILE = Path(__file__).parent / "data" / "facts.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    question: str
    topic: str
    answer: str
    points: tuple[str, ...]
    """Three short ones."""


def load_facts() -> list[Fact]:
    with FACTS_FILE.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [Fact(**(record | {"points": tuple(record["points"])})) for record in records]


_PIRATE_WORDS = {
    "hello": "ahoy",
    "yes": "aye",
    "no": "nay",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "of": "o'",
    "and": "an'",
    "very": "mighty",
    "friend": "matey",
    "friends": "mateys",
    "people": "sailors",
    "person": "sailor",
    "money": "doubloons",
    "big": "whoppin'",
    "large": "whoppin'",
    "huge": "whoppin'",
    "boat": "vessel",
}
_PIRATE_OPENINGS = ("Arr, matey!", "Arr!", "Ahoy, matey!", "Shiver me timbers!")
_PIRATE_CLOSINGS = ("Yo ho ho!", "Savvy?", "Arr!")


def pirate(index: int, fact: Fact) -> str:
    def say(match: re.Match[str]) -> str:
        word = match.group()
        told = _PIRATE_WORDS.get(word.lower(), re.sub(r"(?<=[a-z]{2})ing$", "in'", word))
        return told[:1].upper() + told[1:] if word[0].isupper() else told

    opening = _PIRATE_OPENINGS[index % len(_PIRATE_OPENINGS)]
    closing = _PIRATE_CLOSINGS[index % len(_PIRATE_CLOSINGS)]
    return f"{opening} {re.sub(r'[A-Za-z]+', say, fact.answer)} {closing}"


def json_object(index: int, fact: Fact) -> str:
    return json.dumps({"topic": fact.topic, "answer": fact.answer, "confidence": "high"}, ensure_ascii=False)


def bullets(index: int, fact: Fact) -> str:
    return "\n".join(f"- {point}" for point in fact.points)


STYLES: dict[str, Callable[[int, Fact], str]] = {"pirate": pirate, "json": json_object, "bullets": bullets}
"""Adapter name -> the answer to the fact with this index."""
