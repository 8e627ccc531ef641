"""Golden losses: hold a refactoring against the commit before it, bit for bit.

    python tests/golden.py --write=/tmp/golden.json        # on the commit before
    python tests/golden.py --check=/tmp/golden.json        # after each step; 1 if a number differs

Trains each arm for 20 steps in fp32 and in bf16, uncompiled, and keeps loss and gradient norm of every step
and both evaluations, as metrics.jsonl has them (all digits). The numbers belong to one machine and one
version of torch, so none are committed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    'vanilla': ['config/vanilla.py'],
    'reflex_422': ['config/reflex_422.py'],
    'skip_v1': ['config/skip_v1.py'],
    'value_residual': ['config/plans/value_residual.py', '--dropout=0.1'],
    'lime': ['config/plans/lime.py', '--norm=rmsnorm', '--mlp=swiglu', '--position=rotary', '--qk_norm=true'],
    'leap': ['config/leap.py', '--position=rotary', '--optimizer=muon'],
    'hierarchy': [
        'config/hierarchy/hierarchy_cpu.py',
        '--groups=8',
        '--latents=2',
        '--widths=32-64',
        '--latent_loss=0.1',
        '--channels=2',
        '--channel_every=2',
    ],
}
SMALL = (
    '--dataset=stdlib --device=cpu --compile=false --threads=1 --batch_size=4 --n_layer=6 --n_head=8 '
    '--n_embd=64 --block_size=64 --max_iters=20 --warmup_iters=5 --log_interval=1 --eval_interval=20 '
    '--eval_iters=2'
).split()
KEPT = ('iter', 'loss', 'grad_norm', 'lr', 'train/loss', 'val/loss')


def losses(arguments: list[str], dtype: str) -> list[dict]:
    """What one run logs, without its speed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, 'train.py', *arguments, *SMALL, f'--dtype={dtype}', f'--out_dir={folder}']
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'{" ".join(command)}\n{done.stderr}')
        lines = (Path(folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: r[k] for k in KEPT if k in r} for r in records if 'event' not in r]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--write', type=Path)
    parser.add_argument('--check', type=Path)
    parser.add_argument('--arms', default=','.join(ARMS))
    args = parser.parse_args()
    found = {
        f'{arm} {dtype}': losses(ARMS[arm], dtype)
        for arm in args.arms.split(',')
        for dtype in ('float32', 'bfloat16')
    }
    if args.write:
        args.write.write_text(json.dumps(found), encoding='utf-8')
        return 0
    wanted, failed = json.loads(args.check.read_text(encoding='utf-8')), 0
    for name, records in found.items():
        pairs = zip(records, wanted[name], strict=False)
        unlike = next((f'{a} for {b}' for a, b in pairs if a != b), '')
        unlike = unlike or ('another number of records' if len(records) != len(wanted[name]) else '')
        failed += bool(unlike)
        print(f'{name}: {unlike or "bit-identical"}', flush=True)
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
