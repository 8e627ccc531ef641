"""Speed of text to GPT-2 tokens on one core: this repository's way beside the usual one, on the same text.

    python data/bench_encode.py
    python data/bench_encode.py --files train.jsonl.xz --rounds 5

- prepare: corpus.prepare with one process: read, encode, write, hash, meta.json
- map: `datasets` reads the text into its Arrow cache, `Dataset.map` encodes into another, a memmap is filled
- encode: the tokenizer alone, on text in memory, to an array

Every round runs each arm once, in a process of its own. Speed is bytes of text per second of CPU time, and of
wall time; memory is what the arm took at its peak beyond its imports. The token files of the first two are
compared.
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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import corpus
from data.sources import file_source, paths, text_sha256
from data.tokenizer import load


def prepare(text, folder):
    """This repository's way -> (file of tokens, function that does it)."""
    val = folder / 'val.txt'
    val.write_text('prepare makes no split without the other', encoding='utf-8')
    splits = {'train': [file_source(text)], 'val': [file_source(str(val))]}
    load('gpt2')
    return folder / 'train.bin', lambda: corpus.prepare(folder, 'gpt2', splits, num_proc=1)


def datasets_map(text, folder):
    """The usual way, as in nanoGPT: an Arrow cache of the text, one of the ids, and a memmap."""
    import datasets
    import tiktoken

    datasets.disable_progress_bars()
    encoding = tiktoken.get_encoding('gpt2')
    out = folder / 'train.bin'

    def encode(row):
        ids = [*encoding.encode_ordinary(row['text']), encoding.eot_token]
        return {'ids': ids, 'count': len(ids)}

    def work():
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


def encode_only(text, folder):
    """The tokenizer alone."""
    tokenizer = load('gpt2')
    batches = [pieces for pieces, _, _ in corpus.chunks([file_source(text)])]

    def work():
        for pieces in batches:
            for ids in tokenizer.encode_utf8_batch(pieces):
                np.asarray(ids, np.uint16)

    return None, work


ARMS = {'prepare': prepare, 'map': datasets_map, 'encode': encode_only}


def peak_mib():
    """Peak resident memory of this process in MiB; nan where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << 20 if sys.platform == 'darwin' else 1 << 10
    )


def run_arm(name, text, folder):
    """Runs one arm in this process -> its figures, JSON-able."""
    out, work = ARMS[name](text, folder)
    base, cpu, wall = peak_mib(), time.process_time(), time.perf_counter()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    disk = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    digest = text_sha256(out) if out else None
    return {'cpu': cpu, 'wall': wall, 'memory': peak_mib() - base, 'disk': disk / 1e6, 'sha256': digest}


def as_jsonl(given, path):
    """All the text as one .jsonl file -> bytes of text."""
    size = 0
    with path.open('w', encoding='utf-8', newline='\n') as file:
        for name in given:
            for text in file_source(name).texts():
                file.write(json.dumps({'text': text}) + '\n')
                size += len(text.encode('utf-8', 'replace'))
    return size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        '--files', nargs='+', help='the text; the standard library of this Python unless given'
    )
    parser.add_argument('--rounds', type=int, default=3, help='times that every arm runs (3)')
    parser.add_argument('--arm', choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument('--text', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        with tempfile.TemporaryDirectory(dir=Path(args.text).parent) as folder:
            print('\n' + json.dumps(run_arm(args.arm, args.text, Path(folder))))
        return

    given = args.files or sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / 'text.jsonl'
        size = as_jsonl(paths(given), text)
        print(
            f'{size / 1e6:.1f} MB of text, {args.rounds} rounds, {platform.processor() or platform.machine()}'
        )
        figures = {name: [] for name in ARMS}
        for _ in range(args.rounds):
            for name, runs in figures.items():
                command = [sys.executable, __file__, '--arm', name, '--text', str(text)]
                environment = {**os.environ, 'HF_DATASETS_OFFLINE': '1'}
                # its errors are not caught: they are seen
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, env=environment, check=False
                )
                if done.returncode:
                    sys.exit(f'the arm {name} ended with {done.returncode}')
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    if {run['sha256'] for run in figures['prepare']} != {run['sha256'] for run in figures['map']}:
        sys.exit('the two token files differ')
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


if __name__ == '__main__':
    corpus.run(main)
