"""How text is drawn from a language model, token by token, with its cache or without."""

from __future__ import annotations

import contextlib
import math

import torch
from torch.nn import functional as F


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
):
    """Yield the next token (B, 1), max_new_tokens times, after the prompt idx (B, T >= 1).

    temperature 0 is greedy. Ids of padding rows (from vocab_used on) are never drawn. generator: of the
    draws; None is torch's global one. When the context outgrows block_size (if that is its limit), the last
    block_size // 2 tokens are kept and read again: the cost per token stays bounded, and tokens are the same
    with and without the cache. top_k, top_p: see draw.

    lookup: up to this many tokens are guessed from what repeats in the text, and read in one pass together
    with the last one. Each is still drawn from its own logits, by the same random numbers: a guess saves
    passes, and changes a token only where rounding decides (in bf16, at times). It needs one sequence and a
    cache that rewinds, and is not made without them.
    """
    if idx.size(1) < 1:
        raise ValueError('the prompt is empty: give at least one token, such as the end-of-text token')
    block_size, vocab = model.config.block_size, model.config.vocab_used or None
    modules = list(model.modules())
    context, fresh, cache, made, hope = idx, idx, None, 0, 1
    repeats = None
    while made < max_new_tokens:
        if context.size(1) > model.context_limit:
            context = context[:, -max(1, block_size // 2) :]
            fresh, cache = context, None
        if use_cache and cache is None:
            cache = model.new_cache(idx.size(0))
            if lookup and repeats is None and cache.rewinds and idx.size(0) == 1:
                repeats = Repeats(idx[0].tolist())
        read, guess = fresh if use_cache else context, []
        if repeats:
            room = min(lookup, max_new_tokens - made - 1, model.context_limit - context.size(1))
            guess = repeats.guess(min(hope, room))
        if guess:
            read = torch.cat([read, read.new_tensor([guess])], dim=1)  # (1, fresh tokens and guesses)
        with no_dropout(modules):
            hidden = model.hidden(read, cache)
        logits = model.logits(hidden[:, -1 - len(guess) :]).float()  # (B, 1 + guesses, vocab_size)
        for i in range(len(guess) + 1):
            token = draw(logits[:, i, :vocab], temperature, top_k, generator, top_p)  # (B, 1)
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


def draw(logits, temperature: float, top_k: int | None = None, generator=None, top_p: float = 1.0):
    """Logits (B, number of ids) -> one token id per row (B, 1), of the top_k likeliest, and of those the
    fewest that together have probability top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        p, order = F.softmax(logits, dim=-1).sort(descending=True)  # (B, number of ids)
        out = p.cumsum(-1) - p >= top_p  # those before it suffice
        logits = logits.masked_fill(out.scatter(1, order, out), -math.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)


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
