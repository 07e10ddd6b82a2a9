"""Triton kernels for CUDA devices; importing a module of this package imports triton, but for ``lora_tiles``.

They write to preallocated outputs and neither allocate nor synchronise, so that a step can be captured as a CUDA graph.
``twins`` holds each operation in plain torch.
"""
