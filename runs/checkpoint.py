"""Checkpoints that survive: written beside the old file and moved over it, verified when read.

A folder holds `last.pt`, `previous.pt` (the save before it) and `best.pt` (lowest validation loss), each a
complete state: kill the process at any moment and a loadable file is there. The files are what torch.save
writes, so `torch.load('last.pt', weights_only=True)` opens them anywhere; every record in them carries a
CRC-32, which `load` checks first.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import threading
import zipfile
from pathlib import Path

import torch

from configurator import UserError

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


class CheckpointError(UserError):
    """One line: the file, what is wrong with it, and what to do."""


def write_failed(path: Path, e: Exception) -> str:
    """One line: what could not be written, and why."""
    if not path.parent.is_dir():
        return f'{path} could not be written: its folder is gone'
    causes = [e]  # torch's writer reports a failed write as a RuntimeError, while handling the OSError
    while causes[-1].__context__ is not None:
        causes.append(causes[-1].__context__)
    code = next((c.errno for c in causes if isinstance(c, OSError) and c.errno), None)
    free = shutil.disk_usage(path.parent).free
    full = 'the disk is full' if free < 2**20 else (str(e).strip() or type(e).__name__).splitlines()[0]
    reason = {
        errno.ENOSPC: 'the disk is full',
        errno.EDQUOT: 'the disk quota is used up',
        errno.EFBIG: 'it would pass the limit on file sizes (ulimit -f)',
    }.get(code, full)
    return f'{path} could not be written: {reason} ({free / 2**20:,.0f} MiB free)'


def save(state: dict, out_dir: str | Path, best: bool = False):
    """Write state as out_dir/last.pt (and best.pt, the same file, if best); the old last becomes previous.

    Raises CheckpointError where it cannot be written; there is a whole last.pt then as before.
    """
    out_dir = Path(out_dir)
    new = _temporary(out_dir / LAST)
    try:
        with open(new, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if best:
            _link(new, out_dir / BEST)
        if (out_dir / LAST).exists():
            _link(out_dir / LAST, out_dir / PREVIOUS)
        os.replace(new, out_dir / LAST)
        _fsync_folder(out_dir)
    except (OSError, RuntimeError) as e:
        for name in (LAST, PREVIOUS, BEST):
            _temporary(out_dir / name).unlink(missing_ok=True)
        fix = 'the checkpoint before it is whole: make room and go on with --init_from=resume'
        if not out_dir.is_dir():
            fix = 'if it was moved, go on where it is now with --init_from=resume'
        raise CheckpointError(f'{write_failed(out_dir / LAST, e)}; {fix}') from e


def _temporary(path: Path) -> Path:
    return path.with_name(f'{path.name}.tmp-{os.getpid()}')


def _link(source: Path, target: Path):
    """Make target a second name of the file source, in one step, whatever target was."""
    second = _temporary(target)
    second.unlink(missing_ok=True)
    try:
        os.link(source, second)
    except OSError:  # a file system without hard links
        with open(source, 'rb') as old, open(second, 'wb') as new:
            shutil.copyfileobj(old, new, 2**24)
            new.flush()
            os.fsync(new.fileno())
    os.replace(second, target)


def _fsync_folder(folder: Path):
    if os.name == 'posix':  # makes the new names durable; Windows has no handle for a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Saver:
    """Saves in the background: training waits for a copy of the state, not for the disk.

    One write is under way at a time. A write that failed raises in the next call of save() or wait(), and
    shows in `error` before that. before: called ahead of each write, in the background too.
    """

    def __init__(self, out_dir: str | Path, before=lambda: None):
        self.out_dir, self.before = Path(out_dir), before
        self.thread, self.error, self.copies = None, None, []

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


def remove_stale(out_dir: str | Path):
    """Delete what a killed save left behind; call it only while holding the folder's lock."""
    for path in Path(out_dir).glob('*.tmp-*'):
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str):
    """Write a small text file so that readers see the old content or the new, never half of it."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, 'w', encoding='utf-8') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(write_failed(path, e)) from e


class FolderLock:
    """Refuses a second run in one folder; the lock is the operating system's and dies with its process."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __enter__(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / '.lock', 'a+b')
        except OSError as e:
            raise CheckpointError(f'{self.folder} cannot hold a run: {e}') from None
        try:
            _lock(self.file)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read(100).decode(errors='replace') or 'process unknown'
            self.file.close()
            raise CheckpointError(
                f'{self.folder} is in use by another run ({holder}): '
                'wait for it, stop it, or give another --out_dir'
            ) from None
        except OSError as e:
            print(f'warning: {self.folder} cannot be locked ({e}): a second run in it would not be noticed')
        self.file.truncate(0)
        self.file.write(f'process {os.getpid()} on {platform.node()}'.encode())
        self.file.flush()
        return self

    def __exit__(self, *error):
        self.file.close()


def _lock(file):
    """Lock an open file for this process, or raise OSError at once."""
    if os.name == 'nt':
        import msvcrt

        os.lseek(file.fileno(), 2**30, os.SEEK_SET)  # a byte past the text, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
