"""Text to token ids and back, per base model. The only module of the gateway that knows transformers.

``Codecs`` loads one ``TextCodec`` per base directory on first use; a ``Detokenizer`` serves one choice.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers.decoders import DecodeStream

from loraplex.core.control import BaseModelView
from loraplex.core.errors import BadConfig, InvalidInput

_INVALID_PREFIX = "Invalid prefix encountered"
_PRIME_TOKENS = 6


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write the 256 bytes (GPT-2's ``bytes_to_unicode``, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHAR = _byte_alphabet()


class Detokenizer:
    """Token ids in, text out, as soon as it is whole: a character that is cut across tokens waits for its rest."""

    __slots__ = ("_backend", "_stream")

    def __init__(self, backend: Any, prompt_token_ids: Sequence[int]) -> None:
        """``prompt_token_ids``: its end gives the context on which spacing of the first token may depend."""
        self._backend = backend
        prime = list(prompt_token_ids[-_PRIME_TOKENS:])
        text = backend.decode(prime, skip_special_tokens=True)
        if text and not text.endswith("\ufffd"):
            self._stream = DecodeStream(ids=prime, skip_special_tokens=True)
        else:
            self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes; often empty for a part of a character."""
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception as error:
            # The library raises a bare Exception when a sequence of invalid bytes decodes differently once it grows;
            # a fresh stream goes on from this token.
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self._backend, token_id)
        return piece or ""


class TextCodec:
    """The tokenizer of one base. Thread-safe: the backend is not changed after loading."""

    def __init__(self, directory: str) -> None:
        """Raises BadConfig when the directory holds no fast tokenizer."""
        # transformers takes seconds to import; a gateway that only lists models does not pay for it.
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            self.backend: Any = self._tokenizer.backend_tokenizer
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise BadConfig(f"{directory}: no usable tokenizer: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(_config_vocab_size(directory), self.backend.get_vocab_size())
        self._byte_level = b"ByteLevel" in self.backend.decoder.__getstate__() if self.backend.decoder else False
        self._added = {int(i): str(token.content) for i, token in self.backend.get_added_tokens_decoder().items()}
        self._bytes: dict[int, bytes] = {}

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> tuple[int, ...]:
        """With the special tokens that the model expects at the start of a prompt."""
        return tuple(self.backend.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Through the chat template, up to where the assistant speaks. InvalidInput when the template refuses."""
        if not self.has_chat_template:
            raise InvalidInput("This base model has no chat template; use completions.", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise InvalidInput(f"The chat template refuses these messages: {error}", param="messages") from error
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=True))

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        return Detokenizer(self.backend, prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, also when they are only a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level and all(char in _BYTE_OF_CHAR for char in piece):
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return str(piece).replace("\u2581", " ").encode()


class Codecs:
    """Gives out the codec of a base; each directory is loaded once, in a thread."""

    def __init__(self) -> None:
        self._loading: dict[str, asyncio.Future[TextCodec]] = {}

    async def get(self, base: BaseModelView) -> TextCodec:
        """Raises BadConfig; a later call after any failure tries again."""
        future = self._loading.get(base.directory)
        if future is None:
            future = asyncio.ensure_future(asyncio.to_thread(TextCodec, base.directory))
            self._loading[base.directory] = future
        try:
            return await asyncio.shield(future)
        except Exception:
            self._loading.pop(base.directory, None)
            raise


def _config_vocab_size(directory: str) -> int:
    """Rows of the embedding, which may exceed the tokenizer's; 0 when config.json does not say."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        return 0
    config = json.loads(path.read_text(encoding="utf-8"))
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size", 0))
    return int(size)
