"""How text is drawn from a language model, token by token, with its cache or without."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Sampling(NamedTuple):
    """How a token is drawn from its logits."""

    temperature: float = 1.0  # 0: the likeliest one
    top_k: int | None = None  # of the so many likeliest ones; None: of all
    top_p: float = 1.0  # of the fewest ones, the likeliest first, that together have this probability
    vocab: int | None = None  # ids from here on are padding and never drawn; None: all are real


@torch.no_grad()
def stream_tokens(
    model,
    idx,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    lookup: int = 0,
    top_p: float = 1.0,
    decoder=None,
):
    """Yield the next token (B, 1), max_new_tokens times, after the prompt idx (B, T >= 1).

    temperature 0 is greedy. Ids of padding rows (from vocab_used on) are never drawn. generator: of the
    draws; None is torch's global one. When the context outgrows block_size (if that is its limit), the last
    block_size // 2 tokens are kept and read again: the cost per token stays bounded, and tokens are the same
    with and without the cache. top_k, top_p: see Sampling.

    lookup: up to this many tokens are guessed from what repeats in the text, and read in one pass together
    with the last one. Each is still drawn from its own logits, by the same random numbers: a guess saves
    passes, and changes a token only where rounding decides (in bf16, at times). It needs one sequence and a
    cache that rewinds, and is not made without them.

    decoder: a decoding.Decoder of this model and of as many sequences, whose compiled or captured steps make
    the tokens after the first; the same tokens, except where rounding decides.

    Where logits are inf or nan, -1 is yielded, and 0 is read in its place.
    """
    if idx.size(1) < 1:
        raise ValueError('the prompt is empty: give at least one token, such as the end-of-text token')
    if decoder is not None and len(decoder.token) != idx.size(0):
        raise ValueError(f'the decoder is for {len(decoder.token)} sequences, and here are {idx.size(0)}')
    block_size = model.config.block_size
    sampling = Sampling(temperature, top_k, top_p, model.config.vocab_used or None)
    modules = list(model.modules())
    context, fresh, cache, made, hope = idx, idx, None, 0, 1
    repeats = None
    if not use_cache:
        decoder = None
    while made < max_new_tokens:
        if context.size(1) > model.context_limit:
            context = context[:, -max(1, block_size // 2) :]
            fresh, cache = context, None
        if use_cache and cache is None:
            if decoder is None:
                cache = model.new_cache(idx.size(0))
            else:
                cache = decoder.cache
                cache.rewind(0)
            if lookup and repeats is None and cache.rewinds and idx.size(0) == 1:
                repeats = Repeats(idx[0].tolist())
        read, guess = fresh if use_cache else context, []
        if repeats:
            room = min(lookup, max_new_tokens - made - 1, model.context_limit - context.size(1))
            guess = repeats.guess(min(hope, room))
        if guess:
            read = torch.cat([read, read.new_tensor([guess])], dim=1)  # (1, fresh tokens and guesses)
        logits = token = None
        if decoder is not None and cache.length and read.size(1) == 1:
            token = decoder.next(read, sampling, generator)  # (B, 1)
        else:
            with no_dropout(modules):
                hidden = model.hidden(read, cache)
            logits = model.logits(hidden[:, -1 - len(guess) :]).float()  # (B, 1 + guesses, vocab_size)
        for i in range(len(guess) + 1):
            if logits is not None:
                token = draw(logits[:, i], sampling, generator)  # (B, 1)
            yield token
            fresh = token.clamp(min=0)
            context = torch.cat([context, fresh], dim=1)
            made += 1
            if repeats:
                repeats.append(drawn := int(token))
                if i < len(guess) and drawn != guess[i]:
                    break
        if guess:
            hope = 2 * hope if i == len(guess) else max(1, i)  # as many again as came true
            cache.rewind(context.size(1) - 1)


def draw(logits, sampling: Sampling, generator=None):
    """Logits (B, vocab_size) -> one token id per row (B, 1), -1 where they are inf or nan."""
    logits = logits[:, : sampling.vocab]
    return torch.where(
        torch.isfinite(logits).all(dim=-1, keepdim=True), drawn(logits, sampling, generator), -1
    )


def drawn(logits, sampling: Sampling, generator):
    """As draw, whatever the logits are."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p < 1:
        p, order = F.softmax(logits, dim=-1).sort(descending=True)  # (B, number of ids)
        out = p.cumsum(-1) - p >= sampling.top_p  # those before it suffice
        logits = logits.masked_fill(out.scatter(1, order, out), -math.inf)
    p = F.softmax(logits, dim=-1)
    # as torch.multinomial does, by the same random numbers; its check would wait for the device
    return (p / torch.empty_like(p).exponential_(1, generator=generator)).argmax(dim=-1, keepdim=True)


@contextlib.contextmanager
def no_dropout(modules):
    """Inside this context the modules are in evaluation mode; afterwards each has the mode that it had
    before."""
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
