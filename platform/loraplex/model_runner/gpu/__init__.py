"""The executor for CUDA devices: Triton kernels, CUDA graphs, two steps in flight.

The same contract and the same weights as the plain torch executor beside it. Imports ``loraplex_kernels.gpu`` and with
it Triton, so ``build`` imports it only for such a device. Under Triton's interpreter it also runs on the CPU, without
graphs.
"""
