"""The MLPs of blocks, by the names that configs give them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Two linear layers, 4 n_embd wide between them (GPT-2), or hidden. linear: what makes the layers."""

    approximate = 'none'  # the exact GELU

    def __init__(self, config, hidden: int = 0, linear=nn.Linear):
        super().__init__()
        hidden = hidden or 4 * config.n_embd
        self.c_fc = linear(config.n_embd, hidden, bias=config.bias)
        self.gelu = nn.GELU(approximate=self.approximate)
        self.c_proj = linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class TanhMLP(MLP):
    """The same with the tanh approximation that GPT-2's published weights were trained with."""

    approximate = 'tanh'


class SquaredReLU(MLP):
    """The same with relu(x)² (So et al., 2021)."""

    def forward(self, x):
        return self.dropout(self.c_proj(F.relu(self.c_fc(x)).square()))


class SwiGLU(nn.Module):
    """c_proj(silu(c_gate(x)) * c_fc(x)) (Shazeer, 2020).

    The hidden size is the multiple of 64 nearest to 8/3 n_embd: three matrices then have the parameters of
    MLP's two (exactly at 768 or 1536, 1.6 % fewer at 512). hidden: of the MLP to be like, if it is not
    4 n_embd; then it is the nearest multiple of 8.
    """

    def __init__(self, config, hidden: int = 0, linear=nn.Linear):
        super().__init__()
        step = 8 if hidden else 64
        hidden = step * max(1, round(2 * (hidden or 4 * config.n_embd) / 3 / step))
        self.c_gate = linear(config.n_embd, hidden, bias=config.bias)
        self.c_fc = linear(config.n_embd, hidden, bias=config.bias)
        self.c_proj = linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


MLPS: dict[str, Callable[..., nn.Module]] = {
    'gelu': MLP,
    'gelu_tanh': TanhMLP,
    'relu2': SquaredReLU,
    'swiglu': SwiGLU,
}
