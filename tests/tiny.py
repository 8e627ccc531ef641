"""What the tests of whole runs share: tiny data, runs in this process and in others, faults, comparisons."""

import contextlib
import faulthandler
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from data.tokenizer import Bytes
from runs import checkpoint, metrics
from runs.ranks import run_rank

ROOT = Path(__file__).resolve().parent.parent
TIMES = {'seconds', 'tokens_per_s', 'mfu'}  # what may differ between two equal runs
TINY = {
    'device': 'cpu',
    'dtype': 'float32',
    'compile': False,
    'threads': 1,
    'dist_timeout': 60,
    'n_layer': 2,
    'n_head': 4,
    'n_embd': 32,
    'attention': 'reflex(2-2)',
    'block_size': 16,
    'batch_size': 2,
    'gradient_accumulation_steps': 4,
    'dropout': 0.1,
    'learning_rate': 1e-2,
    'warmup_iters': 2,
    'max_iters': 12,
    'eval_interval': 5,
    'eval_iters': 2,
    'log_interval': 1,
}


def write_tokens(folder, vocab_size=64, tokenizer=None, seed=0, **counts):
    """A data set as prepare.py leaves it, of ids that are worth learning; counts: tokens per split."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or Bytes()
    random = np.random.default_rng(seed)
    splits = {}
    for name, n in ({'train': 4000, 'val': 700} | counts).items():
        tokens = (random.integers(0, 5, n).cumsum() % vocab_size).astype('<u2').tobytes()
        (folder / f'{name}.bin').write_bytes(tokens)
        splits[name] = {'tokens': n, 'bytes': 2 * n, 'sha256': hashlib.sha256(tokens).hexdigest()}
    meta = {'format': 1, 'vocab_size': tokenizer.vocab_size, 'dtype': 'uint16', 'splits': splits}
    (folder / 'meta.json').write_text(json.dumps({**meta, 'tokenizer': tokenizer.spec}), encoding='utf-8')
    return folder


def flags(out_dir, **knobs) -> list[str]:
    return [f'--{name}={value}' for name, value in {'out_dir': out_dir, **knobs}.items()]


def start(out_dir, data, **knobs) -> int:
    """A tiny run in this process, from scratch unless init_from says otherwise; the exit status."""
    return train.main(flags(out_dir, dataset=data, **{**TINY, **knobs}))


def resume(out_dir, **knobs) -> int:
    return train.main(flags(out_dir, init_from='resume', **knobs))


def at_step(step: int, action):
    """Have `action` called when step `step` (from 0) begins; returns what undoes it."""
    real = train.learning_rate_at

    def hooked(it, k):
        if it == step:
            action()
        return real(it, k)

    train.learning_rate_at = hooked
    return partial(setattr, train, 'learning_rate_at', real)


@contextlib.contextmanager
def happening(step: int, action):
    undo = at_step(step, action)
    try:
        yield
    finally:
        undo()


def wait_for_saves():
    """Have every save end before training goes on, so that a later fault finds it done."""
    save = checkpoint.Saver.save

    def and_wait(saver, *args):
        save(saver, *args)
        saver.wait()

    checkpoint.Saver.save = and_wait


def at_step_after_saves(step: int, action):
    """Fault of a process."""
    wait_for_saves()
    at_step(step, action)


def kill_me(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def lines(out_dir) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    records = metrics.read_jsonl(Path(out_dir) / metrics.METRICS)
    return [{key: value for key, value in r.items() if key not in TIMES} for r in records]


def status(out_dir) -> str:
    return json.loads((Path(out_dir) / metrics.RUN).read_text(encoding='utf-8'))['status']


def assert_equal(a, b, where='state'):
    """Bit for bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f'{where}[{i}]')
    else:
        assert a == b, f'{where}: {a} != {b}'


def assert_same_run(one, other, names=(checkpoint.LAST, checkpoint.BEST)):
    """The same metrics, weights, optimizer, best loss, …, bit for bit; only clock and folder may differ."""
    assert lines(one) == lines(other)
    for name in names:
        a, b = (checkpoint.load(Path(folder) / name) for folder in (one, other))
        assert_equal(*({key: x[key] for key in x if key not in ('seconds', 'config')} for x in (a, b)), name)


# -----------------------------------------------------------------------------
# Other processes. They are forked from one that has imported torch and nothing else, so that each costs
# little; what they print goes to a file.

os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])  # where that one finds `runs`
FORKS = multiprocessing.get_context('forkserver')
# The optimizer's first step imports the second of them, a model that ranks share out the others
FORKS.set_forkserver_preload(
    ['runs', 'torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.checkpoint']
)


def _program(argv, log, environment, fault):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.dump_traceback_later(45, file=sys.__stderr__)  # of one that hangs
    os.environ.update(environment)
    if fault is not None:
        fault()
    run_rank(train.main, argv)


class Program:
    """`python train.py ARGV` as a process. fault: a picklable function that is called in it first."""

    def __init__(self, argv, log, environment=None, fault=None):
        self.log = Path(log)
        self.process = FORKS.Process(target=_program, args=(argv, log, environment or {}, fault), daemon=True)
        self.process.start()

    def end(self, seconds=60) -> int:
        """Its exit status (-9: killed), waited for at most so long."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f'still running after {seconds} s:\n{self.text()}')
        return code

    def text(self) -> str:
        return self.log.read_text(encoding='utf-8') if self.log.exists() else ''


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start_ranks(n: int, argv, log_folder, fault=None, faulty=None) -> list[Program]:
    """The same as n ranks on CPU. fault: as of Program, on the rank `faulty`, or on all where it is None."""
    group = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(n)}
    ranks = []
    for rank in range(n):
        environment = {**group, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        mine = fault if faulty in (None, rank) else None
        ranks.append(Program(argv, Path(log_folder) / f'rank{rank}.log', environment, mine))
    return ranks


def run_ranks(n: int, argv, log_folder, fault=None, faulty=None) -> list[int]:
    ranks = start_ranks(n, argv, log_folder, fault, faulty)
    return [rank.end() for rank in ranks]


class Torchrun:
    """torchrun with tests/faults.py, or train.py, as its script; output through a pipe."""

    def __init__(self, arguments, script, argv):
        command = [sys.executable, '-m', 'torch.distributed.run', *arguments, ROOT / script, *argv]
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding='utf-8',
            # the variable: without it restarted ranks may be given the addresses of the dead (torch 2.13)
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'},
            start_new_session=True,
        )
        self.seen = ''
        self.guard = threading.Timer(120, self.kill_all)  # a hang becomes a failure
        self.guard.start()

    def kill_all(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def read_until(self, text: str):
        """Read what it prints up to a line with `text`."""
        for line in self.process.stdout:
            self.seen += line
            if text in line:
                return
        raise AssertionError(f'ended without {text!r}:\n{self.seen}')

    def end(self) -> int:
        """Read the rest, which ends when torchrun and all its ranks are gone; its exit status."""
        self.seen += self.process.stdout.read()
        code = self.process.wait()
        assert self.guard.is_alive(), f'hung:\n{self.seen}'
        self.guard.cancel()
        return code
