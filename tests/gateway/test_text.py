"""Stop strings and incremental text, as properties: how text is cut into pieces must not matter."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.gateway.stops import StopMatcher
from loraplex.gateway.tokenizer import Detokenizer, TextCodec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

letters = st.text(alphabet="ab", max_size=24)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read character by character: the first that completes a stop string ends the text before the longest such."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@given(letters, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_matcher_equals_the_reference_however_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopMatcher(stops)
    out, hit = "", False
    for piece in pieces:
        emitted, hit = matcher.feed(piece)
        out += emitted
        assert reference(text, stops)[0].startswith(out)
        if hit:
            break
    if not hit:
        out += matcher.flush()
    assert (out, hit) == reference(text, stops)


@given(st.text(max_size=40))
def test_detokenizer_gives_back_the_text(codec: TextCodec, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = codec.backend.encode(text, add_special_tokens=False).ids
    detokenizer = codec.detokenizer(codec.encode("before"))
    out = ""
    for token_id in ids:
        out += detokenizer.feed(token_id)
        assert text.startswith(out) or "\ufffd" in text
    # A U+FFFD of the text itself cannot be told from a half character while it is last.
    assert out == text or text.startswith(out + "\ufffd")


@given(st.lists(st.integers(0, 399), max_size=30), st.lists(st.integers(0, 399), max_size=8))
def test_detokenizer_takes_any_tokens(codec: TextCodec, ids: list[int], prompt: list[int]) -> None:
    detokenizer = Detokenizer(codec.backend, prompt)
    for token_id in ids:
        assert not detokenizer.feed(min(token_id, codec.backend.get_vocab_size() - 1)).endswith("\ufffd")


def test_half_characters_at_the_end_are_not_sent(codec: TextCodec) -> None:
    ids = codec.backend.encode("東", add_special_tokens=False).ids
    assert len(ids) > 1
    detokenizer = codec.detokenizer(())
    assert "".join(detokenizer.feed(token_id) for token_id in ids[:-1]) == ""
    assert detokenizer.feed(ids[-1]) == "東"


def test_spacing_depends_on_the_prompt_with_metaspace(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581Hi": 1, "\u2581you": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert Detokenizer(tokenizer, [1]).feed(2) == " you"
    assert Detokenizer(tokenizer, []).feed(2) == "you"


@given(st.text(max_size=20))
def test_token_bytes_join_to_the_text(codec: TextCodec, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = codec.backend.encode(text, add_special_tokens=False).ids
    assert b"".join(codec.token_bytes(token_id) for token_id in ids) == text.encode()


def test_special_tokens(codec: TextCodec) -> None:
    end = codec.backend.token_to_id("<|im_end|>")
    assert codec.token_bytes(end) == b"<|im_end|>"
    assert codec.detokenizer(()).feed(end) == ""
    assert codec.token_bytes(10**9) == b""


def test_template_refusals_and_missing_templates(codec: TextCodec, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    settings = (tokenizer_dir / "tokenizer_config.json").read_text()
    strict = settings.replace("{% for message", "{{ raise_exception('roles must alternate') }}{% for message")
    (tmp_path / "tokenizer_config.json").write_text(strict)
    with pytest.raises(InvalidInput, match="roles must alternate"):
        TextCodec(str(tmp_path)).encode_chat([{"role": "user", "content": "x"}])
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InvalidInput, match="no chat template"):
        TextCodec(str(tmp_path)).encode_chat([{"role": "user", "content": "x"}])


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no usable tokenizer"):
        TextCodec(str(tmp_path))
