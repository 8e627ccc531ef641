"""How fast: training, memory, start-up and generation of any configs, side by side on this machine.

    python bench.py                                              # vanilla and three of reflex at cpu size
    python bench.py vanilla leap config/mine.py --size=512/256
    python bench.py vanilla --nanogpt=../nanoGPT                 # and a checkout of nanoGPT, in the same run
    python bench.py vanilla --parts=tokens --nanogpt=../nanoGPT  # 1,000 greedy tokens against nanoGPT's
    python bench.py vanilla hierarchy_cpu --block=2048 --batch=2 --groups=128 --parts=train
    python bench.py --preset=cuda                                # all of it on one GPU, within six minutes

An arm is a config file, by its path or by its name in config/; the first one is the baseline. Any
--knob=value of train.py can be added; it goes to every arm, as do --batch and --block. Arms take turns
in one process, and a ratio is the median over rounds of what an arm and the baseline did in the same round.
Memory and start-up are measured in a process of their own, since a process has one peak.

nanoGPT runs its own model and optimizer: as its README says for the device (CPU: fp32, not compiled), and at
best (compiled, the precision that is native, fused AdamW). Prints Markdown, writes JSON.

A preset names arms and parts, and gives each part a process and a time of its own: what fails or takes longer
is told and skipped. Without --nanogpt its way is taken by a model of ours that does as nanoGPT does: logits
of all tokens at once, no cache. `decode` is generation with compiled or captured steps (decoding.py),
`together` the same of many sequences at once. check_device.py tells whether the device computes what it
should.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from configurator import ConfigError, check_first, configure, run_program
from runs.knobs import Knobs, check, config_file, model_config

ROOT = Path(__file__).resolve().parent
NANOGPT = ('nanoGPT (README)', 'nanoGPT (best)')


# size -> config files, vocabulary, sequences per step on a CPU (elsewhere as configured)
SIZES = {
    'cpu': (['config/sizes/size_cpu.py'], 4096, 16),
    '512/256': (['config/sizes/size_512_256.py'], 50304, 4),
    '768/1024': ([], 50304, 1),
    'shakespeare': (['config/recipes/shakespeare_char_cpu.py'], 128, 12),
}
# preset -> (arms, size, seconds for each part)
PRESETS = {
    'cuda': (
        ['vanilla', 'reflex_422', 'skip_v1', 'value_residual', 'reflex_521', 'reflex_all'],
        '768/1024',
        {'train': 230, 'decode': 50, 'together': 30, 'loss': 25},
    ),
}
# losses of other packages, measured beside ours where they are: (module, function, options)
BORROWED: dict[str, tuple[str, str, dict]] = {
    'liger-kernel': (
        'liger_kernel.transformers.functional',
        'liger_fused_linear_cross_entropy',
        {'accum_dtype': 'float32'},  # of the weight's gradient, as in ours
    ),
    'cut-cross-entropy': ('cut_cross_entropy', 'linear_cross_entropy', {}),
}
# what a kernel or an operation is, by its name: the first pattern that is found counts
KINDS = {
    'attention': r'sdpa|flash|fmha|attention',
    'products': r'gemm|nvjet|cutlass|::(add|b)?mm$|mkldnn::|mkl::',
    'loss': r'row_kernel|log_softmax|cross_entropy|nll_loss',
    'norms': r'layer_norm|rms_norm',
    'joins': r'cat_|_cat\b|::cat|CatArray|_zeros|zero_$|fill_$',
    'gelu': r'gelu|GELU',
    'optimizer': r'adam|Adam|multi_tensor|foreach',
    'casts, copies': r'_to_copy|copy_|Memcpy|Memset',
}
LOOKUP = 64  # tokens guessed at a time
PARTS = ('train', 'alone', 'generate', 'tokens', 'race', 'decode', 'together', 'loss')
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
# the CPU recipe of nanoGPT's README, where it differs from the defaults of Knobs
NANOGPT_RECIPE = {
    'optimizer': 'adamw',
    'learning_rate': 1e-3,
    'min_lr': 1e-4,
    'beta2': 0.99,
    'max_iters': 2000,
    'lr_decay_iters': 2000,
    'warmup_iters': 100,
    'lr_schedule': 'cosine',
    'eval_interval': 200,
}


def command_line(argv) -> argparse.Namespace:
    """What the command line says, as far as it can be told without torch; `extra` are knobs of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add('arms', nargs='*', default=['vanilla', 'reflex_422', 'reflex_521', 'reflex_all'])
    add('--size', choices=SIZES, default='cpu', help='shape of model and batch')
    add('--batch', type=int, default=0, help='sequences per step; 0 = of the size')
    add('--block', type=int, default=0, help='tokens per sequence; 0 = of the size')
    add('--vocab', type=int, default=0, help='0 = of the size')
    add('--parts', default=','.join(PARTS[:4]), help=f'of {",".join(PARTS)} (default: the first four)')
    add('--preset', choices=PRESETS, help='arms, parts and their times, all at once')
    add('--sequences', type=int, default=32, help='of the part `together`')
    add(
        '--seconds',
        type=float,
        default=0.0,
        help='of a part that takes turns: begin none after; 0 = no limit',
    )
    add('--target', type=float, default=1.88, help='of the race: loss on the validation data')
    add('--rounds', type=int, default=9, help='turns of each arm')
    add('--steps', type=int, default=2, help='training steps per turn')
    add('--contexts', default='256,1024,4096', help='tokens before the generated ones')
    add('--tokens', type=int, default=1000, help='greedy tokens that are generated against nanoGPT')
    add('--weights', type=Path, help='out_dir of a run of vanilla: of these tokens (default: random weights)')
    add('--every', type=int, default=20, help='of these, nanoGPT makes one in so many, which counts for all')
    add('--compile', choices=('auto', 'true', 'false'), default='auto', help='auto = as configured')
    add('--device', default='auto')
    add('--dtype', default='auto')
    add(
        '--clock',
        choices=CLOCKS,
        default='wall',
        help='cpu: processor time; for a machine that others use too',
    )
    add('--threads', type=int, default=0, help="CPU threads; 0 = torch's choice")
    add('--nanogpt', type=Path, help='a checkout of nanoGPT')
    add('--out', type=Path, help='JSON (default: out/bench/SIZE-DEVICE.json)')
    add('--within', default='', help=argparse.SUPPRESS)  # run this part of a preset, print its JSON, and end
    add('--alone', default='', help=argparse.SUPPRESS)  # run this arm for its memory and start-up, and end
    add('--began', type=float, default=0.0, help=argparse.SUPPRESS)
    args, args.extra = parser.parse_known_args(argv)
    if args.preset:
        arms, size, args.limits = PRESETS[args.preset]
        chosen = {'arms': arms, 'size': size, 'parts': ','.join(args.limits), 'contexts': '1024'}
        for name, value in chosen.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    configure(Knobs, args.extra)  # refuses what is no knob
    for name in ('batch', 'block', 'vocab', 'threads', 'tokens', 'seconds'):
        if getattr(args, name) < 0:
            parser.error(f'--{name}={getattr(args, name)}: must not be negative')
    for name in ('rounds', 'steps', 'every', 'sequences'):
        if getattr(args, name) < 1:
            parser.error(f'--{name}={getattr(args, name)}: must be at least 1')
    args.parts = args.parts.split(',')
    for part in args.parts:
        if part not in PARTS:
            parser.error(f'--parts: {part!r} is unknown, of {",".join(PARTS)}')
    try:
        args.contexts = [int(n) for n in args.contexts.split(',')]
    except ValueError:
        parser.error(f'--contexts={args.contexts}: write numbers of tokens joined by commas')
    if args.nanogpt and not (args.nanogpt / 'model.py').is_file():
        parser.error(f'--nanogpt={args.nanogpt}: no model.py is there; give a checkout of nanoGPT')
    if 'tokens' in args.parts and not args.nanogpt:
        args.parts.remove('tokens')
    if args.clock == 'cpu' and (args.device not in ('auto', 'cpu') or args.threads != 1):
        parser.error('--clock=cpu adds the time of all threads up: it needs --device=cpu --threads=1')
    args.clock_name, args.clock = args.clock, CLOCKS[args.clock]
    return args


if __name__ == '__main__':
    check_first(command_line)  # before torch is imported, which takes seconds

import numpy as np
import torch
from torch.nn import functional as F

from data.tokendata import eval_windows, get_batch, open_data
from decoding import Decoder, way
from layers.loss import FUSED_ROWS, ROWS, fused_works, linear_cross_entropy
from model import GPT, GPTConfig
from runs import metrics
from runs.datasets import data_folder
from runs.models import build, load_model
from runs.optimizer import make_optimizer
from runs.ranks import Ranks
from runs.schedule import learning_rate_at
from runs.step import TrainingStep, mean_loss
from runs.system import autocast_for, keep_memory, pick_device, pick_dtype


def arguments(argv) -> argparse.Namespace:
    """The command line, with the device and with the knobs of every arm."""
    args = command_line(argv)
    files, vocab, batch = SIZES[args.size]
    args.device = pick_device(args.device)
    if args.clock_name == 'cpu' and args.device != 'cpu':
        raise ConfigError(f'--clock=cpu needs --device=cpu, and here it is {args.device}')
    args.dtype = pick_dtype(args.dtype, args.device)
    args.knobs = {}
    for arm in args.arms:
        path = Path(arm) if arm.endswith('.py') else ROOT / config_file(arm)
        k = configure(Knobs, [str(path), *(str(ROOT / f) for f in files), *args.extra]).knobs
        batch = batch if args.device == 'cpu' else k.batch_size
        sizes = {'batch_size': args.batch or batch, 'block_size': args.block or k.block_size}
        if args.compile != 'auto':
            sizes['compile'] = args.compile == 'true'
        args.knobs[path.stem] = replace(k, gradient_accumulation_steps=1, **sizes)
        check(args.knobs[path.stem])
    args.arms = list(args.knobs)
    args.vocab = args.vocab or vocab
    if not args.out and args.preset:
        card = re.sub(r'[^a-z0-9]+', '-', metrics.device_name(args.device).lower()).strip('-')
        args.out = ROOT / 'results' / 'bench' / f'preset-{args.preset}-{card}.json'
    args.out = args.out or ROOT / 'out' / 'bench' / f'{args.size.replace("/", "-")}-{args.device[:4]}.json'
    return args


# -----------------------------------------------------------------------------
# Arms: one training step each, as the trainers do it


def random_tokens(k, vocab: int):
    return np.random.default_rng(0).integers(0, vocab, 2**20 + k.block_size).astype(np.uint16)


def batches_of(tokens, k, device: str):
    """Endless (x, y) of tokens for nanoGPT, (batch_size, block_size) each: those that train.py would take."""
    step = 0
    while True:
        batch = get_batch(tokens, k.seed, step, 0, k.batch_size, k.block_size)
        x, y = (torch.from_numpy(a) for a in batch)
        if device.startswith('cuda'):
            x, y = x.pin_memory(), y.pin_memory()
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        step += 1


def our_arm(k, args, tokens):
    """(model, step): step(lr) trains on one batch of tokens as train.py does, and waits for it; without a
    rate, at the highest of the schedule."""
    model = build(k, model_config(k, args.vocab, args.vocab)).to(args.device)
    optimizer = make_optimizer(model, k, args.device.split(':')[0])
    train_step = TrainingStep(k, Ranks(), model, optimizer, tokens, args.device, args.dtype)
    train_step.begin(0)
    numbers = itertools.count()

    def step(lr: float = k.learning_rate):
        train_step.gradients(next(numbers))
        train_step.update(lr)

    return model, step


def load_nanogpt(folder: Path):
    """The module model.py of a checkout of nanoGPT, by another name than ours."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', folder / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NanoGPTWay(GPT):
    """A GPT that computes as nanoGPT does: logits of all tokens and their loss by torch's function, and every
    token from the whole context, drawn by torch.multinomial."""

    def forward(self, idx, targets=None):
        hidden = self.hidden(idx)
        if targets is None:
            return self.logits(hidden[:, -1:]), None
        logits = self.logits(hidden)  # (B, T, vocab_size)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, top_k: int):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1]
            kth = logits.topk(top_k).values[:, [-1]]
            p = logits.masked_fill(logits < kth, -torch.inf).softmax(dim=-1)
            idx = torch.cat([idx, torch.multinomial(p, num_samples=1)], dim=1)
        return idx


def nanogpt_model(k, args, vocab: int = 0):
    """nanoGPT's in the shape of k, knobs or a config; where no checkout is given, of our own model."""
    if not args.nanogpt:
        names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'bias')
        own = GPTConfig(**{name: getattr(k, name) for name in names}, vocab_size=vocab or args.vocab)
        return NanoGPTWay(own, seed=1).to(args.device)
    module = load_nanogpt(args.nanogpt)
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'bias')
    shape = {name: getattr(k, name) for name in names}
    return module.GPT(module.GPTConfig(**shape, vocab_size=vocab or args.vocab)).to(args.device)


def nanogpt_arm(k, args, tokens, best: bool = False):
    """(model, step), as of our_arm, of nanoGPT in the shape of the knobs k, trained as its train.py does."""
    device_type = args.device.split(':')[0]
    on_cpu = device_type == 'cpu'
    model = nanogpt_model(k, args)
    optimizer = model.configure_optimizers(k.weight_decay, k.learning_rate, (k.beta1, k.beta2), device_type)
    if best and on_cpu:
        optimizer = torch.optim.AdamW(
            optimizer.param_groups, lr=k.learning_rate, betas=(k.beta1, k.beta2), fused=True
        )
    compiled = torch.compile(model) if best or not on_cpu else model
    dtype = args.dtype if best or not on_cpu else 'float32'
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    batches = batches_of(tokens, k, args.device)
    batch = [next(batches)]

    def step(lr: float = k.learning_rate):
        for group in optimizer.param_groups:
            group['lr'] = lr
        with autocast_for(args.device, dtype):
            _, loss = compiled(*batch[0])
        batch[0] = next(batches)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), k.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return model, step


def make_arm(name: str, args):
    k = args.knobs.get(name) or args.knobs[args.arms[0]]
    tokens = random_tokens(k, args.vocab)
    if name in NANOGPT:
        return nanogpt_arm(k, args, tokens, best=name == NANOGPT[1])
    return our_arm(k, args, tokens)


def prepare(name: str, args):
    """Before a turn of the arm: the process's memory as its trainer sets it."""
    if args.device == 'cpu':
        keep_memory(name not in NANOGPT)


def all_arms(args) -> list[str]:
    extra = [*NANOGPT] if args.nanogpt else [NANOGPT[0]] if args.preset else []
    if args.nanogpt and not args.device.startswith('cpu'):
        extra = extra[:1]  # README's settings are the best ones there
    return args.arms + extra


# -----------------------------------------------------------------------------
# Measures


def spread(values) -> dict:
    """Median, and the quartiles around it."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {'median': middle, 'quartiles': [low, high]}


def taking_turns(names, turn, rounds: int, until: float = 0.0) -> dict[Any, list[float]]:
    """turn(name) -> seconds, of every arm in every round; who begins rotates. until: of time.monotonic(),
    when no other round begins, except the first."""
    seconds = {name: [] for name in names}
    for i in range(rounds):
        if until and i and time.monotonic() > until:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(turn(name))
    return seconds


def bench_training(args) -> dict:
    """Turns of training steps. With --seconds, arms that would begin to be built in the last quarter of them
    are left out, and no turn begins after the end."""
    arms, left_out, until = {}, [], time.monotonic() + (args.seconds or 1e9)
    rest = {}  # bytes on the device beside those that a step needs
    first = args.arms[0]
    for name in [first, *(n for n in all_arms(args) if n in NANOGPT), *args.arms[1:]]:
        if arms and args.seconds and time.monotonic() > until - 0.25 * args.seconds:
            left_out.append(name)
            continue
        say(f'train: {name}')
        prepare(name, args)
        arms[name] = make_arm(name, args)
        for _ in range(2):  # compiles, and allocates the optimizer's state
            arms[name][1]()
    names = [name for name in all_arms(args) if name in arms]
    peaks = {}
    for name in names if args.device.startswith('cuda') else ():
        torch.cuda.reset_peak_memory_stats()
        rest[name] = torch.cuda.memory_allocated()
        arms[name][1]()
        peaks[name] = torch.cuda.max_memory_allocated() - rest[name]

    def turn(name):
        prepare(name, args)
        step = arms[name][1]
        began = args.clock()
        for _ in range(args.steps):
            step()
        synchronize(args.device)
        return args.clock() - began

    seconds = taking_turns(names, turn, args.rounds, until)
    kernels = {}  # of the baseline and of the first arm beside it: where the time goes
    for name in args.arms[:2] if args.preset else ():
        if name in arms and time.monotonic() < until:
            say(f'train: kernels of {name}')
            prepare(name, args)
            kernels[name] = kernels_of(arms[name][1], args.device)
    peak, rows = metrics.peak_flops(args.device), dict[str, dict]()
    for name in names:
        k = args.knobs.get(name) or args.knobs[args.arms[0]]
        tokens = args.steps * k.batch_size * k.block_size
        row = rows[name] = {'tokens_per_s': spread([tokens / s for s in seconds[name]])}
        pairs = zip(seconds[args.arms[0]], seconds[name], strict=True)
        row['ratio'] = spread([ours / theirs for ours, theirs in pairs])
        row['seconds'] = seconds[name]
        row['ms_per_step'] = 1e3 * spread(seconds[name])['median'] / args.steps
        if name in peaks:
            row['step_bytes'] = peaks[name]
        if name in kernels:
            row['kernels'] = kernels[name]
        if name in args.knobs:
            flops = arms[name][0].flops_per_token()
            row['flops_per_token'] = flops
            row['mfu'] = peak and row['tokens_per_s']['median'] * flops / peak
    for name in left_out:
        say(f'train: {name} left out: no time for it within {args.seconds:g} seconds')
    return rows


def kernels_of(step, device: str) -> dict[str, dict]:
    """{kind of kernel: milliseconds and number in one step}, of KINDS and 'other'; on a CPU of operations."""
    on_cuda = device.startswith('cuda')
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        step()
        synchronize(device)
    kinds: dict[str, dict] = {kind: {'ms': 0.0, 'number': 0} for kind in (*KINDS, 'other')}
    for event in profile.key_averages():
        time_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), 'other')
        if time_us:
            kinds[kind]['ms'] += time_us / 1e3
            kinds[kind]['number'] += event.count
    return kinds


def bench_alone(args, argv) -> dict:
    """Peak memory, and seconds from the start of a process to the end of its first step."""
    rows = {}
    for name in all_arms(args):
        say(f'alone: {name}')
        command = [sys.executable, str(Path(__file__)), *argv, f'--alone={name}', f'--began={time.time()}']
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f'bench.py: {name} failed:\n{result.stderr[-2000:]}')
        rows[name] = json.loads(result.stdout.splitlines()[-1])
    return rows


def run_alone(name: str, args):
    """One arm, in this process: a line of JSON at the end."""
    prepare(name, args)
    step = make_arm(name, args)[1]
    step()
    began = time.time() - args.began
    step()  # the optimizer has its state by now
    print(json.dumps({'first_step_s': began, 'peak_bytes': metrics.peak_memory(args.device)}))


def nanogpt_stream(model, idx, tokens: int):
    """As GPT.stream, greedy: nanoGPT draws from its one likeliest token."""
    for _ in range(tokens):
        idx = model.generate(idx, 1, top_k=1)
        yield idx[:, -1:]


def bench_generation(args) -> dict:
    """Tokens/s after a context is read, one sequence, with the cache and without."""
    chunk, rows = 8, {}
    long = max(args.contexts) + args.rounds * chunk + 1
    long = -(-long // 1024) * 1024  # a hierarchy wants whole groups
    models = {}
    for name in args.arms:
        k = replace(args.knobs[name], block_size=long)
        models[name] = build(k, model_config(k, args.vocab, args.vocab)).to(args.device).eval()
    if args.nanogpt:
        models['nanoGPT'] = nanogpt_model(replace(args.knobs[args.arms[0]], block_size=long), args).eval()
    for context in args.contexts:
        say(f'generate: context {context}')
        idx = torch.randint(args.vocab, (1, context), generator=torch.Generator().manual_seed(1))
        idx = idx.to(args.device)
        for cached in (True, False):
            names = [name for name in models if name != 'nanoGPT' or not cached]
            n, rounds = (chunk, args.rounds) if cached else (1, min(3, args.rounds))
            streams = {}
            for name in names:
                prepare(name, args)
                if name == 'nanoGPT':
                    streams[name] = nanogpt_stream(models[name], idx, rounds * n + 1)
                else:
                    streams[name] = models[name].stream(idx, rounds * n + 1, temperature=0, use_cache=cached)
                with autocast_for(args.device, args.dtype):
                    next(streams[name])  # reads the context

            def turn(name, streams=streams, n=n):
                prepare(name, args)
                began = args.clock()
                with autocast_for(args.device, args.dtype):
                    for _ in range(n):
                        next(streams[name])
                synchronize(args.device)
                return args.clock() - began

            seconds = taking_turns(names, turn, rounds)
            for name in names:
                row = rows.setdefault(name, {}).setdefault(str(context), {})
                pairs = zip(seconds[args.arms[0]], seconds[name], strict=True)
                row['cached' if cached else 'recomputed'] = {
                    'tokens_per_s': spread([n / s for s in seconds[name]]),
                    'ratio': spread([ours / theirs for ours, theirs in pairs]),
                }
    return rows


def decode_model(name: str, args, block_size: int):
    k = replace(args.knobs[name], block_size=block_size)
    return build(k, model_config(k, args.vocab, args.vocab)).to(args.device).eval()


def bench_decode(args, B: int = 1, tokens: int = 64) -> dict:
    """Greedy tokens/s after the first context is read: by steps of fixed shapes, pass by pass, and without a
    cache, as nanoGPT does it; of B sequences together by steps alone. With --compile=true steps are
    compiled."""
    context, rows, until = args.contexts[0], {}, time.monotonic() + (args.seconds or 1e9)
    n = max(2, tokens // 4 if args.device == 'cpu' else tokens)
    block_size = context + (args.rounds + 1) * n + 3
    block_size = -(-block_size // 256) * 256 if block_size > 256 else block_size
    idx = torch.randint(args.vocab, (B, context), generator=torch.Generator().manual_seed(1)).to(args.device)
    streams, begun = {}, {}

    def begin(name, how, stream):
        prepare(name, args)
        began = time.perf_counter()
        with autocast_for(args.device, args.dtype):
            next(stream), next(stream)  # reads the context, compiles or captures the step
        synchronize(args.device)
        streams[name, how], begun[name, how] = stream, time.perf_counter() - began

    compile = args.compile == 'true'
    for name in args.arms:
        if streams and time.monotonic() > until - 0.3 * (args.seconds or 0):
            say(f'decode: {name} left out: no time for it within {args.seconds:g} seconds')
            continue
        say(f'decode: {name}, {B} at once')
        model, most = decode_model(name, args, block_size), (args.rounds + 1) * n
        steps = way(model.steps, args.device.split(':')[0], compile) != 'plain'
        if steps:
            with autocast_for(args.device, args.dtype), torch.no_grad():
                decoder = Decoder(model, B, compile)
            begin(name, 'steps', model.stream(idx, most, temperature=0, decoder=decoder))
        if B == 1 or not steps:
            begin(name, 'passes', model.stream(idx, most, temperature=0))
    if B == 1:
        shape = replace(args.knobs[args.arms[0]], block_size=block_size)
        begin(
            'nanoGPT', 'whole', nanogpt_stream(nanogpt_model(shape, args).eval(), idx, (args.rounds + 1) * n)
        )

    def turn(arm):
        prepare(arm[0], args)
        took = n if arm[1] == 'steps' else max(1, n // 8)
        began = args.clock()
        with autocast_for(args.device, args.dtype):
            for _ in range(took):
                next(streams[arm])
        synchronize(args.device)
        return (args.clock() - began) / took

    seconds = taking_turns(list(streams), turn, args.rounds, until)
    for (name, how), found in seconds.items():
        first = seconds.get((args.arms[0], how), found)
        row = {'tokens_per_s': spread([B / s for s in found]), 'to_the_second_token_s': begun[name, how]}
        row['ratio'] = spread([ours / theirs for ours, theirs in zip(first, found, strict=True)])
        rows.setdefault(name, {})[how] = row
    return rows


def borrowed_losses(dtype: str) -> tuple[dict, dict]:
    """({name: function of (hidden, weight, targets, rows)}, {name: why it is not here}) of BORROWED. They are
    given numbers of the type that autocast would give them."""
    here, missing = {}, {}
    for name, (module, function, options) in BORROWED.items():
        if importlib.util.find_spec(module.split('.', maxsplit=1)[0]) is None:
            missing[name] = f'not installed: pip install --no-deps {name}'
            continue
        try:
            loss = getattr(importlib.import_module(module), function)
        except Exception as e:  # whatever a package raises that does not fit this torch or Triton
            missing[name] = f'{type(e).__name__}: {e}'[:200]
            continue
        options = {key: getattr(torch, value) for key, value in options.items()}

        def run(hidden, weight, targets, rows, loss=loss, options=options):
            low = getattr(torch, dtype)
            return loss(hidden.to(low), weight.to(low), targets, ignore_index=-1, **options)

        here[name] = run
    return here, missing


def bench_loss(args) -> dict:
    """Milliseconds and bytes of the head's loss and its gradients, for the tokens of a step: all rows at once
    and compiled, in chunks, by the fused kernel where it is, and by packages that are installed; and how far
    the loss is from that of all rows in fp32."""
    k = args.knobs[args.arms[0]]
    N, device = k.batch_size * k.block_size, args.device
    hidden = torch.randn(N, k.n_embd, device=device).requires_grad_()
    weight = (torch.randn(args.vocab, k.n_embd, device=device) / 50).requires_grad_()
    targets = torch.randint(args.vocab, (N,), device=device)
    compiled = torch.compile(linear_cross_entropy) if args.compile != 'false' else linear_cross_entropy
    ways = {'all rows at once': (compiled, N), 'as trained': (linear_cross_entropy, None)}
    if fused_works(device.split(':')[0]):
        ways |= {f'fused, {rows} rows': (linear_cross_entropy, rows) for rows in (ROWS['cuda'], FUSED_ROWS)}
    here, missing = borrowed_losses(args.dtype)
    ways |= {name: (function, None) for name, function in here.items()}
    with torch.no_grad():
        exact = linear_cross_entropy(hidden, weight, targets).item()
    values = {}

    def turn(name):
        function, rows = ways[name]
        began = args.clock()
        with autocast_for(device, args.dtype):
            values[name] = function(hidden, weight, targets, rows=rows)
        torch.autograd.grad(values[name], (hidden, weight))
        synchronize(device)
        return args.clock() - began

    rows: dict[str, dict] = {}
    for name in list(ways):
        try:
            turn(name)
        except Exception as e:  # of a package that does not run here; ours must
            if name not in here:
                raise
            missing[name] = f'{type(e).__name__}: {e}'[:200]
            del ways[name]
            continue
        rows[name] = {'from_exact': values[name].item() - exact}
        if device.startswith('cuda'):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            turn(name)
            rows[name]['bytes'] = torch.cuda.max_memory_allocated() - before
    for name, found in taking_turns(list(ways), turn, args.rounds).items():
        rows[name]['ms'] = spread([1e3 * s for s in found])
    return rows | {name: {'left_out': why} for name, why in missing.items()}


def bench_preset(args, argv) -> tuple[dict, dict]:
    """(what each part gave, why others gave nothing): each in a process of its own, and within its time."""
    given, skipped = {}, {}
    for part in args.parts:
        limit = args.limits[part]
        own = ['--within=' + part, f'--seconds={0.8 * limit - 10:g}']  # the rest: imports, and the first turn
        began = time.monotonic()
        try:
            command = [sys.executable, str(Path(__file__)), *argv, *own]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
            if done.returncode:
                raise RuntimeError(f'its process ended with status {done.returncode}')
            given[part] = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, RuntimeError, ValueError, IndexError) as e:
            skipped[part] = f'{type(e).__name__}: {e}'[-300:]
            say(f'{part} skipped after {time.monotonic() - began:.0f} s: {skipped[part]}')
    return given, skipped


def bench_tokens(args) -> dict:
    """Greedy tokens after a prompt of one, by the baseline with its cache, then with guesses too, and by
    nanoGPT with the same weights: random ones, or those of a run."""
    say(f'tokens: {args.tokens} greedy ones')
    if args.weights:
        model, _ = load_model(args.weights, device=args.device)
    else:
        k = replace(args.knobs[args.arms[0]], block_size=max(1024, args.tokens))
        model = build(k, model_config(k, args.vocab, args.vocab)).to(args.device).eval()
    c = model.config
    nanogpt = nanogpt_model(c, args, c.vocab_size).eval()
    weights = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    try:
        nanogpt.load_state_dict(weights)
    except RuntimeError:
        raise ConfigError(f'--weights={args.weights}: nanoGPT has no such model, {model.summary()}') from None
    n = min(args.tokens, c.block_size)
    idx = torch.zeros(1, 1, dtype=torch.long, device=args.device)
    with autocast_for(args.device, args.dtype):
        prepare(args.arms[0], args)
        seconds: dict[Any, float] = {}  # by how many tokens are guessed, or 'steps'
        drawn: dict[Any, torch.Tensor] = {}
        for lookup in (0, LOOKUP):
            model.generate(idx, 20, temperature=0, lookup=lookup)
            began = args.clock()
            drawn[lookup] = model.generate(idx, n, temperature=0, lookup=lookup)
            synchronize(args.device)
            seconds[lookup] = args.clock() - began
        if way(model.steps, args.device.split(':')[0], args.compile == 'true') != 'plain':
            decoder = Decoder(model, compile=args.compile == 'true')
            model.generate(idx, 20, temperature=0, decoder=decoder)
            began = args.clock()
            drawn['steps'] = model.generate(idx, n, temperature=0, decoder=decoder)
            synchronize(args.device)
            seconds['steps'] = args.clock() - began
        prepare(NANOGPT[0], args)
        lengths = range(1 + args.every // 2, n + 1, args.every)  # the middle one of each so many
        theirs = 0.0
        for length in lengths:
            context = drawn[0][:, :length]
            began = args.clock()
            nanogpt.generate(context, 1, top_k=1)
            synchronize(args.device)
            theirs += args.clock() - began
        # what it would have drawn, everywhere: the first difference would show
        with torch.no_grad():
            logits = nanogpt(drawn[0][:, :-1], drawn[0][:, 1:])[0][..., : c.vocab_used or None]
        same = bool((logits.argmax(-1) == drawn[0][:, 1:]).all())
        same = same and all(torch.equal(drawn[0], other) for other in drawn.values())
    theirs *= n / len(lengths)
    steps = (
        {'steps_seconds': seconds['steps'], 'steps_ratio': theirs / seconds['steps']}
        if 'steps' in drawn
        else {}
    )
    return steps | {
        'tokens': n,
        'different_tokens': drawn[0].unique().numel(),
        'block_size': c.block_size,
        'seconds': seconds[0],
        'lookup_seconds': seconds[LOOKUP],
        'nanogpt_seconds': theirs,
        'ratio': theirs / seconds[0],
        'lookup_ratio': theirs / seconds[LOOKUP],
        'same_tokens': same,
    }


def bench_race(args) -> dict:
    """Seconds of training until the validation loss is --target, by each arm with its own recipe.

    All are evaluated on the same windows of val, every eval_interval steps, outside of the clock. nanoGPT
    follows its README's recipe.
    """
    racers = {name: args.knobs[name] for name in args.arms}
    k = args.knobs[args.arms[0]]
    if args.nanogpt:
        racers[NANOGPT[0]] = replace(k, **NANOGPT_RECIPE)
    data = open_data(data_folder(k.dataset), k.block_size)
    windows = eval_windows(data.splits['val'], k.block_size, k.eval_iters * k.batch_size)
    autocast = partial(autocast_for, args.device, args.dtype)
    arms: dict = {}
    rows: dict[str, dict] = {name: {'curve': []} for name in racers}

    def evaluate(model):
        model.eval()
        loss = mean_loss(model, data.splits['val'], windows, 64, k.block_size, args.device, autocast, Ranks())
        model.train()
        return loss

    for name, own in racers.items():
        prepare(name, args)
        arms[name] = (nanogpt_arm if name in NANOGPT else our_arm)(own, args, data.splits['train'])
        rows[name] |= {'steps': 0, 'seconds': 0.0, 'val': evaluate(arms[name][0]), 'reached': False}
    running = list(racers)
    while running:
        for name in list(running):
            own, row, (model, step) = racers[name], rows[name], arms[name]
            prepare(name, args)
            began = args.clock()
            for it in range(row['steps'], min(own.max_iters, row['steps'] + own.eval_interval)):
                step(learning_rate_at(it, own))
            row['seconds'] += args.clock() - began
            row['steps'] = it + 1
            row['val'] = evaluate(model)
            row['curve'].append([row['steps'], round(row['seconds'], 3), round(row['val'], 4)])
            say(f'race: {name}: step {row["steps"]}, {row["seconds"]:.1f} s, val {row["val"]:.4f}')
            row['reached'] = row['val'] <= args.target
            if row['reached'] or row['steps'] >= own.max_iters:
                running.remove(name)
    return {'target': args.target, 'arms': rows}


# -----------------------------------------------------------------------------
# What is told


def markdown(result: dict) -> str:
    def cell(value, digits):
        low, high = value['quartiles']
        return f'{value["median"]:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})'

    def table(head, rows):
        return '\n'.join(f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *rows])

    alone, training, generation = (result.get(part, {}) for part in ('alone', 'train', 'generate'))
    baseline, parts = result['arms'][0], []
    rows, has_bytes = [], any('step_bytes' in row for row in training.values())
    for name in training or alone:
        of_training, of_alone = training.get(name), alone.get(name)
        row = [name]
        if of_training:
            row += [cell(of_training['tokens_per_s'], 0), cell(of_training['ratio'], 3)]
            row += [f'{of_training["mfu"]:.1%}' if of_training.get('mfu') else '-']
            if has_bytes:
                row += [f'{of_training["step_bytes"] / 2**30:.2f} GiB']
        if of_alone:
            memory = of_alone['peak_bytes']
            row += [f'{memory / 2**20:,.0f} MiB' if memory else '-', f'{of_alone["first_step_s"]:.1f} s']
        rows.append(row)
    if rows:
        head = ['training', 'tokens/s', f'of {baseline}', 'MFU'] if training else ['training']
        head += ['above the weights'] if has_bytes else []
        parts.append(table(head + (['peak memory', 'to the first step'] if alone else []), rows))
    rows = []
    for name, row in training.items():
        if 'kernels' in row:
            found = row['kernels'].values()
            total = {'ms': sum(of['ms'] for of in found), 'number': sum(of['number'] for of in found)}
            rows.append([name, *(f'{of["ms"]:,.2f} ({of["number"]})' for of in (*found, total))])
    if rows:
        parts.append(table(['kernels of a step: ms (number)', *KINDS, 'other', 'all'], rows))
    if generation:
        contexts = list(next(iter(generation.values())))
        head = ['generation, tokens/s'] + [f'{c}, {how}' for c in contexts for how in ('cache', 'no cache')]
        rows = []
        for name, by_context in generation.items():
            found = [by_context[c].get(how) for c in contexts for how in ('cached', 'recomputed')]
            rows.append([name, *(f'{f["tokens_per_s"]["median"]:,.1f}' if f else '-' for f in found)])
        parts.append(table(head, rows))
    for part in ('decode', 'together'):
        rows = [
            [
                name,
                how,
                cell(row['tokens_per_s'], 1),
                cell(row['ratio'], 3),
                f'{row["to_the_second_token_s"]:.1f} s',
            ]
            for name, by_way in result.get(part, {}).items()
            for how, row in by_way.items()
        ]
        if rows:
            head = [part, 'by', 'tokens/s', f'of {baseline}', 'to the second token']
            parts.append(table(head, rows))
    if 'loss' in result:
        rows = [
            [
                name,
                cell(row['ms'], 2),
                f'{row["bytes"] / 2**20:,.0f} MiB' if 'bytes' in row else '-',
                f'{row["from_exact"]:+.1e}',
            ]
            for name, row in result['loss'].items()
            if 'ms' in row
        ]
        parts.append(table(['loss and gradients', 'ms', 'memory', 'from the loss in fp32'], rows))
        parts += [f'{n} left out: {row["left_out"]}' for n, row in result['loss'].items() if 'ms' not in row]
    parts += [f'skipped: {part}: {why}' for part, why in result.get('skipped', {}).items()]
    if 'race' in result:
        first = result['race']['arms'][baseline]
        rows = []
        for name, row in result['race']['arms'].items():
            reached = 'yes' if row['reached'] else 'no'
            ratio = f'{row["seconds"] / first["seconds"]:.2f}'
            rows.append(
                [name, reached, f'{row["steps"]:,}', f'{row["seconds"]:.1f} s', ratio, f'{row["val"]:.3f}']
            )
        head = [f'to val {result["race"]["target"]}', 'reached', 'steps', 'training', f'of {baseline}', 'val']
        parts.append(table(head, rows))
    if 'tokens' in result:
        t = result['tokens']
        same, told = 'the same' if t['same_tokens'] else 'OTHER', ''
        if 'steps_ratio' in t:
            told = f'; {t["steps_seconds"]:.2f} s by steps, {t["steps_ratio"]:.1f} times'
        parts.append(
            f'{t["tokens"]:,} greedy tokens, {same} ones: {t["seconds"]:.2f} s with the cache, '
            f'{t["lookup_seconds"]:.2f} s with guesses; {t["nanogpt_seconds"]:.1f} s by nanoGPT, '
            f'{t["ratio"]:.1f} and {t["lookup_ratio"]:.1f} times as long' + told
        )
    return '\n\n'.join(parts)


def synchronize(device: str):
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]):
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision('high')  # as train.py, and as nanoGPT
    if args.alone:
        return run_alone(args.alone, args)
    k = args.knobs[args.arms[0]]
    result = {
        'command': ' '.join(['python bench.py', *argv]).replace(str(args.nanogpt), 'NANOGPT'),
        'arms': args.arms,
        'size': args.size,
        'shape': {
            'n_layer': k.n_layer,
            'n_head': k.n_head,
            'n_embd': k.n_embd,
            'vocab_size': args.vocab,
            'block_size': k.block_size,
            'batch_size': k.batch_size,
        },
        'device': {'name': metrics.device_name(args.device), 'dtype': args.dtype},
        'threads': torch.get_num_threads(),
        'clock': args.clock_name,
        'compile': {name: k.compile for name, k in args.knobs.items()},
        'cores': os.cpu_count(),
        'load_before': os.getloadavg() if hasattr(os, 'getloadavg') else None,
        'commit': metrics.commit(),
        'nanogpt_commit': args.nanogpt and metrics.commit(args.nanogpt),
        'versions': metrics.versions(),
    }
    measures = {
        'train': lambda: bench_training(args),
        'alone': lambda: bench_alone(args, argv),
        'generate': lambda: bench_generation(args),
        'tokens': lambda: bench_tokens(args),
        'race': lambda: bench_race(args),
        'decode': lambda: bench_decode(args),
        'together': lambda: bench_decode(args, args.sequences),
        'loss': lambda: bench_loss(args),
    }
    if args.within:
        print(json.dumps(measures[args.within]()))
        return
    if args.preset:
        given, result['skipped'] = bench_preset(args, argv)
        result |= given
    for part in args.parts if not args.preset else ():
        result[part] = measures[part]()
        gc.collect()
    result['load_after'] = os.getloadavg() if hasattr(os, 'getloadavg') else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    device, threads = result['device'], result['threads']
    shape = ', '.join(f'{name} {value}' for name, value in result['shape'].items())
    where = f'{device["name"]}, {device["dtype"]}, threads: {threads}, {args.clock_name} time'
    print(f'{args.size} ({shape}), {where}\n')
    print(markdown(result))


if __name__ == '__main__':
    run_program(main)
