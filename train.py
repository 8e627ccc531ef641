"""Train a GPT, or another model, on one device or several.

    python train.py config/reflex_422.py                                     # one process
    python train.py config/reflex_422.py config/size_cpu.py --max_iters=100  # configs in order, flags win
    torchrun --standalone --nproc_per_node=2 train.py config/reflex_422.py   # several ranks, one host
    python train.py config/finetune_shakespeare.py --init_from=gpt2-medium   # from GPT-2-shaped weights
    python train.py config/hierarchy.py                                      # another model
    python train.py --out_dir=out/reflex_422 --init_from=resume              # go on after any interruption

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
from runs.knobs import STARTS, Knobs, model_config

if __name__ == '__main__':
    check_command_line(Knobs, __doc__)  # before torch is imported, which takes seconds

import torch.distributed as dist

from data.tokendata import open_data
from runs import checkpoint, metrics, pretrained
from runs.console import Progress, say
from runs.datasets import data_folder, prepare_stdlib
from runs.diagnostics import SpikeWatch, finite, stand_out
from runs.files import FileError
from runs.models import build
from runs.optimizer import make_optimizer
from runs.ranks import (
    Ranks,
    StopRequest,
    TrainingError,
    leave,
    main_rank_first,
    ranks,
    refuse_unlike_ranks,
    run_rank,
)
from runs.resume import refuse_other_run, restore, snapshot
from runs.schedule import learning_rate_at
from runs.start import claimed, pretrained_knobs, read_knobs
from runs.step import TrainingStep, evaluate, share_of
from runs.system import set_up
from runs.text import print_sample


def main(argv: list[str]) -> int:
    """Everything that can be refused, before anything is built; then `train`."""
    # 1. Read the knobs, and refuse what cannot work.
    k, given, resume, there = read_knobs(argv, __doc__)
    out_dir, group = Path(k.out_dir), ranks()
    device, dtype = set_up(k, group.local_rank)
    share_of(k, group)
    stop = StopRequest(group.torchrun, give_up_seconds=k.dist_timeout)

    with claimed(out_dir, there, group):
        # 2. Open the data, and the checkpoint or the weights that the run begins with.
        with main_rank_first(group, k, device):
            state, source = None, None
            if resume:
                state = checkpoint.load_folder(out_dir)
            elif k.init_from not in STARTS:
                source = pretrained.read(k.init_from)
                k = pretrained_knobs(k, given, source.config)
            folder = data_folder(k.dataset)
            if group.main:
                prepare_stdlib(folder)
            data = open_data(folder, k.block_size, k.vocab_size or None, verify=group.main)
            vocab_size = -(-data.vocab_size // 64) * 64  # a multiple of 64 is faster; padding is never drawn
            config = model_config(k, vocab_size, data.vocab_size)
            if state is not None and group.main:
                refuse_other_run(state, data, k, config)
        if group.ddp:
            refuse_unlike_ranks(k, data, state, device)
        return train(k, argv, group, stop, config, data, state, source, device, dtype)


def train(k: Knobs, argv, group: Ranks, stop: StopRequest, config, data, state, source, device, dtype) -> int:
    """Train; returns the exit status, or, as one rank of several, ends the process with it.

    state: of the checkpoint to go on from, or None; source: pretrained weights to begin with, or None.
    """
    # 3. Build the model and the optimizer.
    model = build(k, config).to(device)
    if source is not None:
        say(pretrained.begin_with(model, source, data))
    optimizer = make_optimizer(model, k, device.split(':')[0])
    step = TrainingStep(k, group, model, optimizer, data.splits['train'], device, dtype)
    it, evaluated, best_val_loss, seconds = 0, False, math.inf, 0.0
    watches = {name: SpikeWatch() for name in ('loss', 'grad_norm')}

    # 4. Go on from the checkpoint, if there is one.
    out_dir, resumed = Path(k.out_dir), state is not None
    if resumed:
        it, evaluated, best_val_loss, seconds = restore(state, step, watches)
    run = metrics.describe_run(k, argv, model, data, device, dtype, group.world)
    record = metrics.Record(group.main and not k.eval_only, k, run, resume_iter=it if resumed else None)
    saver = checkpoint.Saver(out_dir, before=record.sync)
    speed = metrics.Speed(run, device, it, seconds)
    last_save, last_save_time = it if resumed else None, time.monotonic()
    say(
        f'{out_dir}: {model.summary()}; {run["tokens_per_step"]:,} tokens per step; {device} {dtype}, '
        f'{group.world} rank{"s" * (group.world > 1)}{f"; from iteration {it}" if resumed else ""}'
    )
    if resumed and evaluated and it >= k.max_iters:
        say(f'all {k.max_iters} iterations of this run are done: a higher --max_iters goes on')

    def save(best: bool = False):
        nonlocal last_save, last_save_time
        if not finite(model):
            raise TrainingError(
                f'iteration {it}: the last update made weights inf or nan; they were not saved. {go_back()}'
            )
        if group.main:
            saver.save(snapshot(step, data, it, evaluated, best_val_loss, seconds, watches), best)
        last_save, last_save_time = it, time.monotonic()

    def go_back() -> str:
        last = f'{out_dir / checkpoint.LAST} is of iteration {last_save}'
        last = 'Nothing was saved yet' if last_save is None else last
        return f'{last}; a lower learning_rate or a longer warm-up is the usual fix'

    # 5. The loop: evaluate, save, step, log.
    if not k.eval_only:
        step.begin(it)
    progress = Progress(k.max_iters, it, on=group.main)
    status = 'failed'
    stop.catch_signals()
    try:
        while True:
            done = it >= k.max_iters or k.eval_only
            if (it % k.eval_interval == 0 or done) and not evaluated:
                losses = evaluate(step, data.splits, stop)
                if losses is None:
                    stop.agreed = True  # the resumed run evaluates here
                else:
                    say(f'iter {it:>6}: train {losses["train"]:.4f}, val {losses["val"]:.4f}')
                    if not all(map(math.isfinite, losses.values())):
                        raise TrainingError(f'iteration {it}: the evaluation gives {losses}. {go_back()}')
                    best, evaluated = losses['val'] < best_val_loss, True
                    best_val_loss = min(best_val_loss, losses['val'])
                    values = {'iter': it, 'train/loss': losses['train'], 'val/loss': losses['val']}
                    record.log(values, seconds)
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
            stopping = bool(stop.reason) or saver.error is not None
            loss, grad_norm, stop.agreed = step.gradients(it, stopping)
            if not step.finite(loss, grad_norm):
                raise TrainingError(
                    f'iteration {it}: loss {loss}, gradient norm {grad_norm}; first not finite: '
                    f'{step.blame(it)}. The update was not made. {go_back()}'
                )
            step.update(lr)
            it, evaluated = it + 1, False
            seconds += time.perf_counter() - started
            progress.step()

            for name, value, usual in stand_out(watches, loss=loss, grad_norm=grad_norm):
                say(f'warning: iter {it}: {name} {value:.4g} stands out, {usual:.4g} is usual')
                record.event({'iter': it, 'event': 'spike', 'what': name, 'value': value, 'usual': usual})
            if it == 1 or it % k.log_interval == 0:
                values = {'iter': it, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm}
                values |= speed.read(it, seconds)
                record.log(values, seconds)
                progress.show(values, seconds)
        saver.wait()
        status = 'finished' if done and evaluated else 'stopped'
    finally:
        # 6. The end: the record is closed whatever happened. A failure has its own message, and what goes
        # wrong here after it is no news.
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
        say(f'--- a sample of {k.sample_tokens} tokens (more: python sample.py --out_dir={out_dir})')
        print_sample(model, data, k.sample_tokens, k.seed, device)
    if group.ddp:
        dist.destroy_process_group()
        leave(0)
    return 0


if __name__ == '__main__':
    run_rank(main, sys.argv[1:])
