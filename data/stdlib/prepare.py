"""Text that every machine with Python has: the sources of its standard library, tests left out.

    python data/stdlib/prepare.py

Every twentieth file, by a hash of its name, is for validation; a byte-level BPE of 4096 tokens is trained on
the others. The text differs between Python versions, so compare losses only between runs on the same one.
"""

import hashlib
import os
import platform
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.corpus import prepare
from data.files import CorpusError
from data.scripts import how, local_splits, options
from data.sources import Splits, TextFile

LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
BUILT = ('_sysconfigdata', 'config-')  # written by the build, with paths of its machine
VAL_OF = 20  # one file of so many is for validation
LEAST = 100  # source files; with fewer, this Python came without its library's sources


@dataclass(frozen=True)
class PythonFile(TextFile):
    """A Python source, in the encoding that it declares."""

    def texts(self) -> Iterator[str]:
        with tokenize.open(self.path) as file:
            yield file.read()


def library_splits(library: Path) -> Splits:
    """The library's files."""
    names = []
    for folder, below, files in os.walk(library):
        below[:] = [name for name in below if name not in LEFT_OUT and not name.startswith(BUILT)]
        found = [name for name in files if name.endswith('.py') and not name.startswith(BUILT)]
        names += [Path(folder, name).relative_to(library).as_posix() for name in found]
    splits: Splits = {'train': [], 'val': []}
    for name in sorted(names):
        number = int.from_bytes(hashlib.sha256(name.encode('utf-8')).digest()[:4], 'big')
        splits['train' if number % VAL_OF else 'val'].append(PythonFile(str(library / name)))
    if len(splits['train']) < LEAST:
        raise CorpusError(
            f'{library} holds {len(splits["train"])} source files: this Python came without the sources of '
            'its library (compiled or zipped); install one with them, or give --files and --val_files'
        )
    return splits


def main(argv: list[str]) -> int:
    args = options(Path(__file__).parent, __doc__, tokenizer='bpe:4096').parse_args(argv)
    splits, origin = local_splits(args), None
    if not splits:
        splits = library_splits(Path(sysconfig.get_path('stdlib')))
        origin = {'python': platform.python_version(), 'files': sum(map(len, splits.values()))}
    if 'val' not in splits:
        raise CorpusError('--files needs --val_files here')
    prepare(args.out_dir, args.tokenizer, splits, origin, **how(args))
    return 0


if __name__ == '__main__':
    run_program(main)
