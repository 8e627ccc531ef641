"""Norms, by the names that configs give them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019), in fp32 at least."""

    def __init__(self, size: int, bias: bool = False):
        """bias: accepted so that all NORMS are made alike; an RMSNorm has none."""
        super().__init__(size, eps=1e-5)

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return y.type_as(x)


NORMS: dict[str, Callable[..., nn.Module]] = {'layernorm': nn.LayerNorm, 'rmsnorm': RMSNorm}
