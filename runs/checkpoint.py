"""Checkpoints that survive: written beside the old file and moved over it, verified when read.

A folder holds `last.pt`, `previous.pt` (the save before it) and `best.pt` (lowest validation loss), each a
complete state: kill the process at any moment and a loadable file is there. The files are what torch.save
writes, so `torch.load('last.pt', weights_only=True)` opens them anywhere; every record in them carries a
CRC-32, which `load` checks first.
"""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import torch

from runs import files

LAST, PREVIOUS, BEST = 'last.pt', 'previous.pt', 'best.pt'
# What a checkpoint holds: the entries that every reader relies on, and those that going on needs as well.
TO_READ = {
    'model': dict,
    'model_args': dict,
    'iter': int,
    'config': dict,
    'tokenizer': dict | None,
    'data_fingerprint': str | None,
}
TO_RESUME = {
    'optimizer': dict,
    'scaler': dict,
    'evaluated': bool,
    'best_val_loss': float,
    'watches': dict,
    'seconds': float,
}


class CheckpointError(files.FileError):
    """One line: the file, what is wrong with it, and what to do."""


def save(state: dict, out_dir: str | Path, best: bool = False):
    """Write state as out_dir/last.pt (and best.pt, the same file, if best); the old last becomes previous.

    Raises CheckpointError where it cannot be written; there is a whole last.pt then as before.
    """
    last = Path(out_dir) / LAST
    try:
        with files.replacing(last, 'wb') as f:
            torch.save(state, f)
            files.sync(f)  # whole, before it gets a second name
            if best:
                files.link(files.temporary(last), last.with_name(BEST))
            if last.exists():
                files.link(last, last.with_name(PREVIOUS))
    except (OSError, RuntimeError) as e:
        fix = 'the checkpoint before it is whole: make room and go on with --init_from=resume'
        if not last.parent.is_dir():
            fix = 'if it was moved, go on where it is now with --init_from=resume'
        raise CheckpointError(f'{files.write_failed(last, e)}; {fix}') from e


class Saver:
    """Saves in the background: training waits for a copy of the state, not for the disk.

    One write is under way at a time. A write that failed raises in the next call of save() or wait(), and
    shows in `error` before that. before: called ahead of each write, in the background too.
    """

    def __init__(self, out_dir: str | Path, before=lambda: None):
        self.out_dir, self.before = Path(out_dir), before
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.copies: list = []

    def save(self, state: dict, best: bool = False):
        self.wait()
        copy = self._copy(state)
        self.thread = threading.Thread(target=self._write, args=(copy, best), daemon=True)
        self.thread.start()

    def _write(self, state, best):
        try:
            self.before()
            save(state, self.out_dir, best)
        except Exception as e:
            self.error = e

    def wait(self, timeout: float | None = None):
        """Until the write under way is done, or timeout seconds have passed."""
        if self.thread is not None:
            self.thread.join(timeout)
            if self.thread.is_alive():
                raise CheckpointError(f'{self.out_dir / LAST} is still being written after {timeout:.0f} s')
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _copy(self, state):
        """The same nest of dicts and lists, with every tensor copied to memory that the next save reuses."""
        used, copies = {}, iter(self.copies)

        def copy(x):
            if isinstance(x, dict):
                return {key: copy(value) for key, value in x.items()}
            if isinstance(x, (list, tuple)):
                return type(x)(copy(value) for value in x)
            if not isinstance(x, torch.Tensor):
                return x
            key = x.data_ptr(), x.shape, x.dtype  # a tied weight is one tensor under two names: one copy
            if key not in used:
                here = next(copies, None)
                if here is None or here.shape != x.shape or here.dtype != x.dtype:
                    here = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)  # pinned: fast, async
                used[key] = here.copy_(x.detach(), non_blocking=x.is_cuda)
            return used[key]

        copied = copy(state)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are under way
        self.copies = list(used.values())
        return copied


def load(path: str | Path, resume: bool = False) -> dict:
    """Read and verify one checkpoint file, onto the CPU. CheckpointError says what is wrong in one line.

    resume: whether a training is to go on from it, which takes more than the weights.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()  # compares every record's CRC-32
        if broken is not None:
            raise CheckpointError(f'{path} is damaged: the checksum of its record {broken} does not match')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f'{path} does not exist') from None
    except zipfile.BadZipFile as e:
        size = path.stat().st_size
        with open(path, 'rb') as f:
            begin = f.read(16)
        what = f'({size:,} bytes, beginning {begin!r}) is cut short or no checkpoint at all: {e}'
        raise CheckpointError(f'{path} {what if size else "is empty"}') from None
    except CheckpointError:
        raise
    except Exception as e:  # a zip, but with something else in it; weights_only refuses code
        reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise CheckpointError(f'{path} is not a checkpoint of this project: {reason}') from None
    wanted = TO_READ | TO_RESUME if resume else TO_READ
    missing = [name for name in wanted if not isinstance(state, dict) or name not in state]
    if missing:
        raise CheckpointError(f'{path} is not a checkpoint of this project: it has no {", ".join(missing)}')
    for name, kind in wanted.items():
        if not isinstance(state[name], kind):
            kind = getattr(kind, '__name__', kind)
            raise CheckpointError(
                f'{path} is not a checkpoint of this project: its {name} is of type '
                f'{type(state[name]).__name__}, not {kind}'
            )
    if state['iter'] < 0:
        raise CheckpointError(f'{path} is not a checkpoint of this project: its iter is {state["iter"]}')
    return state


def load_folder(out_dir: str | Path, which: str = LAST, resume: bool = False) -> dict:
    """The named checkpoint of a run; the error names the other files of the folder that are whole."""
    out_dir = Path(out_dir)
    try:
        return load(out_dir / which, resume)
    except CheckpointError as e:
        whole = {}
        for other in (LAST, PREVIOUS, BEST):
            if other != which and (out_dir / other).exists():
                try:
                    whole[other] = f'{out_dir / other} (iteration {load(out_dir / other, resume)["iter"]})'
                except CheckpointError:
                    continue
        if not whole:
            raise CheckpointError(f'{e}; no other checkpoint is in {out_dir}') from None
        fix = f'take one with --checkpoint={next(iter(whole))}'
        if resume:
            fix = f'copy one to {out_dir / which} to go on from there'
        raise CheckpointError(f'{e}; whole: {", ".join(whole.values())}: {fix}') from None
