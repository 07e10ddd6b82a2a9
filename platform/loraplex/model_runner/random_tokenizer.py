"""A tokenizer for ``random:NAME``, so that such a model serves text: every id of the vocabulary stands for something.

Bytes are encoded one by one; the other tokens are made-up words, which only the model writes, so that text that is not
a random model's own is several times as long in tokens as with a real tokenizer. Called for the platform's base models.
"""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_random_tokenizer(spec: ModelSpec, directory: Path) -> Path:
    """Writes the files of a Hugging Face tokenizer of ``spec.vocab_size`` ids into ``directory``, unless they are
    there, and returns it. Raises BadConfig for a vocabulary too small for bytes."""
    if (directory / "tokenizer_config.json").is_file():
        return directory
    special = {token_id for token_id in (spec.bos_token_id, *spec.eos_token_ids) if token_id is not None}
    pieces = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {
        _special(token_id) if token_id in special else next(pieces, f"Ġw{token_id}"): token_id
        for token_id in range(spec.vocab_size)
    }
    if next(pieces, None) is not None:
        raise BadConfig(f"a vocabulary of {spec.vocab_size} tokens has no room for 256 bytes", param="model")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_special(token_id) for token_id in sorted(special)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if spec.bos_token_id is None else _special(spec.bos_token_id),
        "eos_token": _special(spec.eos_token_ids[0]) if spec.eos_token_ids else None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    # The settings last: who finds them finds all. Each appears whole, since several processes may write the same.
    _write(directory / "tokenizer.json", tokenizer.to_str())
    _write(directory / "tokenizer_config.json", json.dumps(settings))
    return directory


def _special(token_id: int) -> str:
    return f"<|{token_id}|>"


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
