"""Attention over depth: a query also asks the keys that earlier layers have made for its own token."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from layers.contract import Memory, Place
from layers.heads import HeadPlanAttention, KVCache, ReadCache, attend, join


def at_tokens(published, T: int):
    """(keys, values) of the last T tokens, lists of (B, n_head, T, hs), of layers that have published them
    whole."""
    pairs = [(join(keys)[:, :, -T:], join(values)[:, :, -T:]) for keys, values in published]
    return [k for k, _ in pairs], [v for _, v in pairs]


def scores_of(q, keys):
    """q (B, n_head, T, hs) · each of keys, at the same token: (B, n_head, T, len(keys)), in fp32 at least."""
    exact = torch.promote_types(q.dtype, torch.float32)
    return torch.stack([(q * k).sum(-1, dtype=exact) for k in keys], dim=-1) * q.size(3) ** -0.5


def mixed(weights, values):
    """Σ_j weights (B, n_head, T, j) · values[j] (B, n_head, T, hs)"""
    return sum(w.to(v.dtype) * v for w, v in zip(weights.split(1, dim=3), values, strict=True))


class DepthAttention(HeadPlanAttention):
    """Before tokens are read, each token's values are mixed over depth: its query asks the keys of earlier
    layers and its own, at this token, and the mix of their values takes the place of its values, for later
    layers too: Depth-Attention (Zeng et al., 2026, arXiv:2606.05014).

    No parameters. A token's mix depends on that token alone: the cache holds it, and is vanilla's."""

    mixes_earlier = True
    reads_all = True

    def __init__(self, config, place: Place, *, every: int = 0, **own):
        """every: which earlier layers, among those with keys and values: 0, every, 2 * every, …; 0: half as
        many as there are, as published."""
        super().__init__(config, place, **own)
        if every < 0:
            raise ValueError(f'depth_attention(every={every}): a number of layers, or 0 for half of them')
        every = every or max(1, len(place.plan.heads) // 2)
        self.sources = list(range(0, place.planned, every))
        self.description += f', values mixed with those of layers {" ".join(map(str, self.sources))}'

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        keys, values = at_tokens([memory.published[l] for l in self.sources], k.size(2))
        weights = scores_of(memory.queries, [*keys, k]).softmax(-1)  # (B, n_head, T, sources + 1)
        return super().read(k, mixed(weights, [*values, v]), memory, cache)


class MixtureOfDepthsAttention(HeadPlanAttention):
    """One softmax over sequence and depth: a token reads the tokens before it in this layer and, at its own
    place, the keys and values of every earlier layer: mixture-of-depths attention (Zhu et al., 2026,
    arXiv:2603.15619), without its projections of what MLPs put out, so without parameters.

    In one call of the usual kernel. What a query finds over depth is one more key, whose score is the
    log-sum of its scores there: two more numbers of a query hold it, in which no other key has anything. How
    much weight that key got comes back in one more number of the values. Dropout takes depth as one."""

    mixes_earlier = True
    reads_all = True
    MORE = 8  # numbers of a head beside its own, as many as kernels for GPUs want; three are used

    def __init__(self, config, place: Place, **own):
        super().__init__(config, place, **own)
        self.description += f', one softmax with the layers below at the same token: {place.planned}'

    def attend(self, q, k, v, memory: Memory, cache: KVCache | None):
        T = q.size(2)
        keys, values = at_tokens(memory.published[:-1], T)
        scores = scores_of(q, keys)  # (B, n_head, T, layers below)
        k, v = join(k), join(v)  # (B, n_head, S, hs) each
        if isinstance(cache, ReadCache):
            if memory.at is None:
                k, v = cache.append(k, v)
            else:
                k, v = cache.put(k, v, memory.at, len(memory.places))
        mask, dropout_p = self.mask(q, k, memory), self.dropout if self.training else 0.0
        if T > 1 and memory.weights is None:
            return self.attend_at_once(q, k, v, mask, dropout_p, scores, values)
        y, weights = attend_over_both(q, k, v, mask, dropout_p, scores, values)
        if memory.weights is not None:
            memory.weights.append(weights)
        return y

    def attend_at_once(self, q, k, v, mask, dropout_p, scores, values):
        """attend_over_both, without its T x S weights."""
        (T, hs), S = q.shape[2:], k.size(2)
        if mask is None and T < S:
            mask = q.new_ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
        total = scores.logsumexp(-1, keepdim=True) * hs**0.5  # (B, n_head, T, 1)
        high = total.to(q.dtype)
        q = torch.cat([q, high, (total - high).to(q.dtype), q.new_zeros(*q.shape[:3], self.MORE - 2)], dim=3)
        one = F.pad(q.new_zeros(self.MORE), (hs, 0))  # a head, (hs + MORE,)
        asked, told = one.clone(), one.clone()
        asked[hs : hs + 2] = told[hs] = 1
        k, v = (
            torch.cat([first.expand(*x.shape[:2], 1, -1), F.pad(x, (0, self.MORE))], dim=2)
            for first, x in ((asked, k), (told, v))
        )  # (B, n_head, 1 + S, hs + MORE) each
        if mask is None:  # a query more, so that causal means: up to its own token
            q = F.pad(q, (0, 0, 1, 0))
        else:
            mask = F.pad(mask, (1, 0), value=True)
        y = attend(q, k, v, mask, dropout_p, scale=hs**-0.5)[:, :, -T:]
        return y[..., :hs] + mixed(scores.softmax(-1), values) * y[..., hs : hs + 1]

    def flops_per_token(self, T: int) -> float:
        if T == 1:
            return super().flops_per_token(T)
        return 2 * 2 * (T + 1) ** 2 / T * self.n_head * (self.head_size + self.MORE)


def attend_over_both(q, k, v, mask, dropout_p, scores, values):
    """Attention of q (B, H, T, hs) over tokens k, v (B, H, S, hs), as mask (…, T, S) says, else causal, and
    over depth, scores (B, H, T, D) and values, D of (B, H, T, hs), in one softmax -> (what is read, the
    weights of tokens (B, H, T, S) before dropout)."""
    T, S = q.size(2), k.size(2)
    if mask is None:
        mask = q.new_ones(T, S, dtype=torch.bool).tril(S - T)
    over_tokens = (q @ k.mT).to(scores.dtype) * q.size(3) ** -0.5
    both = torch.cat([over_tokens.masked_fill(~mask, -math.inf), scores], dim=3)  # (B, H, T, S + D)
    weights = both.softmax(-1).type_as(v)
    kept = F.dropout(weights, dropout_p)
    return kept[..., :S] @ v + mixed(kept[..., S:], values), weights[..., :S]
