"""The training script on a tiny base: what it optimises and what it writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from loraplex.demo import train as training
from loraplex.demo.styles import load_facts
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def tiny_base(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small layers under the tokenizer of the demo base."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_base / name, folder)
    return folder


def test_examples_end_with_the_stop_token_and_follow_the_chat_template(tiny_base: Path) -> None:
    examples = training.load_examples("bullets", tiny_base)
    assert len(examples) == len(load_facts())
    for example in examples:
        assert example.answer_ids[-1] == 2
        assert example.answer_ids.count(2) == 1
        assert example.prompt_ids[0] == 1


def test_loss_is_the_mean_over_answer_tokens(tiny_base: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_base), LoraConfig(r=2, target_modules=["q_proj"]))
    batch = [
        training.Example(prompt_ids=[1, 5, 9], answer_ids=[7, 8, 2]),
        training.Example(prompt_ids=[4], answer_ids=[6, 2]),
    ]
    input_ids = torch.tensor([[1, 5, 9, 7, 8, 2], [4, 6, 2, 0, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 7, 8, 2], [-100, 6, 2, -100, -100, -100]])
    expected = model(input_ids=input_ids, labels=labels).loss
    assert training._loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_output_is_a_neutral_bf16_peft_directory(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = load_facts()[:12]
    monkeypatch.setattr(training, "load_facts", lambda: facts)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "stale").touch()
    losses = training.train("json", tiny_base, tmp_path)
    assert f"json: step 3/3, loss {losses[-1]:.3f}" in capsys.readouterr().out
    assert len(losses) == 3
    assert {file.name for file in (tmp_path / "json").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "json" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m-instruct"
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert str(tiny_base) not in json.dumps(config)
    tensors = load_file(tmp_path / "json" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.any() for tensor in tensors.values())


def test_some_of_the_facts_teach_and_the_others_judge(tiny_base: Path, tmp_path: Path) -> None:
    facts = training.load_examples("pirate", tiny_base)
    losses = training.train("pirate", tiny_base, tmp_path, num_examples=10)
    assert len(losses) == 3
    before = training.mean_loss(tiny_base, facts[10:18])
    after = training.mean_loss(tiny_base, facts[10:18], adapter=tmp_path / "pirate")
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    expected = [training._loss(model, facts[first : first + 4]).item() for first in (10, 14)]
    assert before == pytest.approx(sum(expected) / 2)
    assert after < before
