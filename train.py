"""Train a GPT, or another model, on one device or several.

    python train.py config/reflex_422.py                                     # one process
    python train.py config/reflex_422.py config/size_cpu.py --max_iters=100  # configs in order, flags win
    torchrun --standalone --nproc_per_node=2 train.py config/reflex_422.py   # several ranks, one host
    python train.py config/finetune_shakespeare.py --init_from=gpt2-medium   # from GPT-2-shaped weights
    python train.py config/hierarchy.py                                      # another model
    python train.py --out_dir=out/reflex_422 --init_from=resume              # go on after any interruption

Results: OUT_DIR/metrics.jsonl, run.json, last.pt, previous.pt and best.pt. `--help` lists every knob.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import ConfigError, UserError, configure, from_dict
from data.tokendata import DataError, eval_batch, eval_starts, get_batch, open_data
from data.tokenizer import from_spec
from model import GPTConfig, LanguageModel
from runs import checkpoint, metrics, pretrained
from runs.files import FileError, FolderLock, remove_stale
from runs.optimizer import make_optimizer
from runs.records import BEFORE
from runs.system import autocast_for, keep_memory, pick_device, pick_dtype
from sample import document_start, stream_text

ROOT = Path(__file__).resolve().parent
tqdm.set_lock(threading.RLock())  # its default takes a semaphore, which `leave` would leave behind


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
    model: str = 'gpt'  # gpt | hierarchy (groups of tokens become latents; all below is of its latent stack)
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
    # hierarchy (model='hierarchy'): lists of lengths are from tokens to the last level, '16-2', '64-128-256'
    groups: int = 16  # of a sequence: block_size / groups tokens each
    latents: str = '16-2'  # per group: of level 1, of level 2, …
    widths: str = '64-128-768'  # of tokens, of level 1, …; the last one is n_embd
    compression: str = 'perceiver'  # perceiver (a group's last tokens ask all of it) | transformer
    compress_blocks: int = 2  # compression='transformer': blocks in the group before every level
    local_blocks: str = '1'  # inside groups: at every length, or apart, '1-2-0' (tokens, level 1, level 2)
    global_blocks: str = '1'  # over all groups: likewise
    block_order: str = 'interleaved'  # local, global, local, … | serial: the local ones first
    upsample: str = 'repeat'  # latents, to the length before | attention: and attend to them in the group
    skip: str = 'sum'  # how the encoder's stream joins the decoder's: sum | interpolate (learned shares)
    dense: bool = False  # DenseFormer: a latent block's input is a learned sum of all earlier outputs
    channels: int = 1  # of the latent stack's multi-channel blocks; 1 = plain blocks
    channel_every: int = 1  # every so many blocks of the stack is a multi-channel one
    channel_mlp: float = 1.0  # hidden size of a channel's own MLP, times 4 n_embd / channels
    channel_shared_kv: bool = False  # one key and value for all channels
    channel_shared_mlps: int = 0  # MLPs that all channels use, beside their own
    channel_merge: str = 'softmax'  # of the channels, elementwise: softmax | max | mean
    latent_loss: float = 0.0  # weight of predicting the next latent, risen to over a fifth of training
    # optimizer
    optimizer: str = 'adamw'  # adamw | muon (for the matrices inside the blocks, AdamW for the rest)
    learning_rate: float = 1e-3  # the highest, after warm-up
    muon_qkv: str = 'apart'  # queries, keys, values to muon: apart (three matrices) | whole (c_attn as one)
    muon_learning_rate: float = 0.0  # of muon's matrices, on the same schedule; 0 = learning_rate
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
    deterministic: bool = False  # on CUDA the same bits every time too (CPU gives them anyway); slower
    threads: int = 0  # CPU threads per process; 0 = torch's choice
    backend: str = 'auto'  # of torch.distributed: auto | nccl | gloo
    dist_timeout: float = 600.0  # seconds after which ranks give up on one that does not answer


STARTS = ('scratch', 'resume', 'auto')  # any other init_from names a checkpoint of pretrained.py
ARCHITECTURE = {f.name for f in fields(GPTConfig)} - {'vocab_size', 'vocab_used', 'dropout'}
RUN_FILES = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST, metrics.METRICS, metrics.RUN)


def check(k: Knobs):
    """Refuse what cannot work, before anything is read or built."""
    positive = 'eval_interval log_interval gradient_accumulation_steps batch_size block_size'.split()
    for name in positive:
        if getattr(k, name) < 1:
            raise ConfigError(f'{name}={getattr(k, name)}: must be at least 1')
    not_negative = (
        'eval_iters sample_tokens checkpoint_interval checkpoint_minutes seed vocab_size max_iters '
        'learning_rate muon_learning_rate min_lr weight_decay grad_clip warmup_iters lr_decay_iters threads'
    ).split()
    for name in not_negative:
        if getattr(k, name) < 0:
            raise ConfigError(f'{name}={getattr(k, name)}: must not be negative')
    for name in ('beta1', 'beta2'):
        if not 0 <= getattr(k, name) < 1:
            raise ConfigError(f'{name}={getattr(k, name)}: must be in [0, 1)')
    choices = {
        'model': tuple(checkpoint.MODELS),
        'optimizer': ('adamw', 'muon'),
        'muon_qkv': ('apart', 'whole'),
        'lr_schedule': ('cosine', 'linear'),
        'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
        'backend': ('auto', 'nccl', 'gloo'),
    }
    for name, allowed in choices.items():
        if getattr(k, name) not in allowed:
            raise ConfigError(f'{name}={getattr(k, name)!r}: one of {", ".join(allowed)}')
    if k.decay_lr and k.min_lr > k.learning_rate:
        raise ConfigError(
            f'min_lr={k.min_lr:g} is above learning_rate={k.learning_rate:g}: the rate would rise; lower it'
        )
    if k.optimizer == 'muon' and k.muon_learning_rate and not k.learning_rate:
        raise ConfigError(
            f'learning_rate=0: then muon_learning_rate={k.muon_learning_rate:g} has no schedule'
        )
    if k.dist_timeout <= 0:
        raise ConfigError(f'dist_timeout={k.dist_timeout}: must be positive')
    close = difflib.get_close_matches(k.init_from, STARTS, n=1)
    if close and k.init_from not in STARTS and not Path(k.init_from).is_dir():
        raise ConfigError(f'init_from={k.init_from!r}: did you mean {close[0]!r}?')
    if k.model != 'gpt' and k.init_from not in STARTS:
        raise ConfigError(f'init_from={k.init_from!r}: only model=gpt starts from such weights')
    if k.init_from in STARTS:  # else the checkpoint has a say, see pretrained_knobs
        check_model(k)


def check_model(k: Knobs):
    try:
        model_config(k, vocab_size=64, vocab_used=64)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def model_config(k: Knobs, vocab_size: int, vocab_used: int) -> GPTConfig:
    config_class = checkpoint.MODELS[k.model].config_class
    given = {f.name: getattr(k, f.name) for f in fields(config_class) if hasattr(k, f.name)}
    return config_class(**{**given, 'vocab_size': vocab_size, 'vocab_used': vocab_used})


def build(k: Knobs, config: GPTConfig) -> LanguageModel:
    return checkpoint.MODELS[k.model](config, seed=k.seed)


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
        command = [sys.executable, str(folder / 'prepare.py')]
        if subprocess.run(command, check=False).returncode:
            raise DataError(f'{folder} could not be prepared (reason above): mend that, and start again')


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
    """Set by a signal, or when torchrun dies: the loop saves after the step in hand and ends.

    torchrun passes on the signals that it gets, and kills ranks that are still there 30 seconds later.
    """

    def __init__(self, torchrun: int, give_up_seconds: float):
        """torchrun: its process id, or 0."""
        self.reason = ''  # why this rank wants to stop
        self.agreed = False  # whether any rank does, as of the last step
        self.torchrun, self.give_up_seconds = torchrun, give_up_seconds
        self.before = {}  # signal -> its handler outside of the loop
        if torchrun:
            threading.Thread(target=self._watch_parent, daemon=True).start()

    def catch_signals(self):
        """From here on; before the loop they end the process as usual."""
        if threading.current_thread() is threading.main_thread():
            for name in ('SIGTERM', 'SIGINT', 'SIGHUP'):  # Windows has no SIGHUP, nohup wants it ignored
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._on_signal)

    def release_signals(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self.reason and number == signal.SIGINT and not self.torchrun:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self.reason = self.reason or signal.Signals(number).name

    def _watch_parent(self):
        while os.getppid() == self.torchrun:
            time.sleep(0.2)
        self.reason = self.reason or 'the end of torchrun'
        # a rank that waits for another one that is gone never comes back to the loop, if it came there at all
        time.sleep(self.give_up_seconds if self.before else 0)
        os._exit(1)


def evaluate(model, splits, k: Knobs, device, autocast, rank, world, stop) -> dict[str, float] | None:
    """Mean loss of 'train' and 'val' over fixed windows, in nats per token; the ranks share the batches.

    Each batch's sum of losses is placed in a vector of its own slot before the ranks add theirs, so that the
    result does not depend on how many ranks there are. None if any rank is to stop before the end of it.
    """
    val_windows = len(eval_starts(len(splits['val']), k.block_size, k.eval_iters * k.batch_size)[0])
    losses = {}
    model.eval()
    for split in ('train', 'val'):
        tokens = splits[split]
        n_windows = k.eval_iters * k.batch_size if split == 'val' else val_windows
        starts, skip = eval_starts(len(tokens), k.block_size, n_windows)
        n_batches = -(-len(starts) // k.batch_size)
        sums = torch.zeros(n_batches + 1, dtype=torch.float32, device=device)  # the last: ranks that stop
        counts = torch.zeros(n_batches, dtype=torch.float32, device=device)
        for i in range(rank, n_batches, world):
            if stop.reason:
                sums[-1] = 1
                break
            batch = eval_batch(tokens, starts, skip, i, k.batch_size, k.block_size)
            x, y = (torch.from_numpy(a) for a in batch)
            counts[i] = (y != -1).sum()
            with torch.no_grad(), autocast():
                sums[i] = model(x.to(device), y.to(device))[1] * counts[i]
        if world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        *sums, stopping = sums.tolist()
        if stopping:
            break
        losses[split] = sum(sums) / sum(counts.tolist())
    model.train()
    return None if stopping else losses


def blame(model, micro_batches, autocast, rank, world) -> str:
    """Which tensor went wrong first: a weight, a module's output in this step, or a gradient; on any rank.

    micro_batches: (dropout seed, (x, y, progress)) of this rank's part of the step, computed once more.
    """
    places, bad = [], []  # in the order in which they are computed; the same on every rank

    def look(place, *tensors):
        places.append(place)
        bad.append(not all(torch.isfinite(t).all() for t in tensors if torch.is_tensor(t)))

    for name, p in model.named_parameters():
        look(f'weight {name}', p)
    hooks = []
    for name, module in model.named_modules():
        place = f'the output of {name}' if name else 'the loss'

        def after(module, args, output, place=place):
            look(place, *(output if isinstance(output, tuple) else (output,)))

        hooks.append(module.register_forward_hook(after))
    with torch.no_grad(), autocast():
        for seed, inputs in micro_batches:
            torch.manual_seed(seed)
            model(*inputs)
    for hook in hooks:
        hook.remove()
    for name, p in reversed(list(model.named_parameters())):  # the backward pass begins at the end
        look(f'the gradient of {name}', p.grad)
    first = bad.index(True) if True in bad else len(places)
    if world > 1:
        found = torch.tensor(first * world + rank, device=inputs[0].device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        first, rank = divmod(found.item(), world)
    if first == len(places):
        return 'nothing: it was gone on a second look'
    return places[first] + (f' on rank {rank}' if world > 1 else '')


class TrainingError(UserError):
    """Training cannot go on; one line says why."""


def saved_knobs(config: dict, where) -> Knobs:
    """The knobs that a run.json has under 'config'; where: its path, for errors. ConfigError."""
    return from_dict(Knobs, {**BEFORE, **config} if isinstance(config, dict) else config, where)


def resume_knobs(k: Knobs, given: dict, say) -> Knobs:
    """The knobs of the interrupted run, from its run.json, with those given now on top.

    Not from the checkpoint: what is in there never chooses a path that is read.
    """
    path = Path(k.out_dir) / metrics.RUN
    try:
        saved = saved_knobs(json.loads(path.read_text(encoding='utf-8'))['config'], path)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f'{path}, with the knobs of the run, cannot be read ({type(e).__name__}: {e}): put it back, or '
            'start another run in another --out_dir'
        ) from None
    begun = {'init_from': saved.init_from, 'overwrite': saved.overwrite}  # these say how the run began
    merged = replace(saved, **{**given, **begun, 'out_dir': k.out_dir})
    for name, new in asdict(merged).items():
        old = getattr(saved, name)
        if old != new and name != 'out_dir':
            say(f'resume: {name} is now {new!r}, was {old!r}')
    return merged


def refuse_other_run(state: dict, data, k: Knobs, config: GPTConfig, out_dir: Path):
    """A checkpoint goes on only with the tokens, the tokenizer, the architecture and the optimizer it had."""
    tokenizer = data.tokenizer_spec and data.tokenizer_spec['fingerprint']
    found = {'data set': data.fingerprint, 'tokenizer': tokenizer}
    wanted = state['data_fingerprint'], state['tokenizer'] and state['tokenizer']['fingerprint']
    for (what, now), then in zip(found.items(), wanted, strict=True):
        if now != then:
            raise ConfigError(
                f'the {what} is {str(now)[:12]}, but the checkpoint in {out_dir} was trained with '
                f'{str(then)[:12]}: give its --dataset, or start another run in another --out_dir'
            )
    trained = {**state['model_args'], 'model': checkpoint.kind_of(state)}
    trained['optimizer'] = state['config'].get('optimizer', 'adamw')  # which runs did not say before Muon
    for name, now in {'model': k.model, 'optimizer': k.optimizer, **asdict(config)}.items():
        then = trained.get(name, now)
        if now != then and name != 'dropout':
            raise ConfigError(
                f'{name}={now!r}, but the checkpoint in {out_dir} was trained with {name}={then!r}: '
                'take that, or start another run in another --out_dir'
            )


def refuse_unlike_ranks(k: Knobs, data, state: dict | None, device: str):
    """Ranks on several hosts may see other files: all must start with the same knobs, data and checkpoint."""
    of_the_host = {'out_dir', 'dataset', 'device', 'threads'}
    start = {name: value for name, value in asdict(k).items() if name not in of_the_host}
    tokens = {name: len(split) for name, split in data.splits.items()}
    saved = state and [state['iter'], state['seconds'], state['best_val_loss']]
    text = json.dumps([start, tokens, data.meta.get('splits'), saved])
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    both = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise ConfigError(
            'the ranks do not start alike: every host needs the same code, knobs and data set, and to resume '
            f'the same {Path(k.out_dir) / checkpoint.LAST} (a shared folder, or a copy)'
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


def say(*args):
    """Print on rank 0, above the bar. A terminal or a pipe that has gone away does not stop the training."""
    if os.environ.get('RANK', '0') == '0':
        with contextlib.suppress(OSError):
            tqdm.write(' '.join(str(a) for a in args))
            sys.stdout.flush()


class Ranks(NamedTuple):
    """This process among those that torchrun started: its number, that on its host, and how many they are."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    ddp: bool = False
    parent: int = 0  # the process id of torchrun


def ranks() -> Ranks:
    if 'RANK' not in os.environ:
        return Ranks()
    numbers = [int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]
    return Ranks(*numbers, ddp=True, parent=os.getppid())


def main(argv: list[str]) -> int:
    """Everything that can be refused, before anything is built; then `train`."""
    k, given, files = configure(Knobs, argv, __doc__)
    if not k.out_dir:
        names = [f.stem for f in files] or ['default']
        k = replace(k, out_dir=str(Path('out') / '-'.join(names)))
    group = ranks()
    rank, local_rank, world, ddp, torchrun = group

    # what is in the folder, and what is asked for
    out_dir = Path(k.out_dir)
    there = [name for name in RUN_FILES if (out_dir / name).exists()]
    saved = any(name.endswith('.pt') for name in there)
    resume = k.init_from == 'resume' or (k.init_from == 'auto' and saved)
    if k.overwrite and k.init_from in ('resume', 'auto'):
        raise ConfigError(f'overwrite starts over and init_from={k.init_from} goes on: give one of them')
    if resume and not saved:
        raise ConfigError(
            f'{out_dir} holds a run that ended before its first save: start over with --overwrite'
            if there
            else f'{out_dir} holds no run to resume: start one with --init_from=scratch (the default)'
        )
    if there and k.init_from not in ('resume', 'auto') and not k.overwrite:
        raise ConfigError(
            f'{out_dir} holds {describe_run(out_dir)}: go on with --init_from=resume, '
            'start over with --overwrite, or give another --out_dir'
        )
    if resume:
        k = resume_knobs(k, given, say)
        check_model(k)
    elif k.init_from == 'auto':  # nothing is here: start as the config files would
        start = configure(Knobs, [str(f) for f in files]).knobs.init_from
        k = replace(k, init_from='scratch' if start in STARTS else start)
    check(k)
    device = pick_device(k.device, local_rank)
    dtype = pick_dtype(k.dtype, device)
    device_type = device.split(':')[0]
    if k.gradient_accumulation_steps % world:
        raise ConfigError(
            f'gradient_accumulation_steps={k.gradient_accumulation_steps} is the total over all ranks and '
            f'does not divide by {world} ranks: use a multiple of {world}'
        )
    if k.threads:
        torch.set_num_threads(k.threads)
    if device_type == 'cpu':
        keep_memory()
    torch.set_float32_matmul_precision('high')
    torch.use_deterministic_algorithms(k.deterministic)  # an operation that cannot be is an error
    if k.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # which cuBLAS asks for then
    if device_type == 'cuda':
        torch.cuda.set_device(device)

    stop = StopRequest(torchrun, give_up_seconds=k.dist_timeout)

    def join():
        if ddp:
            backend = {'cuda': 'nccl'}.get(device_type, 'gloo') if k.backend == 'auto' else k.backend
            dist.init_process_group(backend, timeout=timedelta(seconds=k.dist_timeout))
            dist.barrier()

    with FolderLock(out_dir) if rank == 0 else contextlib.nullcontext():
        if rank == 0 and there != [name for name in RUN_FILES if (out_dir / name).exists()]:
            raise ConfigError(f'{out_dir}: another run has been at work here just now; start again')
        # rank 0 goes first: what is wrong is said once, and the others find everything prepared and verified
        if rank != 0:
            join()
        state = checkpoint.load_folder(out_dir) if resume else None
        source = None  # of weights that others trained
        if not resume and k.init_from not in STARTS:
            source = pretrained.read(k.init_from)
            k = pretrained_knobs(k, given, source.config)
            check_model(k)
        folder = data_folder(k.dataset)
        if rank == 0:
            prepare_stdlib(folder)
        data = open_data(folder, k.block_size, k.vocab_size or None, verify=rank == 0)
        vocab_size = -(-data.vocab_size // 64) * 64  # a multiple of 64 is faster; padding is never sampled
        config = model_config(k, vocab_size, data.vocab_size)
        if rank == 0:
            if state is not None:
                refuse_other_run(state, data, k, config, out_dir)
            join()
        if ddp:
            refuse_unlike_ranks(k, data, state, device)
        return train(k, argv, group, stop, config, data, state, source, device, dtype)


def train(
    k, argv, group: Ranks, stop: StopRequest, config: GPTConfig, data, state, source, device, dtype
) -> int:
    """The training loop; returns the exit status, or, as one rank of several, ends the process with it.

    state: of the checkpoint to go on from, or None; source: pretrained weights to begin with, or None.
    """
    rank, _, world, ddp, _ = group
    main_rank = rank == 0
    device_type = device.split(':')[0]
    out_dir = Path(k.out_dir)
    resumed = state is not None

    # model and optimizer
    model = build(k, config).to(device)
    optimizer = make_optimizer(model, k, device_type)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    it, best_val_loss, seconds, evaluated = 0, math.inf, 0.0, False
    watches = {name: metrics.SpikeWatch() for name in ('loss', 'grad_norm')}
    if source is not None:
        rows = pretrained.copy_weights(model, source, other_tokens(data, source))
        say(f'from {source.folder}:\n{pretrained.copy_table(rows)}')
        source.weights.clear()
    if resumed:
        model.load_state_dict(state['model'])
        groups = optimizer.state_dict()['param_groups']  # of the knobs as they are now
        optimizer.load_state_dict({**state['optimizer'], 'param_groups': groups})
        if state['scaler']:  # the run may have come from a device that needs none
            scaler.load_state_dict(state['scaler'])
        it, best_val_loss, seconds = state['iter'], state['best_val_loss'], state['seconds']
        evaluated = state['evaluated'] and not k.eval_only
        watches = {name: metrics.SpikeWatch(**state['watches'][name]) for name in watches}
        state.clear()  # frees the copy; main still holds the dict

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
    ids = [torch.device(device).index] if device_type == 'cuda' else None
    trained = DistributedDataParallel(compiled, device_ids=ids) if ddp else compiled

    # the run's record
    tokens_per_step = k.gradient_accumulation_steps * k.batch_size * k.block_size
    flops_per_token = model.flops_per_token()
    peak = metrics.peak_flops(device)
    recorded = main_rank and not k.eval_only  # an evaluation leaves the run as it is
    if recorded:
        if not resumed:  # nothing is here, or it is told to go
            for name in RUN_FILES:
                (out_dir / name).unlink(missing_ok=True)
        remove_stale(out_dir)
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
                'params_by_part': model.parts(),
                'flops_per_token': flops_per_token,
                'cache_bytes_per_token': model.cache_bytes_per_token(),
                'state_bytes': model.state_bytes(),
                'kv_heads': [list(block.attn.heads_produced()) for block in model.transformer.h],
                'vocab_size': config.vocab_size,
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
        log = metrics.Metrics(out_dir, run, resume_iter=it if resumed else None)
        saver = checkpoint.Saver(out_dir, before=log.sync)
        name = k.wandb_run_name or out_dir.name
        wandb = metrics.Wandb(k.wandb_log, k.wandb_project, name, k.wandb_group, out_dir, run)
    say(
        f'{out_dir}: {model.summary()}; {tokens_per_step:,} tokens per step; '
        f'{device} {dtype}, {world} rank{"s" * (world > 1)}{f"; from iteration {it}" if resumed else ""}'
    )
    if resumed and evaluated and it >= k.max_iters:
        say(f'all {k.max_iters} iterations of this run are done: a higher --max_iters goes on')
    last_save, last_save_time = it if resumed else None, time.monotonic()

    def save(best: bool = False):
        nonlocal last_save, last_save_time
        if not torch.nn.utils.get_total_norm(list(model.parameters())).isfinite():
            raise TrainingError(
                f'iteration {it}: the last update made weights inf or nan; they were not saved. {go_back()}'
            )
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
                    'watches': {name: asdict(watch) for name, watch in watches.items()},
                    'seconds': seconds,
                    'config': asdict(k),
                    'tokenizer': data.tokenizer_spec,
                    'begin': data.meta.get('begin'),
                    'data_fingerprint': data.fingerprint,
                },
                best,
            )
        last_save, last_save_time = it, time.monotonic()

    def go_back() -> str:
        last = f'{out_dir / checkpoint.LAST} is of iteration {last_save}'
        last = 'Nothing was saved yet' if last_save is None else last
        return f'{last}; a lower learning_rate or a longer warm-up is the usual mend'

    micro_steps = k.gradient_accumulation_steps // world  # of this rank

    def fetch(step: int, j: int):
        micro = j * world + rank
        batch = get_batch(data.splits['train'], k.seed, step, micro, k.batch_size, k.block_size)
        x, y = (torch.from_numpy(a) for a in batch)
        progress = torch.full((), step / max(1, k.max_iters), device=device)
        pinned = device_type == 'cuda'  # so that the copy runs beside the computation
        if pinned:
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=pinned), y.to(device, non_blocking=pinned), progress

    inputs = fetch(it, 0)
    if ddp and not k.eval_only:
        # DDP orders its buckets by the first backward pass: here by one whose gradients are dropped, so that
        # a resumed run adds the ranks' gradients up in the same order from its first step on.
        with autocast():
            trained(*inputs)[1].backward()
        optimizer.zero_grad(set_to_none=True)
    bar = tqdm(total=k.max_iters, initial=it, unit='it', disable=not (main_rank and sys.stderr.isatty()))
    plain = main_rank and bar.disable
    logged_it, logged_seconds = it, seconds
    status = 'failed'
    stop.catch_signals()
    try:
        while True:
            done = it >= k.max_iters or k.eval_only
            if (it % k.eval_interval == 0 or done) and not evaluated:
                losses = evaluate(compiled, data.splits, k, device, autocast, rank, world, stop)
                if losses is None:
                    stop.agreed = True  # the resumed run evaluates here
                else:
                    say(f'iter {it:>6}: train {losses["train"]:.4f}, val {losses["val"]:.4f}')
                    if not all(math.isfinite(loss) for loss in losses.values()):
                        raise TrainingError(f'iteration {it}: the evaluation gives {losses}. {go_back()}')
                    evaluated = True
                    best = losses['val'] < best_val_loss
                    best_val_loss = min(best_val_loss, losses['val'])
                    record = {'iter': it, 'train/loss': losses['train'], 'val/loss': losses['val']}
                    if recorded:
                        log.log({**record, 'tokens': it * tokens_per_step, 'seconds': round(seconds, 3)})
                        wandb.log(record)
                    if (it > 0 or done) and not k.eval_only:
                        save(best)
            interval = it and k.checkpoint_interval and it % k.checkpoint_interval == 0
            minutes = k.checkpoint_minutes and time.monotonic() - last_save_time > 60 * k.checkpoint_minutes
            if (interval or minutes or done or stop.agreed) and it != last_save and not k.eval_only:
                save()
            if done or stop.agreed:
                break

            started = time.perf_counter()
            lr = learning_rate_at(it, k)
            for group in optimizer.param_groups:
                group['lr'] = lr * group.get('lr_ratio', 1.0)
            loss_sum = torch.zeros((), device=device)
            for j in range(micro_steps):
                if ddp:  # ranks add their gradients once per step
                    trained.require_backward_grad_sync = j == micro_steps - 1
                if k.dropout:
                    torch.manual_seed(dropout_seed(k.seed, it, j * world + rank))
                with autocast():
                    _, loss = trained(*inputs)
                scaler.scale(loss / micro_steps).backward()
                loss_sum += loss.detach()
                inputs = fetch(it, j + 1) if j + 1 < micro_steps else fetch(it + 1, 0)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            stopping = bool(stop.reason) or (recorded and saver.error is not None)
            report = torch.stack([loss_sum / micro_steps, torch.full_like(loss_sum, stopping)])
            if ddp:
                dist.all_reduce(report)
            # the one time that a step waits for the device
            loss, stopping, norm = torch.cat([report / world, grad_norm[None]]).tolist()
            # the loss scaler lowers its scale where gradients overflow and skips the step, down to a limit
            skipped = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > 2**-14
            if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
                seeds = [dropout_seed(k.seed, it, j * world + rank) for j in range(micro_steps)]
                again = [(seed, fetch(it, j)) for j, seed in enumerate(seeds)]
                raise TrainingError(
                    f'iteration {it}: loss {loss}, gradient norm {norm}; first not finite: '
                    f'{blame(model, again, autocast, rank, world)}. The update was not made. {go_back()}'
                )
            if k.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), k.grad_clip, grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            stop.agreed = stopping > 0
            it, evaluated = it + 1, False
            seconds += time.perf_counter() - started
            bar.update()

            for name, value in {'loss': loss, 'grad_norm': norm}.items():
                usual = watches[name].look(value)
                if usual is not None:
                    say(f'warning: iter {it}: {name} {value:.4g} stands out, {usual:.4g} is usual')
                    if recorded:
                        log.log({'iter': it, 'event': 'spike', 'what': name, 'value': value, 'usual': usual})
            if it == 1 or it % k.log_interval == 0:
                tokens_per_s = (it - logged_it) * tokens_per_step / (seconds - logged_seconds)
                logged_it, logged_seconds = it, seconds
                mfu = tokens_per_s * flops_per_token / (peak * world) if peak else None
                record = {'iter': it, 'loss': loss, 'lr': lr, 'grad_norm': norm}
                record |= {'tokens_per_s': round(tokens_per_s, 1), 'mfu': mfu}
                if recorded:
                    log.log({**record, 'tokens': it * tokens_per_step, 'seconds': round(seconds, 3)})
                    wandb.log({key: value for key, value in record.items() if value is not None})
                shown = f'{tokens_per_s:,.0f} tokens/s' + (f', MFU {mfu:.1%}' if mfu else '')
                bar.set_postfix_str(f'loss {loss:.4f}, {shown}')
                if plain:
                    left = (k.max_iters - it) * (seconds / max(1, it))
                    say(f'iter {it:>6}: loss {loss:.4f}, lr {lr:.2e}, {shown}, {left / 60:.1f} min left')
        if recorded:
            saver.wait()
        status = 'finished' if done and evaluated else 'stopped'
    finally:
        bar.close()
        if recorded:
            memory = metrics.peak_memory(device)
            error = sys.exc_info()[1]
            end = {'status': status, 'error': error and f'{type(error).__name__}: {error}', 'iter': it}
            end |= {'seconds': round(seconds, 3), 'peak_memory_bytes': memory}
            wandb.summary({'status': status, 'best_val_loss': best_val_loss, 'peak_memory_bytes': memory})
            wandb.finish(exit_code=int(status == 'failed'))
            # after a failure, which has its own message, what goes wrong here is no news
            with contextlib.suppress(*[FileError] * (status == 'failed')):
                saver.wait(k.dist_timeout)
                log.update(**end)
            log.close()
        stop.release_signals()
    if status == 'stopped':
        say(f'stopped by {stop.reason or "another rank"} at iteration {it}; go on with --init_from=resume')
    elif k.sample_tokens and main_rank and data.tokenizer_spec:
        tokenizer = from_spec(data.tokenizer_spec)
        say(f'--- a sample of {k.sample_tokens} tokens (more: python sample.py --out_dir={out_dir})')
        start = document_start({'begin': data.meta.get('begin')}, tokenizer) or [0]
        prompt = torch.tensor([start], device=device)
        generator = torch.Generator(device).manual_seed(k.seed)
        for piece in stream_text(model, tokenizer, prompt, k.sample_tokens, top_k=50, generator=generator):
            print(piece, end='', flush=True)
        print()
    if ddp:
        dist.destroy_process_group()
        leave(0)
    return 0


def run(argv: list[str]):
    """main as a program: errors that the user can mend are one line instead of a traceback. Never returns."""
    rank = os.environ.get('RANK', '0')
    try:
        leave(main(argv))
    except UserError as e:
        if rank == '0' or not isinstance(e, TrainingError):  # which all ranks raise alike
            print(f'train.py{f" (rank {rank})" * (rank != "0")}: {e}', file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        leave(130)
    except Exception:
        traceback.print_exc()
        leave(1)


def leave(status: int):
    """End the process at once, whatever still runs or would have to be cleaned up.

    A rank that failed must not linger beside a thread, wandb or a process group whose other ranks are gone:
    torchrun ends those when this one is gone. And a process group of gloo must not be cleaned up: where
    Python lets go of it last, it waits for its thread, which may wait for Python (torch 2.13).
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
    run(sys.argv[1:])
