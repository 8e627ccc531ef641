"""A GPT whose attention is pluggable: the model, its cache, its FLOPs and its sampling, in one file.

What it shares with other models (hierarchy.py) is `LanguageModel`.

The boundary that every attention keeps:  y = attention(x, memory, cache)

    x       (B, T, n_embd), the normalised residual stream
    memory  what the layers of one forward pass share (`Memory`): memory.published has one entry per earlier
            layer of the head plan, what that layer chose to publish (its keys and values); the attention
            reads it and appends its own entry. memory.rotate puts rotary positions into queries and keys.
            memory.real, memory.mask: which tokens of a batch of padded sequences are padding: no attention
            may let them count.
    cache   this layer's state from earlier tokens, made by attention.new_cache(); None without generation.
            Its select(rows) keeps those sequences of the batch, in that order (beam search). Where it
            `rewinds`, rewind(n) forgets all tokens but the first n.
    y       (B, T, n_embd), to be added to the residual stream

Which heads read which layer is data (plans.py); additive attention is in leap.py; norms, MLPs and positions
are classes that a config names (NORMS, MLPS, POSITIONS). Dimensions: B batch, T time, C n_embd.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.leap import WINDOWED, layer_windows
from layers.loss import linear_cross_entropy
from layers.plans import PLANS, HeadPlan


@dataclass(frozen=True)
class GPTConfig:
    """The architecture; what does not fit together is refused here, before anything is built."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 rounded up to a multiple of 64
    vocab_used: int = 0  # ids from here on are padding and never sampled; 0 = all ids are real
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False  # biases in linear layers and layernorms (an rmsnorm has none)
    attention: str = 'vanilla'  # a plan of plans.py, additive or leap; by layer: 'leap*4 reflex*2'
    head_split: str = '4-2-2'  # attention='reflex': heads with lag 0, 1, 2, …; '8/4-2-2' = keys/values apart
    windows: str = 'auto'  # additive, leap: auto (4, 8, … global) | global | by layer, '4-8-16-32-64-0'
    norm: str = 'layernorm'  # layernorm | rmsnorm, before each half of a block and before the head
    mlp: str = 'gelu'  # gelu | gelu_tanh (GPT-2's approximation of it) | swiglu, all of like size
    position: str = 'learned'  # learned (a table) | rotary (queries and keys are turned) | none
    qk_norm: bool = False  # an rmsnorm per head on queries and keys

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(
                f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: heads would differ in size'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: must be in [0, 1)')
        if not 0 <= self.vocab_used <= self.vocab_size:
            raise ValueError(
                f'vocab_used={self.vocab_used}: must be between 0 and vocab_size={self.vocab_size}'
            )
        choices = {'norm': NORMS, 'mlp': MLPS, 'position': POSITIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r} is unknown: one of {", ".join(known)}')
        if self.position == 'rotary' and self.head_size % 2:
            raise ValueError(
                f"position='rotary' turns pairs of numbers, but n_embd={self.n_embd} / n_head={self.n_head} "
                f'gives heads of {self.head_size}: choose an even head size'
            )
        layer_windows(self.windows, self.n_layer)
        kinds = set(self.layer_kinds())
        if not kinds <= WINDOWED.keys():
            self.head_plan()
        if 'additive' in kinds and self.position == 'rotary':
            raise ValueError(
                "attention='additive' forms no product of query and key that position='rotary' could turn: "
                "use 'learned' or 'none'"
            )
        if kinds & WINDOWED.keys() and self.qk_norm:
            raise ValueError(f'qk_norm=True: attention={self.attention!r} has no scores for it to tame')

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def plan_name(self) -> str:
        return self.attention + (f' {self.head_split}' if self.attention == 'reflex' else '')

    def layer_kinds(self) -> list[str]:
        """The attention of every layer, a name of PLANS or WINDOWED; ValueError where they do not add up."""
        kinds, words = [], self.attention.split()
        for word in words:
            name, star, count = word.partition('*')
            if name not in PLANS and name not in WINDOWED:
                known = ', '.join([*PLANS, *WINDOWED])
                raise ValueError(f'attention={self.attention!r}: {name!r} is unknown, one of {known}')
            if star and not count.isdecimal():
                raise ValueError(f"attention={self.attention!r}: write counts as in 'leap*4 reflex*2'")
            kinds += [name] * (int(count) if star else self.n_layer if len(words) == 1 else 1)
        if len(kinds) != self.n_layer:
            raise ValueError(
                f'attention={self.attention!r} speaks of {len(kinds)} layers, but n_layer={self.n_layer}'
            )
        return kinds

    def head_plan(self) -> HeadPlan:
        """The checked plan of the layers that follow one, as if they were alone; ValueError with the numbers
        where it does not fit, or where there is none."""
        planned = [kind for kind in self.layer_kinds() if kind not in WINDOWED]
        if len(set(planned)) != 1:
            raise ValueError(f'attention={self.attention!r} names {len(set(planned))} head plans: name one')
        config = self
        if len(planned) < self.n_layer:
            config = replace(self, attention=planned[0], n_layer=len(planned), windows='auto')
        return HeadPlan(PLANS[planned[0]](config), self.n_head)

    def context_limit(self) -> float:
        """The most tokens a context can have: endless where positions are no table and nothing is kept of
        single tokens."""
        endless = self.position != 'learned' and set(self.layer_kinds()) <= WINDOWED.keys()
        return math.inf if endless else self.block_size


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019), in fp32 at least."""

    def __init__(self, size: int, bias: bool = False):
        """bias: taken so that all NORMS are made alike; an RMSNorm has none."""
        super().__init__(size, eps=1e-5)

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return y.type_as(x)


NORMS = {'layernorm': nn.LayerNorm, 'rmsnorm': RMSNorm}


class LearnedPosition(nn.Embedding):
    """A learned vector per position, added to the token's (GPT-2).

    Every position kind is called as  x, rotate = position(x, pos):  x (B, T, n_embd) embedded tokens, pos
    (B or 1, T) their positions; attentions apply `rotate` to queries and keys (B, heads, T, head_size). It is
    rotation(pos, head_size), for attentions elsewhere.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config.block_size, config.n_embd)

    @staticmethod
    def rotation(pos, head_size: int):
        return unrotated

    def forward(self, x, pos):
        return x + super().forward(pos), unrotated


class RotaryPosition(nn.Module):
    """Queries and keys are turned by angles that grow with the position (Su et al., 2021; half-split pairs,
    base 10000): their product then depends on the distance alone. Has no parameters and keeps no tables."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.head_size

    @staticmethod
    def rotation(pos, head_size: int):
        pairs = torch.arange(0, head_size, 2, device=pos.device, dtype=torch.float32)
        angle = pos[:, None, :, None].float() * 10000.0 ** (-pairs / head_size)  # (B or 1, 1, T, hs / 2)
        return partial(rotate, cos=angle.cos(), sin=angle.sin())

    def forward(self, x, pos):
        return x, self.rotation(pos, self.head_size)


class NoPosition(nn.Module):
    """Nothing tells positions apart but the causal mask (Haviv et al., 2022)."""

    def __init__(self, config: GPTConfig):
        super().__init__()

    @staticmethod
    def rotation(pos, head_size: int):
        return unrotated

    def forward(self, x, pos):
        return x, unrotated


POSITIONS = {'learned': LearnedPosition, 'rotary': RotaryPosition, 'none': NoPosition}


def rotate(x, cos, sin):
    """x (B, heads, T, hs), each pair (x[i], x[i + hs / 2]) turned by its angle; in fp32, returned as x is."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def unrotated(x):
    return x


class Memory:
    """What the layers of one forward pass share beside x; made for that pass and dropped with it."""

    def __init__(self, rotate=unrotated, real=None, T: int = 0):
        """real: (B, S) bool, which of the S tokens so far, the T of x last, are no padding; None: all are."""
        self.published = []  # one entry per layer so far: what it chose to publish to the layers after it
        self.rotate = rotate  # of queries and keys (B, heads, T, head_size), at the positions of x
        self.real, self.T, self.seen = real, T, None

    @property
    def mask(self):
        """(B, 1, T, S) bool, who sees whom; None where that is simply everyone before."""
        if self.real is not None and self.seen is None:
            S = self.real.size(1)
            at = torch.arange(S, device=self.real.device)  # of keys; the T queries are the last of them
            sees = (at <= at[-self.T :, None]) & self.real[:, None, None, :]
            self.seen = sees | (at == at[-self.T :, None])  # padding sees itself: no softmax over nothing
        return self.seen


class HeadLinear(nn.Linear):
    """A projection to some of the heads of a full projection: the others are never computed.

    `heads` are the heads kept, in order, of `n_heads_full`. Initial values are drawn for the full projection
    and then selected, so that two models that share a head start it with the same weights.
    """

    def __init__(self, n_embd: int, head_size: int, heads: list[int], n_heads_full: int, bias: bool):
        super().__init__(n_embd, len(heads) * head_size, bias=bias)
        self.rows_full = n_heads_full * head_size
        self.rows = [h * head_size + i for h in heads for i in range(head_size)]  # of the full projection


class KVCache:
    """Keys and values of one layer's produced heads, (B, heads, max_len, head_size) each, filled in order."""

    rewinds = True

    def __init__(self, B, key_heads, value_heads, max_len, head_size, device, dtype):
        self.k = torch.empty(B, key_heads, max_len, head_size, device=device, dtype=dtype)
        self.v = torch.empty(B, value_heads, max_len, head_size, device=device, dtype=dtype)
        self.length = 0  # tokens held

    def append(self, k, v):
        """Store k, v (B, heads, T, head_size); return views of all held, (B, heads, length, head_size)."""
        end = self.length + k.size(2)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def rewind(self, length: int):
        """Forget all tokens but the first `length`."""
        self.length = length

    def select(self, rows):
        """Keep the sequences rows (a LongTensor of batch indices), in that order."""
        self.k, self.v = self.k[rows], self.v[rows]


DROPOUT_BLOCK = 256  # queries at a time in causal attention with dropout on CPU; 128 is as fast


def attend(q, k, v, mask=None, dropout_p=0.0):
    """Attention of q (B, H, T, hs) over k, v (B, H, S >= T, hs): as mask (…, T, S) says, else causal, with
    the T queries those of the last T keys."""
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.requires_grad and q.size(3) < 64:
        # torch's backward pass on CPU is 3 (hs 16) to 5 times (hs 32) as slow in bf16 as in fp32
        with torch.autocast('cpu', enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, dropout_p).type_as(q)
    T, S = q.size(2), k.size(2)
    if mask is None and dropout_p > 0 and q.device.type == 'cpu' and T > DROPOUT_BLOCK:
        # torch's kernel for CPU takes no dropout; what it does in its place passes over all T x T weights
        blocks = []
        for start in range(0, T, DROPOUT_BLOCK):
            some = q[:, :, start : start + DROPOUT_BLOCK]  # (B, H, up to DROPOUT_BLOCK, hs)
            end = S - T + start + some.size(2)
            blocks.append(attend(some, k[:, :, :end], v[:, :, :end], None, dropout_p))
        return torch.cat(blocks, dim=2)  # (B, H, T, hs)
    if mask is None and 1 < T < S:
        mask = q.new_ones(T, S, dtype=torch.bool).tril(S - T)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout_p)


def cut(x, sizes):
    """x (B, heads, T, hs), cut along its heads. It lies in memory as (B, T, heads, hs): so do the pieces, and
    their gradients when they are joined (across that order, 4-2-2 takes 2 % more time at 128 wide)."""
    return tuple(piece.transpose(1, 2) for piece in x.transpose(1, 2).split(sizes, dim=2))


def join(pieces):
    """Pieces (B, heads, T, hs) along their heads, in memory as for `cut`; one alone is not copied."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=2).transpose(1, 2)


class HeadPlanAttention(nn.Module):
    """Causal attention whose heads read keys and values, of this layer or earlier ones, that a plan names.

    One projection, one gather, one scaled-dot-product-attention call, whatever the plan; a token that is
    generated gathers nothing, but attends to the pieces where they lie. Publishes (key pieces, value pieces):
    its produced heads, cut where readers need them; keys normed and rotated.
    """

    backward_flops = 2  # of the backward pass, for one of flops_per_token

    def __init__(self, config: GPTConfig, plan: HeadPlan, layer: int):
        super().__init__()
        n_head = len(plan.heads[layer])
        self.n_head, self.head_size, self.dropout = n_head, config.head_size, config.dropout
        self.n_key, self.n_value = len(plan.keys[layer]), len(plan.values[layer])
        self.key_cuts, self.value_cuts = plan.key_cuts[layer], plan.value_cuts[layer]
        self.key_reads, self.value_reads = plan.key_reads[layer], plan.value_reads[layer]
        self.runs, self.key_runs, self.value_runs = plan.runs(layer)
        self.description = plan.describe(layer)
        heads = list(range(n_head))  # rows of the full projection: queries, then keys, then values
        heads += [n_head + h for h in plan.keys[layer]] + [2 * n_head + h for h in plan.values[layer]]
        self.c_attn = HeadLinear(config.n_embd, self.head_size, heads, 3 * n_head, bias=config.bias)
        counts = (n_head, self.n_key, self.n_value)
        self.c_attn.matrix_rows = [n * self.head_size for n in counts if n]  # for Muon
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # over each head's numbers, one weight for all heads of the layer (as Qwen 3, Gemma 3)
        self.q_norm = RMSNorm(self.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size) if config.qk_norm and self.n_key else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, memory: Memory, cache: KVCache | None = None):
        B, T, _ = x.shape
        hs = self.head_size
        q, k, v = self.c_attn(x).split([self.n_head * hs, self.n_key * hs, self.n_value * hs], dim=2)
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, n_head, T, hs)
        k = k.view(B, T, self.n_key, hs).transpose(1, 2)  # (B, n_key, T, hs)
        v = v.view(B, T, self.n_value, hs).transpose(1, 2)  # (B, n_value, T, hs)
        q = memory.rotate(self.q_norm(q))
        k = memory.rotate(self.k_norm(k))  # lagged heads read it as it is from here on
        k, v = self.read(k, v, memory, cache)  # pieces, n_head heads together, of (B, heads, S, hs), S >= T
        if cache is not None and T == 1 and len(self.runs) > 1:
            return self.output(self.attend_in_place(q, k, v, memory.mask))
        y = attend(q, join(k), join(v), memory.mask, self.dropout if self.training else 0.0)
        return self.output(y)

    def output(self, y):
        """y (B, n_head, T, hs) -> (B, T, n_embd)"""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        """This layer's k (B, n_key, T, hs), v (B, n_value, T, hs) -> what its heads read, as lists of pieces
        (B, heads, S, hs) that are n_head heads together. Publishes what later layers read."""
        if cache is not None:
            k, v = cache.append(k, v)
        memory.published.append((cut(k, self.key_cuts), cut(v, self.value_cuts)))
        k = self.pieces(k, self.key_reads, [keys for keys, _ in memory.published])
        v = self.pieces(v, self.value_reads, [values for _, values in memory.published])
        return k, v

    @staticmethod
    def pieces(own, reads, published):
        """own: this layer's produced heads; reads: None (own, as they are) or (layer, piece) pairs."""
        return [own] if reads is None else [published[layer][piece] for layer, piece in reads]

    def attend_in_place(self, q, k, v, mask):
        """Attention of one token over the pieces k, v as they lie in the caches: to join them would copy the
        whole cache for every token."""
        q = q.split(self.runs, dim=1)
        k = [run for piece, sizes in zip(k, self.key_runs, strict=True) for run in piece.split(sizes, dim=1)]
        v = [
            run for piece, sizes in zip(v, self.value_runs, strict=True) for run in piece.split(sizes, dim=1)
        ]
        return join([attend(*run, mask) for run in zip(q, k, v, strict=True)])

    def new_cache(self, B, max_len, device, dtype) -> KVCache:
        """Empty state for generation: B sequences of at most max_len tokens."""
        return KVCache(B, self.n_key, self.n_value, max_len, self.head_size, device, dtype)

    def heads_produced(self) -> tuple[int, int]:
        """How many key and value heads this layer projects: those that some layer reads."""
        return self.n_key, self.n_value

    def cache_bytes_per_token(self, itemsize: int) -> int:
        return (self.n_key + self.n_value) * self.head_size * itemsize

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of generation state that does not grow with the tokens."""
        return 0

    def flops_per_token(self, T: int) -> int:
        """Forward FLOPs per token beyond the linear layers: q·k and weights·v over all T positions."""
        return 2 * 2 * T * self.n_head * self.head_size

    def describe(self) -> str:
        return self.description


class ValueResidualAttention(HeadPlanAttention):
    """Values are λ v_l + (1 - λ) v_0, of this layer and of layer 0, with a learned λ per layer that starts at
    0.5: the learnable ResFormer (Zhou et al., 2024, arXiv:2410.17897).

    Where the plan lets heads take layer 0's values as they are, the others, which come first, mix theirs.
    """

    def __init__(self, config: GPTConfig, plan: HeadPlan, layer: int):
        super().__init__(config, plan, layer)
        if plan.values[0][: self.n_value] != plan.values[layer]:
            raise ValueError(
                f'a value residual mixes head by head, but layer {layer} makes the values of heads '
                f'{plan.values[layer]} and layer 0 those of {plan.values[0]}: let the heads that take values '
                'of other layers come last'
            )
        self.own_share = nn.Parameter(torch.tensor(0.5))  # λ
        self.description += ', value residual'

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        _, first = memory.published[0]  # pieces (B, heads, S, hs), S >= T, that are n_head heads together
        first = join([piece[:, :, -v.size(2) :] for piece in first])[:, : self.n_value]  # (B, n_value, T, hs)
        v = self.own_share * v + (1 - self.own_share) * first
        return super().read(k, v, memory, cache)


class LimeAttention(HeadPlanAttention):
    """Head h reads Σ_j R[h, j] k_j and Σ_j R[h, j] v_j over all heads j of this and all earlier layers, R
    a learned matrix per layer: the static router of LIMe (Gerasimov et al., 2025, arXiv:2502.09245).

    A token's mix depends on that token alone: the cache holds what is read, and layers publish new tokens.
    """

    def __init__(self, config: GPTConfig, plan: HeadPlan, layer: int):
        super().__init__(config, plan, layer)
        self.router = nn.Parameter(torch.empty(self.n_head, (layer + 1) * self.n_head))
        self.description += ', static router'

    def init_own(self, generator):
        """As published: the own heads as they are, and uniform noise of variance 1 / (number of heads)."""
        bound = math.sqrt(3 / self.router.size(1))
        self.router.copy_(torch.empty(self.router.shape).uniform_(-bound, bound, generator=generator))
        self.router[:, -self.n_head :] = torch.eye(self.n_head)

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        T = k.size(2)
        memory.published.append(((k,), (v,)))
        kv = [torch.cat([k[:, :, -T:], v[:, :, -T:]], dim=3) for (k,), (v,) in memory.published]
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

    def __init__(self, config: GPTConfig, plan: HeadPlan, layer: int):
        super().__init__(config, plan, layer)
        logits = torch.zeros(2, layer + 1, self.n_head)
        logits[:, layer] = math.log(layer)
        self.allocation = nn.Parameter(logits.flatten())  # a vector: weight decay would even the shares out
        self.description += ', learned split'

    def shares(self):
        """(2, layers so far, n_head): of keys and of values, what share of a layer each head reads."""
        return self.allocation.view(2, -1, self.n_head).softmax(dim=1)

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        T = k.size(2)
        memory.published.append(((k,), (v,)))
        of_keys, of_values = self.shares().type_as(k)[..., None, None]  # (layers so far, n_head, 1, 1) each
        pairs = [(k[:, :, -T:], v[:, :, -T:]) for (k,), (v,) in memory.published]
        k = sum(share * k for share, (k, _) in zip(of_keys, pairs, strict=True))  # (B, n_head, T, hs)
        v = sum(share * v for share, (_, v) in zip(of_values, pairs, strict=True))
        k, v = (k, v) if cache is None else cache.append(k, v)
        return [k], [v]


# What layers after the first are made of, where a plan alone does not say it; layer 0 has nothing to mix.
MIXERS = {
    'value_residual': ValueResidualAttention,
    'first_residual': ValueResidualAttention,
    'lime': LimeAttention,
    'learned_split': LearnedSplitAttention,
}


def make_attentions(config: GPTConfig) -> list[nn.Module]:
    """The attention of every layer. A head plan counts only the layers that follow it."""
    kinds = config.layer_kinds()
    plan = None if set(kinds) <= WINDOWED.keys() else config.head_plan()
    attentions, planned = [], 0
    for kind, window in zip(kinds, layer_windows(config.windows, config.n_layer), strict=True):
        if kind in WINDOWED:
            attentions.append(WINDOWED[kind](config, window))
            continue
        attention = MIXERS.get(kind, HeadPlanAttention) if planned else HeadPlanAttention
        attentions.append(attention(config, plan, planned))
        planned += 1
    return attentions


class MLP(nn.Module):
    """Two linear layers, 4 n_embd wide between them (GPT-2), or hidden. linear: what makes the layers."""

    approximate = 'none'  # the exact GELU

    def __init__(self, config: GPTConfig, hidden: int = 0, linear=nn.Linear):
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


class SwiGLU(nn.Module):
    """c_proj(silu(c_gate(x)) * c_fc(x)) (Shazeer, 2020).

    The hidden size is the multiple of 64 nearest to 8/3 n_embd: three matrices then have the parameters of
    MLP's two (exactly at 768 or 1536, 1.6 % fewer at 512). hidden: of the MLP to be like, if it is not
    4 n_embd; then it is the nearest multiple of 8.
    """

    def __init__(self, config: GPTConfig, hidden: int = 0, linear=nn.Linear):
        super().__init__()
        step = 8 if hidden else 64
        hidden = step * max(1, round(2 * (hidden or 4 * config.n_embd) / 3 / step))
        self.c_gate = linear(config.n_embd, hidden, bias=config.bias)
        self.c_fc = linear(config.n_embd, hidden, bias=config.bias)
        self.c_proj = linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


MLPS = {'gelu': MLP, 'gelu_tanh': TanhMLP, 'swiglu': SwiGLU}


class Block(nn.Module):
    def __init__(self, config: GPTConfig, attn: nn.Module):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, bias=config.bias)
        self.attn = attn
        self.ln_2 = NORMS[config.norm](config.n_embd, bias=config.bias)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x, memory: Memory, cache=None):
        x = x + self.attn(self.ln_1(x), memory, cache)
        return x + self.mlp(self.ln_2(x))


class Cache:
    """What generation carries from call to call: one state per layer, and how many tokens they hold."""

    def __init__(self, layers: list):
        self.layers = layers
        self.length = 0

    @property
    def rewinds(self) -> bool:
        return all(layer.rewinds for layer in self.layers)

    def rewind(self, length: int):
        """Forget all tokens but the first `length`; only where every layer can."""
        for layer in self.layers:
            layer.rewind(length)
        self.length = length

    def select(self, rows):
        """Keep the sequences rows (a LongTensor of batch indices), in that order."""
        for layer in self.layers:
            layer.select(rows)


@contextlib.contextmanager
def no_dropout(modules):
    """In which those of the modules that train do not, for as long as it takes to compute something."""
    training = [m for m in modules if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Repeats:
    """Guesses how a text goes on by what followed when its last tokens stood there before (prompt lookup
    decoding; Saxena, 2023)."""

    SAME = 3  # tokens that must be alike

    def __init__(self, ids: list[int]):
        self.ids, self.after = [], {}  # after: SAME tokens -> where the one after them stands
        for i in ids:
            self.append(i)

    def append(self, token: int):
        end = tuple(self.ids[-self.SAME :])
        self.after[end] = len(self.ids)
        self.ids.append(token)

    def guess(self, n: int) -> list[int]:
        """n tokens, or none; what would lie beyond the end of the text is guessed to be one more round."""
        start = self.after.get(tuple(self.ids[-self.SAME :]))
        if start is None:
            return []
        period = len(self.ids) - start
        return [self.ids[start + i % period] for i in range(n)]


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, T: int, backward: bool = False) -> float:
    """FLOPs per token of a module's linear layers and attentions, over sequences of T tokens.

    Every multiply-add of the matrix products counts 2, heads that are not projected count nothing, and
    attention counts the full T x T square, which is the convention of MFU (PaLM, appendix B) and of
    torch's FlopCounterMode. The backward pass is twice the forward pass (of additive attention's means,
    once); recomputation does not count.
    """
    total = sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)) * (
        1 + 2 * backward
    )
    for m in module.modules():
        if hasattr(m, 'backward_flops'):
            total += m.flops_per_token(T) * (1 + m.backward_flops * backward)
    return total


class LanguageModel(nn.Module):
    """What all models share: initial values, loss, optimizer, sampling.

    A model has config, context_limit, lm_head and `transformer` with wte, and the methods
        hidden(idx, cache)   token ids (B, T) -> what the head reads (B, T, C)
        new_cache(B)         empty generation state for B sequences
        describe(), summary(), parts(), flops_per_token(), cache_bytes_per_token(), state_bytes()
    """

    def finish(self, seed: int | None):
        """Called at the end of a model's constructor: the head, and all initial values."""
        wte = self.transformer.wte
        self.lm_head = nn.Linear(wte.embedding_dim, wte.num_embeddings, bias=False)
        self.lm_head.weight = wte.weight  # tied (Press and Wolf, 2017)
        self.init_weights(int(torch.randint(2**62, (), device='cpu')) if seed is None else seed)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """GPT-2's initialisation. Each tensor draws from a generator of its own, seeded by (seed, name):
        models that share a tensor share its initial values, whatever else differs between them."""
        if self.lm_head.weight.is_meta:
            return
        for name, module in self.named_modules():
            digest = hashlib.sha256(f'{seed} {name}'.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
            if hasattr(module, 'init_own'):  # parameters beside those of torch's layers
                module.init_own(generator)
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue  # norms start as ones and zeros
            if module is self.lm_head:
                continue
            # residual projections are smaller, so that the stream's variance does not grow with depth
            residual = name.endswith('c_proj')
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
            rows = getattr(module, 'rows_full', module.weight.size(0))
            full = torch.empty(rows, module.weight.size(1)).normal_(0.0, std, generator=generator)
            module.weight.copy_(full[module.rows] if isinstance(module, HeadLinear) else full)
            if getattr(module, 'bias', None) is not None:
                module.bias.zero_()

    def get_extra_state(self) -> str:
        """Saved with the weights, and compared when they are loaded."""
        return self.describe()

    def set_extra_state(self, state: str):
        if state != self.describe():
            raise ValueError(
                'these weights belong to another attention plan or kind of block: they were trained as\n'
                f'{state}\nand this model (attention={self.config.attention!r}) is\n{self.describe()}'
            )

    def forward(self, idx, targets=None, progress=None):
        """Token ids (B, T) -> (logits (B, T, vocab_size), None); with targets (B, T): (None, mean loss).

        Targets of -1 do not count. progress: in training, what part of it is done, as a scalar tensor: then a
        model adds what losses it has beside that of the tokens. Logits are not kept where only the loss is
        wanted: at 50304 tokens they are the largest tensor by far; ask for them without targets.
        """
        hidden = self.hidden(idx)
        if targets is None:
            return self.lm_head(hidden), None
        return None, linear_cross_entropy(hidden, self.lm_head.weight, targets, ignore_index=-1)

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters, without position embeddings by default (nanoGPT's count: wte is also lm_head)."""
        total = count(self)
        tables = (m for m in self.modules() if isinstance(m, LearnedPosition))
        return total - sum(map(count, tables)) if non_embedding else total

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type) -> torch.optim.AdamW:
        """AdamW, fused where the device has it; matrices decay, biases and norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in ('cuda', 'cpu')
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def cache_type(self) -> tuple:
        """(device, dtype) of keys and values in generation."""
        weight = self.lm_head.weight
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        return weight.device, torch.get_autocast_dtype(kind) if autocast else weight.dtype

    @torch.no_grad()
    def stream(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        use_cache=True,
        generator=None,
        lookup=0,
        top_p=1.0,
    ):
        """Yield the next token (B, 1), max_new_tokens times, after the prompt idx (B, T >= 1).

        temperature 0 is greedy. Ids of padding rows (from vocab_used on) are never drawn. generator: of the
        draws; None is torch's global one. When the context outgrows block_size (if that is its limit), the
        last block_size // 2 tokens are kept and read again: the cost per token stays bounded, and tokens are
        the same with and without the cache. top_k, top_p: see draw.

        lookup: up to so many tokens are guessed from what repeats in the text, and read in one pass together
        with the last one. Each is still drawn from its own logits, by the same random numbers: a guess saves
        passes, and changes a token only where rounding decides (bf16: at times). It needs one sequence and a
        cache that rewinds, and is not made without.
        """
        if idx.size(1) < 1:
            raise ValueError('the prompt is empty: give at least one token, such as the end-of-text token')
        block_size = self.config.block_size
        modules = list(self.modules())
        context, fresh, cache, made, hope = idx, idx, None, 0, 1
        repeats = None
        while made < max_new_tokens:
            if context.size(1) > self.context_limit:
                context = context[:, -max(1, block_size // 2) :]
                fresh, cache = context, None
            if use_cache and cache is None:
                cache = self.new_cache(idx.size(0))
                if lookup and repeats is None and cache.rewinds and idx.size(0) == 1:
                    repeats = Repeats(idx[0].tolist())
            read, guess = fresh if use_cache else context, []
            if repeats:
                room = min(lookup, max_new_tokens - made - 1, self.context_limit - context.size(1))
                guess = repeats.guess(min(hope, room))
            if guess:
                read = torch.cat([read, read.new_tensor([guess])], dim=1)  # (1, fresh tokens and guesses)
            with no_dropout(modules):
                hidden = self.hidden(read, cache)
            logits = self.lm_head(hidden[:, -1 - len(guess) :]).float()
            for i in range(len(guess) + 1):
                token = self.draw(logits[:, i], temperature, top_k, generator, top_p)  # (B, 1)
                yield token
                context, fresh = torch.cat([context, token], dim=1), token
                made += 1
                if repeats:
                    repeats.append(drawn := int(token))
                    if i < len(guess) and drawn != guess[i]:
                        break
            if guess:
                hope = 2 * hope if i == len(guess) else max(1, i)  # as many again as came true
                cache.rewind(context.size(1) - 1)

    def draw(self, logits, temperature, top_k=None, generator=None, top_p=1.0):
        """Logits (B, vocab_size) -> one token id per row (B, 1), of the top_k likeliest, and of those the
        fewest that together have probability top_p."""
        logits = logits[:, : self.config.vocab_used or None]
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits / temperature
        if top_k is not None:
            kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
            logits = logits.masked_fill(logits < kth, -math.inf)
        if top_p < 1:
            p, order = F.softmax(logits, dim=-1).sort(descending=True)  # (B, vocab_used)
            out = p.cumsum(-1) - p >= top_p  # those before it suffice
            logits = logits.masked_fill(out.scatter(1, order, out), -math.inf)
        return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)

    def generate(self, idx, max_new_tokens, *args, **options):
        """Prompt (B, T) -> prompt and max_new_tokens more (B, T + max_new_tokens); arguments of `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **options)], dim=1)


class GPT(LanguageModel):
    config_class = GPTConfig

    def __init__(self, config: GPTConfig, seed: int | None = None):
        """seed: of the initial weights; None draws one from torch's global generator (torch.manual_seed)."""
        super().__init__()
        self.config = config
        attentions = make_attentions(config)
        self.context_limit = config.context_limit()
        self.transformer = nn.ModuleDict(
            {
                'wte': nn.Embedding(config.vocab_size, config.n_embd),
                'wpe': POSITIONS[config.position](config),  # has parameters only where they are learned
                'drop': nn.Dropout(config.dropout),
                'h': nn.ModuleList([Block(config, attn) for attn in attentions]),
                'ln_f': NORMS[config.norm](config.n_embd, bias=config.bias),
            }
        )
        self.finish(seed)

    def describe(self) -> str:
        """What the layers compute, a line for the blocks and one per attention: shapes do not tell it."""
        c = self.config
        blocks = f'norm {c.norm}, mlp {c.mlp}, position {c.position}, qk_norm {c.qk_norm}'
        return '\n'.join([blocks, *(block.attn.describe() for block in self.transformer.h)])

    def summary(self) -> str:
        """What it is, in a line, for people."""
        c = self.config
        size = f'{self.num_params() / 1e6:.2f}M parameters'
        return f'{c.plan_name}, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, {size}'

    def parts(self) -> dict[str, int]:
        """Parameters by part of the model."""
        t = self.transformer
        named = {'tokens': t.wte, 'positions': t.wpe, 'blocks': t.h, 'final norm': t.ln_f}
        return {name: count(module) for name, module in named.items()}

    def hidden(self, idx, cache: Cache | None = None, pos=None, real=None):
        """Token ids (B, T) -> final normalised residual stream (B, T, n_embd).

        With a cache, idx follows the tokens that it holds, and the cache is advanced by T. For batches of
        padded sequences: pos (B, T), the positions of idx (None: one after the other), and real (B, S) bool,
        which tokens of the cache and idx together are no padding (None: all). Padding gets no meaning.
        """
        _, T = idx.shape
        start = cache.length if cache is not None else 0
        if start + T > self.context_limit:
            raise ValueError(
                f'{start + T} tokens do not fit block_size={self.config.block_size}: crop the sequence'
            )
        if pos is None:
            pos = torch.arange(start, start + T, device=idx.device)[None]  # (1, T)
        x, rotate = self.transformer.wpe(self.transformer.wte(idx), pos)
        x = self.transformer.drop(x)
        memory = Memory(rotate, real, T)
        for i, block in enumerate(self.transformer.h):
            x = block(x, memory, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def flops_per_token(self, T: int | None = None, backward: bool = True) -> int:
        """FLOPs per token of one pass over sequences of T tokens (default block_size); see `flops`."""
        return flops(self, T or self.config.block_size, backward)

    def cache_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of generation state that one more token of one sequence costs (itemsize 2: bf16)."""
        return sum(block.attn.cache_bytes_per_token(itemsize) for block in self.transformer.h)

    def state_bytes(self, itemsize: int = 2) -> int:
        """Bytes of generation state of one sequence that stay the same however many tokens it has."""
        return sum(block.attn.state_bytes(itemsize) for block in self.transformer.h)

    def new_cache(self, B: int) -> Cache:
        """Empty state for B sequences of at most block_size tokens, in the type of the keys."""
        size, device_and_dtype = self.config.block_size, self.cache_type()
        return Cache([b.attn.new_cache(B, size, *device_and_dtype) for b in self.transformer.h])
