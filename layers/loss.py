"""The loss of a language-model head, computed without ever holding all of its logits.

At 50304 tokens the logits of a batch are its largest tensor by far: 6.6 GB in fp32 for 32 x 1024 tokens, and
autograd keeps several of their size. Here they live one chunk of rows at a time, and the gradients of the
hidden states and of the weight are made on the spot, while the chunk is there, so that nothing is computed
twice. Ideas: "Cut Your Losses" (Wijmans et al., 2024), and gradients in the forward pass from Liger Kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from layers.windowed_mean import without_autocast

# Rows of logits held at a time, or LOGITS if those are more: few enough to reuse their memory, enough that
# adding up the weight's gradient, once per chunk, does not show. CPU: 1.2 to 2 times as fast as all at once.
ROWS = {'cpu': 512, 'cuda': 2048}
LOGITS = 2**20
FUSED = 'layers.fused_loss'  # imports triton; an exported model, whose code is one file, goes without it
FUSED_ROWS = 8192  # where one kernel makes loss and gradient: on an H100 a step takes 41.8 ms, with 2048 46.8


@torch.compiler.assume_constant_result
def fused_works(device: str) -> bool:
    """Whether Triton is here and its kernel computes on this device what it should: tried once per process on
    a few rows, so that a compiler or a card it does not suit costs a warning, and not the training."""
    return _tried(device)


@functools.cache
def _tried(device: str) -> bool:
    if device != 'cuda' or not all(map(importlib.util.find_spec, ('triton', 'layers', FUSED))):
        return False
    try:
        return _kernel_is_right(device)
    except Exception as e:  # whatever Triton, its compiler or the driver raise
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        warnings.warn(f'the fused loss does not run here, another way is taken: {reason}', stacklevel=2)
        return False


def _kernel_is_right(device: str) -> bool:
    """The kernel's losses and gradients of a few rows against those of F.cross_entropy; False with a warning
    where they differ."""
    loss_and_gradient = importlib.import_module(FUSED).loss_and_gradient
    with without_autocast(device), torch.enable_grad():
        numbers = torch.arange(5 * 9001, device=device, dtype=torch.float32).view(5, 9001)
        logits = (4 * torch.sin(numbers)).to(torch.bfloat16)
        labels = torch.tensor([0, 9000, -1, 17, 8192], device=device)
        exact = logits.float().requires_grad_()
        wanted = F.cross_entropy(exact, labels, ignore_index=-1, reduction='none')
        (gradient,) = torch.autograd.grad(wanted.sum(), exact)
        found = loss_and_gradient(logits, labels, 0.0)
    right = torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    right = right and torch.allclose(logits.float(), gradient, rtol=1e-2, atol=1e-5)
    if not right:
        warnings.warn('the fused loss computes something else here: another way is taken', stacklevel=2)
    return right


def way(device: str, dtype, triton: bool, compiling: bool) -> str:
    """How the loss of many rows is made: 'fused' (one kernel for loss and gradient, in chunks), 'whole' (all
    rows at once, which inductor fuses) or 'chunks'. dtype: of the logits; triton: whether the kernel works
    here; compiling: whether torch.compile is at work."""
    if device != 'cuda':
        return 'chunks'
    if triton and dtype in (torch.bfloat16, torch.float16):
        return 'fused'
    return 'whole' if compiling else 'chunks'


def soft_capped(logits, softcap: float):
    """softcap * tanh(logits / softcap), in fp32 at least (Gemma 2, 2024); as they are where softcap is 0."""
    if not softcap:
        return logits
    return softcap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)


def linear_cross_entropy(
    hidden, weight, targets, ignore_index: int = -1, rows: int | None = None, softcap: float = 0.0
):
    """Mean cross-entropy of the logits hidden @ weight.T, as F.cross_entropy(..., ignore_index) gives it.

    hidden (..., C), weight (V, C), targets (...) of token ids; rows: of logits held at a time; softcap: see
    soft_capped. Products run in the autocast type where autocast is on; softmax, the sum of losses and that
    of the weight's gradient in fp32 at least. Returns a scalar; nan, as F.cross_entropy, where no target
    counts.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    N, V, device = hidden.size(0), weight.size(0), hidden.device.type
    autocast = device != 'meta' and torch.is_autocast_enabled(device)  # meta tensors know no autocast
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    how = way(device, dtype, fused_works(device), torch.compiler.is_compiling())
    if rows is None:
        some = {'fused': FUSED_ROWS, 'whole': N, 'chunks': ROWS.get(device, ROWS['cuda'])}[how]
        rows = max(some, LOGITS // V)
    if N <= rows:
        logits = soft_capped(F.linear(hidden, weight), softcap)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(exact), targets, ignore_index=ignore_index)
    if torch.is_grad_enabled():
        fused = how == 'fused'
        return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, rows, dtype, softcap, fused)
    return _chunked(hidden, weight, targets, ignore_index, rows, dtype, softcap, False, False)[0]


def log_p(hidden, weight, targets, softcap: float = 0.0):
    """hidden (N, C), weight (V, C), targets (N,) of token ids -> the log-probability (N,) of each target, in
    fp32 at least; softcap as of linear_cross_entropy. The logits of some rows at a time are made once more
    for the gradient."""

    def of_some(hidden, targets):
        logits = soft_capped(F.linear(hidden, weight), softcap)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return -F.cross_entropy(logits.to(exact), targets, reduction='none')

    rows = max(ROWS.get(hidden.device.type, ROWS['cuda']), LOGITS // weight.size(0))
    if hidden.size(0) <= rows:
        return of_some(hidden, targets)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(of_some, h, t, use_reentrant=False) for h, t in pieces])


def log_mixture(log_p, shares):
    """Log-probabilities log_p (n, ...) and shares of at least 0, likewise, whose sum over n is 1 -> the log
    (...) of the mixture of the probabilities. A share of 0 has its gradient too, and its log_p may be
    -inf."""
    most = (log_p + shares.log()).detach().amax(0)
    return most + (shares * (log_p - most).clamp(max=80).exp()).sum(0).log()  # the sum is at least 1


def _chunked(hidden, weight, targets, ignore_index, rows, dtype, softcap, grad_hidden, grad_weight):
    """(mean loss, gradient of the summed loss for hidden, the same for weight, number of targets counted)."""
    exact = torch.promote_types(dtype, torch.float32)
    w = weight.to(dtype)
    counted = targets != ignore_index
    labels = targets.masked_fill(~counted, 0)
    total = hidden.new_zeros((), dtype=exact)
    d_hidden = torch.empty_like(hidden, dtype=dtype) if grad_hidden else None
    d_weight = torch.zeros_like(weight, dtype=exact) if grad_weight else None
    for i in range(0, hidden.size(0), rows):
        h = hidden[i : i + rows].to(dtype)
        label, keep = labels[i : i + rows, None], counted[i : i + rows, None]
        logits = soft_capped(h @ w.t(), softcap)  # (rows, V)
        log_p = F.log_softmax(logits, dim=-1, dtype=exact)
        total -= log_p.gather(1, label).masked_fill(~keep, 0).sum()
        if not (grad_hidden or grad_weight):
            continue
        # of one loss, not of the mean: the mean's are so small that fp16 would lose them
        d_logits = log_p.exp_().scatter_add_(1, label, torch.full_like(label, -1, dtype=exact))
        if softcap:
            d_logits *= 1 - (logits / softcap).square()
        d_logits = d_logits.to(dtype)
        if grad_hidden:
            d_hidden[i : i + rows] = (d_logits @ w) * keep
        if grad_weight:
            d_weight += d_logits.t() @ (h * keep)
    count = counted.sum()
    return total / count, d_hidden, d_weight, count


def _fused(hidden, weight, targets, ignore_index, rows, dtype, softcap, grad_hidden, grad_weight):
    """As _chunked, which needs half a dozen passes over the logits where one kernel needs two."""
    loss_and_gradient = importlib.import_module(FUSED).loss_and_gradient
    exact = torch.promote_types(dtype, torch.float32)
    w, counted = weight.to(dtype), targets != ignore_index
    labels = targets.masked_fill(~counted, -1)
    total = hidden.new_zeros((), dtype=exact)
    d_hidden = torch.empty_like(hidden, dtype=dtype) if grad_hidden else None
    d_weight = torch.zeros_like(weight, dtype=exact) if grad_weight else None
    with without_autocast(hidden.device.type):  # it would cast the sum, too
        for i in range(0, hidden.size(0), rows):
            h = hidden[i : i + rows].to(dtype)
            d_logits = h @ w.t()  # (rows, V), logits until the next line
            total += loss_and_gradient(d_logits, labels[i : i + rows], softcap).sum()
            if grad_hidden:
                d_hidden[i : i + rows] = d_logits @ w
            if grad_weight:
                d_weight = add_product(d_weight, d_logits.t(), h)
    count = counted.sum()
    return total / count, d_hidden, d_weight, count


def add_product(total, a, b):
    """total (n, m), fp32, and a (n, k) @ b (k, m), of 16 bits: on CUDA the product adds to it as it is made,
    where it would else be written, read again and added, 154 MB of fp32 each time at 50304 x 768."""
    if total.device.type == 'cuda' and total.dtype != a.dtype:
        return torch.addmm(total, a, b, out_dtype=total.dtype)
    return total + a @ b


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, rows, dtype, softcap, fused):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss, d_hidden, d_weight, count = (_fused if fused else _chunked)(
            hidden, weight, targets, ignore_index, rows, dtype, softcap, need_hidden, need_weight
        )
        ctx.save_for_backward(d_hidden, d_weight, count)
        ctx.types = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight, count = ctx.saved_tensors
        scale = grad / count
        if d_hidden is not None:
            d_hidden = d_hidden.to(ctx.types[0]) * scale
        if d_weight is not None:
            d_weight = (d_weight * scale).to(ctx.types[1])
        return d_hidden, d_weight, None, None, None, None, None, None
