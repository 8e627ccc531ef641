"""Loss and gradient of rows of logits in one pass over memory: a kernel in Triton, for CUDA.

A softmax that is scaled again as it goes (Milakov and Gimelshein, 2018) needs the logits once for its sum and
once for the gradient, which is written in their place: Liger Kernel's way (Hsu et al., 2024). On a CPU it
runs where TRITON_INTERPRET=1 was set before Triton was imported, which is how it is tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192  # logits of a row at a time


@triton.jit
def capped(x, SOFTCAP: tl.constexpr):
    """As soft_capped in loss.py: tanh(x) is 2 sigmoid(2 x) - 1."""
    return SOFTCAP * (2 * tl.sigmoid(2 * x / SOFTCAP) - 1) if SOFTCAP > 0 else x


@triton.jit
def row_kernel(logits, labels, losses, V, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits (rows, V): its loss, and its gradient in the place of the row; zeros for a label of
    -1."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V  # rows * V does not fit 32 bits
    label = tl.load(labels + row)
    largest, total = -float('inf'), 0.0  # of the logits so far; sum of exp(logit - largest)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = capped(tl.load(logits + at, mask=at < V, other=0).to(tl.float32), SOFTCAP)
        x = tl.where(at < V, x, -float('inf'))
        above = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above), 0)
        largest = above
    log_sum = largest + tl.log(total)
    own = capped(tl.load(logits + tl.maximum(label, 0)).to(tl.float32), SOFTCAP)
    tl.store(losses + row, tl.where(label >= 0, log_sum - own, 0.0))
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = capped(tl.load(logits + at, mask=at < V, other=0).to(tl.float32), SOFTCAP)
        d = tl.exp(x - log_sum) - tl.where(at == label, 1.0, 0.0)
        if SOFTCAP > 0:
            d *= 1 - (x / SOFTCAP) * (x / SOFTCAP)
        tl.store(logits + at, tl.where(label >= 0, d, 0.0).to(logits.dtype.element_ty), mask=at < V)


@torch.library.custom_op('reflex::loss_and_gradient', mutates_args=('logits',))
def loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, softcap: float) -> torch.Tensor:
    """logits (rows, V), contiguous, and labels (rows,), -1 where none counts -> losses (rows,) in fp32; the
    gradient of each row's own loss is written in the place of its logits (before softcap)."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    row_kernel[(len(logits),)](logits, labels, losses, logits.size(1), softcap, BLOCK, num_warps=16)
    return losses


@loss_and_gradient.register_fake
def _(logits, labels, softcap):
    return logits.new_empty(len(logits), dtype=torch.float32)
