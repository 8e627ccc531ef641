"""Data sets by name: where they lie, and what is known of their text. The files are read by data/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runs.knobs import check_paths

ROOT = Path(__file__).resolve().parents[1]


def data_folder(dataset: str) -> Path:
    """The folder of a data set: the one of that name in data/, or else the path as it is given.

    That of a diagnostic, as in 'diagnostics/mqar', need not be there yet: see `prepare_own`."""
    check_paths(dataset=dataset)
    inside = ROOT / 'data' / dataset
    generated = inside.parent == ROOT / 'data' / 'diagnostics'
    return inside if generated or inside.is_dir() else Path(dataset)


def prepare_own(folder: Path):
    """Prepare a data set that every machine can make, when it is used for the first time: the sources of the
    Python standard library, and the diagnostics, which are generated."""
    from data.tokendata import DataError  # imports numpy, which what only needs a folder can do without

    stdlib, generated = ROOT / 'data' / 'stdlib', ROOT / 'data' / 'diagnostics'
    if folder not in (stdlib, generated / folder.name) or (folder / 'meta.json').exists():
        return
    print(f'preparing {folder.relative_to(ROOT).as_posix()} (once)', flush=True)
    command = [sys.executable, str(stdlib / 'prepare.py')]
    if folder != stdlib:
        command = [sys.executable, str(generated / 'prepare.py'), folder.name]
    if subprocess.run(command, check=False).returncode:
        raise DataError(f'{folder} could not be prepared (reason above): fix that, and start again')


def bytes_per_token(data) -> dict[str, float]:
    """Bytes of text per token of each split: nats per token / (bytes per token * ln 2) is bits per byte."""
    splits = data.meta.get('splits', {})
    return {name: split['bytes'] / split['tokens'] for name, split in splits.items() if 'bytes' in split}
