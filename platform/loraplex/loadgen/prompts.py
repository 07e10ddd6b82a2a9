"""Prompts of a wanted number of tokens, different for every request so that no prefix cache shortens the work.

Pure: the text depends on seed, index and length alone. Called by the runners.
"""

import os
import random
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from loraplex.core.errors import BadConfig, NotFound

_TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
)
_WORDS = _TEXT.split(" ")
"""Each is one token, with the blank before it, in practically every byte-pair vocabulary."""
_NEAR = 32


Prompt = str | list[int]
"""Text, or the token ids themselves."""


class PromptMaker(Protocol):
    def make(self, index: int, num_tokens: int) -> Prompt:
        """The prompt of the ``index``-th request of the run."""


class RandomTokens:
    """Exactly ``num_tokens`` ids, each drawn from the whole vocabulary."""

    def __init__(self, vocab_size: int, *, seed: int) -> None:
        self._ids = range(vocab_size)
        self._seed = seed

    def make(self, index: int, num_tokens: int) -> list[int]:
        return random.Random(f"{self._seed}/{index}").choices(self._ids, k=num_tokens)


class WordPrompts:
    """One common word per token: right to a few percent without knowing the tokenizer."""

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def make(self, index: int, num_tokens: int) -> str:
        return " ".join(random.Random(f"{self._seed}/{index}").choices(_WORDS, k=num_tokens))


class TokenizerPrompts:
    """Exactly ``num_tokens`` tokens (special tokens included) for the tokenizer of a model directory."""

    def __init__(self, directory: str | os.PathLike[str], *, seed: int) -> None:
        """Raises NotFound without ``tokenizer.json`` in the directory, BadConfig when it cannot be read."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise NotFound(f"no tokenizer.json in {os.fspath(directory)}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise BadConfig(f"tokenizer {path}: {error}") from error
        self._words = WordPrompts(seed=seed)

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)

    def make(self, index: int, num_tokens: int) -> str:
        """Raises BadConfig when there is no text of that length: not more than the tokenizer's special tokens."""
        num_words = num_tokens
        text = self._words.make(index, num_words)
        while self.count(text) < num_tokens:
            num_words *= 2
            text = self._words.make(index, num_words)
        encoded = self._tokenizer.encode(text)
        ends = [
            offset[1]
            for offset, special in zip(encoded.offsets, encoded.special_tokens_mask, strict=True)
            if not special
        ]
        num_special = len(encoded.ids) - len(ends)
        if num_tokens > num_special:
            # Cut after the last wanted token. Inside a word the shortened text may fall into tokens differently, so
            # its neighbours are tried as well.
            cut = ends[num_tokens - num_special - 1]
            for position in sorted(range(max(1, cut - _NEAR), cut + _NEAR), key=lambda p: abs(p - cut)):
                if self.count(text[:position]) == num_tokens:
                    return text[:position]
        raise BadConfig(f"no prompt of exactly {num_tokens} tokens found for this tokenizer")
