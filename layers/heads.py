"""Softmax attention whose heads read the keys and values that a head plan names (layers/plans.py)."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.contract import Attention, Memory, Place, captured
from layers.kernels import kernels_for
from layers.norms import RMSNorm
from layers.plans import HeadPlan


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
        """Store k, v (B, heads, T, head_size); return views of all held, (B, heads, length, head_size).

        Gradients reach k and v and end at what was held before: nothing that is stored has a graph."""
        start, end = self.length, self.length + k.size(2)
        self.k[:, :, start:end] = k.detach()
        self.v[:, :, start:end] = v.detach()
        self.length = end
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return torch.cat([self.k[:, :, :start], k], dim=2), torch.cat([self.v[:, :, :start], v], dim=2)
        return self.k[:, :, :end], self.v[:, :, :end]

    def rewind(self, length: int):
        """Forget all tokens but the first `length`."""
        self.length = length

    def select(self, rows):
        """Keep the sequences rows (a LongTensor of batch indices), in that order."""
        self.k, self.v = self.k[rows], self.v[rows]


class ReadCache(KVCache):
    """What one layer's heads read, in their order, (B, n_head, max_len, head_size) each: one attention call
    reads it, whatever the plan, where a KVCache holds what is produced and is read piece by piece. It takes
    as much memory as vanilla's. For steps of fixed shapes, in which the place of a token is data."""

    SPARE = 16  # places that are never used: a slice of all others is no special case for a compiler

    def __init__(self, B, heads, max_len, head_size, device, dtype):
        max_len += self.SPARE
        # zeros, since what is masked must be numbers: 0 * nan is nan. Keys lie so that neighbours in memory
        # are of neighbouring tokens: a query's products with them are then vectors, however small the heads
        self.k = torch.zeros(B, heads, head_size, max_len, device=device, dtype=dtype).mT
        self.v = torch.zeros(B, heads, max_len, head_size, device=device, dtype=dtype)
        self.length = 0

    def put(self, k, v, at, size: int):
        """Store k, v (B, n_head, 1, hs) of one token at the place `at`, a LongTensor (1,); return the first
        `size` places (B, n_head, size, hs)."""
        self.k.index_copy_(2, at, k.to(self.k.dtype))
        self.v.index_copy_(2, at, v.to(self.v.dtype))
        return self.k[:, :, :size], self.v[:, :, :size]

    def select(self, rows):
        """In place, since a captured step knows where its tensors lie: as many rows as there are."""
        self.k.copy_(self.k[rows])
        self.v.copy_(self.v[rows])


DROPOUT_BLOCK = 256  # queries at a time in causal attention with dropout on CPU; 128 is as fast


def attend(q, k, v, mask=None, dropout_p=0.0, scale=None):
    """Attention of q (B, H, T, hs) over k, v (B, H, S >= T, hs): as mask (…, T, S) says, else causal, with
    the T queries those of the last T keys. scale: of scores; None: 1 / √hs."""
    learns = q.requires_grad or k.requires_grad
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and learns and q.size(3) < 64:
        # torch's backward pass on CPU is 3 (hs 16) to 5 times (hs 32) as slow in bf16 as in fp32
        with torch.autocast('cpu', enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, dropout_p, scale).type_as(q)
    T, S = q.size(2), k.size(2)
    if mask is None and dropout_p > 0 and q.device.type == 'cpu' and T > DROPOUT_BLOCK:
        # torch's kernel for CPU takes no dropout; what it does in its place passes over all T x T weights
        blocks = []
        for start in range(0, T, DROPOUT_BLOCK):
            some = q[:, :, start : start + DROPOUT_BLOCK]  # (B, H, up to DROPOUT_BLOCK, hs)
            end = S - T + start + some.size(2)
            blocks.append(attend(some, k[:, :, :end], v[:, :, :end], None, dropout_p, scale))
        return torch.cat(blocks, dim=2)  # (B, H, T, hs)
    if mask is None and 1 < T < S:
        mask = q.new_ones(T, S, dtype=torch.bool).tril(S - T)
    causal = mask is None and bool(T > 1)  # where a graph is traced, T is no int
    with kernels_for(q, S, mask is not None, learns):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout_p, scale=scale
        )


def attend_one(q, k, v, mask):
    """Attention of one token q (B, H, 1, hs) over places k, v (B, H, S, hs), those where mask (B or 1, 1, 1,
    S) says so: operations of fixed shapes, whatever the number of tokens so far. In fp32 at least where sums
    are taken."""
    exact = torch.promote_types(v.dtype, torch.float32)
    # compiled, sums are fused to one pass each, where the call of a product costs more than the product
    if torch.compiler.is_compiling():
        scores = (q.mT.to(exact) * k.mT.to(exact)).sum(dim=2, keepdim=True)  # (B, H, 1, S)
    else:
        scores = (q.to(k.dtype) @ k.mT).to(exact)
    weights = (scores * q.size(3) ** -0.5).masked_fill(~mask, -torch.inf).softmax(dim=-1)
    if torch.compiler.is_compiling():
        return (weights.mT * v.to(exact)).sum(dim=2, keepdim=True).to(v.dtype)  # (B, H, 1, hs)
    return weights.to(v.dtype) @ v


def attend_in_sight(q, k, v, mask=None, dropout_p=0.0):
    """`attend`, step by step -> (its result, the weights (B, H, T, S) before dropout)."""
    T, S = q.size(2), k.size(2)
    if mask is None:
        mask = q.new_ones(T, S, dtype=torch.bool).tril(S - T)
    scores = (q @ k.mT / math.sqrt(q.size(3))).masked_fill(~mask, -math.inf)  # (B, H, T, S)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).type_as(v)
    return F.dropout(weights, dropout_p) @ v, weights


def cut(x, sizes):
    """x (B, heads, T, hs), cut along its heads. It lies in memory as (B, T, heads, hs): so do the pieces, and
    their gradients when they are joined (across that order, 4-2-2 takes 2 % more time at 128 wide)."""
    return tuple(piece.transpose(1, 2) for piece in x.transpose(1, 2).split(sizes, dim=2))


def join(pieces):
    """Pieces (B, heads, T, hs) along their heads, in memory as for `cut`; one alone is not copied."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=2).transpose(1, 2)


class HeadPlanAttention(Attention):
    """Causal attention whose heads read keys and values, of this layer or earlier ones, that a plan names.

    One projection, one gather, one scaled-dot-product-attention call, whatever the plan; a token that is
    generated gathers nothing, but attends to the pieces where they lie. Publishes (key pieces, value pieces):
    its produced heads, cut where readers need them; keys normed and rotated.
    """

    has_scores = rotates = publishes = steps = True
    padding = 'anywhere'

    def __init__(self, config, place: Place, *, window: int = 0, gain: str = ''):
        """window: how many tokens a token reads, itself included; 0: all before it. gain: layer | head: what
        heads read from other layers' values is scaled by a learned number, one for the layer or one for each
        such head."""
        super().__init__()
        if window < 0:
            raise ValueError(f'window={window}: must be a number of tokens, or 0 for all before')
        if gain not in ('', 'layer', 'head'):
            raise ValueError(f"gain={gain!r}: 'layer' or 'head'")
        plan, layer = place.plan, place.planned
        n_head = len(plan.heads[layer])
        self.n_head, self.head_size, self.dropout = n_head, config.head_size, config.dropout
        self.window = window
        if window:
            self.padding = 'left'  # between tokens it would take up places in the window
        self.n_key, self.n_value = len(plan.keys[layer]), len(plan.values[layer])
        self.key_cuts, self.value_cuts = plan.key_cuts[layer], plan.value_cuts[layer]
        self.key_reads, self.value_reads = plan.key_reads[layer], plan.value_reads[layer]
        self.runs, self.key_runs, self.value_runs = plan.runs(layer)
        self.description = plan.describe(layer) + (f', window {window}' if window else '')
        heads = list(range(n_head))  # rows of the full projection: queries, then keys, then values
        heads += [n_head + h for h in plan.keys[layer]]
        heads += [2 * n_head + h for h in self.projected_values(plan, layer)]
        self.c_attn = HeadLinear(config.n_embd, self.head_size, heads, 3 * n_head, bias=config.bias)
        counts = (n_head, self.n_key, len(heads) - n_head - self.n_key)
        self.c_attn.matrix_rows = [n * self.head_size for n in counts if n]
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # over each head's numbers, one weight for all heads of the layer (as Qwen 3, Gemma 3)
        self.q_norm = RMSNorm(self.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size) if config.qk_norm and self.n_key else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)
        self.scaled = [bool(gain) and head.value[0] != layer for head in plan.heads[layer]]
        self.scales = any(self.scaled)
        if self.scales:
            self.gain = nn.Parameter(torch.ones(sum(self.scaled) if gain == 'head' else 1))
            self.description += f', gain per {gain}'

    def projected_values(self, plan: HeadPlan, layer: int) -> list[int]:
        """The heads whose values are a projection of x."""
        return plan.values[layer]

    def forward(self, x, memory: Memory, cache: KVCache | None = None):
        q, k, v = self.project(x, memory)
        memory.queries = q
        # where what is read is held, layers publish new tokens alone, as without a cache
        past = None if isinstance(cache, ReadCache) else cache
        k, v = self.read(k, v, memory, past)  # pieces, n_head heads together, of (B, heads, S, hs), S >= T
        return self.output(self.attend(q, k, v, memory, cache))

    def project(self, x, memory: Memory):
        """x (B, T, C) -> q (B, n_head, T, hs), k (B, n_key, T, hs), v (B, n_value, T, hs), with norm and
        rotation."""
        return self.split(self.c_attn(x), memory)

    def split(self, qkv, memory: Memory):
        """(B, T, rows of c_attn) -> q, k, v as of project."""
        B, T, _ = qkv.shape
        qkv = qkv.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, heads, T, hs)
        q, k, v = cut(qkv, [self.n_head, self.n_key, qkv.size(1) - self.n_head - self.n_key])
        # lagged heads read k as it is from here on
        return memory.rotate(self.q_norm(q)), memory.rotate(self.k_norm(k)), v

    def attend(self, q, k, v, memory: Memory, cache: KVCache | None):
        """q (B, n_head, T, hs) over pieces k, v -> what the heads read, (B, n_head, T, hs)."""
        if isinstance(cache, ReadCache):
            k, v = join(k), join(v)  # (B, n_head, T, hs) each, of new tokens
            if memory.at is not None:
                k, v = cache.put(k, v, memory.at, len(memory.places))
                return attend_one(q, k, v, self.mask(q, k, memory))
            k, v = ([held] for held in cache.append(k, v))
        elif memory.weights is None and cache is not None and q.size(2) == 1 and len(self.runs) > 1:
            return self.attend_in_place(q, k, v, memory)
        k, v = join(k), join(v)  # (B, n_head, S, hs) each
        mask, dropout_p = self.mask(q, k, memory), self.dropout if self.training else 0.0
        if memory.weights is None:
            return attend(q, k, v, mask, dropout_p)
        y, weights = attend_in_sight(q, k, v, mask, dropout_p)
        memory.weights.append(weights)
        return y

    def mask(self, q, k, memory: Memory):
        """Who sees whom, (B or 1, 1, T, S) bool, for the T queries that are the last of S keys; None where
        that is simply everyone before."""
        T, S = q.size(2), k.size(2)
        if not self.window or (not captured() and S <= self.window):
            return memory.mask
        places = torch.arange(S, device=q.device)
        queries = places[S - T :] if memory.at is None else memory.at  # (T,)
        age = queries[:, None] - places  # (T, S)
        near = ((age >= 0) & (age < self.window))[None, None]  # (1, 1, T, S)
        return near if memory.mask is None else near & memory.mask | (age == 0)

    def output(self, y):
        """y (B, n_head, T, hs) -> (B, T, n_embd)"""
        if self.scales:
            gains, one = iter(self.gain.to(y.dtype).expand(sum(self.scaled))), y.new_ones(())
            y = y * torch.stack([next(gains) if scaled else one for scaled in self.scaled])[:, None, None]
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def read(self, k, v, memory: Memory, cache: KVCache | None):
        """This layer's k (B, n_key, T, hs), v (B, n_value, T, hs) -> what its heads read, as lists of pieces
        (B, heads, S, hs) that are n_head heads together. Publishes what later layers read."""
        if cache is not None:
            k, v = self.hold(k, v, memory, cache)
        memory.published.append((cut(k, self.key_cuts), cut(v, self.value_cuts)))
        k = self.pieces(k, self.key_reads, [keys for keys, _ in memory.published])
        v = self.pieces(v, self.value_reads, [values for _, values in memory.published])
        return k, v

    def hold(self, k, v, memory: Memory, cache: KVCache):
        """k (B, n_key, T, hs), v (B, n_value, T, hs) of new tokens -> those of all tokens so far."""
        return cache.append(k, v)

    @staticmethod
    def pieces(own, reads, published):
        """own: this layer's produced heads; reads: None (own, as they are) or (layer, piece) pairs."""
        return [own] if reads is None else [published[layer][piece] for layer, piece in reads]

    def attend_in_place(self, q, k, v, memory: Memory):
        """Attention of one token over the pieces k, v as they lie in the caches: to join them would copy the
        whole cache for every token."""
        mask = self.mask(q, k[0], memory)
        q = q.split(self.runs, dim=1)
        k = [run for piece, sizes in zip(k, self.key_runs, strict=True) for run in piece.split(sizes, dim=1)]
        v = [
            run for piece, sizes in zip(v, self.value_runs, strict=True) for run in piece.split(sizes, dim=1)
        ]
        return join([attend(*run, mask) for run in zip(q, k, v, strict=True)])

    def new_cache(self, B, max_len, device, dtype) -> KVCache:
        """Empty state for generation: B sequences of at most max_len tokens."""
        return KVCache(B, self.n_key, self.n_value, max_len, self.head_size, device, dtype)

    def new_read_cache(self, B, max_len, device, dtype) -> ReadCache:
        """Empty state for generation that holds what is read; all layers that publish must have one then."""
        return ReadCache(B, self.n_head, max_len, self.head_size, device, dtype)

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
