"""Which of torch's kernels for attention runs, by rules of ours where torch's own order is a bad one."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def kernels(capability: tuple[int, int], T: int, S: int, masked: bool, learns: bool) -> tuple[str, ...]:
    """Names of SDPBackend, the best one first; () leaves the choice to torch.

    capability: of the CUDA device, (9, 0) for Hopper. T queries over S keys, with a mask or without; learns:
    whether gradients are wanted.

    From Hopper on torch prefers cuDNN, which makes a plan for every new shape: about 65 ms on an H100. In
    training all shapes are the same and the plan is a good one. Whatever reads a text has a new length each
    time, and a token that is generated has one per layer and head split.
    """
    if learns or capability < (9, 0):
        return ()
    if masked:  # flash takes no mask
        return 'EFFICIENT_ATTENTION', 'MATH'
    if T == 1 < S or T == S:
        return 'FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH'
    return 'EFFICIENT_ATTENTION', 'MATH'  # causal with T < S is a mask to torch


def kernels_for(q, S: int, masked: bool, learns: bool):
    """The context in which attention of q (B, H, T, hs) over S keys is computed. A compiled pass has its
    shapes fixed and takes what torch chooses."""
    if q.device.type != 'cuda' or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    names = kernels(torch.cuda.get_device_capability(q.device), q.size(2), S, masked, learns)
    if not names:
        return contextlib.nullcontext()
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)
