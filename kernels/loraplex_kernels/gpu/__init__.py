"""Triton kernels for CUDA devices; importing any module of this package imports triton.

They write to preallocated outputs and neither allocate nor synchronise, so that a step can be captured as a CUDA graph.
``twins`` holds each operation in plain torch.
"""
