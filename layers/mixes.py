"""Head plans with one more step: mixes of what earlier layers have computed, other inputs, or other
outputs."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.contract import Memory, Place
from layers.heads import HeadPlanAttention, KVCache, join
from layers.windowed_mean import widen


class ValueResidualAttention(HeadPlanAttention):
    """Values are λ v_l + (1 - λ) v_0, of this layer and of layer 0, with a learned λ per layer that starts at
    0.5: the learnable ResFormer (Zhou et al., 2024, arXiv:2410.17897).

    Heads that the plan lets take layer 0's values as they are mix nothing.
    """

    mixes_earlier = True

    def __init__(self, config, place: Place, **own):
        super().__init__(config, place, **own)
        made, mixed = place.plan.values[0], place.plan.values[place.planned]
        missing = sorted(set(mixed) - set(made))
        if missing:
            raise ValueError(
                f'a value residual mixes head by head, but layer 0 makes no values for heads {missing}, which'
                f' layer {place.planned} makes; let heads of layer 0 read them'
            )
        self.first = [made.index(h) for h in mixed]  # among the values of layer 0
        self.own_share = nn.Parameter(torch.tensor(0.5))  # λ
        self.description += ', value residual'

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        _, first = memory.published[0]  # pieces (B, heads, S, hs), S >= T, that are all values of layer 0
        first = join([piece[:, :, -v.size(2) :] for piece in first])
        as_they_are = self.first == list(range(self.n_value))
        first = first[:, : self.n_value] if as_they_are else first[:, self.first]  # (B, n_value, T, hs)
        v = self.own_share * v + (1 - self.own_share) * first
        return super().read(k, v, memory, cache)


class LimeAttention(HeadPlanAttention):
    """Head h reads Σ_j R[h, j] k_j and Σ_j R[h, j] v_j over all heads j of this and all earlier layers, R
    a learned matrix per layer: the static router of LIMe (Gerasimov et al., 2025, arXiv:2502.09245).

    A token's mix depends on that token alone: the cache holds what is read, and layers publish new tokens.
    """

    mixes_earlier = True
    published_past = False
    reads_all = True

    def __init__(self, config, place: Place, **own):
        super().__init__(config, place, **own)
        self.router = nn.Parameter(torch.empty(self.n_head, (place.planned + 1) * self.n_head))
        self.description += ', static router'

    def init_own(self, generator):
        """As published: the own heads as they are, and uniform noise of variance 1 / (number of heads)."""
        bound = math.sqrt(3 / self.router.size(1))
        self.router.copy_(torch.empty(self.router.shape).uniform_(-bound, bound, generator=generator))
        self.router[:, -self.n_head :] = torch.eye(self.n_head)

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        T = k.size(2)
        memory.published.append(((k,), (v,)))
        pairs = [(join(keys), join(values)) for keys, values in memory.published]
        kv = [torch.cat([k[:, :, -T:], v[:, :, -T:]], dim=3) for k, v in pairs]
        kv = torch.cat(kv, dim=1)  # (B, (layer + 1) * n_head, T, 2 * hs)
        k, v = torch.einsum('hj,bjtd->bhtd', self.router, kv).chunk(2, dim=3)  # (B, n_head, T, hs) each
        k, v = (k, v) if cache is None else cache.append(k, v)
        return [k], [v]

    def flops_per_token(self, T: int) -> int:
        return super().flops_per_token(T) + 2 * self.router.numel() * 2 * self.head_size


class LearnedSplitAttention(HeadPlanAttention):
    """Each head reads its own index of every layer so far, in learned proportions, for keys and values apart:
    a head split whose allocation over layers training finds, to be read from the weights (`shares`).

    Half of a head's share is the layer's own at first, the rest is spread evenly. Cache as in LimeAttention.
    """

    mixes_earlier = True
    published_past = False
    reads_all = True

    def __init__(self, config, place: Place, **own):
        super().__init__(config, place, **own)
        logits = torch.zeros(2, place.planned + 1, self.n_head)
        logits[:, place.planned] = math.log(place.planned)
        self.allocation = nn.Parameter(logits.flatten())  # a vector: weight decay would even the shares out
        self.description += ', learned split'

    def shares(self):
        """(2, layers so far, n_head): of keys and of values, what share of a layer each head reads."""
        return self.allocation.view(2, -1, self.n_head).softmax(dim=1)

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        T = k.size(2)
        memory.published.append(((k,), (v,)))
        of_keys, of_values = self.shares().type_as(k)[..., None, None]  # (layers so far, n_head, 1, 1) each
        pairs = [(join(keys)[:, :, -T:], join(values)[:, :, -T:]) for keys, values in memory.published]
        k = sum(share * k for share, (k, _) in zip(of_keys, pairs, strict=True))  # (B, n_head, T, hs)
        v = sum(share * v for share, (_, v) in zip(of_values, pairs, strict=True))
        k, v = (k, v) if cache is None else cache.append(k, v)
        return [k], [v]


class MidpointAttention(HeadPlanAttention):
    """Keys and values are this layer's own projections, but of what an earlier layer had as its input.

    A lagged head of a plan reads keys that were trained for another layer's queries; here the reader has its
    own.
    """

    def __init__(self, config, place: Place, *, layer: int = 2, **own):
        """layer: whose input; layers up to it are plain self-attention."""
        super().__init__(config, place, **own)
        if not 0 <= layer < config.n_layer - 1:
            raise ValueError(
                f'midpoint(layer={layer}): from 0 to {config.n_layer - 2} of n_layer={config.n_layer}'
            )
        last = place.layer - place.of_word + place.n_word - 1  # of the layers of this word
        if last <= layer:
            raise ValueError(
                f'midpoint(layer={layer}): none of its layers is above it; the last one is {last}'
            )
        self.source = layer if place.layer > layer else None
        if self.source is not None:
            self.description += f', keys and values from the input of layer {layer}'

    def project(self, x, memory: Memory):
        if self.source is None:
            return super().project(x, memory)
        rows = self.n_head * self.head_size  # of the queries
        weight, bias = self.c_attn.weight, self.c_attn.bias
        parts = [
            F.linear(of, weight[part], None if bias is None else bias[part])
            for of, part in ((x, slice(0, rows)), (memory.inputs[self.source], slice(rows, None)))
        ]
        return self.split(torch.cat(parts, dim=2), memory)


class ExclusiveAttention(HeadPlanAttention):
    """What a token reads, minus the part along its own value: y - (y · v / |v|²) v, so that attention
    brings only what the residual stream does not have yet (Zhai, 2026, arXiv:2603.09078)."""

    def __init__(self, config, place: Place, **own):
        super().__init__(config, place, **own)
        self.description += ', exclusive'

    def attend(self, q, k, v, memory: Memory, cache: KVCache | None):
        y = super().attend(q, k, v, memory, cache)
        own = join([piece[:, :, -q.size(2) :] for piece in v])  # (B, n_head, T, hs)
        along, size = ((widen(a) * widen(own)).sum(-1, keepdim=True) for a in (y, own))
        return y - (along / size.clamp(min=1e-12) * own).type_as(y)
