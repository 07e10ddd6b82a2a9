"""The tokenizer of random models, as the gateway uses it."""

from dataclasses import replace
from pathlib import Path

import pytest
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.gateway.tokenizer import TextCodec
from loraplex.model_runner.random_models import random_spec
from loraplex.model_runner.random_tokenizer import write_random_tokenizer

SPEC = random_spec("tiny-llama", BaseModelId("tiny"))


def test_text_survives_and_every_id_but_the_special_ones_stands_for_some(tmp_path: Path) -> None:
    codec = TextCodec(str(write_random_tokenizer(SPEC, tmp_path / "tokenizer")))
    assert codec.vocab_size == SPEC.vocab_size
    text = "Héllo, 東京! 1 + 1 = 2\n"
    assert codec.decode(codec.encode(text)) == text
    special = {SPEC.bos_token_id, *SPEC.eos_token_ids}
    silent = {token_id for token_id in range(SPEC.vocab_size) if not codec.decode([token_id])}
    assert silent == special
    assert len({codec.token_bytes(token_id) for token_id in range(SPEC.vocab_size)}) == SPEC.vocab_size
    chat = codec.encode_chat([{"role": "user", "content": "hi"}])
    assert codec.decode(chat) == "user: hi\nassistant: "


def test_a_second_call_leaves_the_files(tmp_path: Path) -> None:
    directory = write_random_tokenizer(SPEC, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert sorted(before) == ["tokenizer.json", "tokenizer_config.json"]
    write_random_tokenizer(SPEC, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="200"):
        write_random_tokenizer(replace(SPEC, vocab_size=200), tmp_path / "none")
    assert not (tmp_path / "none").exists()
