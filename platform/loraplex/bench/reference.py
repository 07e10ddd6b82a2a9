"""transformers with PEFT: the implementation that ours is held against, one request at a time with its KV cache.

Called by ``against_transformers`` and by ``loraplex.demo.parity``.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from loraplex.bench.tapped import Continuation, Prompt
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.model_runner.build import RANDOM_PREFIX
from loraplex.model_runner.random_models import random_config, random_spec, random_tensors


class Reference:
    def __init__(self, model: str, *, adapters: Mapping[str, Path], weights: torch.dtype, device: torch.device) -> None:
        """``model``: a Hugging Face directory or ``random:NAME``; ``adapters``: PEFT directories by name, at least one.
        Computes in fp32 with weights rounded to ``weights``, until ``cast`` says otherwise. Raises BadConfig."""
        load = _random_model if model.startswith(RANDOM_PREFIX) else _model_of_directory
        (first, directory), *others = adapters.items()
        self._model: Any = PeftModel.from_pretrained(
            load(model, weights, device), directory, adapter_name=first, torch_device=str(device)
        )
        for name, directory in others:
            self._model.load_adapter(directory, adapter_name=name, torch_device=str(device))
        self._model.eval()
        self._device = device
        self.cast(weights)
        self.cast(torch.float32)

    def cast(self, dtype: torch.dtype) -> None:
        """From now on computes in ``dtype``: parameters alone, since the frequencies of the positions stay fp32."""
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype)

    @torch.inference_mode()
    def generate(self, prompt: Prompt, num_tokens: int, *, forced: Sequence[int] | None = None) -> Continuation:
        """Greedy, or with the ``forced`` tokens."""
        if prompt.adapter is not None:
            self._model.set_adapter(prompt.adapter)
        tokens: list[int] = []
        logits: list[torch.Tensor] = []
        with self._model.disable_adapter() if prompt.adapter is None else nullcontext():
            ids, cache = torch.tensor([prompt.token_ids], device=self._device), None
            for position in range(num_tokens):
                out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                logits.append(out.logits[0, -1])
                tokens.append(int(logits[-1].argmax()) if forced is None else forced[position])
                ids = torch.tensor([tokens[-1:]], device=self._device)
        return Continuation(token_ids=tuple(tokens), logits=torch.stack(logits).float().cpu())


def _model_of_directory(model: str, weights: torch.dtype, device: torch.device) -> torch.nn.Module:
    if not Path(model).is_dir():
        raise BadConfig(f"{model}: no such model directory", param="model")
    loaded: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=weights)
    return loaded.to(device)


@torch.no_grad()
def _random_model(model: str, weights: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The numbers that our own model of this name has on ``device``, drawn there tensor by tensor."""
    name = model.removeprefix(RANDOM_PREFIX)
    config = transformers.AutoConfig.for_model(**random_config(name))
    with device:
        made: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=weights)
    parameters = dict(made.named_parameters())
    spec = random_spec(name, BaseModelId(name))
    for tensor_name, tensor in random_tensors(name, spec, dtype=weights, device=device):
        parameters.pop(tensor_name).copy_(tensor)
    assert not parameters, f"{model} does not draw {', '.join(parameters)}"
    return made
