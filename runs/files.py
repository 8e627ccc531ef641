"""Files that are whole or not there: one way to write, second names, and the lock of a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import time
from pathlib import Path

from configurator import UserError

LOCK = '.lock'  # in the folder of a run


class FileError(UserError):
    """One line: the file or folder, what is wrong with it, and what to do."""


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = 'w'):
    """A file to write (mode 'w': UTF-8, or 'wb') that takes the place of `path` when the block ends.

    It is on the disk by then: whenever the process or the machine dies, readers find the old content or the
    new, never a part of it. Where the block raises or the disk is full, `path` stays as it was.
    """
    path = Path(path)
    new = temporary(path)
    try:
        with open(new, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            sync(file)
        os.replace(new, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def write_text(path: str | Path, text: str):
    """Write a small text file as `replacing` does. Raises FileError."""
    try:
        with replacing(path) as file:
            file.write(text)
    except OSError as e:
        raise FileError(write_failed(path, e)) from e


def make_folder(path: Path):
    """With those above it, where they are missing. Raises FileError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f'{path} cannot be made: {e}') from None


def write_failed(path: str | Path, e: Exception) -> str:
    """One line: what could not be written, and why."""
    path = Path(path)
    if not path.parent.is_dir():
        return f'{path} could not be written: its folder is gone'
    causes: list[BaseException] = [
        e
    ]  # torch's writer reports a failed write as a RuntimeError, while handling the OSError
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


def temporary(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f'{path.name}.tmp-{os.getpid()}')


def remove_stale(folder: str | Path):
    """Delete what a killed write left behind; call it only while holding the folder's lock."""
    for path in Path(folder).glob('*.tmp-*'):
        path.unlink(missing_ok=True)


def link(source: Path, target: Path):
    """Make target a second name of the file source, in one step, whatever target was."""
    second = temporary(target)
    second.unlink(missing_ok=True)
    try:
        try:
            os.link(source, second)
        except OSError:  # a file system without hard links
            with open(source, 'rb') as old, open(second, 'wb') as new:
                shutil.copyfileobj(old, new, 2**24)
                sync(new)
        os.replace(second, target)
    except BaseException:
        second.unlink(missing_ok=True)
        raise


def sync(file):
    """Have what was written to an open file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path):
    """Make new names in a folder durable; Windows has no handle for one."""
    if os.name == 'posix':
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_name(what: str, name: str):
    """FileError unless `name` is that of one folder, and not of some other place."""
    if not name or name.startswith(('.', '-')) or any(c in name for c in '/\\:\n'):
        raise FileError(f'{what} is {name!r}: give the plain name of a folder, without / and a first dot')


class FolderLock:
    """Refuses a second process in one folder; the lock is the operating system's and dies with its process.

    user: what works in the folder. instead: what to give so that it works in another one. Raises FileError.
    """

    def __init__(self, folder: str | Path, user: str = 'run', instead: str = '--out_dir'):
        self.folder, self.user, self.instead = Path(folder), user, instead

    def __enter__(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / LOCK, 'a+b')
        except OSError as e:
            raise FileError(f'{self.folder} cannot hold a {self.user}: {e}') from None
        try:
            _lock_soon(self.file)
        except (BlockingIOError, PermissionError):
            holder = _holder(self.file)
            self.file.close()
            raise FileError(
                f'{self.folder} is in use by another {self.user} ({holder}): '
                f'wait for it, stop it, or give another {self.instead}'
            ) from None
        except OSError as e:
            print(
                f'warning: {self.folder} cannot be locked ({e}): '
                f'a second {self.user} in it would not be noticed'
            )
        self.file.truncate(0)
        self.file.write(f'process {os.getpid()} on {platform.node()}'.encode())
        self.file.flush()
        return self

    def __exit__(self, *error):
        self.file.close()


def lock_holder(folder: str | Path) -> str:
    """Who holds a folder's lock now, 'process 123 on host'; '' if nobody does, or locks do not work there."""
    try:
        with open(Path(folder) / LOCK, 'r+b') as file:
            try:
                _lock(file, shared=True)
            except (BlockingIOError, PermissionError):
                return _holder(file)
    except OSError:
        pass
    return ''


def _holder(file) -> str:
    file.seek(0)
    return file.read(100).decode(errors='replace') or 'process unknown'


def _lock_soon(file):
    """Lock an open file, with a second try: who looks at a lock (lock_holder) has it for an instant."""
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        time.sleep(0.2)
        _lock(file)


def _lock(file, shared: bool = False):
    """Lock an open file for this process, or raise OSError at once. shared: beside others of the kind."""
    if os.name == 'nt':
        import msvcrt

        os.lseek(file.fileno(), 2**30, os.SEEK_SET)  # a byte past the text, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
