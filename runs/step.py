"""One training step, and the evaluation between steps: what train.py repeats, and what bench.py measures."""

from __future__ import annotations

import math
import os
import shutil
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import ConfigError
from data.tokendata import Examples, eval_batch, eval_windows, get_batch
from model import LanguageModel
from runs.console import say
from runs.diagnostics import blame, whole
from runs.knobs import Knobs
from runs.ranks import Ranks, any_rank
from runs.system import autocast_for


def dropout_seed(seed: int, step: int, micro: int, part: int = 0) -> int:
    """Seed of a micro-batch's dropout. It depends on these numbers alone: it is the same after a resume, on
    any ranks.

    part: which of the ranks that share the micro-batch; their sequences must not get the same dropout.
    """
    entropy = [seed, step, micro, 1] + ([part] if part else [])
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def share_of(k: Knobs, group: Ranks) -> tuple[list[int], slice]:
    """This rank's share of every step: which micro-batches, and which of their sequences.

    A step trains on gradient_accumulation_steps micro-batches of batch_size sequences, the same ones on any
    number of ranks. The ranks share the micro-batches out where their number divides; else every rank takes
    its part of each micro-batch, and the parts differ by one sequence at most.
    """
    n, rank, world = k.gradient_accumulation_steps, group.rank, group.world
    if n % world == 0:
        return list(range(rank, n, world)), slice(0, k.batch_size)
    if k.batch_size < world:
        raise ConfigError(
            f'{world} ranks cannot share gradient_accumulation_steps={n} micro-batches of '
            f'batch_size={k.batch_size}: make the first a multiple of {world}, or the second at least {world}'
        )
    return list(range(n)), slice(k.batch_size * rank // world, k.batch_size * (rank + 1) // world)


def compiled(model: LanguageModel, k: Knobs, device: str):
    """The model as torch.compile makes it, or as it is where that is off or cannot be."""
    if not k.compile:
        return model
    compilers = os.environ.get('CXX', 'g++'), 'clang++'
    if device == 'cpu' and not any(shutil.which(c) for c in compilers):
        say('warning: compile is on, but no C++ compiler is here: running uncompiled, slower, same results')
        return model
    say('compiling the model (about a minute) …')
    # graphs only on CUDA: elsewhere the mode is the same as none
    return torch.compile(model, mode='reduce-overhead' if k.cuda_graphs and device != 'cpu' else None)


class TrainingStep:
    """Gradients of a batch, then an update; between the two the caller may look at loss and gradient norm."""

    def __init__(self, k: Any, group: Ranks, model, optimizer, tokens, device: str, dtype: str):
        """k: Knobs, or other TrainingKnobs with block_size and dropout. tokens: of the training split. dtype:
        of autocast, 'float32', 'bfloat16' or 'float16'."""
        self.k, self.group, self.model, self.optimizer = k, group, model, optimizer
        self.tokens, self.device = tokens, device
        self.device_type = device.split(':')[0]
        self.autocast = partial(autocast_for, device, dtype)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == 'float16')
        self.micros, self.rows = share_of(k, group)
        # DDP takes the mean over ranks: a rank with fewer sequences than others must count less
        sequences = self.rows.stop - self.rows.start
        parts = 1 if sequences == k.batch_size else group.world
        self.divisor = len(self.micros) * k.batch_size / (sequences * parts)
        self.compiled = compiled(model, k, device)
        self.trained = self.compiled
        self.sharded = hasattr(model, 'reshard')  # see fsdp.py
        self.replicated = group.ddp and not self.sharded
        if self.replicated:
            ids = [torch.device(device).index] if self.device_type == 'cuda' else None
            self.trained = DistributedDataParallel(
                self.compiled, device_ids=ids, gradient_as_bucket_view=True
            )
        self.inputs = None  # of the next micro-batch, fetched while the device computes
        self.grad_norm: torch.Tensor | None = None  # of the gradients that are in the parameters
        self.norm = math.nan  # the same, told

    def begin(self, it: int):
        """Called once, before the first step, which is number `it`."""
        self.inputs = self.fetch(it, 0)
        if self.replicated:
            # DDP orders its buckets by the first backward pass. Here that is one whose gradients are dropped,
            # so that a resumed run adds the ranks' gradients up in the same order from its first step on.
            with self.autocast():
                self.trained(*self.inputs)[1].backward()
            self.optimizer.zero_grad(set_to_none=True)

    def fetch(self, it: int, j: int):
        """Micro-batch j of this rank in step `it`: x, y (sequences, block_size), and the part of training
        that is done, a scalar."""
        k = self.k
        batch = get_batch(self.tokens, k.seed, it, self.micros[j], k.batch_size, k.block_size)
        x, y = (torch.from_numpy(a[self.rows]) for a in batch)
        progress = torch.full((), it / max(1, k.max_iters), device=self.device)
        pinned = self.device_type == 'cuda'  # so that the copy runs beside the computation
        if pinned:
            x, y = x.pin_memory(), y.pin_memory()
        x, y = (t.to(self.device, non_blocking=pinned) for t in (x, y))
        return x, y, progress

    def dropout_seed(self, it: int, j: int) -> int:
        part = 0 if self.rows == slice(0, self.k.batch_size) else self.group.rank
        return dropout_seed(self.k.seed, it, self.micros[j], part)

    def gradients(self, it: int, stopping: bool = False) -> tuple[float, float, bool]:
        """Leave the gradients of step `it` in the parameters.

        Returns the mean loss (nats per token), the norm of the gradient, and whether any rank wants to stop;
        they are the same on all ranks.
        """
        loss_sum = torch.zeros((), device=self.device)
        last = len(self.micros) - 1
        for j in range(len(self.micros)):
            if self.replicated:  # ranks add their gradients once per step
                self.trained.require_backward_grad_sync = j == last
            if self.k.dropout:
                torch.manual_seed(self.dropout_seed(it, j))
            if self.k.cuda_graphs:  # what the last step left may be written over
                torch.compiler.cudagraph_mark_step_begin()
            with self.autocast():
                _, loss = self.trained(*self.inputs)
            self.scaler.scale(loss / self.divisor).backward()
            loss_sum += loss.detach()
            self.inputs = self.fetch(it, j + 1) if j < last else self.fetch(it + 1, 0)
        self.scaler.unscale_(self.optimizer)
        # frozen weights have no gradient
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.grad_norm = whole(torch.nn.utils.get_total_norm(gradients))
        report = torch.stack([loss_sum / self.divisor, torch.full_like(loss_sum, stopping)])
        if self.group.ddp:
            dist.all_reduce(report)
        # the one time that a step waits for the device
        loss, stopping, self.norm = torch.cat([report / self.group.world, self.grad_norm[None]]).tolist()
        return loss, self.norm, stopping > 0

    def finite(self, loss: float, norm: float) -> bool:
        """Whether an update may be made: loss and norm are finite, or the loss scaler will skip this step (it
        lowers its scale where gradients overflow, down to a limit)."""
        skipped = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > 2**-14
        return math.isfinite(loss) and (math.isfinite(norm) or skipped)

    def blame(self, it: int) -> str:
        """What went wrong first in step `it`, whose gradients are in the parameters: see diagnostics.py."""
        again = [(self.dropout_seed(it, j), self.fetch(it, j)) for j in range(len(self.micros))]
        return blame(self.model, again, self.autocast, self.group.rank, self.group.world)

    def update(self, lr: float):
        """Clip the gradients, make the step of the optimizer at the rate lr, and drop the gradients."""
        for group in self.optimizer.param_groups:
            group['lr'] = lr * group.get('lr_ratio', 1.0)
        # where the norm is below by more than rounding, or the 1e-6 that torch adds to it, the factor is 1: a
        # pass over all gradients would change nothing
        if self.k.grad_clip and not self.norm + 1e-6 < 0.999 * self.k.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.k.grad_clip, self.grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def turns(n_batches: int, group: Ranks, in_step: bool) -> range:
    """The batches of this rank among n_batches. in_step: as many on every rank, since all of them must
    compute at the same time; those from n_batches on do not count."""
    end = -(-n_batches // group.world) * group.world if in_step else n_batches
    return range(group.rank, end, group.world)


def mean_loss(
    model, tokens, windows, batch_size, block_size, device, autocast, group: Ranks, stop=None, in_step=False
):
    """Mean loss over windows of one split, in nats per token; None if any rank is to stop before the end.

    windows: (starts, skip) of eval_windows. The ranks share the batches. Each batch's sum of losses has a
    place of its own in a vector before the ranks add theirs, so that the result does not depend on how many
    ranks there are. stop: a StopRequest, or None; in_step: whether the ranks share the model out.
    """
    starts, skip = windows
    n_batches = -(-len(starts) // batch_size)
    sums = torch.zeros(n_batches + 1, dtype=torch.float32, device=device)  # the last one: ranks that stop
    counts = torch.zeros(n_batches, dtype=torch.float32, device=device)
    for i in turns(n_batches, group, in_step):
        stopping = stop is not None and bool(stop.reason)
        if any_rank(stopping, device) if in_step else stopping:
            sums[-1] = 1
            break
        at = i % n_batches
        x, y = (torch.from_numpy(a) for a in eval_batch(tokens, starts, skip, at, batch_size, block_size))
        with torch.no_grad(), autocast():
            loss = model(x.to(device), y.to(device))[1]
        if i < n_batches:
            counts[i] = (y != -1).sum()
            sums[i] = loss * counts[i]
    if group.world > 1:
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    *sums, stopping = sums.tolist()
    return None if stopping else sum(sums) / sum(counts.tolist())


def evaluate(step: TrainingStep, splits: dict, stop) -> dict[str, float] | None:
    """Mean loss of 'train' and 'val' over fixed windows, as many of each; None if any rank is to stop."""
    k, losses = step.k, {}
    val_windows = eval_windows(splits['val'], k.block_size, k.eval_iters * k.batch_size)
    step.compiled.eval()
    for split in ('train', 'val'):
        tokens = splits[split]
        windows = val_windows
        if split == 'train':
            windows = eval_windows(tokens, k.block_size, len(val_windows[0]))
        losses[split] = mean_loss(
            step.compiled,
            tokens,
            windows,
            k.batch_size,
            k.block_size,
            step.device,
            step.autocast,
            step.group,
            stop,
            step.sharded,
        )
        if losses[split] is None:
            break
    step.compiled.train()
    if step.sharded:
        step.model.reshard()  # what the evaluation gathered last is held until the next step
    return None if None in losses.values() else losses


def accuracies(step: TrainingStep, tokens) -> dict[str, float]:
    """{'val/accuracy': the share of asked tokens that the model's best guess gets right}, over the windows of
    an evaluation of val, and the same of every group that the data set names, where there are several.

    tokens: of val. Empty where the data do not say which tokens are asked for.
    """
    k, model = step.k, step.compiled
    if not isinstance(tokens, Examples):
        return {}
    starts, skip = eval_windows(tokens, k.block_size, k.eval_iters * k.batch_size)
    used = step.model.config.vocab_used or None  # the ids beyond are padding
    right = torch.zeros(k.block_size, dtype=torch.int64, device=step.device)  # by place in an example
    model.eval()
    n_batches = -(-len(starts) // k.batch_size)
    for i in turns(n_batches, step.group, step.sharded):
        at = i % n_batches
        x, y = (torch.from_numpy(a) for a in eval_batch(tokens, starts, skip, at, k.batch_size, k.block_size))
        with torch.no_grad(), step.autocast():
            logits, _ = model(x.to(step.device))  # (B, T, vocab_size)
        if i < n_batches:
            right += (logits[..., :used].argmax(-1) == y.to(step.device)).sum(0)
    model.train()
    if step.sharded:
        step.model.reshard()
    if step.group.ddp:
        dist.all_reduce(right)
    by_place = right.double().cpu() / len(starts)
    shares = {name: by_place[[place - 1 for place in places]] for name, places in tokens.asked.items()}
    named = {f'val/accuracy/{name}': share.mean().item() for name, share in shares.items()}
    return {'val/accuracy': torch.cat([*shares.values()]).mean().item(), **(named if len(named) > 1 else {})}
