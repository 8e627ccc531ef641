"""Checkpoints that survive: written beside the old file and moved over it, verified when read.

A folder holds `last.pt`, `previous.pt` (the save before it) and `best.pt` (lowest validation loss), each a
complete state: kill the process at any moment and a loadable file is there. The files are what torch.save
writes, so `torch.load('last.pt', weights_only=True)` opens them anywhere; every record in them carries a
CRC-32, which `load` checks first.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import zipfile
from pathlib import Path

import torch

from model import GPT, GPTConfig

LAST, PREVIOUS, BEST = 'last.pt', 'previous.pt', 'best.pt'


class CheckpointError(Exception):
    """One line: the file, what is wrong with it, and what to do."""


def save(state: dict, out_dir: str | Path, best: bool = False):
    """Write state as out_dir/last.pt (and best.pt, the same file, if best); the old last becomes previous.

    Raises CheckpointError where it cannot be written; the files that were there are untouched then.
    """
    out_dir = Path(out_dir)
    temporary = out_dir / f'{LAST}.tmp-{os.getpid()}'
    try:
        with open(temporary, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if best:
            _link(temporary, out_dir / BEST)
        if (out_dir / LAST).exists():
            _link(out_dir / LAST, out_dir / PREVIOUS)
        os.replace(temporary, out_dir / LAST)
        _fsync_folder(out_dir)
    except (OSError, RuntimeError) as e:  # torch's writer reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(out_dir).free
        code = getattr(e, 'errno', None) or getattr(e.__context__, 'errno', None)
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or free < 2**20
        reason = 'the disk is full' if full else str(e).splitlines()[0]
        raise CheckpointError(
            f'{out_dir / LAST} could not be saved: {reason} ({free / 2**20:.0f} MiB free); '
            'the checkpoint before it is intact: make room and continue with --init_from=resume'
        ) from e


def _link(source: Path, target: Path):
    """Make target a second name of the file source, in one step, whatever target was."""
    second = target.with_name(f'{target.name}.tmp-{os.getpid()}')
    second.unlink(missing_ok=True)
    try:
        os.link(source, second)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, second)
    os.replace(second, target)


def _fsync_folder(folder: Path):
    if os.name == 'posix':  # makes the new names durable; Windows has no handle for a folder
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Saver:
    """Saves in the background: training waits for a copy of the state, not for the disk.

    One write is under way at a time. A write that failed raises in the next call of save() or wait().
    """

    def __init__(self, out_dir: str | Path):
        self.out_dir = Path(out_dir)
        self.thread, self.error = None, None

    def save(self, state: dict, best: bool = False):
        self.wait()
        copy = _copy(state)
        self.thread = threading.Thread(target=self._write, args=(copy, best))
        self.thread.start()

    def _write(self, state, best):
        try:
            save(state, self.out_dir, best)
        except Exception as e:
            self.error = e

    def wait(self):
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def _copy(x):
    """The same nest of dicts and lists with every tensor copied to the CPU."""
    if isinstance(x, torch.Tensor):
        return x.detach().to('cpu', copy=True)
    if isinstance(x, dict):
        return {k: _copy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_copy(v) for v in x)
    return x


def load(path: str | Path) -> dict:
    """Read and verify one checkpoint file, onto the CPU. CheckpointError says what is wrong in one line."""
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
        what = 'is empty' if size == 0 else f'({size} bytes) is truncated or not a checkpoint: {e}'
        raise CheckpointError(f'{path} {what}') from None
    except CheckpointError:
        raise
    except Exception as e:  # a zip, but with something else in it; weights_only refuses code
        reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise CheckpointError(f'{path} is not a checkpoint of this project: {reason}') from None
    if not isinstance(state, dict) or 'model_args' not in state or 'model' not in state:
        raise CheckpointError(f'{path} is not a checkpoint of this project: it has no model_args and model')
    return state


def load_folder(out_dir: str | Path, which: str = LAST) -> dict:
    """The named checkpoint of a run; the error names the other files of the folder that are whole."""
    out_dir = Path(out_dir)
    try:
        return load(out_dir / which)
    except CheckpointError as e:
        whole = []
        for other in (LAST, PREVIOUS, BEST):
            if other != which and (out_dir / other).exists():
                try:
                    whole.append(f'{out_dir / other} (iteration {load(out_dir / other)["iter"]})')
                except CheckpointError:
                    continue
        if not whole:
            raise CheckpointError(f'{e}; no other checkpoint is in {out_dir}') from None
        raise CheckpointError(
            f'{e}; whole: {", ".join(whole)}: copy one to {out_dir / which} to go on from there'
        ) from None


def load_model(out_dir: str | Path, which: str = '', device: str = 'cpu') -> tuple[GPT, dict]:
    """The model of a run and its checkpoint; which: a file's name, or '' for best.pt, else last.pt."""
    which = which or (BEST if (Path(out_dir) / BEST).exists() else LAST)
    state = load_folder(out_dir, which)
    try:
        model = GPT(GPTConfig(**state['model_args']), seed=0)
        model.load_state_dict(state['model'])
    except (TypeError, ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0]
        raise CheckpointError(
            f'{Path(out_dir) / which} does not fit this version of model.py: {reason}'
        ) from None
    return model.to(device).eval(), state


def remove_stale(out_dir: str | Path):
    """Delete what a killed save left behind; call it only while holding the folder's lock."""
    for path in Path(out_dir).glob('*.tmp-*'):
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str):
    """Write a small text file so that readers see the old content or the new, never half of it."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp-{os.getpid()}')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)


class FolderLock:
    """Refuses a second run in one folder; the lock is the operating system's and dies with its process."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / '.lock', 'a+', encoding='utf-8')
        try:
            if os.name == 'nt':
                import msvcrt

                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            holder = self.file.read().strip()
            self.file.close()
            raise CheckpointError(
                f'{folder} is in use by another run ({holder or "process unknown"}): '
                'wait for it, stop it, or give another --out_dir'
            ) from None
        self.file.truncate(0)
        self.file.write(f'process {os.getpid()}')
        self.file.flush()

    def release(self):
        self.file.close()
