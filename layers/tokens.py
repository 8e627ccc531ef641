"""Head plans whose values depend on the token alone: do earlier layers' values help because they tell it?"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.contract import Memory, Place
from layers.heads import HeadLinear, HeadPlanAttention, KVCache, ReadCache, attend, attend_in_sight
from layers.plans import HeadPlan


class TokenTable(nn.Embedding):
    """A table with a row for every id of the vocabulary."""


class BankAttention(HeadPlanAttention):
    """Values are rows of a table of the layer's own, one per token of the vocabulary: Bank of Values (He
    et al., 2026, arXiv:2606.02780), which has them in the last third of the layers, as in 'vanilla*4
    bank*2'."""

    reads_tokens = True

    def __init__(self, config, place: Place, **own):
        super().__init__(config, place, **own)
        self.bank = TokenTable(config.vocab_size, self.n_value * self.head_size)
        self.scale = math.sqrt(config.n_embd)  # values then start as large as projected ones
        self.description += ', values from a bank'

    def projected_values(self, plan: HeadPlan, layer: int) -> list[int]:
        return []

    def project(self, x, memory: Memory):
        q, k, _ = super().project(x, memory)
        return q, k, self.values(memory.tokens, k)

    def values(self, tokens, like):
        """Ids (B, S) -> their values (B, n_value, S, hs), of the type of `like`."""
        v = (self.bank(tokens) * self.scale).type_as(like)  # (B, S, n_value * hs)
        return v.unflatten(2, (self.n_value, self.head_size)).transpose(1, 2)

    def hold(self, k, v, memory: Memory, cache: TokenCache):
        return cache.append(k, v[:, :0])[0], self.values(cache.remember(memory.tokens), k)

    def new_cache(self, B, max_len, device, dtype) -> TokenCache:
        return TokenCache(B, self.n_key, 0, max_len, self.head_size, device, dtype)

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Of keys and of an id."""
        return self.n_key * self.head_size * itemsize + 4


class TokenCache(KVCache):
    """Keys and values that are computed from the stream, and the ids (B, max_len) of the tokens: what depends
    on an id alone is made again when it is read."""

    def __init__(self, B, key_heads, value_heads, max_len, head_size, device, dtype):
        super().__init__(B, key_heads, value_heads, max_len, head_size, device, dtype)
        self.ids = torch.empty(B, max_len, device=device, dtype=torch.int32)

    def remember(self, tokens):
        """The ids (B, T) of the tokens whose keys were just appended; returns those of all (B, length)."""
        self.ids[:, self.length - tokens.size(1) : self.length] = tokens
        return self.ids[:, : self.length]

    def select(self, rows):
        super().select(rows)
        self.ids = self.ids[rows]


class EmbeddingValueAttention(HeadPlanAttention):
    """The values of the last heads are a projection of the token's embedding, those of the others a
    projection of x. The layer has as many parameters as a plain one, and shares nothing with other layers.

    In generation these values are not kept, but the ids of the tokens are. A head's weights a over the tokens
    so far then meet the embeddings e, and only their sum is projected: Σ a_t (W e_t) = W Σ a_t e_t. Where
    another layer reads the keys or values of this one, they are kept as usual."""

    reads_tokens = True

    def __init__(self, config, place: Place, *, heads: int = 0, **own):
        """heads: how many of them; 0: half."""
        heads = heads or config.n_head // 2
        if not 1 <= heads <= config.n_head:
            raise ValueError(f'embedding_values(heads={heads}): from 1 to n_head={config.n_head}')
        self.of_tokens = heads
        super().__init__(config, place, **own)
        self.own = self.n_value - heads
        last = range(config.n_head - heads, config.n_head)
        rows = [2 * config.n_head + h for h in last]
        self.c_embed = HeadLinear(config.n_embd, self.head_size, rows, 3 * config.n_head, bias=config.bias)
        self.description += f', values of {heads} heads from the embedding'
        self.keeps_values = place.plan.read_above(place.planned)

    def projected_values(self, plan: HeadPlan, layer: int) -> list[int]:
        return plan.values[layer][: len(plan.values[layer]) - self.of_tokens]

    def project(self, x, memory: Memory):
        q, k, v = super().project(x, memory)
        embedded = F.rms_norm(memory.embedded, memory.embedded.shape[-1:])
        own = self.c_embed(embedded).unflatten(2, (self.of_tokens, self.head_size)).transpose(1, 2)
        return q, k, torch.cat([v, own], dim=1)  # (B, n_value, T, hs)

    def forward(self, x, memory: Memory, cache=None):
        if cache is None or cache.length == 0 or self.keeps_values or isinstance(cache, ReadCache):
            return super().forward(x, memory, cache)
        q, k, v = self.project(x, memory)
        memory.queries = q
        memory.published.append(((), ()))  # nobody reads them
        k, v = cache.append(k, v[:, : self.own])
        embedded = memory.embed(cache.remember(memory.tokens))  # (B, S, C)
        embedded = F.rms_norm(embedded, embedded.shape[-1:]).type_as(k)
        mask = self.mask(q, k, memory)
        if memory.weights is not None:
            memory.weights.append(attend_in_sight(q, k, k, mask)[1])
        y = attend(q[:, : self.own], k[:, : self.own], v, mask) if self.own else q[:, :0]
        e = embedded[:, None].expand(-1, self.of_tokens, -1, -1)  # (B, of_tokens, S, C)
        e = attend(q[:, self.own :], k[:, self.own :], e, mask)  # (B, of_tokens, T, C)
        W = self.c_embed.weight.unflatten(0, (self.of_tokens, self.head_size))  # (of_tokens, hs, C)
        e = e @ W.mT.type_as(e)  # (B, of_tokens, T, hs)
        if self.c_embed.bias is not None:
            e = e + self.c_embed.bias.view(self.of_tokens, 1, self.head_size).type_as(e)
        return self.output(torch.cat([y, e], dim=1))

    def hold(self, k, v, memory: Memory, cache):
        if self.keeps_values:
            return super().hold(k, v, memory, cache)
        cache.append(k, v[:, : self.own])
        cache.remember(memory.tokens)
        return k, v  # the first tokens are all tokens so far

    def new_cache(self, B, max_len, device, dtype) -> KVCache:
        if self.keeps_values:
            return super().new_cache(B, max_len, device, dtype)
        return TokenCache(B, self.n_key, self.own, max_len, self.head_size, device, dtype)

    def cache_bytes_per_token(self, itemsize: int) -> int:
        if self.keeps_values:
            return super().cache_bytes_per_token(itemsize)
        return (self.n_key + self.own) * self.head_size * itemsize + 4
