"""Data sets by name: where they lie, and what is known of their text. The files are read by data/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data.tokendata import DataError
from runs.knobs import check_paths

ROOT = Path(__file__).resolve().parents[1]


def data_folder(dataset: str) -> Path:
    """The folder of a data set: the one of that name in data/, or else the path as it is given."""
    check_paths(dataset=dataset)
    return ROOT / 'data' / dataset if (ROOT / 'data' / dataset).is_dir() else Path(dataset)


def prepare_stdlib(folder: Path):
    """Prepare the one corpus that every machine has, when it is used for the first time."""
    if folder == ROOT / 'data' / 'stdlib' and not (folder / 'meta.json').exists():
        print('preparing data/stdlib, the sources of the Python standard library (once)', flush=True)
        command = [sys.executable, str(folder / 'prepare.py')]
        if subprocess.run(command, check=False).returncode:
            raise DataError(f'{folder} could not be prepared (reason above): fix that, and start again')


def stamps(data) -> dict[Path, tuple]:
    """What the file system says of the files of an open data set: another stamp is another content."""
    found = {}
    for split in data.splits:
        path = data.folder / f'{split}.bin'
        try:
            s = path.stat()
            found[path] = s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino
        except OSError as e:
            found[path] = (e.errno,)
    return found


def changed(data, then: dict[Path, tuple]) -> str:
    """'' if the files are what they were when their stamps were `then`, or else which one is not."""
    now = stamps(data)
    return next((f'{path} was changed while it was read' for path in now if now[path] != then[path]), '')


def bytes_per_token(data) -> dict[str, float]:
    """Bytes of text per token of each split: nats per token / (bytes per token * ln 2) is bits per byte."""
    splits = data.meta.get('splits', {})
    return {name: split['bytes'] / split['tokens'] for name, split in splits.items() if 'bytes' in split}
