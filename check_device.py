"""Does this device compute what it should? Each part against its reference, within two minutes on a GPU.

    python check_device.py                             # on a GPU if there is one
    python check_device.py --size=tiny --device=cpu    # the same checks in small, to see that they run

Compiled against eager, bf16 against fp32, tokens with a cache and with captured steps against those without,
the loss and its gradients against float64; and whole runs: one rank of DDP, resuming, fp16 with its scaler,
LEAP, the hierarchy. Prints a table, writes JSON; the exit status is 1 if a check failed. A check that cannot
be made here is told as left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from decoding import Decoder
from layers import loss
from model import GPT, GPTConfig
from runs import metrics
from runs.system import autocast_for, pick_device, pick_dtype

ROOT = Path(__file__).resolve().parent
SIZES = {
    'device': {'n_layer': 6, 'n_head': 8, 'n_embd': 512, 'block_size': 512, 'vocab_size': 50304},
    'tiny': {'n_layer': 4, 'n_head': 8, 'n_embd': 32, 'block_size': 48, 'vocab_size': 512},
}
PLANS = ('vanilla', 'reflex(4-2-2)', 'reflex_all', 'layer0(8/4-4)', 'value_residual')
STEPS = 6  # of a whole run
RUNS = {
    'straight': [],
    'first half': ['--max_iters=3'],
    'one rank of DDP': [],
    'fp16 with its scaler': ['--dtype=float16'],
    'LEAP': ['--attention=leap'],
    'hierarchy': (
        'config/hierarchy/hierarchy_cpu.py --block_size=32 --groups=4 --latents=2 --widths=32-64'
    ).split(),
}


class LeftOut(Exception):
    """Why a check cannot be made here."""


def model_of(args, attention='reflex(4-2-2)', **changes) -> GPT:
    model = GPT(GPTConfig(**{**SIZES[args.size], 'attention': attention, **changes}), seed=1)
    with torch.no_grad():
        for p in model.parameters():  # far from its start, where all tokens are nearly alike
            if p.dim() > 1:
                p.mul_(3)
    return model.to(args.device)


def tokens_of(args, B: int, T: int):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SIZES[args.size]['vocab_size'], (B, T), generator=generator).to(args.device)


def apart(a, b) -> float:
    """How far tensors a are from b, as a part of b's size."""
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (a, b))
    return ((a - b).norm() / b.norm()).item()


def loss_and_gradients(model, forward, idx, autocast):
    with autocast:
        value = forward(idx[:, :-1], idx[:, 1:].contiguous())[1]
    return [value, *torch.autograd.grad(value, list(model.parameters()))]


def check_compiled(args):
    """Loss and gradients, in the device's type: no further from eager ones in fp32 than eager ones are."""
    model, idx = model_of(args), tokens_of(args, 4, 33 if args.size == 'tiny' else 513)
    exact = loss_and_gradients(model, model, idx, contextlib.nullcontext())
    eager = loss_and_gradients(model, model, idx, autocast_for(args.device, args.dtype))
    compiled = torch.compile(model, backend=args.backend)
    found = loss_and_gradients(model, compiled, idx, autocast_for(args.device, args.dtype))
    return apart(found, exact), 1.5 * apart(eager, exact) + 1e-4


def check_low_precision(args):
    """The loss in the device's type against fp32, in nats."""
    model, idx = model_of(args), tokens_of(args, 4, 33 if args.size == 'tiny' else 513)
    low = loss_and_gradients(model, model, idx, autocast_for(args.device, args.dtype))[0]
    exact = loss_and_gradients(model, model, idx, contextlib.nullcontext())[0]
    return abs(low - exact).item(), 0.02


def check_tokens(args):
    """Greedy tokens in fp64, of each plan: with a cache, and by steps of fixed shapes (captured on CUDA),
    past the end of the context; how many differ from those that are drawn without a cache."""
    differ, size = 0, 40 if args.size == 'tiny' else 300
    for attention in PLANS:
        model = model_of(args, attention, block_size=size).double().eval()
        idx = tokens_of(args, 2, size - 20)
        wanted = model.generate(idx, 40, temperature=0, use_cache=False)
        decoder = Decoder(model, 2)
        for own in ({}, {'decoder': decoder}, {'decoder': decoder}):
            differ += int((model.generate(idx, 40, temperature=0, **own) != wanted).sum())
        told_of_graphs(args, decoder)
    return differ, 0


def check_drawn(args):
    """Tokens drawn at temperature 1 by the same random numbers, in fp64; how many differ."""
    model, idx, drawn = model_of(args).double().eval(), tokens_of(args, 3, 10), []
    decoder = Decoder(model, 3)
    for own in ({'use_cache': False}, {'decoder': decoder}):
        generator = torch.Generator(args.device).manual_seed(5)
        drawn.append(model.generate(idx, 30, top_k=50, top_p=0.9, generator=generator, **own))
    told_of_graphs(args, decoder)
    return int((drawn[0] != drawn[1]).sum()), 0


def told_of_graphs(args, decoder):
    if args.device.startswith('cuda') and (not decoder.graphs or None in decoder.graphs.values()):
        raise RuntimeError('no CUDA graph of the step was captured')


def check_steps_in_low_precision(args):
    """Logits of a step, the weights cast once: no further from fp32 than those of a whole pass are."""
    model, idx = model_of(args).eval(), tokens_of(args, 2, 30)
    with torch.no_grad():
        exact = model.logits(model.hidden(idx)[:, -1:])[:, 0].float()
        with autocast_for(args.device, args.dtype):
            whole = model.logits(model.hidden(idx)[:, -1:])[:, 0].float()
            decoder = Decoder(model, 2)
            model.hidden(idx[:, :-1], decoder.cache)
            found = decoder.step(idx[:, -1:], 29)
    return apart([found], [exact]), 1.5 * apart([whole], [exact]) + 1e-4


def check_loss(args):
    """The loss of the head and its gradients, as training makes them here, in chunks, against float64."""
    V, generator = SIZES[args.size]['vocab_size'], torch.Generator().manual_seed(2)
    hidden = torch.randn(500, 64, generator=generator).to(args.device).requires_grad_()
    weight = (torch.randn(V, 64, generator=generator) / 3).to(args.device).requires_grad_()
    targets = torch.randint(V, (500,), generator=generator).to(args.device)
    targets[7:50] = -1

    def run(dtype, **how):
        with autocast_for(args.device, dtype):
            value = loss.linear_cross_entropy(hidden, weight, targets, **how)
        return [value, *torch.autograd.grad(value, (hidden, weight))]

    of_double = torch.nn.functional.linear(hidden.double(), weight.double())
    exact = torch.nn.functional.cross_entropy(of_double, targets, ignore_index=-1)
    exact = [exact, *torch.autograd.grad(exact, (hidden, weight))]
    plain, found = run(args.dtype, rows=500), run(args.dtype, rows=128)
    worst = max(apart([a], [c]) - 1.5 * apart([b], [c]) for a, b, c in zip(found, plain, exact, strict=True))
    return max(0.0, worst), 1e-3


# ---- whole runs, all at once, each in a process of its own


def write_data(folder: Path):
    random = np.random.default_rng(0)
    for name, n in (('train', 20_000), ('val', 4_000)):
        (random.integers(0, 5, n).cumsum() % 64).astype('<u2').tofile(folder / f'{name}.bin')


def start_runs(args, folder: Path) -> dict[str, subprocess.Popen]:
    """Each of RUNS under way; what they print goes to files beside their folders."""
    write_data(folder)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = str(s.getsockname()[1])
    alone = {
        'RANK': '0',
        'LOCAL_RANK': '0',
        'WORLD_SIZE': '1',
        'MASTER_ADDR': 'localhost',
        'MASTER_PORT': port,
    }
    names = [name for name in RUNS if wanted(args, of_run(name))]
    return {
        name: start_run(args, folder, name, RUNS[name], alone if 'DDP' in name else {})
        for name in names
        if args.device.startswith('cuda') or 'fp16' not in name
    }


def of_run(name: str) -> str:
    """The check that a run belongs to."""
    return 'resuming' if name == 'first half' else name


def start_run(args, folder: Path, name: str, own: list[str], environment=()) -> subprocess.Popen:
    small = (
        '--n_layer=4 --n_head=8 --n_embd=64 --block_size=32 --attention=reflex(4-2-2) --batch_size=4 '
        f'--vocab_size=64 --max_iters={STEPS} --lr_decay_iters={STEPS} --warmup_iters=2 --eval_interval=3 '
        '--eval_iters=2 --log_interval=1 --learning_rate=1e-2 --compile=false --deterministic=true '
        '--threads=1'
    ).split()
    configs = [word for word in own if word.endswith('.py')]
    flags = [word for word in own if not word.endswith('.py')]
    out = folder / name.replace(' ', '-')
    command = [sys.executable, 'train.py', *configs, *small, f'--dataset={folder}', f'--out_dir={out}']
    command += [f'--device={args.device}', f'--dtype={args.dtype}', *flags]
    log = (folder / f'{out.name}.log').open('a')
    settings = {**os.environ, 'CUBLAS_WORKSPACE_CONFIG': ':4096:8', **dict(environment)}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=settings)


def finished(args, folder: Path, name: str, process: subprocess.Popen) -> Path:
    """The folder of a run that has ended well."""
    out = folder / name.replace(' ', '-')
    if process.wait(timeout=max(1, args.until - time.monotonic())):
        raise RuntimeError((folder / f'{out.name}.log').read_text(encoding='utf-8')[-400:])
    return out


def losses(out: Path) -> list[float]:
    lines = (out / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [record['loss'] for record in map(json.loads, lines) if 'loss' in record]


def weights(out: Path) -> list:
    saved = torch.load(out / 'last.pt', map_location='cpu', weights_only=True)['model']
    return [value for value in saved.values() if torch.is_tensor(value)]


def check_resume(args, folder, running):
    """How many numbers of the weights differ after a run that stopped half way, and one that did not."""
    straight = finished(args, folder, 'straight', running['straight'])
    finished(args, folder, 'first half', running['first half'])
    again = ['--init_from=resume', f'--max_iters={STEPS}']
    out = finished(args, folder, 'first half', start_run(args, folder, 'first half', again))
    pairs = zip(weights(out), weights(straight), strict=True)
    return sum(int((a != b).sum()) for a, b in pairs), 0


def check_ddp(args, folder, running):
    """The largest difference of a loss from that of a run without DDP."""
    straight = losses(finished(args, folder, 'straight', running['straight']))
    ddp = losses(finished(args, folder, 'one rank of DDP', running['one rank of DDP']))
    return max(abs(a - b) for a, b in zip(ddp, straight, strict=True)), 1e-3


def check_run(name):
    def check(args, folder, running):
        """The last loss less the first one."""
        if name not in running:
            raise LeftOut('fp16 needs CUDA')
        found = losses(finished(args, folder, name, running[name]))
        return found[-1] - found[0], -0.01

    return check


COMPUTED = {
    'tokens with a cache and by steps': check_tokens,
    'drawn tokens by steps': check_drawn,
    'steps in low precision': check_steps_in_low_precision,
    'loss and gradients in chunks': check_loss,
    'low precision': check_low_precision,
    'compiled': check_compiled,
}
TRAINED = {
    'resuming': check_resume,
    'one rank of DDP': check_ddp,
    **{name: check_run(name) for name in ('fp16 with its scaler', 'LEAP', 'hierarchy')},
}


def wanted(args, name: str) -> bool:
    needs = {'straight': ('resuming', 'one rank of DDP')}.get(name, (name,))
    return not args.only or any(part in need for part in args.only.split(',') for need in needs)


def judged(name: str, args, check, *more) -> dict:
    """What came of one check: the number found, the largest one allowed, and whether it holds."""
    began = time.monotonic()
    if began > args.until:
        return {'left out': f'the {args.seconds:g} seconds were over'}
    try:
        found, most = check(args, *more)
    except LeftOut as e:
        return {'left out': str(e)}
    except Exception as e:  # a check that breaks is a result, and the others go on
        return {'passed': False, 'error': f'{type(e).__name__}: {e}'[:400]}
    return {'passed': found <= most, 'found': found, 'allowed': most, 'seconds': time.monotonic() - began}


def all_checks(args) -> dict[str, dict]:
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = start_runs(args, folder)
        try:
            for name, check in COMPUTED.items():
                if wanted(args, name):
                    rows[name] = judged(name, args, check)
                    print(line(name, rows[name]), flush=True)
            for name, check in TRAINED.items():
                if wanted(args, name):
                    rows[name] = judged(name, args, check, folder, running)
                    print(line(name, rows[name]), flush=True)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    return rows


def line(name: str, row: dict) -> str:
    if 'left out' in row:
        return f'| {name} | left out | {row["left out"]} |'
    told = row.get('error') or f'{row["found"]:.3g}, at most {row["allowed"]:.3g}'
    return f'| {name} | {"passed" if row["passed"] else "FAILED"} | {" ".join(told.split())} |'


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--device', default='auto')
    parser.add_argument('--dtype', default='auto', help='the low precision (default: of the device)')
    parser.add_argument('--size', choices=SIZES, default='device')
    parser.add_argument('--only', default='', help='parts of names of checks, joined by commas')
    parser.add_argument(
        '--seconds', type=float, default=120.0, help='checks that would begin later are left out'
    )
    parser.add_argument('--backend', default='inductor', help='of torch.compile')
    parser.add_argument('--out', type=Path, help='JSON; results/bench/check-CARD.json, out/bench on a CPU')
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    args.until = time.monotonic() + args.seconds
    torch.set_float32_matmul_precision('highest')  # fp32 is the reference here
    card = metrics.device_name(args.device)
    print(f'{card}, {args.dtype}\n\n| check | | |\n| --- | --- | --- |')
    rows = all_checks(args)
    if not args.out:
        kept = 'results' if args.device.startswith('cuda') else 'out'
        slug = re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')
        args.out = ROOT / kept / 'bench' / f'check-{slug}.json'
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {'device': {'name': card, 'dtype': args.dtype}, 'size': args.size, 'commit': metrics.commit()}
    result |= {'versions': metrics.versions(), 'checks': rows}
    args.out.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    failed = [name for name, row in rows.items() if not row.get('passed', True)]
    print(
        f'\n{len(rows) - len(failed)} of {len(rows)} without a failure'
        + f': {", ".join(failed)}' * bool(failed)
    )
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
