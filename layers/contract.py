"""The boundary that every attention keeps, `y = attention(x, memory, cache)`, and all that the project asks
of an attention beside it. The defaults are the safe ones: nobody relies on what a layer does not
say of itself.

To add one: a subclass of `Attention` in this folder, a line in layers/registry.py, a config that names it.
tests/test_layers.py then holds it against all of this.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn as nn

from layers.plans import HeadPlan

# what an attention may promise, the least first; see Attention.padding
PADDING = ('right', 'left', 'anywhere')


def unrotated(x):
    return x


def captured() -> bool:
    """Whether a graph is being taken down that must hold for other inputs (torch.export, torch.jit.trace):
    then no decision may depend on a size or on a value."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


class Memory:
    """What the layers of one forward pass share beside x; made for that pass and dropped with it.

    published  one entry per layer so far that publishes: its keys and values, which later layers may read
    inputs     x of every layer so far, (B, T, n_embd) each
    queries    of the last layer so far that asks with any, (B, n_head, T, head_size); None before the first
    tokens     (B, T) ids of x; embedded (B, T, n_embd), what the token table says of them. Both are None
               where a layer's input stands for more than one token, as in the latents of a hierarchy
    embed      the token table: ids -> embedded
    x0         the normed embedding, where blocks take a share of it; else None
    rotate     puts positions into queries and keys (B, heads, T, head_size), where positions are rotary
    real       (B, S) bool, which of the S tokens so far, the T of x last, are no padding; None: all are
    at, places in a step of fixed shapes (decoding.py): the place of the one token among those so far, a
               LongTensor (1,), and the places of a cache that are looked at, 0, 1, 2, …; else None
    weights    where somebody asks for them, a list to which every attention with scores appends who looks at
               whom, (B, n_head, T, S), less than 1 in all where a token looks at more than tokens; else None
    """

    def __init__(self, rotate=unrotated, real=None, T: int = 0, tokens=None, embedded=None, embed=None):
        self.published, self.inputs = [], []
        self.queries = self.x0 = self.weights = None
        self.tokens, self.embedded, self.embed = tokens, embedded, embed
        self.rotate = rotate
        self.real, self.T, self.seen = real, T, None
        self.at = self.places = None

    def copy(self) -> Memory:
        """One that holds the same so far, with lists of its own: for a block that is computed twice."""
        other = copy.copy(self)
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, list)}
        vars(other).update(lists)
        return other

    @property
    def mask(self):
        """(B or 1, 1, T, S) bool, who sees whom; None where that is simply everyone before."""
        if self.at is not None and self.seen is None:
            self.seen = (self.places <= self.at)[None, None, None]  # (1, 1, 1, S)
        if self.real is not None and self.seen is None:
            S = self.real.size(1)
            at = torch.arange(S, device=self.real.device)  # of keys; the T queries are the last of them
            sees = (at <= at[-self.T :, None]) & self.real[:, None, None, :]
            self.seen = sees | (at == at[-self.T :, None])  # padding sees itself: no softmax over nothing
        return self.seen


class Place(NamedTuple):
    """Where in a model a layer stands, as its constructor is told."""

    layer: int = 0  # among all layers of the model
    n_layer: int = 1
    of_word: int = 0  # among the layers of its word of the attention string
    n_word: int = 1
    plan: HeadPlan | None = None  # who reads what, over the layers that publish keys and values
    planned: int = 0  # among those


class Counted(nn.Module):
    """A module that does matrix products beside those of its linear layers."""

    def flops_per_token(self, T: int) -> float:
        """Forward FLOPs per token of those, over a sequence of T tokens: 2 for every multiply-add."""
        raise NotImplementedError(f'{type(self).__name__} does not say how many FLOPs it takes')

    def backward_flops_per_token(self, T: int) -> float:
        """Of the backward pass: a product's gradient is two products."""
        return 2 * self.flops_per_token(T)


class Attention(Counted):
    """Base class of all attentions.

    A constructor takes (config, place, *, own options): keyword-only arguments of type int, float, bool or
    str with defaults, which an attention string gives in parentheses, `name(option=value)`. It raises
    ValueError, naming the value and the fix.

    Parameters that are no weights of torch's layers are initialised by `init_own(generator)`, if there are
    any. A linear layer that is several matrices one above the other lists their rows in its `matrix_rows`
    (for Muon)."""

    # facts that rules go by; they belong to the class, so that rules apply before anything is built
    has_scores = False  # scores are products of queries and keys, which qk_norm may normalise
    rotates = False  # it puts positions into what it compares, by memory.rotate
    bounded = False  # its state stops growing, so a context may be endless
    padding = 'right'  # where padding may stand in a batch: right (no token looks there) | left | anywhere
    publishes = False  # it appends (key pieces, value pieces) to memory.published
    published_past = True  # what it publishes is of all tokens so far, not of the new ones alone
    mixes_earlier = False  # the first layer that publishes has none before it to mix with, and is a plain one
    reads_all = False  # it reads every head of every earlier layer that publishes
    reads_tokens = False  # it reads memory.tokens or memory.embedded
    steps = False  # it has new_read_cache, and with one it takes a token whose place is data (memory.at)

    def forward(self, x, memory: Memory, cache=None):
        """x (B, T, n_embd), the normalised residual stream -> what is added to the stream (B, T, n_embd).

        cache: this layer's state from earlier tokens, made by new_cache and advanced here; None without
        generation. Token t of the output depends on tokens up to t alone. Where memory.real says that a token
        is padding, it must not count for others, as far as `padding` promises."""
        raise NotImplementedError

    def new_cache(self, B: int, max_len: int, device, dtype):
        """Empty state for B sequences of at most max_len tokens: an object with
        select(rows)   keep the sequences rows (LongTensor of batch indices), in that order
        rewinds        whether it can rewind(n): forget all tokens but the first n
        """
        raise NotImplementedError

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of state that one more token of one sequence costs, in numbers of itemsize bytes."""
        raise NotImplementedError

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of state of one sequence that stay the same however many tokens it has."""
        return 0

    def heads_produced(self) -> tuple[int, int]:
        """How many key and value heads it projects; (0, 0) where it has none."""
        return 0, 0

    def describe(self) -> str:
        """One line on what it computes that its weights' shapes do not tell: kept with the weights, and
        compared when they are loaded."""
        raise NotImplementedError
