"""Train a GPT, on one device or several.

    python train.py config/reflex_422.py                                     # one process
    python train.py config/reflex_422.py config/size_cpu.py --max_iters=100  # configs in order, flags win
    torchrun --standalone --nproc_per_node=2 train.py config/reflex_422.py   # several ranks, one host
    python train.py config/finetune_shakespeare.py --init_from=gpt2-medium   # from GPT-2-shaped weights
    python train.py --out_dir=out/reflex_422 --init_from=resume              # go on after any interruption

Results: OUT_DIR/metrics.jsonl, run.json, last.pt, previous.pt and best.pt. `--help` lists every knob.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import metrics
import pretrained
from configurator import ConfigError, configure, from_dict
from model import GPT, GPTConfig
from sample import stream_text
from system import autocast_for, pick_device, pick_dtype
from tokendata import DataError, eval_batch, eval_starts, get_batch, open_data
from tokenizer import TokenizerError, from_spec

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Knobs:
    # output
    out_dir: str = ''  # where everything of the run goes; '' = out/<names of the config files>
    overwrite: bool = False  # start over in a folder that holds a run: its files are deleted
    eval_interval: int = 250  # iterations between evaluations (one more at the end)
    eval_iters: int = 200  # batches of each split per evaluation; 0 = all of val, and as much of train
    eval_only: bool = False  # evaluate once and stop
    log_interval: int = 10  # iterations between lines of metrics.jsonl
    sample_tokens: int = 0  # tokens of text to print when training is done
    # start
    init_from: str = (
        'scratch'  # scratch | resume | auto (resume if there is a run) | gpt2, owner/name, a folder
    )
    checkpoint_interval: int = 0  # iterations between saves; 0 = at every evaluation
    checkpoint_minutes: float = 0.0  # save also when this many minutes have passed; 0 = off
    seed: int = 1337  # of initial weights, batches and dropout, each with a generator of its own
    # wandb
    wandb_log: bool = False  # send the same metrics to wandb; if it fails, training goes on without it
    wandb_project: str = 'reflex-attention'  # the project that wandb files the run under
    wandb_run_name: str = ''  # '' = the name of out_dir
    wandb_group: str = ''  # runs of one experiment, such as the seeds of an arm
    # data
    dataset: str = 'openwebtext'  # a folder of data/, or any path, that prepare.py has filled
    vocab_size: int = 0  # only for a plain .bin without meta.json; 0 = what meta.json says
    gradient_accumulation_steps: int = 1  # micro-batches per step, in total over all ranks
    batch_size: int = 32  # sequences per micro-batch
    block_size: int = 1024  # tokens per sequence
    # model
    n_layer: int = 6  # blocks
    n_head: int = 8  # attention heads per layer
    n_embd: int = 768  # width of the residual stream, a multiple of n_head
    dropout: float = 0.0  # on embeddings, attention weights and the outputs of attention and MLP
    bias: bool = False  # biases in linear layers and norms
    attention: str = 'vanilla'  # vanilla | reflex | leap | … (plans.py, leap.py), by layer 'leap*4 reflex*2'
    head_split: str = '4-2-2'  # attention='reflex': heads with lag 0, 1, 2, …; '8/4-2-2' = keys/values apart
    windows: str = 'auto'  # additive, leap: auto | global | tokens per layer, '4-8-16-32-64-0' (0: global)
    norm: str = 'layernorm'  # layernorm | rmsnorm
    mlp: str = 'gelu'  # gelu | gelu_tanh (GPT-2's approximation of it) | swiglu, all of like size
    position: str = 'learned'  # learned (a table) | rotary (queries and keys are turned) | none
    qk_norm: bool = False  # an rmsnorm per head on queries and keys
    # optimizer
    learning_rate: float = 1e-3  # the highest, after warm-up
    max_iters: int = 5000  # optimizer steps
    weight_decay: float = 0.1  # on matrices; norms and biases do not decay
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.98  # and of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    # learning-rate schedule
    decay_lr: bool = True  # warm up, then decay; false = learning_rate throughout
    lr_schedule: str = 'cosine'  # shape of the decay: cosine | linear
    warmup_iters: int = 400  # iterations of linear rise from 0
    lr_decay_iters: int = 0  # iteration at which min_lr is reached; 0 = max_iters
    min_lr: float = 1e-5  # where the decay ends
    # system
    device: str = 'auto'  # auto (cuda, mps or cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = 'auto'  # auto | float32 | bfloat16 | float16: autocast; weights stay float32
    compile: bool = True  # torch.compile; takes a minute to start, needs a C++ compiler on CPU
    threads: int = 0  # CPU threads per process; 0 = torch's choice
    backend: str = 'auto'  # of torch.distributed: auto | nccl | gloo
    dist_timeout: float = 600.0  # seconds after which ranks give up on one that does not answer


STARTS = ('scratch', 'resume', 'auto')  # any other init_from names a checkpoint of pretrained.py
ARCHITECTURE = {f.name for f in fields(GPTConfig)} - {'vocab_size', 'vocab_used', 'dropout'}


def check(k: Knobs):
    """Refuse what cannot work, before anything is read or built."""
    positive = 'eval_interval log_interval gradient_accumulation_steps batch_size block_size'.split()
    for name in positive:
        if getattr(k, name) < 1:
            raise ConfigError(f'{name}={getattr(k, name)}: must be at least 1')
    not_negative = (
        'eval_iters sample_tokens checkpoint_interval checkpoint_minutes seed vocab_size max_iters '
        'learning_rate min_lr weight_decay grad_clip warmup_iters lr_decay_iters threads'
    ).split()
    for name in not_negative:
        if getattr(k, name) < 0:
            raise ConfigError(f'{name}={getattr(k, name)}: must not be negative')
    for name in ('beta1', 'beta2'):
        if not 0 <= getattr(k, name) < 1:
            raise ConfigError(f'{name}={getattr(k, name)}: must be in [0, 1)')
    choices = {
        'lr_schedule': ('cosine', 'linear'),
        'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
        'backend': ('auto', 'nccl', 'gloo'),
    }
    for name, allowed in choices.items():
        if getattr(k, name) not in allowed:
            raise ConfigError(f'{name}={getattr(k, name)!r}: one of {", ".join(allowed)}')
    if k.dist_timeout <= 0:
        raise ConfigError(f'dist_timeout={k.dist_timeout}: must be positive')
    if k.init_from in STARTS:  # else the checkpoint has a say, see pretrained_knobs
        check_model(k)


def check_model(k: Knobs):
    try:
        model_config(k, vocab_size=64, vocab_used=64)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def model_config(k: Knobs, vocab_size: int, vocab_used: int) -> GPTConfig:
    given = {f.name: getattr(k, f.name) for f in fields(GPTConfig) if hasattr(k, f.name)}
    return GPTConfig(**{**given, 'vocab_size': vocab_size, 'vocab_used': vocab_used})


def pretrained_knobs(k: Knobs, given: dict, found: GPTConfig) -> Knobs:
    """The knobs with the checkpoint's architecture wherever no config file and no flag says otherwise."""
    taken = {name: getattr(found, name) for name in ARCHITECTURE if hasattr(k, name) and name not in given}
    return replace(k, **taken)


def learning_rate_at(it: int, k: Knobs) -> float:
    """Linear warm-up to learning_rate, then cosine or linear decay to min_lr at lr_decay_iters."""
    if not k.decay_lr:
        return k.learning_rate
    end = k.lr_decay_iters or k.max_iters
    if it < k.warmup_iters:
        return k.learning_rate * (it + 1) / (k.warmup_iters + 1)
    if it >= end:
        return k.min_lr
    progress = (it - k.warmup_iters) / (end - k.warmup_iters)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if k.lr_schedule == 'cosine' else 1 - progress
    return k.min_lr + left * (k.learning_rate - k.min_lr)


def data_folder(dataset: str) -> Path:
    return ROOT / 'data' / dataset if (ROOT / 'data' / dataset).is_dir() else Path(dataset)


def prepare_stdlib(folder: Path):
    """The one corpus that every machine has: prepared on first use."""
    if folder == ROOT / 'data' / 'stdlib' and not (folder / 'meta.json').exists():
        print('preparing data/stdlib, the sources of the Python standard library (once)', flush=True)
        subprocess.run([sys.executable, str(folder / 'prepare.py')], check=True)


def dropout_seed(seed: int, step: int, micro: int) -> int:
    """Dropout of a micro-batch is a function of these alone: the same after a resume, on any ranks."""
    return int(np.random.SeedSequence([seed, step, micro, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def other_tokens(data, source) -> str:
    """'' if the data's token ids mean what they mean to the checkpoint; else the reason to think not."""
    if data.tokenizer_spec is None:  # plain .bin: the number of ids is all that is known
        sizes = data.vocab_size, source.config.vocab_size
        return '' if sizes[0] == sizes[1] else 'the data has {} token ids, the checkpoint {}'.format(*sizes)
    return pretrained.token_difference(from_spec(data.tokenizer_spec), source.folder)


class StopRequest:
    """Set by SIGTERM or Ctrl-C, or when torchrun dies: the loop saves after the step in hand and ends."""

    def __init__(self, under_torchrun: bool):
        self.reason = ''  # why this rank wants to stop
        self.agreed = False  # whether any rank does, as of the last step
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)
        if under_torchrun:
            threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True).start()

    def _on_signal(self, number, frame):
        self.reason = signal.Signals(number).name

    def _watch_parent(self, parent: int):
        while os.getppid() == parent:
            time.sleep(0.5)
        self.reason = self.reason or 'torchrun is gone'
        time.sleep(20)
        os._exit(1)  # a rank that waits for another one that is already gone never comes back to the loop


def evaluate(model, splits, k: Knobs, device, autocast, rank, world) -> dict[str, float]:
    """Mean loss of 'train' and 'val' over fixed windows, in nats per token; the ranks share the batches.

    Each batch's sum of losses is placed in a vector of its own slot before the ranks add theirs, so that the
    result does not depend on how many ranks there are.
    """
    val_windows = len(eval_starts(len(splits['val']), k.block_size, k.eval_iters * k.batch_size)[0])
    losses = {}
    model.eval()
    for split in ('train', 'val'):
        tokens = splits[split]
        n_windows = k.eval_iters * k.batch_size if split == 'val' else val_windows
        starts, skip = eval_starts(len(tokens), k.block_size, n_windows)
        n_batches = -(-len(starts) // k.batch_size)
        sums = torch.zeros(n_batches, dtype=torch.float32, device=device)
        counts = torch.zeros(n_batches, dtype=torch.float32, device=device)
        for i in range(rank, n_batches, world):
            batch = eval_batch(tokens, starts, skip, i, k.batch_size, k.block_size)
            x, y = (torch.from_numpy(a) for a in batch)
            counts[i] = (y != -1).sum()
            with torch.no_grad(), autocast():
                sums[i] = model(x.to(device), y.to(device))[1] * counts[i]
        if world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        losses[split] = float(sums.double().cpu().sum() / counts.double().cpu().sum())
    model.train()
    return losses


def blame(model, batches, autocast, world) -> str:
    """Which tensor went wrong first, on any rank: a weight, a module's output here, or a gradient."""
    suspects = [(0, f'weight {name}') for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    hooks = []
    for name, module in model.named_modules():

        def look(module, args, output, name=name):
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(t)]
            if not all(torch.isfinite(t).all() for t in tensors):
                suspects.append((1, f'the output of {name or "the loss"}'))

        hooks.append(module.register_forward_hook(look))
    with torch.no_grad(), autocast():
        for x, y in batches:
            model(x, y)
    for hook in hooks:
        hook.remove()
    for name, p in model.named_parameters():
        if p.grad is not None and not torch.isfinite(p.grad).all():
            suspects.append((2, f'the gradient of {name}'))
    first = min(suspects, key=lambda s: s[0], default=(3, 'nothing: it was gone on a second look'))
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, first)
        first = min(everyone, key=lambda s: s[0])
    return first[1]


class TrainingError(Exception):
    """Training cannot go on; one line says why."""


def resume_knobs(k: Knobs, given: dict, state: dict, say) -> Knobs:
    """The knobs of the interrupted run, with those given now on top; what must not change is refused."""
    saved = from_dict(Knobs, state['config'], 'the checkpoint')
    session = {'out_dir', 'init_from', 'overwrite'}  # of this start, not of the run
    merged = replace(saved, **{**given, **{name: getattr(k, name) for name in session}})
    for name in (f.name for f in fields(Knobs) if f.name not in session):
        old, new = getattr(saved, name), getattr(merged, name)
        if old == new:
            continue
        if name in ARCHITECTURE:
            raise ConfigError(
                f'{name}={new!r}, but the checkpoint in {k.out_dir} was trained with {name}={old!r}: '
                'take that, or start another run in another --out_dir'
            )
        say(f'resume: {name} is now {new!r}, was {old!r}')
    return merged


def refuse_other_data(state: dict, data, config: GPTConfig, out_dir: Path):
    """A checkpoint goes on only with the tokens, the tokenizer and the shapes it was trained with."""
    tokenizer = data.tokenizer_spec and data.tokenizer_spec['fingerprint']
    found = {'data set': data.fingerprint, 'tokenizer': tokenizer, 'vocab_size': config.vocab_size}
    wanted = state['data_fingerprint'], state['tokenizer'] and state['tokenizer']['fingerprint']
    for (what, now), then in zip(found.items(), (*wanted, state['model_args']['vocab_size']), strict=True):
        if now != then:
            raise ConfigError(
                f'the {what} is {str(now)[:12]}, but the checkpoint in {out_dir} was trained with '
                f'{str(then)[:12]}: give its --dataset, or start another run in another --out_dir'
            )


def describe_run(out_dir: Path) -> str:
    """'a finished run (5000 of 5000 iterations)', as far as its files tell."""
    try:
        run = json.loads((out_dir / metrics.RUN).read_text(encoding='utf-8'))
        last = metrics.read_jsonl(out_dir / metrics.METRICS)[-1]['iter']
        kind = 'a finished' if run['status'] == 'finished' else 'an unfinished'
        return f'{kind} run ({last} of {run["config"]["max_iters"]} iterations)'
    except (OSError, ValueError, KeyError, IndexError):
        return 'a run'


def bytes_per_token(data) -> dict[str, float]:
    """Bytes of text per token of each split: nats per token / (bytes per token * ln 2) is bits per byte."""
    splits = data.meta.get('splits', {})
    return {name: split['bytes'] / split['tokens'] for name, split in splits.items() if 'bytes' in split}


def main(argv: list[str]) -> int:
    k, given, files = configure(Knobs, argv, __doc__)
    if not k.out_dir:
        names = [f.stem for f in files] or ['default']
        k = replace(k, out_dir=str(Path('out') / '-'.join(names)))
    check(k)

    # ranks
    ddp = 'RANK' in os.environ
    rank, local_rank, world = (
        int(os.environ.get(name, default))
        for name, default in (('RANK', '0'), ('LOCAL_RANK', '0'), ('WORLD_SIZE', '1'))
    )
    main_rank = rank == 0
    device = pick_device(k.device, local_rank)
    dtype = pick_dtype(k.dtype, device)
    device_type = device.split(':')[0]
    if k.gradient_accumulation_steps % world:
        raise ConfigError(
            f'gradient_accumulation_steps={k.gradient_accumulation_steps} is the total over all ranks and '
            f'does not divide by {world} ranks: use a multiple of {world}'
        )

    def say(*args):
        if main_rank:
            tqdm.write(' '.join(str(a) for a in args))

    # what is in the folder, and what is asked for
    out_dir = Path(k.out_dir)
    used = any((out_dir / name).exists() for name in (checkpoint.LAST, metrics.METRICS))
    resume = k.init_from == 'resume' or (k.init_from == 'auto' and (out_dir / checkpoint.LAST).exists())
    if k.init_from == 'resume' and not used:
        raise ConfigError(
            f'{out_dir} holds no run to resume: start one with --init_from=scratch (the default)'
        )
    if used and k.init_from not in ('resume', 'auto') and not k.overwrite:
        raise ConfigError(
            f'{out_dir} holds {describe_run(out_dir)}: go on with --init_from=resume, '
            'start over with --overwrite, or give another --out_dir'
        )
    lock = checkpoint.FolderLock(out_dir) if main_rank else None
    state = checkpoint.load_folder(out_dir) if resume else None
    source = None  # of weights that others trained
    if state is not None:
        k = resume_knobs(k, given, state, say)
        check(k)
    elif k.init_from not in STARTS:
        source = pretrained.read(k.init_from)
        k = pretrained_knobs(k, given, source.config)
        check_model(k)

    stop = StopRequest(under_torchrun=ddp)
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    if ddp:
        backend = {'cuda': 'nccl'}.get(device_type, 'gloo') if k.backend == 'auto' else k.backend
        dist.init_process_group(backend, timeout=timedelta(seconds=k.dist_timeout))
    if k.threads:
        torch.set_num_threads(k.threads)
    torch.set_float32_matmul_precision('high')

    # data
    folder = data_folder(k.dataset)
    if main_rank:
        prepare_stdlib(folder)
        data = open_data(folder, k.block_size, k.vocab_size or None)
    if ddp:
        dist.barrier()
    if not main_rank:
        data = open_data(folder, k.block_size, k.vocab_size or None, verify=False)
    train_tokens = data.splits['train']
    vocab_size = -(-data.vocab_size // 64) * 64  # a multiple of 64 is faster; the padding is never sampled
    config = model_config(k, vocab_size, data.vocab_size)

    # model and optimizer
    model = GPT(config, seed=k.seed).to(device)
    optimizer = model.configure_optimizers(k.weight_decay, k.learning_rate, (k.beta1, k.beta2), device_type)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    it, best_val_loss, seconds = 0, math.inf, 0.0
    if source is not None:
        rows = pretrained.copy_weights(model, source, other_tokens(data, source))
        say(f'from {source.folder}:\n{pretrained.copy_table(rows)}')
        source = None  # frees the weights
    if state is not None:
        refuse_other_data(state, data, config, out_dir)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        scaler.load_state_dict(state['scaler'])
        it, best_val_loss, seconds = state['iter'], state['best_val_loss'], state['seconds']
    evaluated = state is not None and state['evaluated']
    state = None  # frees the copy

    def autocast():
        return autocast_for(device, dtype)

    compiled = model
    if (
        k.compile
        and device_type == 'cpu'
        and not any(shutil.which(c) for c in (os.environ.get('CXX', 'g++'), 'clang++'))
    ):
        say('warning: compile is on, but no C++ compiler is here: running uncompiled, slower, same results')
    elif k.compile:
        say('compiling the model (about a minute) …')
        compiled = torch.compile(model)
    ids = [local_rank] if device_type == 'cuda' else None
    trained = DistributedDataParallel(compiled, device_ids=ids) if ddp else compiled

    # the run's record
    tokens_per_step = k.gradient_accumulation_steps * k.batch_size * k.block_size
    flops_per_token = model.flops_per_token()
    peak = metrics.peak_flops(device)
    log = wandb = None
    if main_rank:
        if k.overwrite and not resume:
            for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST, metrics.METRICS, metrics.RUN):
                (out_dir / name).unlink(missing_ok=True)
        checkpoint.remove_stale(out_dir)
        run = {
            'config': asdict(k),
            'command': ' '.join(argv),
            'commit': metrics.commit(),
            'versions': metrics.versions(),
            'device': {'type': device, 'name': metrics.device_name(device), 'dtype': dtype, 'ranks': world},
            'threads': torch.get_num_threads(),
            'model': {
                'params': model.num_params(),
                'params_total': model.num_params(non_embedding=False),
                'flops_per_token': flops_per_token,
                'cache_bytes_per_token': model.cache_bytes_per_token(),
                'state_bytes': model.state_bytes(),
                'kv_heads': [list(block.attn.heads_produced()) for block in model.transformer.h],
                'vocab_size': vocab_size,
            },
            'data': {
                'folder': k.dataset,
                'fingerprint': data.fingerprint,
                'tokens': {name: len(tokens) for name, tokens in data.splits.items()},
                'bytes_per_token': bytes_per_token(data),
            },
            'tokens_per_step': tokens_per_step,
            'status': 'running',
        }
        log = metrics.Metrics(out_dir, run, resume_iter=it if resume else 0)
        name = k.wandb_run_name or out_dir.name
        wandb = metrics.Wandb(k.wandb_log, k.wandb_project, name, k.wandb_group, out_dir, run)
        say(
            f'{out_dir}: {k.attention}{" " + k.head_split if k.attention == "reflex" else ""}, '
            f'{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, '
            f'{model.num_params() / 1e6:.2f}M parameters; {tokens_per_step:,} tokens per step; '
            f'{device} {dtype}, {world} rank{"s" * (world > 1)}'
        )

    saver = checkpoint.Saver(out_dir)
    last_save, last_save_time = it, time.monotonic()

    def save(best: bool = False):
        nonlocal last_save, last_save_time
        last_save, last_save_time = it, time.monotonic()
        if main_rank:
            saver.save(
                {
                    'model': model.state_dict(),
                    'model_args': asdict(config),
                    'optimizer': optimizer.state_dict(),
                    'scaler': scaler.state_dict(),
                    'iter': it,
                    'evaluated': evaluated,
                    'best_val_loss': best_val_loss,
                    'seconds': seconds,
                    'config': asdict(k),
                    'tokenizer': data.tokenizer_spec,
                    'data_fingerprint': data.fingerprint,
                },
                best,
            )

    micro_steps = k.gradient_accumulation_steps // world  # of this rank

    def fetch(step: int, j: int):
        micro = j * world + rank
        batch = get_batch(train_tokens, k.seed, step, micro, k.batch_size, k.block_size)
        x, y = (torch.from_numpy(a) for a in batch)
        if device_type == 'cuda':  # pinned, so that the copy runs beside the computation
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    bar = tqdm(total=k.max_iters, initial=it, unit='it', disable=not (main_rank and sys.stderr.isatty()))
    plain = main_rank and bar.disable
    x, y = fetch(it, 0)
    logged_it, logged_seconds, status, exit_code = it, seconds, 'failed', 1
    try:
        while True:
            done = it >= k.max_iters or k.eval_only
            if (it % k.eval_interval == 0 or done) and not evaluated:
                losses = evaluate(compiled, data.splits, k, device, autocast, rank, world)
                evaluated = True
                best = losses['val'] < best_val_loss
                best_val_loss = min(best_val_loss, losses['val'])
                record = {'iter': it, 'train/loss': losses['train'], 'val/loss': losses['val']}
                if main_rank:
                    log.log({**record, 'tokens': it * tokens_per_step, 'seconds': round(seconds, 3)})
                    wandb.log(record)
                say(f'iter {it:>6}: train {losses["train"]:.4f}, val {losses["val"]:.4f}')
                if it > 0 and not k.eval_only:
                    save(best)
            interval = k.checkpoint_interval and it % k.checkpoint_interval == 0
            minutes = k.checkpoint_minutes and time.monotonic() - last_save_time > 60 * k.checkpoint_minutes
            if (interval or minutes or done or stop.agreed) and it != last_save and not k.eval_only:
                save()
            if done or stop.agreed:
                break

            started = time.perf_counter()
            lr = learning_rate_at(it, k)
            for group in optimizer.param_groups:
                group['lr'] = lr
            loss_sum = torch.zeros((), device=device)
            for j in range(micro_steps):
                if ddp:  # ranks add their gradients once per step
                    trained.require_backward_grad_sync = j == micro_steps - 1
                if k.dropout:
                    torch.manual_seed(dropout_seed(k.seed, it, j * world + rank))
                with autocast():
                    _, loss = trained(x, y)
                scaler.scale(loss / micro_steps).backward()
                loss_sum += loss.detach()
                x, y = fetch(it, j + 1) if j + 1 < micro_steps else fetch(it + 1, 0)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), k.grad_clip or math.inf)
            report = torch.stack([loss_sum / micro_steps, loss_sum.new_tensor(float(bool(stop.reason)))])
            if ddp:
                dist.all_reduce(report)
            loss, stopping = (report / world).tolist()  # the one time that a step waits for the device
            grad_norm = grad_norm.item()
            # the loss scaler looks for overflowing gradients itself, and skips those steps
            if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
                where = blame(model, [fetch(it, j) for j in range(micro_steps)], autocast, world)
                raise TrainingError(
                    f'iteration {it}: loss {loss}, gradient norm {grad_norm}; first not finite: {where}. '
                    f'The update was not made; {out_dir / checkpoint.LAST} is of iteration {last_save}. '
                    'A lower learning_rate or a longer warm-up is the usual mend'
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            stop.agreed = stopping > 0
            it, evaluated = it + 1, False
            seconds += time.perf_counter() - started
            bar.update()

            if it == 1 or it % k.log_interval == 0:
                tokens_per_s = (it - logged_it) * tokens_per_step / (seconds - logged_seconds)
                logged_it, logged_seconds = it, seconds
                mfu = tokens_per_s * flops_per_token / (peak * world) if peak else None
                record = {'iter': it, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm}
                record |= {'tokens_per_s': round(tokens_per_s, 1), 'mfu': mfu}
                if main_rank:
                    log.log({**record, 'tokens': it * tokens_per_step, 'seconds': round(seconds, 3)})
                    wandb.log({key: value for key, value in record.items() if value is not None})
                shown = f'{tokens_per_s:,.0f} tokens/s' + (f', MFU {mfu:.1%}' if mfu else '')
                bar.set_postfix_str(f'loss {loss:.4f}, {shown}')
                if plain:
                    left = (k.max_iters - it) * (seconds / max(1, it))
                    say(f'iter {it:>6}: loss {loss:.4f}, lr {lr:.2e}, {shown}, {left / 60:.1f} min left')
        saver.wait()
        status, exit_code = ('finished', 0) if done else ('stopped', 0)
    finally:
        bar.close()
        if main_rank:
            with contextlib.suppress(checkpoint.CheckpointError):
                saver.wait()
            memory = metrics.peak_memory(device)
            log.update(status=status, iter=it, seconds=round(seconds, 3), peak_memory_bytes=memory)
            log.close()
            wandb.summary({'status': status, 'best_val_loss': best_val_loss, 'peak_memory_bytes': memory})
            wandb.finish(exit_code)
            lock.release()
    if status == 'stopped':
        say(f'stopped by {stop.reason or "another rank"} at iteration {it}; go on with --init_from=resume')
    elif k.sample_tokens and main_rank and data.tokenizer_spec:
        tokenizer = from_spec(data.tokenizer_spec)
        say(f'--- a sample of {k.sample_tokens} tokens (more: python sample.py --out_dir={out_dir})')
        prompt = torch.tensor([[tokenizer.eot or 0]], device=device)
        generator = torch.Generator(device).manual_seed(k.seed)
        for piece in stream_text(model, tokenizer, prompt, k.sample_tokens, top_k=50, generator=generator):
            print(piece, end='', flush=True)
        print()
    if ddp:
        dist.destroy_process_group()
    return exit_code


ERRORS = (
    ConfigError,
    DataError,
    TokenizerError,
    TrainingError,
    checkpoint.CheckpointError,
    pretrained.PretrainedError,
)

if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except ERRORS as e:
        print(f'train.py: {e}', file=sys.stderr)
        sys.exit(2)
