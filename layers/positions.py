"""How positions come into a model, by the names that configs give them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn

from layers.contract import unrotated


class Position:
    """What a kind of position is: called as  x, rotate = position(x, pos), with x (B, T, n_embd) the embedded
    tokens and pos (B or 1, T) their positions. Attentions apply `rotate` to queries and keys."""

    turns = False  # its rotate does something: an attention that compares tokens must apply it
    table = False  # it knows the positions below block_size alone: no context can be longer

    @staticmethod
    def rotation(pos, head_size: int):
        """The function that turns vectors (B, heads, T, head_size) at positions pos (B or 1, T)."""
        return unrotated


class LearnedPosition(Position, nn.Embedding):
    """A learned vector per position, added to the token's (GPT-2)."""

    table = True

    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x, pos):
        return x + super().forward(pos), unrotated


class RotaryPosition(Position, nn.Module):
    """Queries and keys are turned by angles that grow with the position (Su et al., 2021; half-split pairs,
    base 10000): their product then depends on the distance alone. Has no parameters and keeps no tables."""

    turns = True

    def __init__(self, config):
        super().__init__()
        self.head_size = config.head_size

    @staticmethod
    def rotation(pos, head_size: int):
        pairs = torch.arange(0, head_size, 2, device=pos.device, dtype=torch.float32)
        angle = pos[:, None, :, None].float() * 10000.0 ** (-pairs / head_size)  # (B or 1, 1, T, hs / 2)
        return partial(rotate, cos=angle.cos(), sin=angle.sin())

    def forward(self, x, pos):
        return x, self.rotation(pos, self.head_size)


class NoPosition(Position, nn.Module):
    """Nothing tells positions apart but the causal mask (Haviv et al., 2022)."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x, pos):
        return x, unrotated


def rotate(x, cos, sin):
    """x (B, heads, T, hs), each pair (x[i], x[i + hs / 2]) turned by its angle; in fp32, returned as x is."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


POSITIONS = {'learned': LearnedPosition, 'rotary': RotaryPosition, 'none': NoPosition}
