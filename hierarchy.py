"""The hierarchical transformer. It turns groups of tokens into a few latents, runs a deep stack on the
latents, and decodes them back to the full length with skip connections, as a U-net does.

A sequence consists of `groups` groups of K_0 tokens. Level i turns the K_{i-1} latents of a group into K_i,
and each of them stands at a token of the group: latent j of K_i stands at token K_0 - K_i + j and has seen
nothing after it. So the whole model is causal, and new tokens can be computed one by one. Generation keeps
the keys and values of every length; those inside a group are kept only until the group is complete.

    wte, wpe.0                    tokens (B, T, d_0)
    encoder.i  compress, stage    (B, g * K_{i-1}, d_{i-1}) -> (B, g * K_i, d_i), for i = 1 … n
    h                             the latent stack, n_layer blocks on (B, g * K_n, d_n): any head plan
    decoder.i  upsample, stage    (B, g * K_i, d_i) -> (B, g * K_{i-1}, d_{i-1}), for i = n … 1
    ln_f, lm_head                 at width d_0

Relatives: Mirasol3B (Piergiovanni et al., 2023), Hierarchical Perceiver (Carreira et al., 2022), Hourglass
(Nawrot et al., 2021), DenseFormer (Pagliardini et al., 2024), Soft MoE (Puigcerver et al., 2023), DeepSeekMoE
(Dai et al., 2024). Dimensions as in model.py; g groups, n levels, r a length: 0 of tokens, 1 … n of latents.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.channels import MERGES, ChannelBlock
from layers.contract import Memory, captured
from layers.heads import KVCache, attend
from layers.mlps import MLPS
from layers.norms import NORMS
from layers.positions import POSITIONS
from layers.registry import kinds_of, make_attentions
from layers.tokens import TokenTable
from model import Block, Cache, GPTConfig, LanguageModel, count, flops
from shape import GPTShape, HierarchyShape

LATENT_WARMUP = 0.2  # of training: the weight of the latent loss rises to its coefficient


def parse_numbers(name: str, text: str, least: int) -> list[int]:
    """'64-128' -> [64, 128]. Raises ValueError if one of them is not a number, or is below `least`."""
    parts = text.split('-')
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ValueError(f"{name}={text!r}: write numbers from {least} on joined by '-', such as '2-1'")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class HierarchyConfig(HierarchyShape, GPTConfig):
    """The fields of GPTConfig describe the latent stack (and the vocabulary, dropout and kinds of all
    blocks); those of HierarchyShape the way there and back. What does not fit together is refused here."""

    def __post_init__(self):
        GPTShape.__post_init__(self)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r} is unknown: one of {", ".join(known)}')
        for name in ('block_size', 'n_layer', 'n_head', 'groups', 'compress_blocks', 'channels'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        if self.block_size % self.groups:
            raise ValueError(
                f'block_size={self.block_size} is not a multiple of groups={self.groups}: '
                'all groups have the same length'
            )
        K, d = self.lengths, self.level_widths
        if any(after >= before for before, after in pairwise(K)):
            raise ValueError(
                f'latents={self.latents!r} do not shrink: a group has {", then ".join(map(str, K))} '
                f'(block_size={self.block_size} / groups={self.groups} tokens first)'
            )
        if len(d) != len(K):
            raise ValueError(
                f'widths={self.widths!r} are {len(d)}, but latents={self.latents!r} are {len(K) - 1} levels, '
                f'which with the tokens have {len(K)} widths'
            )
        if any(after < before for before, after in pairwise(d)):
            raise ValueError(f'widths={self.widths!r} shrink: a level must be as wide as the one before')
        if d[-1] != self.n_embd:
            raise ValueError(
                f'widths={self.widths!r} end with {d[-1]}, but the latent stack has n_embd={self.n_embd}: '
                'let both be the same'
            )
        for width in d:
            if width % self.n_head:
                raise ValueError(
                    f'widths={self.widths!r}: {width} is not a multiple of n_head={self.n_head}: '
                    'heads would differ in size'
                )
        for name in ('local_blocks', 'global_blocks'):
            self.blocks_at(name)
        self._check_channels()
        if self.latent_loss < 0 or (self.latent_loss and self.groups * K[-1] < 2):
            raise ValueError(
                f'latent_loss={self.latent_loss}: must not be negative, and needs at least 2 latents'
                f' (groups={self.groups}, latents={self.latents!r})'
            )
        for r in range(len(K)):
            self.at(r)
        for name, kind in kinds_of(self.stack()).items():
            if kind.layer.reads_tokens:
                raise ValueError(f'attention={name!r} reads tokens, but in a hierarchy it works on latents')
        if self.x0_skip:
            raise ValueError(
                'x0_skip=True: a block of a hierarchy works on latents, which are of several tokens'
            )

    def _check_channels(self):
        C, s = self.n_embd, self.channels
        if not 1 <= self.channel_every <= self.n_layer:
            raise ValueError(
                f'channel_every={self.channel_every}: from 1 to n_layer={self.n_layer} blocks of the stack'
            )
        if self.channel_shared_mlps < 0:
            raise ValueError(f'channel_shared_mlps={self.channel_shared_mlps}: must not be negative')
        hidden = self.channel_mlp * 4 * C / s
        if hidden < 1 or hidden % 1:
            raise ValueError(
                f'channels={s}: the MLP of one would be channel_mlp={self.channel_mlp:g} * 4 * n_embd={C} / '
                f'{s} = {hidden:g} wide, which is no whole number'
            )
        if not self.plain_blocks and self.attention != 'vanilla':
            raise ValueError(
                f'attention={self.attention!r} has no block to be in: all n_layer={self.n_layer} blocks are '
                f'multi-channel ones (channels={s}, channel_every={self.channel_every}); raise channel_every'
            )

    @property
    def group_size(self) -> int:
        """The number of tokens in a group."""
        return self.block_size // self.groups

    @cached_property
    def lengths(self) -> list[int]:
        """[K_0, K_1, … K_n]: how many tokens, then latents of level 1, 2, …, a group has."""
        return [self.group_size, *parse_numbers('latents', self.latents, 1)]

    @cached_property
    def level_widths(self) -> list[int]:
        """[d_0, d_1, … d_n]: the width of tokens, then of the latents of level 1, 2, …"""
        return parse_numbers('widths', self.widths, 1)

    @property
    def levels(self) -> int:
        return len(self.lengths) - 1

    @property
    def plain_blocks(self) -> int:
        """How many blocks of the latent stack are ordinary ones; the head plan covers those."""
        return self.n_layer - (self.n_layer // self.channel_every if self.channels > 1 else 0)

    def blocks_at(self, name: str) -> list[int]:
        """How many local_blocks or global_blocks there are at each length r."""
        text = getattr(self, name)
        numbers = parse_numbers(name, text, 0)
        if len(numbers) not in (1, self.levels + 1):
            raise ValueError(
                f'{name}={text!r} names {len(numbers)} lengths: name one for all, or all '
                f'{self.levels + 1} (tokens and latents={self.latents!r})'
            )
        return numbers if len(numbers) > 1 else numbers * (self.levels + 1)

    def at(self, r: int, **changes) -> GPTConfig:
        """The config of an ordinary block at length r. Its block_size is the whole sequence at that
        length."""
        own = {f.name: getattr(self, f.name) for f in fields(GPTConfig)}
        own |= {'n_layer': 1, 'attention': 'vanilla', 'n_embd': self.level_widths[r]}
        return GPTConfig(**{**own, 'block_size': self.groups * self.lengths[r], **changes})

    def stack(self) -> GPTConfig:
        """The config of the latent stack's ordinary blocks."""
        n = self.plain_blocks
        planned = {'n_layer': n, 'attention': self.attention} if n else {}
        return self.at(self.levels, **planned)


class Piece:
    """The tokens of one forward pass, and what they are at each length r: whole groups, or part of one
    group. It gives positions and generation state to the modules that compute on it."""

    def __init__(self, config: HierarchyConfig, start: int, T: int, device, cache: HierarchyCache | None):
        """T tokens that follow `start` others. They end where a group ends, or in the group they begin in."""
        self.device, self.cache = device, cache
        K = config.lengths
        group, first = divmod(start, K[0])
        self.whole = first == 0 and T % K[0] == 0
        self.groups = T // K[0] if self.whole else 1
        last = K[0] if self.whole else first + T
        self.ends_group = last == K[0]
        # from where to where in the group: its last K_r tokens have a latent of length r
        self.begin = [max(0, first - K[0] + k) for k in K]
        self.end = [max(0, last - K[0] + k) for k in K]
        self.before = [group * k for k in K]  # latents of the groups before

    def inside(self, r: int):
        """The positions within the group, (1, end - begin)."""
        return torch.arange(self.begin[r], self.end[r], device=self.device)[None]

    def across(self, r: int):
        """The positions within the sequence, (1, groups * (end - begin))."""
        first = self.before[r] + self.begin[r]
        last = first + self.groups * (self.end[r] - self.begin[r])
        return torch.arange(first, last, device=self.device)[None]

    def split(self, x):
        """(B, groups * K, C) -> (B * groups, K, C): each group becomes a sequence of its own."""
        return x.unflatten(1, (self.groups, -1)).flatten(0, 1) if self.groups > 1 else x

    def join(self, x):
        """(B * groups, K, C) -> (B, groups * K, C)"""
        return x.unflatten(0, (-1, self.groups)).flatten(1, 2) if self.groups > 1 else x

    def state(self, attn, B: int, size: int):
        """The state of an attention over the whole sequence, of `size` positions; None outside generation."""
        return None if self.cache is None else self.cache.state(self.cache.of_all, attn, B, size)

    def state_inside(self, attn, B: int, size: int):
        """The state of an attention inside the group, of `size` positions; None where groups are whole."""
        unfinished = self.cache is not None and not self.whole
        return self.cache.state(self.cache.of_group, attn, B, size) if unfinished else None


class HierarchyCache(Cache):
    """What generation carries from call to call: the states of the attentions over the whole sequence; the
    states of those inside the current group, until it is complete; and for each decoder level the
    projected latents of the last complete group and of the current one, (B, K_i to 2 K_i, d_{i-1})."""

    rewinds = False

    def __init__(self, device, dtype):
        super().__init__([])
        self.device, self.dtype = device, dtype
        self.of_all, self.of_group, self.latents = {}, {}, {}  # by module

    def state(self, states: dict, attn, B: int, size: int):
        if attn not in states:
            states[attn] = attn.new_cache(B, size, self.device, self.dtype)
        return states[attn]

    def select(self, rows):
        for state in [*self.of_all.values(), *self.of_group.values()]:
            state.select(rows)
        self.latents = {decoder: latents[rows] for decoder, latents in self.latents.items()}


class CrossAttention(nn.Module):
    """Causal attention inside groups: queries of one stream read keys and values of another, both d_in
    wide. The queries stand at the positions of the last keys. Heads and output have the config's width."""

    def __init__(self, d_in: int, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_size, self.dropout = config.n_head, config.head_size, config.dropout
        self.rotation = POSITIONS[config.position].rotation
        self.c_q = nn.Linear(d_in, config.n_embd, bias=config.bias)
        self.c_kv = nn.Linear(d_in, 2 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = NORMS['rmsnorm'](self.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = NORMS['rmsnorm'](self.head_size) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, source, pos, cache: KVCache | None = None):
        """x (B, n, d_in), source (B, m >= n, d_in), at positions pos (1, m) of the group -> (B, n, n_embd)"""
        n, heads = x.size(1), (-1, self.head_size)
        k, v = self.c_kv(source).chunk(2, dim=2)  # (B, m, n_embd) each
        k = self.k_norm(k.unflatten(2, heads).transpose(1, 2))  # (B, n_head, m, hs)
        k = self.rotation(pos, self.head_size)(k)
        v = v.unflatten(2, heads).transpose(1, 2)  # (B, n_head, m, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        if n == 0:  # nobody asks yet
            return x.new_empty(x.size(0), 0, self.c_proj.out_features)
        q = self.q_norm(self.c_q(x).unflatten(2, heads).transpose(1, 2))  # (B, n_head, n, hs)
        q = self.rotation(pos[:, -n:], self.head_size)(q)
        y = attend(q, k, v, None, self.dropout if self.training else 0.0)  # (B, n_head, n, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def new_cache(self, B, max_len, device, dtype) -> KVCache:
        """Empty generation state for B groups of at most max_len tokens."""
        return KVCache(B, self.n_head, self.n_head, max_len, self.head_size, device, dtype)

    def cache_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.n_head * self.head_size * itemsize

    def flops(self, n: int, m: int) -> float:
        """Forward FLOPs for n queries and m keys."""
        product = 2 * 2 * n * m * self.n_head * self.head_size
        return product + n * (flops(self.c_q, 0) + flops(self.c_proj, 0)) + m * flops(self.c_kv, 0)


def inside_groups(block: Block, x, piece: Piece, r: int, config: GPTConfig, size: int):
    """Run a block on x (B, groups * K, C) so that no group sees another."""
    rotate = POSITIONS[config.position].rotation(piece.inside(r), config.head_size)
    return piece.join(block(piece.split(x), Memory(rotate), piece.state_inside(block.attn, x.size(0), size)))


class Perceiver(nn.Module):
    """The last K_i tokens of a group attend to all of its tokens up to themselves and become its latents."""

    def __init__(self, config: HierarchyConfig, i: int):
        super().__init__()
        self.i, self.size = i, config.lengths[i - 1]
        d_in, own = config.level_widths[i - 1], config.at(i)
        self.ln_1 = NORMS[config.norm](d_in, bias=config.bias)
        self.attn = CrossAttention(d_in, own)
        self.widen = nn.Linear(d_in, own.n_embd, bias=config.bias)
        self.ln_2 = NORMS[config.norm](own.n_embd, bias=config.bias)
        self.mlp = MLPS[config.mlp](own)

    def forward(self, x, piece: Piece):
        """(B, groups * K_{i-1}, d_{i-1}) -> (B, groups * K_i, d_i)"""
        state = piece.state_inside(self.attn, x.size(0), self.size)
        x = piece.split(x)
        first = x.size(1) - (piece.end[self.i] - piece.begin[self.i])  # that becomes a latent
        normed = self.ln_1(x)
        y = self.attn(normed[:, first:], normed, piece.inside(self.i - 1), state)
        y = self.widen(x[:, first:]) + y
        return piece.join(y + self.mlp(self.ln_2(y)))

    def flops(self, n: int, m: int) -> float:
        """Forward FLOPs for a group whose m tokens become n latents."""
        return self.attn.flops(n, m) + n * (flops(self.widen, 0) + flops(self.mlp, 0))

    def state_bytes(self, itemsize: int) -> int:
        return self.size * self.attn.cache_bytes_per_token(itemsize)


class GroupTransformer(nn.Module):
    """Causal blocks run inside the group; then its last K_i tokens are its latents."""

    def __init__(self, config: HierarchyConfig, i: int):
        super().__init__()
        self.i, self.size, self.config = i, config.lengths[i - 1], config.at(i - 1)
        self.h = make_blocks(self.config, config.compress_blocks)
        self.widen = nn.Linear(self.config.n_embd, config.level_widths[i], bias=config.bias)

    def forward(self, x, piece: Piece):
        """(B, groups * K_{i-1}, d_{i-1}) -> (B, groups * K_i, d_i)"""
        for block in self.h:
            x = inside_groups(block, x, piece, self.i - 1, self.config, self.size)
        x = piece.split(x)
        first = x.size(1) - (piece.end[self.i] - piece.begin[self.i])  # that becomes a latent
        return piece.join(self.widen(x[:, first:]))

    def flops(self, n: int, m: int) -> float:
        return m * flops(self.h, m) + n * flops(self.widen, 0)

    def state_bytes(self, itemsize: int) -> int:
        return self.size * sum(block.attn.cache_bytes_per_token(itemsize) for block in self.h)


COMPRESSIONS: dict[str, type[Perceiver] | type[GroupTransformer]] = {
    'perceiver': Perceiver,
    'transformer': GroupTransformer,
}


def make_blocks(config: GPTConfig, n: int) -> nn.ModuleList:
    """n blocks that share nothing with one another."""
    return nn.ModuleList([Block(config, *make_attentions(config)) for _ in range(n)])


class Stage(nn.Module):
    """The local blocks (inside a group) and global blocks (over all) at length r."""

    def __init__(self, config: HierarchyConfig, r: int):
        super().__init__()
        self.r, self.config, self.size = r, config.at(r), config.lengths[r]
        counts = [config.blocks_at(name)[r] for name in ('local_blocks', 'global_blocks')]
        self.local_h, self.global_h = (make_blocks(self.config, n) for n in counts)
        order = [(j, is_global) for is_global, n in enumerate(counts) for j in range(n)]
        self.order = order if config.block_order == 'serial' else sorted(order)

    def forward(self, x, piece: Piece):
        """(B, groups * K_r, d_r) -> the same"""
        if x.size(1) == 0:
            return x
        rotate = POSITIONS[self.config.position].rotation(piece.across(self.r), self.config.head_size)
        for j, is_global in self.order:
            if is_global:
                block = self.global_h[j]
                x = block(x, Memory(rotate), piece.state(block.attn, x.size(0), self.config.block_size))
            else:
                x = inside_groups(self.local_h[j], x, piece, self.r, self.config, self.size)
        return x

    def flops(self, groups: int) -> float:
        """Forward FLOPs per group."""
        K = self.size
        return K * (flops(self.local_h, K) + flops(self.global_h, groups * K))

    def cache_bytes_per_group(self, itemsize: int) -> int:
        return self.size * sum(block.attn.cache_bytes_per_token(itemsize) for block in self.global_h)

    def state_bytes(self, itemsize: int) -> int:
        return self.size * sum(block.attn.cache_bytes_per_token(itemsize) for block in self.local_h)


class Encoder(nn.Module):
    """Level i on the way down: it turns K_{i-1} positions per group into K_i."""

    def __init__(self, config: HierarchyConfig, i: int):
        super().__init__()
        self.i, self.lengths, self.width = i, config.lengths, config.level_widths[i]
        self.compress = COMPRESSIONS[config.compression](config, i)
        self.stage = Stage(config, i)

    def forward(self, x, position, piece: Piece):
        """(B, groups * K_{i-1}, d_{i-1}) -> (B, groups * K_i, d_i); position: of POSITIONS, of length i"""
        if x.size(1) == 0:
            return x.new_empty(x.size(0), 0, self.width)
        # in the stream's type: autocast leaves another
        x, _ = position(self.compress(x, piece).type_as(x), piece.across(self.i))
        return self.stage(x, piece)

    def flops(self, groups: int) -> float:
        n, m = self.lengths[self.i], self.lengths[self.i - 1]
        return self.compress.flops(n, m) + self.stage.flops(groups)

    def state_bytes(self, itemsize: int) -> int:
        return self.compress.state_bytes(itemsize) + self.stage.state_bytes(itemsize)


class Decoder(nn.Module):
    """Level i on the way up: it turns K_i positions per group into K_{i-1}. The last K_i positions get the
    group's own latents. Those before them get the previous group's latents, repeated, with the nearest one
    last."""

    def __init__(self, config: HierarchyConfig, i: int):
        super().__init__()
        own = config.at(i - 1)
        self.i, self.n, self.m = i, config.lengths[i], config.lengths[i - 1]
        self.repeats = -(-(self.m - self.n) // self.n)
        self.c_narrow = nn.Linear(config.level_widths[i], own.n_embd, bias=config.bias)
        self.first = nn.Embedding(self.n, own.n_embd)  # what the first group gets for a previous one
        self.attn = None
        if config.upsample == 'attention':
            self.ln_q = NORMS[config.norm](own.n_embd, bias=config.bias)
            self.ln_kv = NORMS[config.norm](own.n_embd, bias=config.bias)
            self.attn = CrossAttention(own.n_embd, own)
        # What comes back joins the stream no larger than a token's embedding at first: what is common to all
        # latents is learned fastest, and would drown what tells tokens apart; without this, training stays at
        # the loss of token frequencies for hundreds of steps.
        self.ln_up = NORMS['rmsnorm'](own.n_embd)
        nn.init.constant_(self.ln_up.weight, 0.02)
        # the decoder's share is sigmoid(share), for each number of the stream: a half at first
        self.share = nn.Parameter(torch.zeros(own.n_embd)) if config.skip == 'interpolate' else None
        self.stage = Stage(config, i - 1)

    def repeat(self, latents):
        """(…, K_i, C) -> (…, K_{i-1} - K_i, C)"""
        latents = latents.unsqueeze(-2).expand(*latents.shape[:-1], self.repeats, -1).flatten(-3, -2)
        return latents[..., latents.size(-2) - (self.m - self.n) :, :]

    def upsample(self, x, piece: Piece):
        """(B, groups * K_i, d_i) -> (B, groups * K_{i-1}, d_{i-1})"""
        own, B, n = self.c_narrow(x), x.size(0), self.n
        seen = piece.cache.latents.get(self) if piece.cache is not None else None
        if seen is None:
            seen = self.first.weight.type_as(own).expand(B, -1, -1)  # (B, K_i, C)
        if piece.whole:
            own = own.unflatten(1, (piece.groups, n))  # (B, groups, K_i, C)
            before = torch.cat([seen[:, None], own[:, :-1]], dim=1)  # (B, groups, K_i, C)
            y = torch.cat([self.repeat(before), own], dim=2).flatten(1, 2)
            seen = own[:, -1]
        else:
            before = self.repeat(seen[:, :n])[:, piece.begin[self.i - 1] : piece.end[self.i - 1]]
            y = torch.cat([before, own], dim=1)
            seen = torch.cat([seen, own], dim=1)
        if piece.cache is not None:
            piece.cache.latents[self] = (seen[:, -n:] if piece.ends_group else seen).detach()
        return y

    def forward(self, x, skip, position, piece: Piece):
        """x (B, g * K_i, d_i), skip (B, g * K_{i-1}, d_{i-1}) -> as skip; position: of length i - 1"""
        if skip.size(1) == 0:
            return skip
        x, _ = position(self.upsample(x, piece), piece.across(self.i - 1))
        if self.attn is not None:
            state = piece.state_inside(self.attn, x.size(0), self.m)
            queries, source = piece.split(self.ln_q(skip + x)), piece.split(self.ln_kv(x))
            x = x + piece.join(self.attn(queries, source, piece.inside(self.i - 1), state))
        x = self.ln_up(x)
        if self.share is None:
            x = x + skip
        else:
            x = torch.lerp(skip, x.type_as(skip), self.share.sigmoid().type_as(skip))
        return self.stage(x, piece)

    def flops(self, groups: int) -> float:
        attention = self.attn.flops(self.m, self.m) if self.attn is not None else 0
        return self.n * flops(self.c_narrow, 0) + attention + self.stage.flops(groups)

    def state_bytes(self, itemsize: int) -> int:
        attention = self.m * self.attn.cache_bytes_per_token(itemsize) if self.attn is not None else 0
        latents = 2 * self.n * self.c_narrow.out_features * itemsize
        return attention + latents + self.stage.state_bytes(itemsize)


CHOICES = {
    'compression': COMPRESSIONS,
    'block_order': ('interleaved', 'serial'),
    'upsample': ('repeat', 'attention'),
    'skip': ('sum', 'interpolate'),
    'channel_merge': MERGES,
}


class Hierarchy(LanguageModel):
    config_class = HierarchyConfig

    def __init__(self, config: HierarchyConfig, seed: int | None = None):
        """seed: of the initial weights; None draws one from torch's global generator (torch.manual_seed)."""
        super().__init__()
        self.config, self.stack = config, config.stack()
        self.context_limit, self.padding = config.block_size, 'right'  # groups begin at the first token
        tokens, n = config.at(0), config.levels
        self.transformer = nn.ModuleDict(
            {
                'wte': TokenTable(config.vocab_size, tokens.n_embd),
                # by length: a level's are those of the encoder and of the decoder
                'wpe': nn.ModuleList([POSITIONS[config.position](config.at(r)) for r in range(n + 1)]),
                'drop': nn.Dropout(config.dropout),
                'encoder': nn.ModuleDict({str(i): Encoder(config, i) for i in range(1, n + 1)}),
                'h': nn.ModuleList(self.make_stack()),
                'decoder': nn.ModuleDict({str(i): Decoder(config, i) for i in range(1, n + 1)}),
                'ln_f': NORMS[config.norm](tokens.n_embd, bias=config.bias),
            }
        )
        if config.dense:  # what the input of block b + 1 takes of the stack's input and of blocks 0 … b
            plain_chain = [torch.eye(b + 2)[-1] for b in range(config.n_layer)]
            self.transformer['dense'] = nn.ParameterList([nn.Parameter(share) for share in plain_chain])
        if config.latent_loss:
            self.transformer['predict'] = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.finish(seed)

    def make_stack(self) -> list[nn.Module]:
        """The blocks of the latent stack. A head plan counts only the ordinary ones."""
        c = self.config
        attentions = iter(make_attentions(self.stack))
        every = c.channel_every if c.channels > 1 else c.n_layer + 1
        return [
            Block(self.stack, next(attentions)) if (b + 1) % every else ChannelBlock(self.stack, c)
            for b in range(c.n_layer)
        ]

    def describe(self) -> str:
        """What the shapes of the weights do not tell, one line each."""
        c, t = self.config, self.transformer
        of_all = 'norm mlp position qk_norm groups group_size latents compression'.split()
        of_all += 'block_order upsample skip dense'.split()
        lines = [', '.join(f'{name} {getattr(c, name)}' for name in of_all)]
        if c.channels > 1:
            lines.append(f'channels merged by {c.channel_merge}')
        return '\n'.join([*lines, *(block.attn.describe() for block in t.h)])

    def summary(self) -> str:
        c, d = self.config, self.config.level_widths
        levels = ' > '.join(f'{K} x {width}' for K, width in zip(c.lengths, d, strict=True))
        parts = ', '.join(f'{name} {n / 1e6:.2f}M' for name, n in self.parts().items() if n >= 5000)
        return (
            f'hierarchy of {c.groups} groups, {levels}, {c.attention}, {c.n_layer} latent blocks, '
            f'{c.n_head} heads, {self.num_params() / 1e6:.2f}M parameters ({parts})'
        )

    def parts(self) -> dict[str, int]:
        t = self.transformer
        named = {'tokens': t.wte, 'positions': t.wpe}
        named |= {f'down {i}': encoder for i, encoder in t.encoder.items()}
        named |= {'latent stack': t.h}
        named |= {f'up {i}': decoder for i, decoder in reversed(t.decoder.items())}
        named |= {
            name: t[key] for name, key in {'dense': 'dense', 'prediction': 'predict'}.items() if key in t
        }
        return {name: count(module) for name, module in {**named, 'final norm': t.ln_f}.items()}

    def run(self, x, piece: Piece):
        """Embedded tokens (B, T, d_0) -> what the head reads (B, T, d_0), and the latents before the stack
        and after it."""
        t = self.transformer
        x, _ = t.wpe[0](x, piece.across(0))
        x, skips = t.drop(x), []
        for encoder, position in zip(t.encoder.values(), t.wpe[1:], strict=True):
            skips.append(x)
            x = self.step(encoder, x, position, piece)
        latents, x = x, self.think(x, piece)
        thought = x
        for decoder, skip, position in reversed([*zip(t.decoder.values(), skips, t.wpe[:-1], strict=True)]):
            x = self.step(decoder, x, skip, position, piece)
        return t.ln_f(x), latents, thought

    def think(self, x, piece: Piece):
        """The latent stack: (B, groups * K_n, d_n) -> the same"""
        if x.size(1) == 0:
            return x
        t, stack = self.transformer, self.stack
        memory = Memory(POSITIONS[stack.position].rotation(piece.across(self.config.levels), stack.head_size))
        outputs = [x]
        for b, block in enumerate(t.h):
            x = self.step(block, x, memory, piece.state(block.attn, x.size(0), stack.block_size))
            if self.config.dense:
                outputs.append(x)
                x = sum(share * output for share, output in zip(t.dense[b].type_as(x), outputs, strict=True))
        return x

    def hidden(self, idx, cache: HierarchyCache | None = None, pos=None, real=None, embedded=None):
        """Token ids (B, T) -> what the head reads, (B, T, d_0).

        With a cache, idx follows the tokens that it holds, and the cache is advanced by T. pos, real and
        embedded: as in GPT.hidden, but groups begin at the first token: ValueError unless positions are one
        after the other and all padding is on the right.
        """
        x = self.transformer.wte(idx) if embedded is None else embedded  # (B, T, d_0)
        T, K = x.size(1), self.config.group_size
        start = cache.length if cache is not None else 0
        if start + T > self.context_limit:
            raise ValueError(
                f'{start + T} tokens do not fit block_size={self.config.block_size}: crop the sequence'
            )
        in_order = pos is None or bool((pos == torch.arange(start, start + T, device=x.device)).all())
        if real is not None or not in_order:
            raise ValueError(
                'a hierarchy forms groups from the first token on: padding goes to the right alone'
            )
        if cache is None:  # the last group is filled up on the right, where nobody before it looks
            whole = self.config.block_size if captured() else -(-T // K) * K
            x = F.pad(x, (0, 0, 0, whole - T))
            y = self.run(x, Piece(self.config, 0, whole, x.device, None))[0]  # (B, whole, d_0)
            return y.index_select(1, torch.arange(T, device=y.device)) if captured() else y[:, :T]
        done = []
        while T:
            used = cache.length % K  # of the group at hand
            n = min(T, K - used) if used or T < K else T - T % K
            piece = Piece(self.config, cache.length, n, x.device, cache)
            done.append(self.run(x[:, -T:][:, :n], piece)[0])
            if piece.ends_group:
                cache.of_group.clear()
            cache.length, T = cache.length + n, T - n
        return torch.cat(done, dim=1)

    def forward(self, idx, targets=None, progress=None):
        """As LanguageModel.forward. With progress, the latent loss is added. Its weight ramps up over the
        first fifth of training: 1 - cosine between each latent that enters the stack, held fixed, and a
        linear map of what the stack made of the one before."""
        if targets is None or progress is None or not self.config.latent_loss:
            return super().forward(idx, targets)
        T = idx.size(1)
        if T % self.config.group_size:
            raise ValueError(
                f'{T} tokens are no whole groups of {self.config.group_size}: train on block_size'
            )
        x = self.transformer.wte(idx)
        hidden, latents, thought = self.run(x, Piece(self.config, 0, T, idx.device, None))
        loss = self.loss(hidden, targets)
        predicted = self.transformer.predict(thought)[:, :-1].float()
        cosine = F.cosine_similarity(predicted, latents[:, 1:].detach().float(), dim=-1)
        weight = self.config.latent_loss * (progress / LATENT_WARMUP).clamp(max=1)
        return None, loss + weight * (1 - cosine).mean()

    def flops_by_part(self, T: int | None = None, backward: bool = True) -> dict[str, float]:
        """FLOPs per token of each part of the model; see flops_per_token."""
        c, t = self.config, self.transformer
        T = T or c.block_size
        groups = -(-T // c.group_size)
        K_n, both = c.lengths[-1], 1 + 2 * backward
        per_group = {f'down {i}': both * encoder.flops(groups) for i, encoder in t.encoder.items()}
        per_group['latent stack'] = K_n * flops(t.h, groups * K_n, backward)
        per_group |= {f'up {i}': both * decoder.flops(groups) for i, decoder in reversed(t.decoder.items())}
        if 'predict' in t and backward:
            per_group['prediction'] = both * K_n * flops(t.predict, 0)
        per_token = {name: n * groups / T for name, n in per_group.items()}
        return per_token | {'head': both * flops(self.lm_head, 0)}

    def flops_per_token(self, T: int | None = None, backward: bool = True) -> float:
        """FLOPs per token of one pass over sequences of T tokens (default block_size), counted as `flops`
        does, at the number of positions that each part works on. An incomplete last group costs as much as a
        full one."""
        return sum(self.flops_by_part(T, backward).values())

    def cache_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of generation state that one more token costs on average (itemsize 2 is bf16)."""
        t = self.transformer
        latent = sum(block.attn.cache_bytes_per_token(itemsize) for block in t.h)
        stages = [level.stage for level in [*t.encoder.values(), *t.decoder.values()]]
        per_group = self.config.lengths[-1] * latent + sum(s.cache_bytes_per_group(itemsize) for s in stages)
        return round(per_group / self.config.group_size)

    def state_bytes(self, itemsize: int = 2) -> int:
        """The most bytes of generation state of one sequence that do not grow with the number of groups."""
        t = self.transformer
        levels = sum(level.state_bytes(itemsize) for level in [*t.encoder.values(), *t.decoder.values()])
        return levels + sum(block.attn.state_bytes(itemsize) for block in t.h)

    def new_cache(self, B: int) -> HierarchyCache:
        return HierarchyCache(*self.cache_type())
