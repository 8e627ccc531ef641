"""The causal windowed weighted mean. Its cost is linear in the length, and it subtracts no sums from one
another, so that nothing can cancel.

    mean_i = sum_l exp(a_l) x_l / sum_l exp(a_l),    l from max(0, i - window + 1) to i

Every sum is kept as a pair (m, s), worth exp(m) s, with m the largest logit in it: no logit overflows. Time
is divided into chunks of CHUNK tokens. A window consists of the tail of one chunk, of whole chunks, and of
the head of the chunk that i is in. Head and tail are masked matrix products of two chunks. The whole chunks
are the same problem again, with one sum per chunk and a window counted in chunks. These are the suffix and
prefix of van Herk (1992) and Gil and Werman (1993) with chunks of fixed size, and the rescaling of online
softmax (Milakov and Gimelshein, 2018). The work per token depends neither on the window nor on the length.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F

from layers.contract import captured

CHUNK = 16  # tokens; 8 and 32 are no faster on a CPU
NEVER = -1e30  # the logit of what is not there; finite, because inf - inf is not a number
FLOOR = -80.0  # exp of less is slow on CPUs (denormal numbers) and far below what fp32 adds to 1


def windowed_mean(logits, vectors, window: int = 0):
    """The means of `vectors`, weighted by exp(logits), over the last `window` tokens up to each token itself.

    logits (..., T), vectors (..., T, d), any float types; window in tokens, 0: all tokens so far. Returns
    (..., T, d) in the type of `vectors`; sums are fp32 at least, under autocast too, their products TF32
    where torch is told so (train.py does on CUDA; errors are about 3e-4 then). Differentiable once.
    """
    if logits.shape != vectors.shape[:-1]:
        raise ValueError(
            f'logits {tuple(logits.shape)} and vectors {tuple(vectors.shape)} do not belong together'
        )
    if window < 0:
        raise ValueError(f'window={window}: must be a number of tokens, or 0 for all so far')
    return (masked_mean if captured() else WindowedMean.apply)(logits, vectors, window)


def masked_mean(logits, vectors, window: int = 0):
    """The same by its definition, with weights (..., T, T): how many chunks there are depends on T."""
    T = logits.size(-1)
    at = torch.arange(T, device=logits.device)
    age = at[:, None] - at  # of token j for token i, (T, T)
    sees = (age >= 0) & (age < window) if window else age >= 0
    weights = widen(logits)[..., None, :].masked_fill(~sees, NEVER).softmax(-1)  # (..., T, T)
    return (weights @ widen(vectors)).type_as(vectors)


class WindowedMean(torch.autograd.Function):
    """Backward is the same sum, run backwards in time. Token l has weight exp(a_l - m_i) / s_i in mean i, so

        dx_l = exp(a_l) sum_i exp(-m_i) (g_i / s_i),    i from l to l + window - 1

    and da_l = dx_l . x_l less the same sum over (g_i . mean_i) / s_i. Nothing of size T x CHUNK is saved.
    """

    @staticmethod
    def forward(ctx, logits, vectors, window):
        with without_autocast(logits.device.type):
            x = with_weight(widen(vectors))  # (..., T, d + 1)
            m, s = window_sums(logits.to(x.dtype), x, window)
            weight = s[..., -1:].clone()  # a view would keep all of s
            mean = s[..., :-1] / weight  # (..., T, d)
        ctx.save_for_backward(logits, vectors, m, weight, mean)
        ctx.window = window
        return mean.to(vectors.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, vectors, m, weight, mean = ctx.saved_tensors
        with without_autocast(logits.device.type):
            g = with_weight(grad.to(mean.dtype))  # (..., T, d + 1)
            g[..., -1] = (grad * mean).sum(-1)
            g /= weight
            m, s = window_sums(-m, g, ctx.window, backwards=True)
            s *= safe_exp(m.add_(logits)).unsqueeze(-1)
            grad_vectors = s[..., :-1]
            grad_logits = (vectors * grad_vectors).sum(-1) - s[..., -1]
        return grad_logits.to(logits.dtype), grad_vectors.to(vectors.dtype), None


class RunningMean:
    """`windowed_mean` of tokens that arrive a few at a time: its whole memory does not grow with them.

    It holds the last window - 1 tokens; without a window one entry, the (max, weighted sum, weight) of all so
    far, which counts as a token whose vector is the sum.
    """

    def __init__(self, window: int):
        self.window = window
        self.logits = self.vectors = None

    def mean(self, logits, vectors):
        """logits (..., T), vectors (..., T, d), the tokens after those seen -> their means (..., T, d).

        Gradients reach these tokens and end at what is held of those before them.
        """
        if torch.is_grad_enabled() and (logits.requires_grad or vectors.requires_grad):
            mean = self.differentiable(logits, vectors)
            with torch.no_grad():
                self.mean(logits, vectors)  # which holds them for the next tokens
            return mean
        T, window, kind = logits.size(-1), self.window, vectors.dtype
        logits = widen(logits)
        if window == 0:
            vectors = with_weight(widen(vectors))
        if self.logits is not None:
            logits = torch.cat([self.logits, logits], dim=-1)
            vectors = torch.cat([self.vectors, vectors], dim=-2)
        if window:
            keep = max(0, logits.size(-1) - window + 1)
            self.logits, self.vectors = logits[..., keep:].clone(), vectors[..., keep:, :].clone()
            vectors = with_weight(widen(vectors))
        with without_autocast(logits.device.type):
            if T == 1:  # the last mean is one sum over everything held
                m, s = total(logits, vectors)
                m, s = m.unsqueeze(-1), s.unsqueeze(-2)  # (..., 1), (..., 1, d + 1)
            else:
                m, s = window_sums(logits, vectors, window)
                m, s = m[..., -T:], s[..., -T:, :]
        if window == 0:
            self.logits, self.vectors = m[..., -1:].clone(), s[..., -1:, :].clone()
        return (s[..., :-1] / s[..., -1:]).to(kind)

    def differentiable(self, logits, vectors):
        """What `mean` gives, by windowed_mean; holds nothing."""
        if self.logits is None:
            return windowed_mean(logits, vectors, self.window)
        held_logits, held = self.logits, self.vectors
        if self.window == 0:  # all tokens so far as one: their mean, with the logarithm of their weight
            weight = held[..., -1:]  # (..., 1, 1)
            held_logits, held = held_logits + weight.squeeze(-1).log(), held[..., :-1] / weight
        logits = torch.cat([held_logits, widen(logits)], dim=-1)
        vectors = torch.cat([held.type_as(vectors), vectors], dim=-2)
        return windowed_mean(logits, vectors, self.window)[..., held.size(-2) :, :]

    def select(self, rows):
        """Keep the sequences rows (a LongTensor of batch indices), in that order."""
        if self.logits is not None:
            self.logits, self.vectors = self.logits[rows], self.vectors[rows]


def state_bytes(window: int, width: int, itemsize: int) -> int:
    """Bytes that a RunningMean of vectors (width,) of itemsize bytes holds, for one sequence and head."""
    return (window - 1) * (width * itemsize + 4) if window else 4 * (width + 2)


def widen(x):
    """x in fp32, or as it is if wider: no sum is kept in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(device_type: str):
    """Inside, matrix products keep the type of their factors."""
    known = torch.amp.is_autocast_available(device_type)  # not on meta
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


def with_weight(x):
    """(..., d) -> (..., d + 1): a vector and its weight, 1, so that one product sums both."""
    return F.pad(x, (0, 1), value=1.0)


def safe_exp(z):
    """exp in place of z <= 0."""
    return z.clamp_(min=FLOOR).exp_()


def total(a, x):
    """Sum of all: a (..., c), x (..., c, e) -> m (...), s (..., e), worth exp(m) s."""
    m = a.amax(-1)
    return m, (safe_exp(a - m.unsqueeze(-1)).unsqueeze(-2) @ x).squeeze(-2)


def reach(T: int, window: int):
    """Which chunks a window covers, by how many chunks back: those covered in part, and how many in full
    (the nearest, from 1 back). T and window in tokens."""
    if window == 0 or window >= T:
        return [0], -(-T // CHUNK) - 1
    n, chunks = -(-T // CHUNK), window // CHUNK
    parts = {0, chunks, chunks + 1} if window % CHUNK else {0, chunks}
    return sorted(part for part in parts if part < n), min(chunks, n) - 1


def window_sums(a, x, window: int, backwards: bool = False):
    """Sums over windows, as pairs worth exp(m) s: a (..., T), x (..., T, e) -> m (..., T), s (..., T, e).

    backwards: token i sums over i to i + window - 1 in place of i - window + 1 to i.
    """
    shape, T, n = a.shape[:-1], a.size(-1), -(-a.size(-1) // CHUNK)
    parts, full = reach(T, window)
    if n * CHUNK > T:
        a, x = F.pad(a, (0, n * CHUNK - T), value=NEVER), F.pad(x, (0, 0, 0, n * CHUNK - T))
    a = a.reshape(-1, n, CHUNK)  # (N, n, c), N = B * n_head
    x = x.reshape(-1, n, CHUNK, x.size(-1))  # (N, n, c, e)

    def ends(back):
        """Slices over chunks: the ones read, and the ones `back` chunks on that read them."""
        early, late = (slice(None), slice(0, n - back)), (slice(None), slice(back, n))
        return (late, early) if backwards else (early, late)

    time = torch.arange(CHUNK, device=a.device)
    age = (
        time - time.unsqueeze(1) if backwards else time.unsqueeze(1) - time
    )  # of token j for token i, (c, c)
    scores, seen = [], []
    for back in parts:
        source, target = ends(back)
        ages = age + back * CHUNK
        sees = (ages >= 0) & (ages < (window or T))
        seen.append(sees.to(a.dtype))
        # not by adding NEVER: backwards, a query of nothing but padding has logit -NEVER
        scores.append(torch.where(sees, a[source].unsqueeze(-2), NEVER))  # (N, n - back, c, c)
        if back == 0:
            m = scores[0].amax(-1)  # (N, n, c)
        else:
            m[target] = torch.maximum(m[target], scores[-1].amax(-1))
    if full > 0:
        source, target = ends(1)
        whole_m, whole_s = total(a, x)  # (N, n), (N, n, e)
        whole_m, whole_s = window_sums(whole_m[source], whole_s[source], full, backwards)
        m[target] = torch.maximum(m[target], whole_m.unsqueeze(-1))
    for back, z, see in zip(parts, scores, seen, strict=True):
        source, target = ends(back)
        p = safe_exp(z.sub_(m[target].unsqueeze(-1))).mul_(see)  # an unseen token's weight is exactly 0
        if back == 0:
            s = p @ x  # (N, n, c, e)
        else:
            s[target].add_(p @ x[source])
    if full > 0:
        source, target = ends(1)
        carried = safe_exp(whole_m.unsqueeze(-1) - m[target])  # (N, n - 1, c)
        s[target].addcmul_(carried.unsqueeze(-1), whole_s.unsqueeze(-2))
    return m.flatten(1)[:, :T].unflatten(0, shape), s.flatten(1, 2)[:, :T].unflatten(0, shape)


def mean_flops(T: int, window: int, width: int) -> int:
    """FLOPs of the matrix products of one windowed_mean of T vectors (width,), forward; backward as many."""
    n = -(-T // CHUNK)
    parts, full = reach(T, window)
    flops = sum(2 * (n - back) * CHUNK * CHUNK * (width + 1) for back in parts)
    if full > 0:
        flops += 2 * n * CHUNK * (width + 1) + mean_flops(n - 1, full, width)
    return flops
