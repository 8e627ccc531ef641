"""Memory of processes that read batches of one data set at the same time, as the ranks of a run do.

    python data/bench_readers.py                                  # 10^9 random tokens in two shards
    python data/bench_readers.py data/openwebtext --readers 1 8

Token files are mapped into memory. The pages that a process has read count in its RSS, but all processes
share one copy, in the page cache, which the system takes back when it needs memory. PSS counts a page that n
processes share as 1/n of a page in each, so that the sum of PSS is what they take together. `own` is what a
process has alone and cannot give back: its anonymous memory. Linux only.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import UserError, run_program
from data.scripts import Parser, whole
from data.tokendata import get_batch, open_data
from data.tokenizer import Bytes

BATCH_SIZE, BLOCK_SIZE = 32, 1024


def random_set(folder: Path, n_tokens: int) -> None:
    """Write a data set of random tokens: train in two shards, and a short val."""
    random = np.random.default_rng(0)
    splits = {'train': [n_tokens // 2, n_tokens - n_tokens // 2], 'val': [BLOCK_SIZE + 1] * 2}
    entries: dict[str, Any] = {}
    for name, sizes in splits.items():
        for i, size in enumerate(sizes):
            with (folder / f'{name}_{i:03d}.bin').open('wb') as file:
                for start in range(0, size, 1 << 24):
                    random.integers(0, 256, min(1 << 24, size - start), np.uint16).tofile(file)
        shards = [{'tokens': size, 'sha256': '0' * 64} for size in sizes]
        entries[name] = {'tokens': sum(sizes), 'shards': shards}
    meta = {'format': 1, 'vocab_size': 257, 'dtype': 'uint16', 'splits': entries, 'tokenizer': Bytes().spec}
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')


def memory_mib() -> dict[str, float]:
    """RSS, PSS and own memory of this process in MiB."""
    names = {'Rss': 'rss', 'Pss': 'pss', 'Anonymous': 'own'}
    found = {}
    for line in Path('/proc/self/smaps_rollup').read_text(encoding='ascii').splitlines():
        name, _, value = line.partition(':')
        if name in names:
            found[names[name]] = int(value.split()[0]) / 1024
    return found


def read_batches(
    folder: str, reader: int, batches: int, together: Barrier, results: 'Queue[dict[str, float]]'
) -> None:
    """Read that many batches as rank `reader` does, and put the memory and the speed into `results`."""
    tokens = open_data(folder, BLOCK_SIZE, verify=False).splits['train']
    together.wait()
    began = time.perf_counter()
    for step in range(batches):
        get_batch(tokens, 0, step, reader, BATCH_SIZE, BLOCK_SIZE)
    seconds = time.perf_counter() - began
    together.wait()  # every process has read all of its batches, and none has ended
    found = {**memory_mib(), 'speed': batches / seconds}
    together.wait()
    results.put(found)


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument('folder', nargs='?', help='a prepared data set; random tokens unless given')
    parser.add_argument('--tokens', type=whole(10**5), default=10**9, help='random tokens (10^9)')
    parser.add_argument(
        '--readers', type=whole(1), nargs='+', default=[1, 2, 4, 8], help='processes (1 2 4 8)'
    )
    parser.add_argument('--batches', type=whole(1), default=1000, help='that each one reads (1000)')
    args = parser.parse_args(argv)
    if not Path('/proc/self/smaps_rollup').exists():
        raise UserError('/proc/self/smaps_rollup, which tells the memory of a process, is missing: use Linux')
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        if not args.folder:
            random_set(Path(temporary), args.tokens)
        tokens = open_data(folder, BLOCK_SIZE, verify=False).splits['train']
        size = len(tokens) * tokens.dtype.itemsize / 2**20
        batch = f'{BATCH_SIZE} x {BLOCK_SIZE}'
        print(
            f'{len(tokens):,} tokens, {size:,.0f} MiB; every reader reads {args.batches:,} batches of {batch}'
        )
        print('| readers | RSS of each, MiB | PSS of each | own of each | PSS of all | batches/s of each |')
        print('| --- | --- | --- | --- | --- | --- |')
        spawn = multiprocessing.get_context('spawn')
        for count in args.readers:
            together, results = spawn.Barrier(count), spawn.Queue()
            work = [(folder, reader, args.batches, together, results) for reader in range(count)]
            processes = [spawn.Process(target=read_batches, args=arguments) for arguments in work]
            for process in processes:
                process.start()
            found = [results.get(timeout=3600) for _ in processes]
            for process in processes:
                process.join()
            middle = {name: mean(one[name] for one in found) for name in found[0]}
            print(
                f'| {count} | {middle["rss"]:.0f} | {middle["pss"]:.0f} | {middle["own"]:.0f} | '
                f'{sum(one["pss"] for one in found):.0f} | {middle["speed"]:.0f} |'
            )
    return 0


if __name__ == '__main__':
    run_program(main)
