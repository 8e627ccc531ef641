"""Train a GPT, or another model, on one device or several.

    python train.py config/reflex_422.py                                           # one process
    python train.py config/reflex_422.py config/sizes/size_cpu.py --max_iters=100  # in order; flags win
    torchrun --standalone --nproc_per_node=2 train.py config/reflex_422.py         # or more, --shard=true
    python train.py config/recipes/finetune_shakespeare.py --init_from=gpt2-medium # from GPT-2-shaped weights
    python train.py config/hierarchy.py                                            # another model
    python train.py --out_dir=out/reflex_422 --init_from=resume                    # after any interruption

Results: OUT_DIR/metrics.jsonl, run.json, last.pt, previous.pt and best.pt. The knobs, each with its default
and its meaning, are in runs/knobs.py; `--help` lists them.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from pathlib import Path

from configurator import check_command_line
from runs.knobs import Knobs

if __name__ == '__main__':
    check_command_line(Knobs, __doc__)  # before torch is imported, which takes seconds

import torch.distributed as dist

from runs import metrics, pretrained
from runs.console import Progress, say
from runs.diagnostics import SpikeWatch, stand_out
from runs.files import FileError
from runs.fsdp import check_sharding, placed
from runs.models import build, refuse_too_large
from runs.optimizer import make_optimizer
from runs.ranks import (
    Ranks,
    StopRequest,
    leave,
    main_rank_first,
    ranks,
    refuse_unlike_ranks,
    run_rank,
)
from runs.resume import Keeper, make_saver, restore
from runs.schedule import doubts, learning_rate_at
from runs.start import claimed, open_all, read_knobs
from runs.step import TrainingStep, accuracies, evaluate, share_of
from runs.system import set_up
from runs.text import print_sample


def main(argv: list[str]) -> int:
    """Refuse what can be refused before anything is built; then `train`."""
    # 1. Read the knobs, and refuse what cannot work.
    k, given, resume, there = read_knobs(argv, __doc__)
    group = ranks()
    device, dtype = set_up(k, group.local_rank)
    share_of(k, group)
    check_sharding(k, group, device, dtype)
    for doubt in doubts(k):
        say(f'warning: {doubt}')
    stop = StopRequest(group.torchrun, give_up_seconds=k.dist_timeout)

    with claimed(Path(k.out_dir), there, group):
        # 2. Open the data, and the checkpoint or the weights that the run begins with.
        with main_rank_first(group, k, device):
            k, data, config, state, source = open_all(k, given, resume, group)
            refuse_too_large(k, config, group, device, dtype)
        if group.ddp:
            refuse_unlike_ranks(k, data, state, device)
        return train(k, argv, group, stop, config, data, state, source, device, dtype)


def train(k: Knobs, argv, group: Ranks, stop: StopRequest, config, data, state, source, device, dtype) -> int:
    """Train; returns the exit status, or, as one rank of several, ends the process with it.

    state: of the checkpoint to go on from, or None; source: pretrained weights to begin with, or None.
    """
    # 3. Build the model and the optimizer.
    model = build(k, config)
    if source is not None:
        say(pretrained.begin_with(model, source, data))
    model = placed(model, k, group, device, dtype)
    optimizer = make_optimizer(model, k, device.split(':')[0])
    step = TrainingStep(k, group, model, optimizer, data.splits['train'], device, dtype)
    it, evaluated, best_val_loss, seconds, events = 0, False, math.inf, 0.0, []
    watches = {name: SpikeWatch() for name in ('loss', 'grad_norm')}

    # 4. Go on from the checkpoint, if there is one; open the run's record.
    resumed = state is not None
    if resumed:
        it, evaluated, best_val_loss, seconds, events = restore(state, step, data, watches)
    run = metrics.describe_run(k, argv, model, data, device, dtype, group.world)
    record = metrics.Record(group.main and not k.eval_only, k, run, it if resumed else None, events)
    speed = metrics.Speed(run, device, it, seconds)
    saver = make_saver(k, before=record.sync)
    keeper = Keeper(step, data, saver, last=it if resumed else None)
    say(metrics.headline(run, model, it if resumed else None, done=evaluated and it >= k.max_iters))

    # 5. The loop: evaluate, save, step, log.
    if not k.eval_only:
        step.begin(it)
    progress = Progress(k.max_iters, it, on=group.main)
    warmup = k.warmup_iters if k.decay_lr else 0  # values are not usual yet during the warm-up
    status = 'failed'
    stop.catch_signals()
    try:
        while True:
            done = it >= k.max_iters or k.eval_only
            fresh = best = False
            if (it % k.eval_interval == 0 or done) and not evaluated:
                losses = evaluate(step, data.splits, stop)
                if losses is None:
                    stop.agreed = True  # the resumed run evaluates here
                else:
                    found = accuracies(step, data.splits['val'])
                    told = f', accuracy {found["val/accuracy"]:.1%}' if found else ''
                    say(f'iter {it:>6}: train {losses["train"]:.4f}, val {losses["val"]:.4f}{told}')
                    keeper.refuse_losses(it, losses)
                    fresh, evaluated, best = True, True, losses['val'] < best_val_loss
                    best_val_loss = min(best_val_loss, losses['val'])
                    values = {'iter': it, 'train/loss': losses['train'], 'val/loss': losses['val']}
                    record.log(values | found, seconds)
            if keeper.due(it, fresh, end=done or stop.agreed):
                keeper.save(it, evaluated, best_val_loss, seconds, watches, best)
            if done or stop.agreed:
                break

            started = time.perf_counter()
            lr = learning_rate_at(it, k)
            stopping = bool(stop.reason) or saver.error is not None
            loss, grad_norm, stop.agreed = step.gradients(it, stopping)
            keeper.refuse_gradients(it, loss, grad_norm)
            step.update(lr)
            it, evaluated = it + 1, False
            seconds += time.perf_counter() - started
            progress.step()

            unusual = stand_out(watches, loss=loss, grad_norm=grad_norm)
            for name, value, usual in unusual if it > warmup else ():
                say(f'warning: iter {it}: {name} {value:.4g} stands out, {usual:.4g} is usual')
                record.event({'iter': it, 'event': 'spike', 'what': name, 'value': value, 'usual': usual})
            if it == 1 or it % k.log_interval == 0:
                values = {'iter': it, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm}
                values |= speed.read(it, seconds)
                record.log(values, seconds)
                progress.show(values, seconds)
        saver.wait()
        status = 'finished' if done and evaluated else 'stopped'
    except Exception:
        keeper.refuse_other_tokens()  # then that is the reason, whatever it led to
        raise
    finally:
        # 6. The end: the record is closed whatever happened. After a failure, which has its own message, what
        # goes wrong here is no news.
        progress.close()
        quietly = contextlib.suppress(*[FileError] * (status == 'failed'))
        with quietly:
            saver.wait(k.dist_timeout)
        with quietly:
            record.end(status, it, seconds, best_val_loss, device)
        stop.release_signals()
    if status == 'stopped':
        say(f'stopped by {stop.reason or "another rank"} at iteration {it}; go on with --init_from=resume')
    elif k.sample_tokens and group.main and data.tokenizer_spec:
        say(f'--- a sample of {k.sample_tokens} tokens (more: python sample.py --out_dir={k.out_dir})')
        print_sample(model, data, k, device)
    if group.ddp:
        dist.destroy_process_group()
        leave(0)
    return 0


if __name__ == '__main__':
    run_rank(main, sys.argv[1:])
