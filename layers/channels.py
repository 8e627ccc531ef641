"""Multi-channel blocks: several attentions and MLPs side by side on one residual stream, merged
elementwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn

from layers.contract import Counted, Memory, Place
from layers.heads import HeadPlanAttention, KVCache
from layers.mlps import MLPS
from layers.norms import NORMS
from layers.plans import Head, HeadPlan


class ChannelLinear(nn.Linear):
    """A linear layer for each of s channels: (s, …, d_in) -> (s, …, d_out). One above the other in weight."""

    def __init__(self, channels: int, d_in: int, d_out: int, bias: bool):
        super().__init__(d_in, channels * d_out, bias=bias)
        self.channels = channels
        self.matrix_rows = [d_out] * channels

    def forward(self, x):
        weight = self.weight.unflatten(0, (self.channels, -1)).transpose(1, 2)  # (s, d_in, d_out)
        y = torch.bmm(x.flatten(1, -2), weight)  # (s, …, d_in) -> (s, N, d_out)
        if self.bias is not None:
            y = y + self.bias.view(self.channels, 1, -1)
        return y.unflatten(1, x.shape[1:-1])


class ChannelAttention(HeadPlanAttention):
    """s multi-head attentions over one sequence side by side, as s * n_head heads: y (s, B, T, n_embd)."""

    def __init__(self, config, channels: int, shared_kv: bool):
        n = config.n_head
        reads = [h % n if shared_kv else h for h in range(channels * n)]
        plan = HeadPlan([[Head((0, h), (0, h)) for h in reads]], channels * n)
        super().__init__(config, Place(plan=plan))
        self.channels = channels
        self.c_attn.matrix_rows = [config.n_embd] * (channels + 2 * (1 if shared_kv else channels))
        self.c_proj = ChannelLinear(channels, config.n_embd, config.n_embd, bias=config.bias)
        self.description = f'{channels} channels' + (' of shared keys and values' if shared_kv else '')

    def forward(self, x, memory: Memory, cache: KVCache | None = None):
        return super().forward(x, Memory(memory.rotate), cache)  # publishes nothing to other layers

    def output(self, y):
        """y (B, s * n_head, T, hs) -> (s, B, T, n_embd)"""
        y = y.unflatten(1, (self.channels, -1)).permute(1, 0, 3, 2, 4).flatten(3)  # (s, B, T, n_head * hs)
        return self.resid_dropout(self.c_proj(y))


def soften(y):
    """(s, …) -> (…): each number the softmax-weighted mean of its channels."""
    return (y.softmax(dim=0) * y).sum(dim=0)


MERGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'softmax': soften,
    'max': lambda y: y.amax(dim=0),
    'mean': lambda y: y.mean(dim=0),
}


class ChannelBlock(Counted):
    """In the place of a Block: s channels, each with an attention and an MLP of its own on the residual
    stream; merged elementwise by a convex combination. Shared MLPs serve all channels, beside their own."""

    def __init__(self, config, hierarchy):
        """config: of the stack's blocks, as a GPT's; hierarchy: of the whole model, for what concerns
        channels."""
        super().__init__()
        s, shared = hierarchy.channels, hierarchy.channel_shared_mlps
        hidden = round(hierarchy.channel_mlp * 4 * config.n_embd / s)
        self.channels, self.merge = s, MERGES[hierarchy.channel_merge]
        self.ln_1 = NORMS[config.norm](config.n_embd, bias=config.bias)
        self.attn = ChannelAttention(config, s, hierarchy.channel_shared_kv)
        self.ln_2 = NORMS[config.norm](config.n_embd, bias=config.bias)
        self.mlp = MLPS[config.mlp](config, hidden, partial(ChannelLinear, s))
        # the sum of several MLPs is one as wide as all
        self.shared_mlp = MLPS[config.mlp](config, shared * hidden) if shared else None

    def forward(self, x, memory: Memory, cache: KVCache | None = None):
        y = x + self.attn(self.ln_1(x), memory, cache)  # (s, B, T, C)
        normed = self.ln_2(y)
        z = y + self.mlp(normed)
        if self.shared_mlp is not None:
            z = z + self.shared_mlp(normed)
        return self.merge(z)  # (B, T, C)

    def flops_per_token(self, T: int) -> int:
        """Beyond its linear layers, each once, and its attention: all channels use the shared MLPs."""
        if self.shared_mlp is None:
            return 0
        linear = (m for m in self.shared_mlp.modules() if isinstance(m, nn.Linear))
        return (self.channels - 1) * sum(2 * m.weight.numel() for m in linear)
