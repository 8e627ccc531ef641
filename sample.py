"""Sample from a trained model; the text appears as it is generated.

python sample.py --out_dir=out/reflex_422 --start="Once upon a time"
python sample.py --out_dir=out/reflex_422 --start=FILE:prompt.txt --num_samples=3 --temperature=0.8
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from configurator import ConfigError, configure
from system import autocast_for, pick_device, pick_dtype
from tokenizer import TokenizerError, from_spec


@dataclass(frozen=True)
class Knobs:
    out_dir: str = 'out/quickstart'  # the folder of a run
    checkpoint: str = ''  # best.pt | last.pt | previous.pt; '' = best.pt if there is one, else last.pt
    start: str = ''  # the prompt, or FILE:prompt.txt; '' = begin a new document
    num_samples: int = 1  # texts to draw from the same prompt
    max_new_tokens: int = 300  # tokens per sample
    temperature: float = 0.8  # below 1: safer, above: wilder; 0 = always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens only; 0 = from all
    seed: int = 1337  # of the draws: the same seed gives the same text
    use_cache: bool = True  # false: recompute the whole context for every token (same tokens, slow)
    device: str = 'auto'  # auto (cuda, mps or cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = 'auto'  # auto | float32 | bfloat16 | float16
    threads: int = 0  # CPU threads; 0 = torch's choice


def stream_text(model, tokenizer, prompt, max_new_tokens, **options) -> Iterator[str]:
    """The text that continues prompt (1, T), piece by piece; options as of GPT.stream.

    A token may end inside a character: such a tail is held back until the character is whole.
    """
    ids, shown = [], ''
    for token in model.stream(prompt, max_new_tokens, **options):
        ids.append(int(token))
        text = tokenizer.decode(ids)
        ready = text.rstrip('\ufffd')
        yield ready[len(shown) :]
        shown = ready
        if text.endswith('\n'):  # decode line by line, so that the cost per token stays bounded
            ids, shown = [], ''
    yield tokenizer.decode(ids)[len(shown) :]


def read_prompt(start: str) -> str:
    if not start.startswith('FILE:'):
        return start
    path = Path(start[len('FILE:') :])
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f'start={start!r}: {path} cannot be read as UTF-8 text ({e})') from None


def main(argv: list[str]) -> int:
    k = configure(Knobs, argv, __doc__).knobs
    for name, least in {'num_samples': 1, 'max_new_tokens': 1, 'temperature': 0, 'top_k': 0}.items():
        if getattr(k, name) < least:
            raise ConfigError(f'{name}={getattr(k, name)}: must be at least {least}')
    text = read_prompt(k.start)
    device = pick_device(k.device)
    dtype = pick_dtype(k.dtype, device)
    if k.threads:
        torch.set_num_threads(k.threads)
    model, state = checkpoint.load_model(k.out_dir, k.checkpoint, device)
    if state['tokenizer'] is None:
        raise ConfigError(
            f'{k.out_dir} was trained on plain token files: no tokenizer is known to decode with'
        )
    tokenizer = from_spec(state['tokenizer'])
    begin = [] if tokenizer.eot is None else [tokenizer.eot]
    ids = begin + tokenizer.encode(text) or tokenizer.encode('\n')
    prompt = torch.tensor([ids], device=device)  # (1, T)

    generator = torch.Generator(device).manual_seed(k.seed)
    options = {'temperature': k.temperature, 'top_k': k.top_k or None, 'use_cache': k.use_cache}
    started = time.perf_counter()
    for i in range(k.num_samples):
        if i:
            print('\n---')
        print(text, end='', flush=True)
        with autocast_for(device, dtype):
            pieces = stream_text(model, tokenizer, prompt, k.max_new_tokens, generator=generator, **options)
            for piece in pieces:
                print(piece, end='', flush=True)
    seconds = time.perf_counter() - started
    n = k.num_samples * k.max_new_tokens
    print(
        f'\n--- {n} tokens in {seconds:.1f} s: {n / seconds:.1f} tokens/s on {device}, {dtype}',
        file=sys.stderr,
    )
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, TokenizerError, checkpoint.CheckpointError) as e:
        print(f'sample.py: {e}', file=sys.stderr)
        sys.exit(2)
