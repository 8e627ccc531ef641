"""The learning rate of every step."""

from __future__ import annotations

import math

from runs.knobs import TrainingKnobs


def learning_rate_at(it: int, k: TrainingKnobs) -> float:
    """Linear warm-up to learning_rate, then cosine or linear decay to min_lr at lr_decay_iters."""
    if not k.decay_lr:
        return k.learning_rate
    end = k.lr_decay_iters or k.max_iters
    if it < k.warmup_iters:
        return k.learning_rate * (it + 1) / (k.warmup_iters + 1)
    if it >= end:
        return k.min_lr
    progress = (it - k.warmup_iters) / (end - k.warmup_iters)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if k.lr_schedule == 'cosine' else 1 - progress
    return k.min_lr + left * (k.learning_rate - k.min_lr)


def doubts(k: TrainingKnobs) -> list[str]:
    """Warnings about a schedule that is probably a mistake: a warm-up that leaves no time at the full
    rate."""
    last = min(k.lr_decay_iters or k.max_iters, k.max_iters) - 1  # before the decay is at its end
    if not k.decay_lr or last < 0 or k.warmup_iters <= last:
        return []
    highest = learning_rate_at(last, k)
    if highest > 0.9 * k.learning_rate:
        return []
    return [
        f'warmup_iters={k.warmup_iters:g} leaves no time: the learning rate comes to {highest:.3g} in '
        f'{last + 1} iterations, and never to learning_rate={k.learning_rate:g}'
    ]
