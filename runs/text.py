"""Text in and out of a model: the prompt, where a document begins, and what comes token by token."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from configurator import ConfigError
from data.tokenizer import from_spec
from model import LanguageModel

NOT_FINITE = 'the model gives logits that are inf or nan; try --dtype=float32'


def check_sampling(temperature: float, top_k: int | None, top_p: float):
    """Refuse options of GPT.stream from which no token can be drawn. Raises ConfigError."""
    if temperature != 0 and not 1e-6 <= temperature < math.inf:
        raise ConfigError(f'temperature={temperature:g}: at least 1e-6, or 0 for always the likeliest token')
    if (top_k or 0) < 0:
        raise ConfigError(f'top_k={top_k}: must be at least 0')
    if not 0 < top_p <= 1:
        raise ConfigError(f'top_p={top_p}: must be above 0 and at most 1')


@contextlib.contextmanager
def finite_logits(model):
    """Inside this context, logits that are inf or nan raise ConfigError: a token drawn from them means
    nothing."""

    def look(head, inputs, logits):
        if not torch.isfinite(logits).all():
            raise ConfigError(NOT_FINITE)

    with contextlib.ExitStack() as stack:
        for module in model.modules():  # a composed model has experts, and each of them a head
            if isinstance(module, LanguageModel):
                stack.enter_context(module.lm_head.register_forward_hook(look))
        yield


def stream_text(
    model, tokenizer, prompt, max_new_tokens, stop_token=None, stop=(), **options
) -> Iterator[str]:
    """The text that continues prompt (1, T): a piece per token, and one more at the end.

    It ends before the token stop_token and before any of the texts in stop. options as of GPT.stream. A token
    may end inside a character, and a text inside a stop: such a tail is held back until it is known.
    """
    ids = prompt[0, -1:].tolist()  # a tokenizer may drop the space that a text begins with: begin before it
    shown, held = tokenizer.decode(ids).rstrip('\ufffd'), ''
    for token in model.stream(prompt, max_new_tokens, **options):
        drawn = int(token)  # the one time that a token is waited for
        if drawn < 0:
            raise ConfigError(NOT_FINITE)
        if drawn == stop_token:
            yield ''
            break
        ids.append(drawn)
        text = tokenizer.decode(ids)
        ready = text.rstrip('\ufffd')
        held += ready[len(shown) :]
        found = [held.index(s) for s in stop if s in held]
        if found:
            yield held[: min(found)]
            held, ids, shown = '', [], ''
            break
        keep = max((n for s in stop for n in range(len(s)) if held.endswith(s[:n])), default=0)
        yield held[: len(held) - keep]
        held, shown = held[len(held) - keep :], ready
        if text.endswith('\n'):  # decode line by line, so that the cost per token stays bounded
            ids = ids[-1:]
            shown = tokenizer.decode(ids)
    yield held + tokenizer.decode(ids)[len(shown) :]


def read_prompt(start: str) -> str:
    if not start.startswith('FILE:'):
        return start
    path = Path(start[len('FILE:') :])
    try:
        return path.read_text(encoding='utf-8-sig')  # a byte order mark is no text
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f'start={start!r}: {path} cannot be read as UTF-8 text ({e})') from None


def document_start(state: dict, tokenizer) -> list[int]:
    """The tokens that a document begins after: the data's own, else the end of the one before."""
    begin = state.get('begin')
    begin = tokenizer.eot if begin is None else begin
    return [] if begin is None else [begin]


def print_sample(model, data, k, device: str):
    """Print sample_tokens tokens that begin as the knobs say; for data with a known tokenizer."""
    tokenizer = from_spec(data.tokenizer_spec)
    start = document_start({'begin': data.meta.get('begin')}, tokenizer) + tokenizer.encode(k.sample_start)
    prompt = torch.tensor([start or [0]], device=device)  # (1, T)
    generator = torch.Generator(device).manual_seed(k.seed)
    options = {'temperature': 0.8, 'top_k': 200, 'generator': generator}  # as in sample.py
    print(k.sample_start, end='')
    with finite_logits(model):
        for piece in stream_text(model, tokenizer, prompt, k.sample_tokens, **options):
            print(piece, end='', flush=True)
    print()
