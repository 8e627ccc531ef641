"""How a run begins: what is asked for, what its folder holds, and what it needs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from configurator import ConfigError, configure
from data.tokendata import open_data
from model import GPTConfig
from runs import checkpoint, metrics, pretrained
from runs.datasets import data_folder, prepare_own
from runs.files import FolderLock
from runs.knobs import STARTS, Knobs, TrainingKnobs, check, check_model, check_paths, model_config
from runs.ranks import Ranks
from runs.resume import refuse_other_run, resume_knobs

ARCHITECTURE = {f.name for f in fields(GPTConfig)} - {'vocab_size', 'vocab_used', 'dropout'}


class Start(NamedTuple):
    knobs: Any  # of the program: Knobs, or what else read_knobs was asked for
    given: dict  # the knobs that a config file or the command line has set
    resume: bool  # whether the run goes on from the checkpoint in its folder
    there: list[str]  # which of metrics.RUN_FILES its folder holds


def read_knobs(argv: list[str], doc: str, kind: type[TrainingKnobs] = Knobs, check=check) -> Start:
    """The knobs of the command line, on top of those of the run that is to be resumed; checked.

    kind, check: the knobs of the program, and what refuses those that cannot work. ConfigError where they do
    not fit together, or do not fit what lies in the folder.
    """
    k, given, files = configure(kind, argv, doc)
    if not k.out_dir:
        names = [f.stem for f in files] or ['default']
        k = replace(k, out_dir=str(Path('out') / '-'.join(names)))
    check_paths(out_dir=k.out_dir)
    out_dir = Path(k.out_dir)
    there = run_files(out_dir)
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
        k = resume_knobs(k, given)
        if isinstance(k, Knobs):
            check_model(k)
    elif k.init_from == 'auto':  # nothing is here: start as the config files would
        start = configure(kind, [str(f) for f in files]).knobs.init_from
        k = replace(k, init_from='scratch' if start in STARTS else start)
    check(k)
    return Start(k, given, resume, there)


def run_files(out_dir: Path) -> list[str]:
    return [name for name in metrics.RUN_FILES if (out_dir / name).exists()]


def describe_run(out_dir: Path) -> str:
    """'a finished run (5000 of 5000 iterations)', as far as its files tell."""
    try:
        run = json.loads((out_dir / metrics.RUN).read_text(encoding='utf-8'))
        last = metrics.read_jsonl(out_dir / metrics.METRICS)[-1]['iter']
        kind = 'a finished' if run['status'] == 'finished' else 'an unfinished'
        return f'{kind} run ({last} of {run["config"]["max_iters"]} iterations)'
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 'a run'


@contextlib.contextmanager
def claimed(out_dir: Path, there: list[str], group: Ranks):
    """Holds the run's folder: rank 0 locks it. there: what it held when the knobs were checked."""
    if not group.main:
        yield
        return
    with FolderLock(out_dir):
        if there != run_files(out_dir):
            raise ConfigError(f'{out_dir}: another run has been at work here just now; start again')
        yield


def open_all(k: Knobs, given: dict, resume: bool, group: Ranks) -> tuple:
    """What the run begins with -> k, data, config, state, source.

    The knobs, with the architecture of the weights that they name; the data set; the model's config; the
    checkpoint to go on from, or None; pretrained weights, or None.
    """
    state, source = None, None
    if resume:
        state = checkpoint.load_folder(k.out_dir, resume=True)
    elif k.init_from not in STARTS:
        source = pretrained.read(k.init_from)
        k = pretrained_knobs(k, given, source.config)
    folder = data_folder(k.dataset)
    if group.main:
        prepare_own(folder)
    data = open_data(folder, k.block_size, k.vocab_size or None, verify=group.main)
    vocab_size = -(-data.vocab_size // 64) * 64  # a multiple of 64 is faster; padding is never sampled
    config = model_config(k, vocab_size, data.vocab_size)
    if state is not None and group.main:
        refuse_other_run(state, data, k, config)
    return k, data, config, state, source


def pretrained_knobs(k: Knobs, given: dict, found: GPTConfig) -> Knobs:
    """The knobs with the weights' architecture wherever no config file and no flag says otherwise."""
    taken = {name: getattr(found, name) for name in ARCHITECTURE if hasattr(k, name) and name not in given}
    merged = replace(k, **taken)
    check_model(merged)
    return merged
