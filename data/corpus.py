"""Text to token files: the one path that every prepare.py takes.

    sources.py -> pieces of text -> chunks.py -> chunks of tokens -> join.py -> train.bin, val.bin, meta.json

Memory does not grow with the text. The chunks are files in `.prepare/` until all of them are there, so a
killed preparation goes on where it stopped, and nothing looks finished before meta.json, which is written
last. The token files are the same byte for byte however many processes made them, and however often they were
killed.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.chunks import CHUNK, CHUNK_FORMAT, encode_splits, write_json
from data.files import CorpusError, named, one_line
from data.join import (
    SHARD_TOKENS,
    Holdout,
    held_out,
    join_and_hold_out,
    join_chunks,
    refuse_training_text,
    shared_documents,
)
from data.sources import ENDS, PIECE, Piece, Source, Splits, TextFile, estimate, identity, stored_files
from data.tokendata import (
    DTYPES,
    FORMAT,
    JOB,
    JOB_SHAPE,
    META,
    SPLITS,
    WORK,
    DataError,
    Meta,
    dtype_for,
    open_data,
    read_if_whole,
    token_files,
)
from data.tokenizer import Chars, Tokenizer, from_spec, load, train_bpe
from declared import LINE, Object, read_json

ROOT = Path(__file__).resolve().parents[1]
FIT_BYTES = 1 << 30  # bytes of the training split that a BPE is trained on at most: the first
TOKEN_FILE = re.compile(rf'({"|".join(SPLITS)})(_\d{{3,}})?\.bin')


# The tokenizer --------------------------------------------------------------


def fitted(name: str) -> bool:
    """Whether a tokenizer of this name is made from the corpus."""
    return name == 'chars' or name.startswith('bpe:')


def fit(name: str, splits: Splits, holdout: Holdout | None) -> Tokenizer:
    """The tokenizer made from the corpus: 'chars' from all splits, 'bpe:N' from the training split."""
    if name == 'chars':
        seen: set[str] = set()
        for sources in splits.values():
            for text in _texts(sources):
                seen.update(text)
        return Chars(sorted(seen))
    size = name.removeprefix('bpe:')
    if not size.isdecimal():
        raise CorpusError(f'{name!r}: a BPE is asked for with its vocabulary size, as in bpe:4096')
    held: frozenset[int] = frozenset()
    if holdout:
        count = sum(bool(flag & ENDS) for _, flag in _pieces(splits['train']))
        held = frozenset(holdout.documents(count).tolist())
    return train_bpe(_texts(splits['train'], held, FIT_BYTES), int(size))


def _pieces(sources: list[Source]) -> Iterator[Piece]:
    for source in sources:
        with named(source.path):
            yield from source.pieces()


def _texts(
    sources: list[Source], held: frozenset[int] = frozenset(), at_most: float = math.inf
) -> Iterator[str]:
    """The texts of the sources' pieces, without the documents `held`, until `at_most` bytes."""
    document = size = 0
    for piece, flag in _pieces(sources):
        if document not in held:
            yield piece.decode('utf-8')
            size += len(piece)
            if size >= at_most:
                return
        document += bool(flag & ENDS)


# Prepare --------------------------------------------------------------------


def prepare(
    out_dir: str | Path,
    tokenizer: str,
    splits: Splits,
    origin: dict[str, Any] | None = None,
    *,
    end: bool = True,
    begin: bool = False,
    holdout: Holdout | None = None,
    num_proc: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Meta:
    """Make the token files of `splits` ({'train': sources, 'val': sources}); the content of their meta.json.

    - tokenizer: a name that tokenizer.load knows, or 'bpe:N' or 'chars' to make one from the corpus
    - origin: what meta.json tells of the origin of the text; by default the files with their sizes
    - end: whether the end-of-text token follows every document
    - begin: whether the beginning-of-text token, or else the end-of-text token, precedes it
    - holdout: takes the validation split out of 'train'
    - num_proc: processes that encode; None means one per core
    - shard_tokens: the most tokens of a file, beyond which a split is several; 0 is no bound

    Does nothing if the folder holds just that already; goes on where an earlier call was killed. CorpusError
    and TokenizerError say what is wrong.
    """
    from filelock import FileLock, Timeout

    if 'val' not in splits and holdout is None:
        raise CorpusError('there is no text for validation: give --val_files')
    out_dir = Path(out_dir)
    work = out_dir / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(
            f'{out_dir} cannot be made or written to ({one_line(error)}): take another --out_dir'
        ) from error
    lock = FileLock(work / 'lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CorpusError(
            f'another prepare is at work in {out_dir}: wait for it, or take another --out_dir'
        ) from None
    try:
        meta = _prepare(out_dir, work, tokenizer, splits, origin, end, begin, holdout, num_proc, shard_tokens)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CorpusError(
            f'{out_dir} could not be prepared: {one_line(error)}; the same command goes on where it stopped'
        ) from error
    except KeyboardInterrupt:
        print('interrupted: the same command goes on where it stopped', file=sys.stderr)
        raise
    finally:
        lock.release()
    shutil.rmtree(work, ignore_errors=True)
    return meta


def _prepare(
    out_dir: Path,
    work: Path,
    name: str,
    splits: Splits,
    origin: dict[str, Any] | None,
    end: bool,
    begin: bool,
    holdout: Holdout | None,
    num_proc: int | None,
    shard_tokens: int,
) -> Meta:
    started = time.monotonic()
    num_proc = cores() if num_proc is None else num_proc
    if num_proc < 1:
        raise CorpusError(f'--num_proc {num_proc}: at least one process encodes')
    os.environ['TOKENIZERS_PARALLELISM'] = 'true' if num_proc > 1 else 'false'
    sources_of = {split: [identity(s) for s in sources] for split, sources in splits.items()}
    for split in set(splits) - {'train'}:
        if all(source in sources_of['train'] for source in sources_of[split]):
            raise CorpusError(
                f'all of --{split}_files are among --files, so that a loss on them would tell nothing of new '
                f'text: give other --{split}_files'
            )
    if holdout and all(isinstance(source, TextFile) for source in splits['train']):
        holdout.documents(len(splits['train']))  # files are documents: too few are seen before the work
    tokenizer = None if fitted(name) else load(name)
    wanted = {
        'format': [FORMAT, CHUNK, PIECE, CHUNK_FORMAT],
        'tokenizer': tokenizer.fingerprint if tokenizer else [name, FIT_BYTES],
        'documents': [begin, end, asdict(holdout) if holdout else None],
        'shard_tokens': shard_tokens,
        'splits': sources_of,
    }
    job = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode('ascii')).hexdigest()
    if meta := _already(out_dir, job):
        return meta
    _refuse_to_replace(out_dir, work)
    if read_if_whole(work / JOB, JOB_SHAPE).get('job') != job:
        for path in work.iterdir():
            if path.name != 'lock':
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(work / JOB, {'job': job, 'command': command_line()})
    else:
        print(f'going on with what {work} holds')
    spec_path = work / 'spec.json'
    if tokenizer is None and spec_path.is_file():
        tokenizer = from_spec(read_json(spec_path, Object()))
    if tokenizer is None:
        print(f'making the tokenizer {name} from the corpus ...', flush=True)
        tokenizer = fit(name, splits, holdout)
    write_json(spec_path, tokenizer.spec)
    dtype = dtype_for(tokenizer.vocab_size)
    end_id = tokenizer.eot if end else None
    begin_id = (tokenizer.bos if tokenizer.bos is not None else tokenizer.eot) if begin else None
    if end and end_id is None:
        print(
            'this tokenizer has no end-of-text token: documents follow each other with nothing between them'
        )
    ours = [tokenizer.encode(text) for text in ('a', ' b', 'a b')] if tokenizer.kind == 'tokenizers' else None
    if ours and ours[0] + ours[1] != ours[2]:
        print(
            f'this tokenizer puts something of its own before a text: documents of more than {PIECE:,} '
            'characters are encoded in pieces, and it stands before each'
        )
    text_bytes = sum(estimate(sources) for sources in splits.values())
    _check_disk(out_dir, work, tokenizer, splits, text_bytes, DTYPES[dtype].itemsize)

    spec = spec_path, tokenizer.fingerprint
    done = encode_splits(work, splits, spec, text_bytes, num_proc, begin_id, end_id)
    order, is_held = held_out(done['train'], holdout) if holdout else (None, None)
    shared = shared_documents(done, is_held)
    entries: dict[str, dict[str, Any]] = {}
    if order is not None and is_held is not None:
        entries = join_and_hold_out(work, done.pop('train'), order, is_held, shard_tokens)
    entries.update({s: join_chunks(work, s, found, shard_tokens) for s, found in done.items()})
    for split, entry in entries.items():
        if entry['tokens'] == 0 or entry['bytes'] == 0:
            raise CorpusError(f'{out_dir}: the split {split} has no text')
        if split in shared:
            entry['also_in'] = shared[split]
    refuse_training_text(out_dir, entries, holdout)
    meta = {
        'format': FORMAT,
        'tokenizer': {k: v for k, v in tokenizer.spec.items() if k != 'json'},
        'vocab_size': tokenizer.vocab_size,
        'dtype': dtype,
        'begin': begin_id,  # the token before every document, or None
        'splits': entries,
        'source': origin or {'files': {s: stored_files(sources) for s, sources in splits.items()}},
        'command': command_line(),
        'job': job,
    }
    _put_in_place(out_dir, work, meta, tokenizer)
    seconds = time.monotonic() - started
    report(out_dir, meta)
    print(
        f'{sum(e["bytes"] for e in entries.values()) / 1e6:.1f} MB of text in {seconds:.1f} s, '
        f'{num_proc} process(es)'
    )
    return meta


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _already(out_dir: Path, job: str) -> Meta | None:
    """The content of meta.json if the folder holds the result of just this job, else None."""
    try:
        meta = open_data(out_dir).meta
    except DataError:
        return None
    if meta.get('job') != job:
        return None
    print(f'{out_dir} is prepared already, and whole')
    report(out_dir, meta)
    return meta


def _token_files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if TOKEN_FILE.fullmatch(path.name))


def _refuse_to_replace(out_dir: Path, work: Path) -> None:
    """CorpusError if the folder has token files of which neither meta.json nor a preparation tells."""
    found = _token_files_in(out_dir)
    if found and not (out_dir / META).exists() and not (work / JOB).exists():
        raise CorpusError(
            f'{found[0]} was not made here, as {META} is missing, and would be replaced: move it, or take '
            'another --out_dir'
        )


def _check_disk(
    out_dir: Path, work: Path, tokenizer: Tokenizer, splits: Splits, text_bytes: int, itemsize: int
) -> None:
    """CorpusError if the chunks, and beside them the files joined from them, will not fit."""
    sample = next(iter(_pieces(splits['train'])), (b'', 0))[0][:65536].decode('utf-8', 'ignore')
    ratio = len(tokenizer.encode(sample)) / max(1, len(sample.encode('utf-8')))
    there = sum(path.stat().st_size for path in work.rglob('*') if path.is_file())
    needed = 1.1 * 2 * text_bytes * max(ratio, 0.01) * itemsize - there
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise CorpusError(
            f'{out_dir} has {free / 1e9:.1f} GB of free disk, about {needed / 1e9:.1f} GB are needed for '
            f'the tokens of {text_bytes / 1e9:.1f} GB of text: make room, or take another --out_dir'
        )


def _put_in_place(out_dir: Path, work: Path, meta: Meta, tokenizer: Tokenizer) -> None:
    """Move the finished files to the folder: the old meta.json goes first, the new one comes last."""
    (out_dir / META).unlink(missing_ok=True)
    for old in [*_token_files_in(out_dir), out_dir / 'tokenizer.json']:
        old.unlink(missing_ok=True)
    for split, entry in meta['splits'].items():
        for name in token_files(split, entry):
            os.replace(work / name, out_dir / name)
    if 'json' in tokenizer.spec:
        (work / 'tokenizer.json').write_bytes(tokenizer.spec['json'].encode('utf-8'))
        os.replace(work / 'tokenizer.json', out_dir / 'tokenizer.json')
    write_json(work / META, meta)
    os.replace(work / META, out_dir / META)


def report(out_dir: str | Path, meta: Meta) -> None:
    """Print the counts of a data set."""
    tokenizer = meta['tokenizer']
    kind = tokenizer.get('name', tokenizer['kind'])
    print(f'{out_dir}: {kind}, vocabulary {meta["vocab_size"]:,}, {meta["dtype"]}')
    for name, split in meta['splits'].items():
        documents, size = split.get('documents', 0), split.get('bytes', 0)
        print(
            f'  {name:5} {split["tokens"]:>14,} tokens {documents:>11,} documents '
            f'{size:>15,} bytes of text  {size / split["tokens"]:.3f} bytes per token'
        )
        if split.get('empty'):
            print(f'        {split["empty"]:,} more documents without text were left out')
        for other, count in split.get('also_in', {}).items():
            if count:
                print(f'        {count:,} of its documents are in {other} too')


def command_line() -> str | None:
    """The command that runs now, as one would type it in the repository; None if it is no prepare.py, or does
    not fit on a line."""
    script = Path(sys.argv[0]).resolve()
    if script.name != 'prepare.py':
        return None
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else str(script)
    words = ['python', shown, *sys.argv[1:]]
    command = subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)
    return None if LINE.fault(command, '') else command
