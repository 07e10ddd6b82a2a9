"""GPU operations of Loraplex, each with a plain torch twin for the CPU.

Knows tensors, pages and segments; knows no request, no adapter file and no model family. ``loraplex.model_runner`` is
the only caller. Today every operation is the twin, on any device; the modules are the seams for device kernels.
"""

from loraplex_kernels.activation import silu_mul
from loraplex_kernels.attention import AttentionPlan, AttentionRow, paged_attention, plan_attention
from loraplex_kernels.kv import KvLayout, KvPages, kv_row_index, view_kv_pages, write_kv_
from loraplex_kernels.linear import linear, linear_into, pack_weight
from loraplex_kernels.lora import ExpandPart, LoraSegment, LoraSite, lora_add_, lora_expand_, lora_shrink
from loraplex_kernels.norm import add_rms_norm_, rms_norm
from loraplex_kernels.rotary import Llama3Scaling, RotaryAngles, apply_rotary_, rotary_angles, rotary_frequencies

__all__ = [
    "AttentionPlan",
    "AttentionRow",
    "ExpandPart",
    "KvLayout",
    "KvPages",
    "Llama3Scaling",
    "LoraSegment",
    "LoraSite",
    "RotaryAngles",
    "add_rms_norm_",
    "apply_rotary_",
    "kv_row_index",
    "linear",
    "linear_into",
    "lora_add_",
    "lora_expand_",
    "lora_shrink",
    "pack_weight",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rotary_angles",
    "rotary_frequencies",
    "silu_mul",
    "view_kv_pages",
    "write_kv_",
]
