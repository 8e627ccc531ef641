"""The figures of docs/clusters.md: memory per GPU, what ranks cost, what a checkpoint costs.

    python studies/scale_study.py memory       # models of 124M to 7B on 1, 8 and 64 GPUs, on the meta device
    python studies/scale_study.py ranks        # 1, 2 and 4 ranks of the same total batch: time and bytes sent
    python studies/scale_study.py overlap      # how much of the sums over ranks a backward pass hides
    python studies/scale_study.py checkpoints  # time to save and to load, against size

Prints Markdown. `ranks` counts bytes on the loopback of a network namespace of its own, which takes root.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPT, GPTConfig
from runs import checkpoint
from runs.knobs import Knobs, model_config
from runs.memory import needs
from runs.optimizer import make_optimizer
from runs.ranks import Ranks
from runs.step import TrainingStep

ROOT = Path(__file__).resolve().parent.parent
# name -> layers, heads, width, as of GPT-2 and GPT-3
SIZES = {
    '124M': (12, 12, 768),
    '350M': (24, 16, 1024),
    '774M': (36, 20, 1280),
    '1.5B': (48, 25, 1600),
    '6.7B': (32, 32, 4096),
}


def knobs_of(size: str, **knobs) -> Knobs:
    n_layer, n_head, n_embd = SIZES[size]
    return Knobs(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=1024, batch_size=8, **knobs)


def memory():
    """8 sequences of 1,024 tokens per GPU at a time, AdamW, bf16; on several GPUs with --shard=true."""
    print(
        '| model | GPUs | parameters | weights | gradients | AdamW | gathered | activations | total ', end=''
    )
    print('| total, blocks computed twice |\n' + '| --- ' * 10 + '|')
    for size in SIZES:
        for worlds in ((1,), (8, 64)):
            k = knobs_of(size, shard=worlds != (1,))
            config = model_config(k, 50304, 50257)
            once, twice = (
                needs(replace(k, activation_checkpointing=again), GPT, config, worlds[0], 'bfloat16', 8)
                for again in (False, True)
            )
            for world in worlds:
                states = [n * worlds[0] / world for n in (once.weights, once.gradients, once.optimizer)]
                cells = [*states, once.gathered, once.activations]
                less = sum(states) + twice.gathered + twice.activations
                told = ' | '.join(f'{n / 2**30:.2f}' for n in [*cells, sum(cells), less])
                print(f'| {size} | {world} | {once.params / 1e6:,.0f}M | {told} |', flush=True)


# A model whose work is worth sharing out, and small enough for two cores
RANKS = {
    **{'device': 'cpu', 'dtype': 'float32', 'compile': False, 'threads': 1, 'n_layer': 6, 'n_head': 8},
    **{'n_embd': 256, 'block_size': 256, 'batch_size': 4, 'gradient_accumulation_steps': 4},
    **{'max_iters': 12, 'warmup_iters': 2, 'eval_interval': 1000, 'eval_iters': 1, 'log_interval': 1},
}
# Runs a command where the loopback carries nothing else, and tells how many bytes it has carried
ALONE = """
import subprocess, sys
from pathlib import Path
subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
status = subprocess.run(sys.argv[1:]).returncode
line = next(l for l in Path('/proc/net/dev').read_text().splitlines() if l.strip().startswith('lo:'))
print('SENT', line.split()[9])
sys.exit(status)
"""


def random_tokens(folder: Path, vocab_size: int = 4096, n: int = 2_000_000):
    random = np.random.default_rng(0)
    for name, count in {'train': n, 'val': 20_000}.items():
        random.integers(0, vocab_size, count, np.uint16).tofile(folder / f'{name}.bin')


def train(n: int, folder: Path, **knobs) -> tuple[float, float, float]:
    """Train on n ranks -> seconds per step by the clock, processor seconds of all ranks, bytes sent."""
    flags = {
        **RANKS,
        **knobs,
        'dataset': folder,
        'vocab_size': 4096,
        'out_dir': folder / 'run',
        'overwrite': True,
    }
    command = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}'] if n else []
    command = [sys.executable, *command, 'train.py', *(f'--{name}={v}' for name, v in flags.items())]
    alone = ['unshare', '--net', sys.executable, '-c', ALONE]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*alone, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sent = int(done.stdout.split('SENT ')[1].split()[0])
    records = [json.loads(line) for line in (folder / 'run/metrics.jsonl').open(encoding='utf-8')]
    tokens = 4 * 4 * 256
    walls = [tokens / r['tokens_per_s'] for r in records if 'tokens_per_s' in r and r['iter'] > 2]
    return statistics.median(walls), cpu, sent


def per_step(n: int, folder: Path, **knobs) -> tuple[float, float, float]:
    """The same per step: the difference of a long run and a short one, without what a start costs."""
    short, long = (train(n, folder, max_iters=iters, **knobs) for iters in (4, 16))
    return long[0], (long[1] - short[1]) / 12, (long[2] - short[2]) / 12


def ranks():
    """The same total batch on 1, 2 and 4 ranks of two cores, one thread each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_tokens(folder)
        config = GPTConfig(n_layer=6, n_head=8, n_embd=256, block_size=256, vocab_size=4096)
        size = 4 * GPT(config, seed=0).num_params(non_embedding=False)
        print(f'load {os.getloadavg()[0]:.1f}; the model has {size / 2**20:.1f} MiB of weights in fp32')
        print('| ranks | | tokens/s | processor s per step | of 1 rank | MiB sent per step | of the model |')
        print('| --- ' * 7 + '|')
        base = None
        cases = [(0, 'one process', {}), (2, 'whole models', {}), (4, 'whole models', {})]
        cases += [(n, '--shard=true', {'shard': True}) for n in (2, 4)]
        cases += [(0, '--activation_checkpointing=true', {'activation_checkpointing': True})]
        for n, told, knobs in cases:
            wall, cpu, sent = per_step(n, folder, **knobs)
            base = base or cpu
            print(
                f'| {n or 1} | {told} | {4096 / wall:,.0f} | {cpu:.2f} | {cpu / base:.2f} '
                f'| {sent / 2**20:.1f} | {sent / size:.2f} |',
                flush=True,
            )


def overlap():
    """Start two ranks that each profile a step; rank 0 tells how much of the sums is hidden."""
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__, 'profile']
    subprocess.run([sys.executable, *command], check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})


def profiled():
    dist.init_process_group('gloo')
    k = Knobs(**{**RANKS, 'gradient_accumulation_steps': 2, 'warmup_iters': 0})
    config = GPTConfig(n_layer=6, n_head=8, n_embd=256, block_size=256, vocab_size=4096)
    group = Ranks(dist.get_rank(), dist.get_rank(), 2, ddp=True, on_host=2)
    model = GPT(config, seed=0)
    tokens = np.random.default_rng(0).integers(0, 4096, 100_000).astype(np.uint16)
    step = TrainingStep(k, group, model, make_optimizer(model, k, 'cpu'), tokens, 'cpu', 'float32')
    step.begin(0)
    for it in range(3):
        step.gradients(it)
        step.update(1e-3)
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        step.gradients(3)
    spans = {'sums': [], 'backward': []}
    for event in measured.events():
        span = event.time_range.start, event.time_range.end
        if event.name.startswith('gloo:all_reduce'):
            spans['sums'].append(span)
        elif event.name.startswith('autograd::engine::evaluate_function'):
            spans['backward'].append(span)
    if group.main:
        end = max(stop for _, stop in spans['backward'])
        largest = sorted(spans['sums'], key=lambda span: span[1] - span[0])[-8:]
        total = sum(stop - start for start, stop in largest)
        hidden = sum(max(0, min(stop, end) - start) for start, stop in largest)
        begin = min(start for start, _ in spans['backward'])
        print(
            f'load {os.getloadavg()[0]:.1f}; backward pass {(end - begin) / 1e3:.0f} ms; the sums over '
            f'ranks ({len(spans["sums"])} buckets) take {total / 1e3:.0f} ms, {hidden / total:.0%} of it'
        )
    dist.destroy_process_group()


def checkpoints():
    """Files as a run writes them: weights and AdamW's state in fp32; of 1B parameters the weights in bf16."""
    print(f'load {os.getloadavg()[0]:.1f}\n| parameters | file | training waits | save | load, verified |')
    print('| --- ' * 5 + '|')
    for params, dtype in (
        (10e6, torch.float32),
        (40e6, torch.float32),
        (124e6, torch.float32),
        (1e9, torch.bfloat16),
    ):
        rows = round(params / 16 / 1024)
        names = ['weight'] if dtype == torch.bfloat16 else ['weight', 'exp_avg', 'exp_avg_sq']
        tensors = {part: {str(i): torch.zeros(rows, 1024, dtype=dtype) for i in range(16)} for part in names}
        state = {
            'model': tensors.pop('weight'),
            'optimizer': tensors,
            'model_args': {},
            'iter': 1,
            'config': {},
        }
        state |= {'tokenizer': None, 'data_fingerprint': None}
        with tempfile.TemporaryDirectory() as folder:
            saver = checkpoint.Saver(folder)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                saver.save(state)
                waits = time.perf_counter() - start
                saver.wait()
                times.append((waits, time.perf_counter() - start))
            size = (Path(folder) / checkpoint.LAST).stat().st_size
            del state, tensors, saver
            start = time.perf_counter()
            checkpoint.load(Path(folder) / checkpoint.LAST)
            load = time.perf_counter() - start
        waits, save = (statistics.median(t) for t in zip(*times, strict=True))
        print(
            f'| {params / 1e6:,.0f}M {str(dtype)[6:]} | {size / 2**20:,.0f} MiB | {waits:.2f} s '
            f'| {save:.2f} s | {load:.2f} s |',
            flush=True,
        )


PARTS = {
    'memory': memory,
    'ranks': ranks,
    'overlap': overlap,
    'profile': profiled,
    'checkpoints': checkpoints,
}
if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        sys.exit(__doc__)
    PARTS[sys.argv[1]]()
