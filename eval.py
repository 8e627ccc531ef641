"""How well a model predicts: loss, perplexity and bits per byte on any text, or tasks of the
lm-evaluation-harness.

    python eval.py --out_dir=out/reflex_422                           # all of its own validation split
    python eval.py --out_dir=out/reflex_422 --text=book.txt --stride=256
    python eval.py --init_from=gpt2 --dataset=shakespeare             # GPT-2-shaped weights in place of a run
    python eval.py --out_dir=out/reflex_422 --tasks=lambada_openai,hellaswag --limit=100

A window holds block_size tokens; stride is how far from it the next one begins, and each token counts once.
By default stride = window, and a token has half a window of context on average; with a small stride it has
nearly a whole one, at a cost. Only real tokens have a probability: padding ids are none.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import ConfigError, check_command_line, configure, run_program


@dataclass(frozen=True)
class Knobs:
    # model
    out_dir: str = 'out/quickstart'  # the folder of a run
    checkpoint: str = ''  # best.pt | last.pt | previous.pt; '' = best.pt if there is one, else last.pt
    init_from: str = ''  # in place of a run: GPT-2-shaped or exported weights; gpt2, owner/name or a folder
    # what to predict
    dataset: str = ''  # a folder of data/, or any path; '' = what the run was trained on
    split: str = 'val'  # of the data set: train | val | test
    text: str = ''  # in place of a data set: a file of UTF-8 text, one document
    # windows
    window: int = 0  # tokens; 0 = the model's block_size
    stride: int = 0  # tokens from one window to the next; 0 = window: they do not overlap
    batch_size: int = 8  # windows at a time
    # lm-evaluation-harness
    tasks: str = ''  # in place of all that: names of tasks, joined by commas
    include_path: str = ''  # a folder with tasks of your own (YAML; they may run Python files beside them)
    num_fewshot: int = 0  # solved examples before each question
    limit: int = 0  # questions per task; 0 = all
    # output
    save: str = ''  # also write the result to this JSON file
    # system
    device: str = 'auto'  # auto (cuda, mps or cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = 'auto'  # auto | float32 | bfloat16 | float16
    threads: int = 0  # CPU threads; 0 = torch's choice


if __name__ == '__main__':
    check_command_line(Knobs, __doc__)  # before torch is imported, which takes seconds

import numpy as np
import torch
from tqdm import tqdm

from data.files import CorpusError
from data.sources import read_text
from data.tokendata import Examples, eval_batch, eval_windows, open_data
from data.tokenizer import from_spec
from model import GPT
from runs import pretrained
from runs.datasets import bytes_per_token, data_folder
from runs.files import write_text
from runs.knobs import check_threads
from runs.models import load_model
from runs.system import autocast_for, pick_device, pick_dtype
from runs.text import document_start


def load(k: Knobs, device: str):
    """(model, tokenizer or None, the tokens that a document begins after, the run's data set or '')."""
    if k.init_from:
        found = pretrained.read(k.init_from)
        model = GPT(found.config, seed=0)
        pretrained.copy_weights(model, found)
        tokenizer = pretrained.tokenizer_of(found)
        begin = tokenizer.bos if found.begin is None else found.begin
        return model.to(device).eval(), tokenizer, document_start({'begin': begin}, tokenizer), ''
    model, state = load_model(k.out_dir, k.checkpoint, device)
    tokenizer = from_spec(state['tokenizer']) if state['tokenizer'] else None
    begin = document_start(state, tokenizer) if tokenizer else []
    return model, tokenizer, begin, state['config'].get('dataset', '')


def windows(n_tokens: int, window: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts (n,) of windows that predict every token but the first, and how many leading targets of each
    were those of the window before (n,). n_tokens > window >= stride >= 1; the last ends with the tokens."""
    last = n_tokens - 1 - window
    starts = np.append(np.arange(0, last, stride), last)
    return starts, np.diff(starts, prepend=starts[0] - window) * -1 + window


@torch.no_grad()
def loss_on(model: GPT, tokens, window: int, stride: int, batch_size: int, device: str, autocast) -> float:
    """Mean nats per token of tokens (N,) but the first, each predicted once; see the top of this file. Of
    examples, those that are asked for."""
    if isinstance(tokens, Examples):
        starts, skip = eval_windows(tokens, window, 0)
    else:
        starts, skip = windows(len(tokens), window, stride)
    total = count = 0
    batch_size = min(batch_size, len(starts))
    batches = range(-(-len(starts) // batch_size))
    often = 0.1 if sys.stderr.isatty() else 30  # seconds between signs of life
    for i in tqdm(batches, unit='batch', delay=2, mininterval=often, leave=False):
        x, y = (
            torch.from_numpy(a).to(device) for a in eval_batch(tokens, starts, skip, i, batch_size, window)
        )
        with autocast():
            mean = model.loss(model.hidden(x), y, model.config.vocab_used or None)
        n = int((y != -1).sum())
        total, count = total + mean.item() * n, count + n
    return total / count


def measure(
    k: Knobs, model: GPT, tokenizer, begin: list[int], own_dataset: str, device: str, autocast
) -> dict:
    """The result of the knobs as a dict: what was predicted, and how well."""
    if k.text:
        if tokenizer is None:
            raise ConfigError(
                f'text={k.text!r}: {k.out_dir} was trained on plain token files, no tokenizer is known'
            )
        try:
            text = read_text(k.text)
        except CorpusError as e:
            raise ConfigError(f'text={k.text!r} cannot be read as UTF-8 text ({e})') from None
        tokens = np.array(begin + tokenizer.encode(text), dtype=np.int64)
        given = tokenizer.decode([]) if begin else tokenizer.decode(tokens[:1])  # what is not predicted
        n_bytes, what = len(text.encode('utf-8')) - len(given.encode('utf-8')), k.text
    else:
        folder = data_folder(k.dataset or own_dataset)
        known = model.config.vocab_used or model.config.vocab_size
        data = open_data(folder, vocab_size=None if (folder / 'meta.json').exists() else known)
        spec = data.tokenizer_spec
        if spec is None or tokenizer is None:
            reason = '' if data.vocab_size == known else 'it is not known whose tokens these are'
        elif spec['fingerprint'] != tokenizer.fingerprint:
            reason = pretrained.difference(from_spec(spec), tokenizer)
        else:
            reason = ''
        if reason:
            raise ConfigError(
                f'{folder} cannot be predicted by this model: {reason}; prepare it with its tokenizer'
            )
        if k.split not in data.splits:
            raise ConfigError(f'split={k.split!r}: {folder} has {", ".join(data.splits)}')
        tokens, what = data.splits[k.split], f'{k.split} of {folder}'
        per_token = bytes_per_token(data).get(k.split)
        n_bytes = per_token and per_token * (len(tokens) - 1)
    if len(tokens) < 2:
        raise ConfigError(f'{what} has {len(tokens)} tokens: at least 2 are needed to predict one')
    window = min(k.window or model.config.block_size, len(tokens) - 1)
    stride, n_targets = min(k.stride or window, window), len(tokens) - 1
    if isinstance(tokens, Examples):
        if window != tokens.size - 1 or k.stride:
            raise ConfigError(
                f'{what} consists of examples of {tokens.size} tokens, each of which is a window: leave out '
                f'window and stride, and take a model of block_size={tokens.size - 1}'
            )
        n_targets = len(tokens) // tokens.size * int(tokens.counts.sum())
    loss = loss_on(model, tokens, window, stride, k.batch_size, device, autocast)
    if not math.isfinite(loss):
        raise ConfigError(f'{what}: the loss is {loss}; try --dtype=float32, or the weights are ruined')
    return {
        'data': what,
        'tokens': n_targets,
        'window': window,
        'stride': stride,
        'loss': loss,
        'perplexity': math.exp(min(loss, 700)),  # the largest that a float holds
        'bits_per_byte': loss * n_targets / n_bytes / math.log(2) if n_bytes else None,
    }


def make_room(path: Path):
    """Refuse a file that cannot be written, before hours are spent on what goes into it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, 'it is a folder')
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, 'its folder is not yours to write to')
    except OSError as e:
        raise ConfigError(f'save={str(path)!r} cannot be written: {e.strerror}') from None


def main(argv: list[str]) -> int:
    k = configure(Knobs, argv, __doc__).knobs
    least = {'window': 0, 'stride': 0, 'batch_size': 1, 'num_fewshot': 0, 'limit': 0}
    for name, value in least.items():
        if getattr(k, name) < value:
            raise ConfigError(f'{name}={getattr(k, name)}: must be at least {value}')
    check_threads(k)
    if k.save:
        make_room(Path(k.save))
    device = pick_device(k.device)
    dtype = pick_dtype(k.dtype, device)
    if k.threads:
        torch.set_num_threads(k.threads)
    model, tokenizer, begin, dataset = load(k, device)
    if k.window > model.context_limit:
        raise ConfigError(f'window={k.window} is longer than block_size={model.config.block_size}')
    window = k.window or model.config.block_size
    if k.stride > window:
        raise ConfigError(f'stride={k.stride} is longer than the window of {window}: it would skip tokens')

    def autocast():
        return autocast_for(device, dtype)

    if k.tasks:
        from harness import run_tasks

        result = run_tasks(model, tokenizer, begin, k, device, autocast)
    else:
        result = measure(k, model, tokenizer, begin, dataset, device, autocast)
        bits = result['bits_per_byte']
        print(
            f'{result["data"]}: {result["tokens"]:,} tokens, loss {result["loss"]:.4f} nats per token, '
            f'perplexity {result["perplexity"]:.3f}'
            + (f', {bits:.4f} bits per byte' if bits else '')
            + f' (window {result["window"]}, stride {result["stride"]}, {dtype})'
        )
    if k.save:
        write_text(k.save, json.dumps(result, indent=1, default=str) + '\n')
    return 0


if __name__ == '__main__':
    run_program(main)
