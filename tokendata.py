"""Token files: reading them, and the batches of a step."""

from __future__ import annotations

import numpy as np
import torch

# -----------------------------------------------------------------------------
# Batches: pure functions of their arguments. Nothing is consumed, so nothing has to be restored on resume,
# and neither the number of ranks nor the evaluation nor the architecture changes what a step trains on.


def batch_starts(n_tokens, seed, step, micro, batch_size, block_size) -> np.ndarray:
    """Where the windows of one micro-batch start: uniform over the split, with replacement.

    micro counts the micro-batches of a step over all ranks. SeedSequence is used as a hash of its arguments:
    numpy promises its output for good, which it does not for the distributions of its generators.
    """
    draws = np.random.SeedSequence([seed, step, micro]).generate_state(batch_size, np.uint64)
    return (draws % np.uint64(n_tokens - block_size)).astype(np.int64)


def get_batch(tokens, seed, step, micro, batch_size, block_size):
    """One micro-batch of a split: x and y, int64 (batch_size, block_size); y is one token ahead."""
    return windows(tokens, batch_starts(len(tokens), seed, step, micro, batch_size, block_size), block_size)


def windows(tokens, starts, block_size):
    rows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def eval_starts(n_tokens, block_size, n_windows):
    """The fixed windows of an evaluation: starts (n,) and how many leading targets of each do not count (n,).

    n_windows are spread evenly over the split; 0, or more than there are, is the whole split: every token
    but the first is a target once (the last window overlaps the one before it, and counts only its end).
    """
    n_targets = n_tokens - 1
    n_whole = -(-n_targets // block_size)
    if n_windows == 0 or n_windows >= n_whole:
        starts = np.arange(n_whole) * block_size
        last = n_targets - block_size
        skip = np.where(starts > last, starts - last, 0)
        return np.minimum(starts, last), skip
    starts = np.arange(n_windows) * (n_targets - block_size) // max(1, n_windows - 1)
    return starts, np.zeros(n_windows, dtype=np.int64)


def eval_batch(tokens, starts, skip, index, batch_size, block_size):
    """Batch `index` of an evaluation: x, y as from get_batch; targets that do not count are -1.

    The last batch is filled up with rows that do not count, so that every batch has the same shape.
    """
    mine = slice(index * batch_size, (index + 1) * batch_size)
    x, y = windows(tokens, starts[mine], block_size)
    for row, n in enumerate(skip[mine]):
        y[row, : int(n)] = -1
    missing = batch_size - x.size(0)
    if missing:
        x = torch.cat([x, x[:1].expand(missing, -1)])
        y = torch.cat([y, torch.full((missing, block_size), -1)])
    return x, y
