"""Signs that a training goes wrong: a value that stands out, and the tensor that went wrong first."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist


@dataclass
class SpikeWatch:
    """Early warning: tells when a value stands out above the recent ones. The state is saved and resumed.

    It does where it is `factor` times, and 8 standard deviations above, the median of the last 20 values. The
    deviation is taken from the steps between neighbours among the last 100, by their median (von Neumann,
    1941, made robust): a falling loss does not widen it, nor does an earlier spike. A spike is told once,
    until a value is back below.
    """

    recent: list[float] = field(default_factory=list)
    high: bool = False

    def __post_init__(self):
        if not isinstance(self.high, bool) or not all(isinstance(value, float) for value in self.recent):
            raise TypeError('a SpikeWatch keeps a list of numbers, and whether the last one stood out')

    def look(self, value: float, factor: float) -> float | None:
        """The usual value (the median), if this one stands out and the one before it did not."""
        if not math.isfinite(value):
            return None  # a step that the loss scaler skips
        was_high, usual = self.high, None
        if len(self.recent) >= 20:
            usual = median(self.recent[-20:])
            steps = [abs(a - b) for a, b in pairwise(self.recent)]
            deviation = 1.4826 * median(steps) / math.sqrt(2)
            self.high = value > usual + max(8 * deviation, (factor - 1) * abs(usual))
        self.recent = [*self.recent[-99:], value]
        return usual if self.high and not was_high else None


# How many times its usual value a value is where it may stand out. The gradient of one batch in hundreds is
# several times as large as usual, and nothing comes of it: it is clipped. Of 270 runs that were kept, 15 had
# one that was ten times as large after the warm-up, and most of those were hard to train.
FACTORS = {'loss': 1.1, 'grad_norm': 10.0}


def finite(model) -> bool:
    """Whether no weight of the model is inf or nan."""
    return bool(torch.nn.utils.get_total_norm(list(model.parameters())).isfinite())


def stand_out(watches: dict[str, SpikeWatch], **values: float) -> list[tuple[str, float, float]]:
    """(name, value, usual value) of every value that stands out; the watches get to know all of them."""
    looks = [(name, value, watches[name].look(value, FACTORS[name])) for name, value in values.items()]
    return [(name, value, usual) for name, value, usual in looks if usual is not None]


def blame(model, micro_batches, autocast, rank: int = 0, world: int = 1) -> str:
    """Which tensor went wrong first: a weight, a module's output in this step, or a gradient; on any rank.

    micro_batches: (dropout seed, (x, y, progress)) of this rank's part of the step, computed once more.
    """
    places, bad = [], []  # in the order in which they are computed; the same on every rank

    def look(place, *tensors):
        places.append(place)
        bad.append(not all(torch.isfinite(t).all() for t in tensors if torch.is_tensor(t)))

    for name, p in model.named_parameters():
        look(f'weight {name}', p)
    hooks = []
    for name, module in model.named_modules():
        place = f'the output of {name}' if name else 'the loss'

        def after(module, args, output, place=place):
            look(place, *(output if isinstance(output, tuple) else (output,)))

        hooks.append(module.register_forward_hook(after))
    with torch.no_grad(), autocast():
        for seed, inputs in micro_batches:
            torch.manual_seed(seed)
            model(*inputs)
    for hook in hooks:
        hook.remove()
    for name, p in reversed(list(model.named_parameters())):  # the backward pass begins at the end
        look(f'the gradient of {name}', p.grad)
    first = bad.index(True) if True in bad else len(places)
    if world > 1:
        found = torch.tensor(first * world + rank, device=inputs[0].device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        first, rank = divmod(found.item(), world)
    if first == len(places):
        return 'nothing: it was gone on a second look'
    return places[first] + (f' on rank {rank}' if world > 1 else '')
