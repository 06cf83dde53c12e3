"""Fused kernels in Triton: the same functions as PyTorch's operators compute, in fewer launches.

Each is imported only where it is used, by the file of the step that it belongs to, because importing Triton takes time
and it is missing on some platforms.
"""
