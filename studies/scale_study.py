"""The figures of docs/clusters.md: memory per GPU, what ranks cost, what a checkpoint costs.

    python studies/scale_study.py memory       # models of 124M to 7B on 1, 8 and 64 GPUs, on the meta device
    python studies/scale_study.py ranks        # 1, 2 and 4 ranks of the same total batch: time and bytes sent
    python studies/scale_study.py overlap      # how much of the sums over ranks a backward pass hides
    python studies/scale_study.py checkpoints  # time to save and to load, against size

Prints Markdown. `ranks` counts bytes on the loopback of a network namespace of its own, which takes root.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
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
from runs.fsdp import placed
from runs.knobs import Knobs, model_config
from runs.memory import needs
from runs.optimizer import make_optimizer
from runs.ranks import Ranks
from runs.step import TrainingStep

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


# A model whose work is worth sharing out, and small enough for two cores: 1,024 tokens per step
WORK = Knobs(
    **{'device': 'cpu', 'compile': False, 'n_layer': 6, 'n_head': 8, 'n_embd': 256, 'block_size': 128},
    **{'batch_size': 2, 'gradient_accumulation_steps': 4, 'warmup_iters': 0},
)
CONFIG = GPTConfig(n_layer=6, n_head=8, n_embd=256, block_size=128, vocab_size=4096)
STEPS = 5  # that are measured, after two others


def training_step(k: Knobs, group: Ranks) -> TrainingStep:
    model = placed(GPT(CONFIG, seed=0), k, group, 'cpu', 'float32')
    tokens = np.random.default_rng(0).integers(0, 4096, 100_000).astype(np.uint16)
    return TrainingStep(k, group, model, make_optimizer(model, k, 'cpu'), tokens, 'cpu', 'float32')


def sent() -> int:
    """Bytes that the loopback of this network namespace has carried."""
    lines = Path('/proc/net/dev').read_text(encoding='ascii').splitlines()
    return int(next(line for line in lines if line.strip().startswith('lo:')).split()[9])


def rank_of(rank: int, n: int, knobs: dict, port: int, results):
    """Train as one rank of n, and put (seconds, processor seconds, bytes sent) of the steps into results."""
    torch.set_num_threads(1)
    k, group = replace(WORK, **knobs), Ranks()
    if n > 1:
        os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'GLOO_SOCKET_IFNAME': 'lo'}
        dist.init_process_group('gloo', rank=rank, world_size=n)
        group = Ranks(rank, rank, n, ddp=True, on_host=n)
    step = training_step(k, group)
    step.begin(0)
    for it in range(STEPS + 2):
        if it == 2:
            if n > 1:
                dist.barrier()
            begin = time.perf_counter(), time.process_time(), sent()
        step.gradients(it)
        step.update(1e-3)
    if n > 1:
        dist.barrier()
    end = time.perf_counter(), time.process_time(), sent()
    results.put([(b - a) / STEPS for a, b in zip(begin, end, strict=True)])
    if n > 1:
        dist.barrier()  # nobody leaves while another one reads
    os._exit(0)


def ranks():
    """The same total batch on 1, 2 and 4 ranks of two cores, one thread each."""
    if 'ALONE' not in os.environ:  # in a network of its own, which carries nothing else
        command = f'ip link set lo up && exec {shlex.join([sys.executable, *sys.argv])}'
        environment = os.environ | {'ALONE': '1'}
        subprocess.run(['unshare', '--net', 'bash', '-c', command], env=environment, check=True)
        return
    torch.set_num_threads(1)
    with torch.device('meta'):
        size = 4 * GPT(CONFIG, seed=0).num_params(non_embedding=False)
    print(f'load {os.getloadavg()[0]:.1f}; the model has {size / 2**20:.1f} MiB of weights in fp32')
    print('| ranks | | tokens/s | processor s per step | of 1 rank | MiB sent per step | of the model |')
    print('| --- ' * 7 + '|')
    cases = [
        (1, 'one process', {}),
        (1, '--activation_checkpointing=true', {'activation_checkpointing': True}),
    ]
    cases += [(n, 'whole models', {}) for n in (2, 4)] + [
        (n, '--shard=true', {'shard': True}) for n in (2, 4)
    ]
    base, forks = None, multiprocessing.get_context('fork')
    for i, (n, told, knobs) in enumerate(cases):
        results = forks.SimpleQueue()  # which writes at once
        own = [forks.Process(target=rank_of, args=(r, n, knobs, 29400 + i, results)) for r in range(n)]
        for process in own:
            process.start()
        found = [results.get() for _ in own]
        for process in own:
            process.join()
        wall, cpu = max(f[0] for f in found), sum(f[1] for f in found)
        out = max(f[2] for f in found)
        base = base or cpu
        print(
            f'| {n} | {told} | {1024 / wall:,.0f} | {cpu:.2f} | {cpu / base:.2f} | {out / 2**20:.1f} '
            f'| {out / size:.2f} |',
            flush=True,
        )


def overlap():
    """Start two ranks that each profile a step; rank 0 tells how much of the sums is hidden."""
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__, 'profile']
    subprocess.run([sys.executable, *command], check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})


def profiled():
    dist.init_process_group('gloo')
    group = Ranks(dist.get_rank(), dist.get_rank(), 2, ddp=True, on_host=2)
    step = training_step(replace(WORK, gradient_accumulation_steps=2), group)
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
        times = f'backward pass {(end - begin) / 1e3:.0f} ms, sums over ranks {total / 1e3:.0f} ms'
        during = f'in {len(spans["sums"])} buckets, {hidden / total:.0%} of it during the backward pass'
        print(f'load {os.getloadavg()[0]:.1f}; {times}, {during}')
    dist.destroy_process_group()


CHECKPOINTS = {10e6: torch.float32, 40e6: torch.float32, 124e6: torch.float32, 1e9: torch.bfloat16}


def checkpoints():
    """Files as a run writes them: weights and AdamW's state in fp32; of 1B parameters the weights in bf16."""
    print(f'load {os.getloadavg()[0]:.1f}\n| parameters | file | training waits | save | load, verified |')
    print('| --- ' * 5 + '|')
    for params, dtype in CHECKPOINTS.items():
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
