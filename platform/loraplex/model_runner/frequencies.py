"""The rotary frequencies of a model. Called by the executors."""

import torch
from loraplex_kernels import Llama3Scaling, rotary_frequencies

from loraplex.core.model import ModelSpec


def model_frequencies(model: ModelSpec, device: torch.device) -> torch.Tensor:
    """(head_dim / 2,) fp32 radians per token."""
    scaling = model.rope_scaling
    llama3: Llama3Scaling | None = None
    if scaling is not None:
        llama3 = Llama3Scaling(
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_positions=scaling.original_max_positions,
        )
    return rotary_frequencies(model.head_dim, model.rope_theta, llama3, device)
