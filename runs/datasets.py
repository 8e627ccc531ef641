"""Data sets by name: where they lie, and what is known of their text. The files are read by data/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runs.knobs import check_paths

ROOT = Path(__file__).resolve().parents[1]


def data_folder(dataset: str) -> Path:
    """The folder of a data set: the one of that name in data/, or else the path as it is given."""
    check_paths(dataset=dataset)
    return ROOT / 'data' / dataset if (ROOT / 'data' / dataset).is_dir() else Path(dataset)


def prepare_stdlib(folder: Path):
    """Prepare the one corpus that every machine has, when it is used for the first time."""
    from data.tokendata import DataError  # imports numpy, which what only needs a folder can do without

    if folder == ROOT / 'data' / 'stdlib' and not (folder / 'meta.json').exists():
        print('preparing data/stdlib, the sources of the Python standard library (once)', flush=True)
        command = [sys.executable, str(folder / 'prepare.py')]
        if subprocess.run(command, check=False).returncode:
            raise DataError(f'{folder} could not be prepared (reason above): fix that, and start again')


def bytes_per_token(data) -> dict[str, float]:
    """Bytes of text per token of each split: nats per token / (bytes per token * ln 2) is bits per byte."""
    splits = data.meta.get('splits', {})
    return {name: split['bytes'] / split['tokens'] for name, split in splits.items() if 'bytes' in split}
