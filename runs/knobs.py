"""The knobs of a training run: each with its default and its meaning, and a check of what cannot work.

train.py trains with them; experiments.py and bench.py make arms of them. Torch is imported only where a
model's config is made, so that a program can answer --help and a misspelt flag at once.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from configurator import ConfigError, from_dict
from shape import HierarchyShape

if TYPE_CHECKING:
    from model import GPTConfig

ROOT = Path(__file__).resolve().parents[1]

STARTS = ('scratch', 'resume', 'auto')  # any other init_from names weights to begin with (pretrained.py)
# What a run did whose record does not name these knobs because it is older, where that is not today's default
BEFORE = {'muon_qkv': 'whole'}


@dataclass(frozen=True)
class TrainingKnobs:
    """What trains a model, whichever it is."""

    # output
    out_dir: str = ''  # the folder of the run; '' = out/<names of the config files>
    overwrite: bool = False  # start over in a folder that holds a run, and delete its files
    eval_interval: int = 250  # iterations between evaluations (there is one more at the end)
    eval_iters: int = 200  # batches of each split per evaluation; 0 = all of val, and as much of train
    eval_only: bool = False  # evaluate once and stop
    log_interval: int = 10  # iterations between lines of metrics.jsonl
    sample_tokens: int = 0  # tokens of text to print when the training is done
    sample_start: str = ''  # what that text begins with; '' = a new document
    # start
    init_from: str = 'scratch'  # scratch | resume | auto (resume if there is a run) | weights: a run, gpt2, …
    checkpoint_interval: int = 0  # iterations between saves; 0 = save at every evaluation
    checkpoint_minutes: float = 0.0  # save also when this many minutes have passed; 0 = off
    seed: int = 1337  # of the initial weights, the batches and the dropout, each with its own generator
    # wandb
    wandb_log: bool = False  # send the same metrics to wandb; if that fails, training goes on without it
    wandb_project: str = 'reflex-attention'  # the project that wandb files the run under
    wandb_run_name: str = ''  # '' = the name of out_dir
    wandb_group: str = ''  # of the runs of one experiment, such as the seeds of an arm
    # data
    dataset: str = 'openwebtext'  # a folder of data/, or any path, that prepare.py has filled
    vocab_size: int = 0  # only for a plain .bin without meta.json; 0 = what meta.json says
    gradient_accumulation_steps: int = 1  # micro-batches per step, in total over all ranks
    batch_size: int = 32  # sequences per micro-batch
    # optimizer
    optimizer: str = 'adamw'  # adamw | muon (for the matrices inside the blocks, AdamW for the rest)
    learning_rate: float = 1e-3  # the highest, after warm-up
    muon_qkv: str = 'apart'  # queries, keys, values to muon: apart (three matrices) | whole (c_attn as one)
    muon_learning_rate: float = 0.0  # of muon's matrices, on the same schedule; 0 = learning_rate
    max_iters: int = 5000  # optimizer steps
    weight_decay: float = 0.1  # of matrices; norms and biases do not decay
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.98  # AdamW's memory of the gradient's square
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    # learning-rate schedule
    decay_lr: bool = True  # warm up, then decay; false = learning_rate throughout
    lr_schedule: str = 'cosine'  # shape of the decay: cosine | linear
    warmup_iters: int = 400  # iterations of linear rise from 0
    lr_decay_iters: int = 0  # the iteration at which min_lr is reached; 0 = max_iters
    min_lr: float = 1e-5  # where the decay ends
    # system
    device: str = 'auto'  # auto (cuda, mps or cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = 'auto'  # auto | float32 | bfloat16 | float16: of autocast; weights stay float32
    compile: bool = True  # torch.compile; takes a minute to start, needs a C++ compiler on a CPU
    deterministic: bool = False  # the same bits every time on CUDA too (a CPU gives them anyway); slower
    threads: int = 0  # CPU threads per process; 0 = torch's choice
    backend: str = 'auto'  # of torch.distributed: auto | nccl | gloo
    dist_timeout: float = 600.0  # seconds after which ranks give up on one that does not answer


@dataclass(frozen=True)
class Knobs(TrainingKnobs, HierarchyShape):
    # model: the fields of shape.py, which come first in this class
    model: str = 'gpt'  # gpt | hierarchy (groups of tokens become latents, whose stack the model knobs shape)

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as e:
            raise ConfigError(str(e)) from None


def check_paths(**paths: str):
    """Refuse what no file system can name, before any of it is looked for. Raises ConfigError."""
    for name, path in paths.items():
        longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
        if longest > 255 or len(os.fsencode(path)) > 4000 or '\0' in path:
            raise ConfigError(f'{name}={path[:40]!r}…: no file or folder can have such a name; shorten it')


def check_seed(k):
    """k: any knobs with a seed."""
    if not 0 <= k.seed < 2**63:
        raise ConfigError(f'seed={k.seed:g}: must be at least 0 and below 2**63')


def check_threads(k):
    """k: any knobs with threads."""
    if not 0 <= k.threads <= 1024:
        raise ConfigError(f'threads={k.threads:g}: from 1 to 1024, or 0 for the choice of torch')


def check_training(k: TrainingKnobs):
    """Refuse settings of a training that cannot work, before anything is read or built. Raises ConfigError.

    k also has the block_size of the model.
    """
    check_paths(init_from=k.init_from)
    check_seed(k)
    check_threads(k)
    positive = 'eval_interval log_interval gradient_accumulation_steps batch_size block_size'.split()
    for name in positive:
        if getattr(k, name) < 1:
            raise ConfigError(f'{name}={getattr(k, name)}: must be at least 1')
    not_negative = (
        'eval_iters sample_tokens checkpoint_interval checkpoint_minutes vocab_size max_iters learning_rate '
        'muon_learning_rate min_lr weight_decay grad_clip warmup_iters lr_decay_iters'
    ).split()
    for name in not_negative:
        if getattr(k, name) < 0:
            raise ConfigError(f'{name}={getattr(k, name)}: must not be negative')
    for name in ('beta1', 'beta2'):
        if not 0 <= getattr(k, name) < 1:
            raise ConfigError(f'{name}={getattr(k, name)}: must be in [0, 1)')
    choices = {
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


def check(k: Knobs):
    """Refuse what cannot work, before anything is read or built. Raises ConfigError."""
    check_training(k)
    for name in ('n_layer', 'n_head'):
        if getattr(k, name) > 10_000:
            raise ConfigError(f'{name}={getattr(k, name):g}: more than 10,000 is taken for a slip')
    close = difflib.get_close_matches(k.init_from, STARTS, n=1)
    if close and k.init_from not in STARTS and not Path(k.init_from).is_dir():
        raise ConfigError(f'init_from={k.init_from!r}: did you mean {close[0]!r}?')
    if k.model != 'gpt' and k.init_from not in STARTS:
        raise ConfigError(f'init_from={k.init_from!r}: only model=gpt starts from such weights')
    if k.init_from in STARTS:  # otherwise the weights have a say in the architecture: see start.py
        check_model(k)


def check_model(k: Knobs):
    """Refuse an architecture that does not fit together. Raises ConfigError."""
    try:
        model_config(k, vocab_size=64, vocab_used=64)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def model_config(k: Knobs, vocab_size: int, vocab_used: int) -> GPTConfig:
    """The config of the model that the knobs describe. ValueError where they do not fit together."""
    from runs.models import MODELS  # imports torch

    if k.model not in MODELS:
        raise ConfigError(f'model={k.model!r}: one of {", ".join(MODELS)}')
    config_class = MODELS[k.model].config_class
    given = {f.name: getattr(k, f.name) for f in fields(config_class) if hasattr(k, f.name)}
    return config_class(**{**given, 'vocab_size': vocab_size, 'vocab_used': vocab_used})


def saved_knobs(config: dict, where, kind: type[TrainingKnobs] = Knobs) -> TrainingKnobs:
    """The knobs that a run.json has under 'config'; where: its path, for errors; kind: of the program that
    wrote it. Raises ConfigError."""
    return from_dict(kind, {**BEFORE, **config} if isinstance(config, dict) else config, where)


def config_file(name: str) -> str:
    """'cla' -> 'config/plans/cla.py': the config file of that name, in whatever group, as seen from the
    repository's root. ConfigError where there is none, or more than one."""
    found = sorted((ROOT / 'config').rglob(f'{name}.py'))
    if len(found) != 1:
        raise ConfigError(
            f'{name!r} is the name of {len(found) or "no"} config file in config/ and its groups'
        )
    return found[0].relative_to(ROOT).as_posix()
