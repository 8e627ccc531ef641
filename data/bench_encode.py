"""Speed of text to GPT-2 tokens on one core: this repository's way beside the usual one, on the same text.

    python data/bench_encode.py
    python data/bench_encode.py --files train.jsonl.xz --rounds 5

- prepare: corpus.prepare with one process: read, encode, write, hash, meta.json
- map: `datasets` reads the text into its Arrow cache, `Dataset.map` encodes into another, a memmap is filled
- encode: the tokenizer alone, on text in memory, to an array

Every round runs each arm once, in a process of its own. Speed is bytes of text per second of CPU time, and of
wall time; memory is what the arm took at its peak beyond its imports. The token files of the first two must
be equal.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import run_program
from data import corpus
from data.chunks import chunks_of
from data.files import CorpusError, text_sha256
from data.scripts import Parser, whole
from data.sources import file_source, paths
from data.tokenizer import load

Arm = tuple[Path | None, Callable[[], Any]]  # the token file, and the function that makes it


def our_way(text: str, folder: Path) -> Arm:
    """As the prepare.py scripts do it."""
    val = folder / 'val.txt'
    val.write_text('there is no training split without a validation split', encoding='utf-8')
    splits = {'train': [file_source(text)], 'val': [file_source(str(val))]}
    load('gpt2')
    return folder / 'train.bin', lambda: corpus.prepare(folder, 'gpt2', splits, num_proc=1)


def datasets_map(text: str, folder: Path) -> Arm:
    """The usual way, as in nanoGPT: an Arrow cache of the text, one of the ids, and a memmap."""
    import datasets
    import tiktoken

    datasets.disable_progress_bars()
    encoding = tiktoken.get_encoding('gpt2')
    out = folder / 'train.bin'

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids = [*encoding.encode_ordinary(row['text']), encoding.eot_token]
        return {'ids': ids, 'count': len(ids)}

    def work() -> None:
        rows = datasets.load_dataset(
            'json', data_files=[text], split='train', cache_dir=str(folder / 'cache')
        )
        rows = rows.map(encode, remove_columns=rows.column_names)
        tokens = np.memmap(out, dtype=np.uint16, mode='w+', shape=(sum(rows['count']),))
        at = 0
        shards = min(1024, len(rows))
        for i in range(shards):
            shard = rows.shard(num_shards=shards, index=i, contiguous=True).with_format('numpy')
            ids = np.concatenate(shard['ids'])
            tokens[at : at + len(ids)] = ids
            at += len(ids)
        tokens.flush()

    return out, work


def encode_only(text: str, folder: Path) -> Arm:
    """The tokenizer alone."""
    tokenizer = load('gpt2')
    batches = [pieces for pieces, _, _ in chunks_of([file_source(text)])]

    def work() -> None:
        for pieces in batches:
            for ids in tokenizer.encode_utf8_batch(pieces):
                np.asarray(ids, np.uint16)

    return None, work


ARMS = {'prepare': our_way, 'map': datasets_map, 'encode': encode_only}


def peak_mib() -> float:
    """Peak resident memory of this process in MiB; nan if the platform does not tell."""
    try:
        import resource
    except ImportError:
        return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << 20 if sys.platform == 'darwin' else 1 << 10
    )


def measure(name: str, text: str, folder: Path) -> dict[str, Any]:
    """Run one arm in this process; its figures, JSON-able."""
    out, work = ARMS[name](text, folder)
    base, cpu, wall = peak_mib(), time.process_time(), time.perf_counter()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    disk = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    digest = text_sha256(out) if out else None
    return {'cpu': cpu, 'wall': wall, 'memory': peak_mib() - base, 'disk': disk / 1e6, 'sha256': digest}


def as_jsonl(given: list[str], path: Path) -> int:
    """Write all the text to one .jsonl file; the bytes of text."""
    size = 0
    with path.open('w', encoding='utf-8', newline='\n') as file:
        for name in given:
            for text in file_source(name).texts():
                file.write(json.dumps({'text': text}) + '\n')
                size += len(text.encode('utf-8', 'replace'))
    return size


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        '--files', nargs='+', action='extend', help='the text (the standard library of this Python)'
    )
    parser.add_argument('--rounds', type=whole(1), default=3, help='times that every arm runs (3)')
    parser.add_argument('--arm', choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument('--text', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.arm:
        with tempfile.TemporaryDirectory(dir=Path(args.text).parent) as folder:
            print('\n' + json.dumps(measure(args.arm, args.text, Path(folder))))
        return 0

    given = args.files or sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / 'text.jsonl'
        size = as_jsonl(paths(given), text)
        print(
            f'{size / 1e6:.1f} MB of text, {args.rounds} rounds, {platform.processor() or platform.machine()}'
        )
        figures: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
        for _ in range(args.rounds):
            for name, runs in figures.items():
                command = [sys.executable, __file__, '--arm', name, '--text', str(text)]
                environment = {**os.environ, 'HF_DATASETS_OFFLINE': '1'}
                # stderr is not captured, so that its errors are seen
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, env=environment, check=False
                )
                if done.returncode:
                    raise CorpusError(f'the arm {name} ended with {done.returncode}: its error is above')
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    if {run['sha256'] for run in figures['prepare']} != {run['sha256'] for run in figures['map']}:
        raise CorpusError('the token files of prepare and map differ')
    print('arm        MB/s of CPU   the best   MB/s of wall   memory MiB   disk MB   (medians, but the best)')
    for name, runs in figures.items():
        middle = {
            key: statistics.median(run[key] for run in runs) for key in ('cpu', 'wall', 'memory', 'disk')
        }
        best = min(run['cpu'] for run in runs)
        speeds = '   '.join(
            f'{size / 1e6 / seconds:8.1f}' for seconds in (middle['cpu'], best, middle['wall'])
        )
        print(f'{name:8} {speeds}   {middle["memory"]:10.0f}   {middle["disk"]:7.0f}')
    return 0


if __name__ == '__main__':
    run_program(main)
