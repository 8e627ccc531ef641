"""Break the core one line at a time, and tell which breaks no test notices.

    python tests/mutate.py                   # all of them: half an hour on one core
    python tests/mutate.py --only=schedule   # those whose file or text has this in it
    python tests/mutate.py --list            # name them, run nothing

A mutant is one line of the source, replaced by a plausible mistake. It is made in a copy of the checkout, and
the tests that are about that file run there: they must fail. A mutant that survives is a behaviour that no
test holds: write the test. One whose line is not found any more is stale: replace it. The status is 1 where
one survives or is stale. This is no part of the suite.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = shutil.ignore_patterns('.git', 'out', '__pycache__', '.pytest_cache', '.ruff_cache', 'openwebtext')

STEP = ('tests/test_step.py',)
RUNS = (*STEP, 'tests/test_reliability.py')
SPEED = ('tests/test_speed.py',)
LOSS = ('tests/test_loss.py',)
MODEL = ('tests/test_model.py',)
EVAL = ('tests/test_eval.py',)


class Mutant(NamedTuple):
    file: str
    line: str  # occurs once in the file
    broken: str
    tests: tuple


MUTANTS = [
    # the loop
    Mutant('train.py', '% k.eval_interval == 0 or done)', '% k.eval_interval == 0)', RUNS),
    Mutant('train.py', 'min(best_val_loss, losses[', 'max(0.0, losses[', RUNS),
    Mutant('train.py', "losses['val'] < best_val_loss", 'True', RUNS),
    Mutant('train.py', 'or saver.error is not None', '', RUNS),
    Mutant('train.py', 'lr = learning_rate_at(it, k)', 'lr = learning_rate_at(it + 1, k)', RUNS),
    Mutant('train.py', 'step.update(lr)', 'step.update(k.learning_rate)', RUNS),
    Mutant('train.py', 'unusual if it > warmup else ()', 'unusual', RUNS),
    Mutant('runs/resume.py', 'self.step.finite(loss, grad_norm)', 'math.isfinite(loss)', RUNS),
    # the schedule
    Mutant(
        'runs/schedule.py', 'k.min_lr + left * (k.learning_rate - k.min_lr)', 'left * k.learning_rate', STEP
    ),
    Mutant('runs/schedule.py', 'if it < k.warmup_iters:', 'if it < 0:', STEP),
    Mutant('runs/schedule.py', 'k.lr_decay_iters or k.max_iters\n    if it', 'k.max_iters\n    if it', STEP),
    Mutant('runs/schedule.py', '(it + 1) / (k.warmup_iters + 1)', 'it / k.warmup_iters', STEP),
    # the step
    Mutant('runs/step.py', 'if self.k.grad_clip:', 'if False:', STEP),
    Mutant('runs/step.py', 'scale(loss / self.divisor)', 'scale(loss)', STEP),
    Mutant('runs/step.py', "lr * group.get('lr_ratio', 1.0)", 'lr', STEP),
    Mutant('runs/step.py', 'torch.manual_seed(self.dropout_seed(it, j))', 'pass', RUNS),
    Mutant('runs/step.py', 'else self.fetch(it + 1, 0)', 'else self.fetch(it, 0)', RUNS),
    Mutant('runs/step.py', 'slice(k.batch_size * rank // world,', 'slice(0,', STEP),
    Mutant('runs/step.py', 'y.to(device))[1] * counts[i]', 'y.to(device))[1]', RUNS),
    Mutant('runs/step.py', '    step.compiled.eval()\n', '', RUNS),
    Mutant('runs/step.py', '    step.compiled.train()\n', '', RUNS),
    # the optimizers
    Mutant(
        'runs/optimizer.py',
        "p.mul_(1 - lr * group['weight_decay'])",
        "p.mul_(1 - group['weight_decay'])",
        SPEED,
    ),
    Mutant('runs/optimizer.py', 'alpha=-0.2 * lr', 'alpha=-lr', SPEED),
    Mutant('runs/optimizer.py', "matrix_blocks(model) if k.muon_qkv == 'apart' else {}", '{}', SPEED),
    Mutant('runs/optimizer.py', "{**saved, 'param_groups': groups}", 'saved', RUNS),
    Mutant('model.py', 'if p.dim() >= 2]', 'if p.dim() >= 1]', STEP),
    # checkpoints
    Mutant(
        'runs/checkpoint.py',
        '            torch.save(state, f)\n            f.flush()\n            os.fsync(f.fileno())',
        '            torch.save(state, f)',
        RUNS,
    ),
    Mutant('runs/checkpoint.py', 'if (out_dir / LAST).exists():', 'if False:', RUNS),
    Mutant('runs/checkpoint.py', '        if best:\n', '        if False:\n', RUNS),
    Mutant('runs/checkpoint.py', 'broken = z.testzip()', 'broken = None', RUNS),
    Mutant(
        'runs/checkpoint.py',
        'used[key] = here.copy_(x.detach(), non_blocking=x.is_cuda)',
        'used[key] = x.detach()',
        RUNS,
    ),
    Mutant('runs/checkpoint.py', 'self.before()', 'pass', RUNS),
    # the record
    Mutant('runs/metrics.py', "record['iter'] <= resume_iter", "record['iter'] < resume_iter", RUNS),
    Mutant('runs/metrics.py', '(it - self.it) * self.tokens_per_step', 'it * self.tokens_per_step', SPEED),
    Mutant('runs/metrics.py', 'None if isinstance(v, float) and not math.isfinite(v) else v', 'v', RUNS),
    # going on
    Mutant('runs/resume.py', "state['evaluated'] and not k.eval_only", 'False', RUNS),
    Mutant('runs/resume.py', '        best_val_loss = math.inf\n', '', RUNS),
    Mutant(
        'runs/resume.py',
        "        watches[name] = SpikeWatch(**state['watches'][name])",
        '        SpikeWatch()',
        RUNS,
    ),
    # the loss
    Mutant('layers/loss.py', '.masked_fill(~keep, 0).sum()', '.sum()', LOSS),
    Mutant('layers/loss.py', '= (d_logits @ w) * keep', '= d_logits @ w', LOSS),
    Mutant('layers/loss.py', 'return total / count,', 'return total / len(hidden),', LOSS),
    # layers
    Mutant('layers/plans.py', 'return [l - lag for', 'return [l - max(0, lag - 1) for', MODEL),
    Mutant('model.py', 'causal = mask is None and T > 1', 'causal = mask is None and T > 2', SPEED),
    Mutant('model.py', '0.02 / math.sqrt(2 * self.config.n_layer)', '0.02', MODEL),
    # data and evaluation
    Mutant(
        'data/tokendata.py',
        'n_tokens - block_size)).astype',
        'n_tokens - block_size - 1)).astype',
        ('tests/test_tokendata.py',),
    ),
    Mutant('eval.py', ': model.config.vocab_used or None]', ':]', EVAL),
    Mutant('eval.py', 'total + mean.item() * n', 'total + mean.item()', EVAL),
    Mutant('harness.py', 'if not continuation_ids:', 'if False:', EVAL),
]


def outcome(mutant: Mutant, copy: Path) -> str:
    """What the tests of the copy make of the mutant: 'killed', 'SURVIVES' or 'STALE'."""
    path = copy / mutant.file
    source = path.read_text(encoding='utf-8')
    if source.count(mutant.line) != 1:
        return 'STALE'
    path.write_text(source.replace(mutant.line, mutant.broken), encoding='utf-8')
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *mutant.tests]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    try:
        done = subprocess.run(
            command, cwd=copy, capture_output=True, env=environment, timeout=900, check=False
        )
        return 'SURVIVES' if done.returncode == 0 else 'killed'
    except subprocess.TimeoutExpired:
        return 'killed'
    finally:
        path.write_text(source, encoding='utf-8')


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--only', default='')
    parser.add_argument('--list', action='store_true')
    options = parser.parse_args(argv)
    wanted = [m for m in MUTANTS if options.only in f'{m.file}: {m.line}']
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'copy'
        if not options.list:
            shutil.copytree(ROOT, copy, ignore=COPIED)
        for mutant in wanted:
            began = time.monotonic()
            found = 'listed' if options.list else outcome(mutant, copy)
            bad += found in ('SURVIVES', 'STALE')
            seconds = time.monotonic() - began
            shown = f'{" ".join(mutant.line.split())}  ->  {" ".join(mutant.broken.split()) or "(nothing)"}'
            print(f'{found:<8} {seconds:4.0f} s  {mutant.file}: {shown}', flush=True)
    print(f'{len(wanted)} mutants, {bad} of them survive or are stale')
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
