"""Additive attention: it computes softmax-weighted running means in place of token-by-token scores, and its
cost is linear in the length.

Each token has one logit per head, and the tokens of a window are summarised by their weighted mean
(windowed_mean.py). `additive` is Fastformer (Wu et al., 2021), made causal and given windows; `leap` is its
later form. Both publish nothing to `memory`. In generation they are recurrences: the state of a layer does
not grow with the tokens seen."""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from layers.contract import Attention, Place
from layers.windowed_mean import NEVER, RunningMean, mean_flops, state_bytes, widen, windowed_mean


def window_of(window: str, place: Place) -> int:
    """The window of one layer, in tokens, 0 for global: 'auto' | 'global' | '64' | '4-8-16-32-64-0'.

    auto: 4 * 2**layer, and the last layer of the model global. Several numbers are one for each layer that
    the word of the attention string stands for."""
    if window == 'auto':
        return 4 * 2**place.layer if place.layer < place.n_layer - 1 else 0
    if window == 'global':
        return 0
    numbers = window.split('-')
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"window={window!r}: write 'auto', 'global', a number of tokens, or one for each layer joined by "
            "'-', such as '4-8-16-32-64-0' (0 is global)"
        )
    if len(numbers) not in (1, place.n_word):
        raise ValueError(f'window={window!r} names {len(numbers)} windows for {place.n_word} layers')
    return int(numbers[place.of_word if len(numbers) > 1 else 0])


class Mean(nn.Module):
    """windowed_mean with its window. It is a module so that a hook can see the logits, which explain.py
    draws."""

    def __init__(self, of: str, window: int):
        super().__init__()
        self.of, self.window = of, window

    def forward(self, logits, vectors, past: RunningMean | None = None):
        """logits (B, n_head, T), vectors (B, n_head, T, d) -> (B, n_head, T, d); past: in generation."""
        if past is not None:
            return past.mean(logits, vectors)
        return windowed_mean(logits, vectors, self.window)


class MeansCache:
    """What a layer carries from token to token: one RunningMean for each of its means."""

    rewinds = False

    def __init__(self, window: int, n: int):
        self.means = [RunningMean(window) for _ in range(n)]

    def select(self, rows):
        """Keep the sequences rows (a LongTensor of batch indices), in that order."""
        for mean in self.means:
            mean.select(rows)


class WindowedAttention(Attention):
    """What the two attentions share: their projections, their state and their cost."""

    name: str
    projections: int  # of the residual stream
    means: dict[str, int]  # what is averaged, and the size of its vectors in heads
    bounded = True
    padding = 'left'  # between tokens it would take up places in the windows

    def __init__(self, config, place: Place, *, window: str = 'auto'):
        """window: auto (4, 8, …, the last layer global) | global | tokens, for all layers or layer by
        layer."""
        super().__init__()
        window = window_of(window, place)
        self.n_head, self.head_size, self.window = config.n_head, config.head_size, window
        self.divisor = math.sqrt(config.head_size)  # of products
        self.c_attn = nn.Linear(config.n_embd, self.projections * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.mean = nn.ModuleList(Mean(of, window) for of in self.means)

    def project(self, x):
        """x (B, T, C) -> the projections, (B, n_head, T, head_size) each."""
        B, T, _ = x.shape
        y = self.c_attn(x).view(B, T, self.n_head, self.projections, self.head_size)
        return y.permute(3, 0, 2, 1, 4)  # (projections, B, n_head, T, hs)

    def dot(self, a, b):
        """Scaled products of (…, hs) with (…, hs), in fp32 whatever they are."""
        return (widen(a) * widen(b)).sum(-1) / self.divisor

    def logits(self, a, b, memory):
        """`dot` of a and b (B, n_head, T, hs) -> (B, n_head, T); padding gets a logit of NEVER."""
        logits = self.dot(a, b)
        if memory.real is None:
            return logits
        return logits.masked_fill(~memory.real[:, None, -logits.size(-1) :], NEVER)

    def output(self, y):
        """y (B, n_head, T, hs) -> (B, T, C)"""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def new_cache(self, B, max_len, device, dtype) -> MeansCache:
        """Empty state for any number of tokens. It takes its shapes from the first of them."""
        return MeansCache(self.window, len(self.means))

    def heads_produced(self) -> tuple[int, int]:
        """How many key and value heads this layer projects."""
        return self.n_head, self.n_head

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """0, because the state does not grow. Its size is `state_bytes`."""
        return 0

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of this layer's whole state for one sequence, once a window's tokens have been seen."""
        widths = [heads * self.head_size for heads in self.means.values()]
        return self.n_head * sum(state_bytes(self.window, width, itemsize) for width in widths)

    def flops_per_token(self, T: int) -> float:
        """Forward FLOPs per token of the matrix products in the means, over a sequence of T tokens; the
        elementwise products around them do not count, as with all attentions."""
        widths = [heads * self.head_size for heads in self.means.values()]
        return self.n_head * sum(mean_flops(T, self.window, width) for width in widths) / T

    def backward_flops_per_token(self, T: int) -> float:
        """The backward pass of a mean is one more mean."""
        return self.flops_per_token(T)

    def describe(self) -> str:
        window = f'window {self.window}' if self.window else 'global'
        return f'{self.name} {window}, {self.n_head} heads'


class AdditiveAttention(WindowedAttention):
    """Causal Fastformer (Wu et al., 2021, arXiv:2108.09084), per head:

    Q = mean(w_q . q, q); p = Q * k; K = mean(w_k . p, p); y = c_proj(K * v), logits over sqrt(head_size).
    Fastformer adds q to y; here the residual stream alone goes past. The two have not been compared.
    """

    name = 'additive'
    projections = 3
    means = {'queries': 1, 'keys': 1}  # noqa: RUF012

    def __init__(self, config, place: Place, **own):
        super().__init__(config, place, **own)
        # zero: every mean starts as the plain one
        self.w_q = nn.Parameter(torch.zeros(config.n_head, 1, config.head_size))
        self.w_k = nn.Parameter(torch.zeros(config.n_head, 1, config.head_size))

    def forward(self, x, memory, cache: MeansCache | None = None):
        q, k, v = self.project(x)  # (B, n_head, T, hs) each
        of_q, of_p = cache.means if cache is not None else (None, None)
        p = self.mean[0](self.logits(self.w_q, q, memory), q, of_q) * k
        u = self.mean[1](self.logits(self.w_k, p, memory), p, of_p) * v
        return self.output(u)


class LeapAttention(WindowedAttention):
    """LEAP, per head: with the focus logits a = f . k, the means K of k and V of v over the window,

    y = c_proj(sigmoid(q . K) * V), products over sqrt(head_size). Rotary positions turn q and the k averaged.
    With rescale, as in leap-transformer 1.0.1 (its default is 10): the numbers of each head of q, f, k and v
    first get mean 0 and standard deviation 1, and products are times rescale / head_size.
    """

    name = 'leap'
    rotates = True
    projections = 4
    means = {'keys and values': 2}  # noqa: RUF012 (side by side: one mean takes both)

    def __init__(self, config, place: Place, *, window: str = 'auto', rescale: float = 0.0):
        """rescale: 0 leaves q, f, k and v as they are."""
        super().__init__(config, place, window=window)
        if rescale < 0 or (rescale and self.head_size == 1):
            raise ValueError(
                f'leap(rescale={rescale:g}): give a number above 0 and heads of more than one number (n_embd='
                f'{config.n_embd} / n_head={config.n_head}), or 0'
            )
        self.rescale = rescale
        if rescale:
            self.divisor = self.head_size / rescale

    def project(self, x):
        y = super().project(x)
        if not self.rescale:
            return y
        wide = widen(y)
        std, mean = torch.std_mean(wide, dim=-1, keepdim=True)
        return ((wide - mean) / (std + 1e-5)).type_as(y)

    def describe(self) -> str:
        return super().describe() + (f', rescale {self.rescale:g}' if self.rescale else '')

    def forward(self, x, memory, cache: MeansCache | None = None):
        q, f, k, v = self.project(x)  # (B, n_head, T, hs) each
        a = self.logits(f, k, memory)  # (B, n_head, T)
        kv = torch.cat([memory.rotate(k), v], dim=-1)  # (B, n_head, T, 2 * hs)
        K, V = self.mean[0](a, kv, cache and cache.means[0]).chunk(2, dim=-1)
        gate = torch.sigmoid(self.dot(memory.rotate(q), K)).unsqueeze(-1)
        return self.output(gate.type_as(V) * V)
