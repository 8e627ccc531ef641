"""Sample from a trained model; the text appears as it is generated.

python sample.py --out_dir=out/reflex_422 --start="Once upon a time"
python sample.py --out_dir=out/reflex_422 --start=FILE:prompt.txt --num_samples=3 --temperature=0.8
python sample.py --out_dir=out/rugpt_reflex --start="Что такое снег?" --template="{start}\\n" --stop=eot
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from configurator import ConfigError, check_command_line, configure, run_program


@dataclass(frozen=True)
class Knobs:
    out_dir: str = 'out/quickstart'  # the folder of a run
    checkpoint: str = ''  # best.pt | last.pt | previous.pt; '' = best.pt if there is one, else last.pt
    start: str = ''  # the prompt, or FILE:prompt.txt; '' = begin a new document
    template: str = ''  # what the prompt is put into, '{start}\n' for one; only what follows it is printed
    stop: str = ''  # end a sample at this text, not printed; eot = the end-of-text token; several: a||b||eot
    num_samples: int = 1  # texts to draw from the same prompt
    max_new_tokens: int = 300  # tokens per sample
    temperature: float = 0.8  # below 1: safer, above: wilder; 0 = always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens only; 0 = from all
    top_p: float = 1.0  # draw from the likeliest ones that together have this probability; 1 = from all
    seed: int = 1337  # of the draws: the same seed gives the same text
    use_cache: bool = True  # false: recompute the whole context for every token (same tokens, slow)
    lookup: int = 32  # tokens to guess at a time where the text repeats itself (same tokens); 0 = none
    compile: bool = False  # compile what makes a token: faster, after half a minute; for long texts
    device: str = 'auto'  # auto (cuda, mps or cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = 'auto'  # auto | float32 | bfloat16 | float16
    threads: int = 0  # CPU threads; 0 = torch's choice


if __name__ == '__main__':
    check_command_line(Knobs, __doc__)  # before torch is imported, which takes seconds

import torch

from data.tokenizer import from_spec
from decoding import decoder_for
from runs.knobs import check_seed, check_threads
from runs.models import load_model
from runs.system import autocast_for, pick_device, pick_dtype
from runs.text import check_sampling, document_start, finite_logits, read_prompt, stream_text


def read_stops(stop: str, tokenizer) -> tuple[int | None, list[str]]:
    """'a||eot' -> (the id of the end-of-text token or None, ['a']); \\n is a line break."""
    texts = [text.replace('\\n', '\n') for text in stop.split('||') if text]
    if 'eot' in texts and tokenizer.eot is None:
        raise ConfigError(f'stop={stop!r}: this {tokenizer.kind} tokenizer has no end-of-text token')
    return tokenizer.eot if 'eot' in texts else None, [text for text in texts if text != 'eot']


def main(argv: list[str]) -> int:
    k = configure(Knobs, argv, __doc__).knobs
    check_seed(k)
    check_threads(k)
    check_sampling(k.temperature, k.top_k, k.top_p)
    for name, least in {'num_samples': 1, 'max_new_tokens': 1, 'lookup': 0}.items():
        if getattr(k, name) < least:
            raise ConfigError(f'{name}={getattr(k, name)}: must be at least {least}')
    text = read_prompt(k.start)
    if k.template and '{start}' not in k.template:
        raise ConfigError(f"template={k.template!r}: it must have '{{start}}', where the prompt goes")
    device = pick_device(k.device)
    dtype = pick_dtype(k.dtype, device)
    if k.threads:
        torch.set_num_threads(k.threads)
    model, state = load_model(k.out_dir, k.checkpoint, device)
    if state['tokenizer'] is None:
        raise ConfigError(
            f'{k.out_dir} was trained on plain token files: no tokenizer is known to decode with'
        )
    tokenizer = from_spec(state['tokenizer'])
    stop_token, stop = read_stops(k.stop, tokenizer)
    full = k.template.replace('\\n', '\n').replace('{start}', text) if k.template else text
    ids = document_start(state, tokenizer) + tokenizer.encode(full) or tokenizer.encode('\n')
    prompt = torch.tensor([ids], device=device)  # (1, T)

    options = {
        'temperature': k.temperature,
        'top_k': k.top_k or None,
        'top_p': k.top_p,
        'use_cache': k.use_cache,
        'lookup': k.lookup,
        'generator': torch.Generator(device).manual_seed(k.seed),
        'stop_token': stop_token,
        'stop': stop,
    }
    with autocast_for(device, dtype):
        decoder = decoder_for(model, compile=k.compile) if k.use_cache else None
    started, n = time.perf_counter(), 0  # tokens
    for i in range(k.num_samples):
        if i:
            print('\n---')
        print('' if k.template else text, end='', flush=True)
        with autocast_for(device, dtype), finite_logits(model):
            for piece in stream_text(model, tokenizer, prompt, k.max_new_tokens, decoder=decoder, **options):
                print(piece, end='', flush=True)
                n += 1
    n -= k.num_samples  # one piece of each is no token
    seconds = time.perf_counter() - started
    print(
        f'\n--- {n} tokens in {seconds:.1f} s: {n / seconds:.1f} tokens/s on {device}, {dtype}',
        file=sys.stderr,
    )
    return 0


if __name__ == '__main__':
    run_program(main)
