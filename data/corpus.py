"""Text to token files: the one path that every prepare.py takes.

    sources -> pieces of text -> chunks of about 4 MB -> tokens, on all cores -> train.bin, val.bin, meta.json

A split of more than SHARD_TOKENS tokens is written as several files, train_000.bin and so on.

Memory does not grow with the corpus: sources are read as streams, and at most two chunks more than there are
workers are in memory. A chunk is a file of its own in `.prepare/` until all chunks are there, so a killed
preparation goes on where it stopped, and nothing looks finished before meta.json, which is written last. What
a chunk holds depends on the text alone: the token files are the same byte for byte however many processes
made them, and however often they were killed.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.files import CorpusError, named, one_line
from data.sources import (
    ENDS,
    PIECE,
    STARTS,
    Piece,
    Source,
    Splits,
    TextFile,
    estimate,
    identity,
    stored_files,
)
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
CHUNK = 1 << 22  # bytes of text: what a worker takes at a time
BATCH = 1 << 20  # bytes of text whose ids are Python integers at the same time
FIT_BYTES = 1 << 30  # bytes of the training split that a BPE is trained on at most: the first
SMALL = 1 << 24  # bytes of text that are not worth starting processes for
SHARD_TOKENS = 10**9  # of a token file at most: 2 GB of uint16
TOKEN_FILE = re.compile(rf'({"|".join(SPLITS)})(_\d{{3,}})?\.bin')
CHUNK_FORMAT = 2  # of the files in .prepare: chunks of another one are not used
TOKENS, BYTES, FLAGS, KEY = range(4)  # columns of a chunk's table, which has a row for each piece

Position = tuple[int, int]  # (source, piece of it): where to go on, without a look into the sources before
Chunk = tuple[list[bytes], list[int], Position]  # pieces, their flags, the position after them


# Encoding -------------------------------------------------------------------


def chunks(sources: list[Source], at: Position = (0, 0)) -> Iterator[Chunk]:
    """The pieces of all sources from position `at` on, in chunks."""
    pieces: list[bytes] = []
    flags: list[int] = []
    size = 0
    for i in range(at[0], len(sources)):
        with named(sources[i].path):
            for j, (piece, flag) in enumerate(sources[i].pieces()):
                if (i, j) < at:
                    continue
                pieces.append(piece)
                flags.append(flag)
                size += len(piece)
                if size >= CHUNK or len(pieces) >= 1 << 16:
                    yield pieces, flags, (i, j + 1)
                    pieces, flags, size = [], [], 0
    if pieces:
        yield pieces, flags, (len(sources), 0)


@lru_cache(maxsize=1)
def stored_tokenizer(spec_path: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer of the spec in that file, which must have that fingerprint."""
    spec = read_json(spec_path, Object())
    return from_spec({**spec, 'fingerprint': fingerprint})


def encode_chunk(
    path: Path,
    spec: tuple[Path, str],
    pieces: list[bytes],
    flags: list[int],
    after: Position,
    begin: int | None,
    end: int | None,
) -> int:
    """Encode a chunk to the file `path`: tokens, a table with a row per piece, the position after it.

    - spec: the file and the fingerprint of the tokenizer
    - begin, end: ids put before and after every document that has text, or None

    Returns the bytes of text.
    """
    tokenizer = stored_tokenizer(*spec)
    dtype = DTYPES[dtype_for(tokenizer.vocab_size)]
    arrays: list[NDArray[Any]] = []
    low = 0
    while low < len(pieces):
        high, size = low, 0
        while high < len(pieces) and (size == 0 or size + len(pieces[high]) <= BATCH):
            size += len(pieces[high])
            high += 1
        encoded = tokenizer.encode_utf8_batch(pieces[low:high])
        for piece, ids, flag in zip(pieces[low:high], encoded, flags[low:high], strict=True):
            empty = not piece and flag == STARTS | ENDS
            first = [begin] if begin is not None and flag & STARTS and not empty else []
            last = [end] if end is not None and flag & ENDS and not empty else []
            arrays.append(np.concatenate([np.asarray(part, dtype) for part in (first, ids, last)]))
        low = high
    sizes = [len(piece) for piece in pieces]
    hashes = b''.join(hashlib.blake2b(piece, digest_size=8).digest() for piece in pieces)
    keys = np.frombuffer(hashes, '<i8')
    table = np.array([[len(a) for a in arrays], sizes, flags, keys], np.int64).T
    with replacing(path) as file:
        np.savez(file, tokens=np.concatenate(arrays), table=table, after=np.array(after))
    return sum(sizes)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name complete or not at all."""
    temporary = Path(f'{path}.{os.getpid()}')
    try:
        with temporary.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + '\n'
    with replacing(path) as file:
        file.write(text.encode('utf-8', 'backslashreplace'))  # a file name may have bytes that are not UTF-8


def _start_worker() -> None:
    """Workers leave Ctrl-C to the parent, use one thread each, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'

    def end_with_parent() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Inline(Executor):
    """An executor that works at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **more))
        return future


def encode_split(
    folder: Path,
    sources: list[Source],
    spec: tuple[Path, str],
    executor: Executor,
    in_flight: int,
    bar: tqdm,
    begin: int | None,
    end: int | None,
) -> list[Path]:
    """Encode the chunks of a split that are missing to folder/000000.npz and so on; the paths of all.

    in_flight: how many chunks may wait for a worker or be with one.
    """
    folder.mkdir(exist_ok=True)
    done: list[Path] = []
    after = (0, 0)
    while (path := folder / f'{len(done):06d}.npz').is_file():
        table, (source, piece) = read_chunk(path, 'table', 'after')
        after = int(source), int(piece)
        done.append(path)
        bar.update(int(table[:, BYTES].sum()))
    pending: set[Future[int]] = set()
    for pieces, flags, after_this in chunks(sources, after):
        path = folder / f'{len(done):06d}.npz'
        arguments = (path, spec, pieces, flags, after_this, begin, end)
        pending.add(executor.submit(encode_chunk, *arguments))
        done.append(path)
        while len(pending) > in_flight:
            pending = _collect(pending, bar)
    while pending:
        pending = _collect(pending, bar)
    return done


def encode_splits(
    work: Path,
    splits: Splits,
    spec: tuple[Path, str],
    text_bytes: int,
    num_proc: int,
    begin: int | None,
    end: int | None,
) -> dict[str, list[Path]]:
    """Encode every split with that many processes, and show a bar; the paths of the chunks of each split."""
    executor: Executor = Inline()
    in_flight = 0
    if num_proc > 1 and text_bytes >= SMALL:
        executor, in_flight = ProcessPoolExecutor(num_proc, get_context('spawn'), _start_worker), num_proc + 2
    often = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(total=text_bytes, unit='B', unit_scale=True, desc=work.parent.name, mininterval=often)
    done = {}
    try:
        for split, sources in splits.items():
            done[split] = encode_split(work / split, sources, spec, executor, in_flight, bar, begin, end)
        bar.total = bar.n  # the total was an estimate
    except BrokenProcessPool as error:
        raise CorpusError(
            f'a process that encodes was killed (too little memory?): run it again with --num_proc below '
            f'{num_proc}; it goes on where it stopped'
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
        bar.close()
    return done


def _collect(pending: set[Future[int]], bar: tqdm) -> set[Future[int]]:
    """Wait for one of the chunks in flight; those that still are."""
    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in finished:
        bar.update(future.result())
    return pending


# The tokenizer --------------------------------------------------------------


def fitted(name: str) -> bool:
    """Whether a tokenizer of this name is made from the corpus."""
    return name == 'chars' or name.startswith('bpe:')


def fit(name: str, splits: Splits, holdout: 'Holdout | None') -> Tokenizer:
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


# Token files ----------------------------------------------------------------


@dataclass(frozen=True)
class Holdout:
    """The documents held out for validation: those of `train_test_split(fraction, seed=seed)` of `datasets`,
    in its order. The others keep the order of the corpus, which that function shuffles."""

    fraction: float
    seed: int

    def documents(self, count: int) -> NDArray[np.int64]:
        """Their numbers among `count` documents, in the order of the validation split."""
        held = math.ceil(self.fraction * count)
        if not 0 < held < count:
            raise CorpusError(
                f'holding out {self.fraction} of {count} document(s) leaves a split empty: give --val_files'
            )
        order = np.random.default_rng(self.seed).permutation(count)
        return np.array(order[:held], np.int64)


class TokenWriter:
    """The token file of a split as it is written, or its shards: counts, and the SHA-256 of each."""

    def __init__(self, folder: Path, name: str, shard_tokens: int) -> None:
        """shard_tokens: the most tokens of a file; 0 is no bound"""
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.shards: list[dict[str, Any]] = []  # that are complete
        self._begin_shard()
        self.tokens = self.documents = self.empty = self.bytes = 0

    def write(self, tokens: NDArray[Any], table: NDArray[np.int64]) -> None:
        """Append tokens (n,), which are those of the pieces in `table`."""
        written = 0
        while written < len(tokens):
            if self.shard_tokens and self.in_shard == self.shard_tokens:
                self._end_shard()
                self._begin_shard()
            room = self.shard_tokens - self.in_shard if self.shard_tokens else len(tokens)
            part = np.ascontiguousarray(tokens[written : written + room])
            self.file.write(part.data)
            self.digest.update(part.data)
            self.in_shard += len(part)
            written += len(part)
        empty = (table[:, FLAGS] == STARTS | ENDS) & (table[:, BYTES] == 0)
        self.tokens += len(tokens)
        self.documents += int((table[~empty, FLAGS] & ENDS > 0).sum())
        self.empty += int(empty.sum())
        self.bytes += int(table[:, BYTES].sum())

    def finish(self) -> dict[str, Any]:
        """Make the files durable; the entry of the split in meta.json."""
        self._end_shard()
        entry = {'tokens': self.tokens, 'documents': self.documents, 'bytes': self.bytes, 'empty': self.empty}
        if len(self.shards) > 1:
            return {**entry, 'shards': self.shards}
        os.replace(self.file.name, self.folder / f'{self.name}.bin')
        return {**entry, 'sha256': self.shards[0]['sha256']}

    def _begin_shard(self) -> None:
        self.file = open(self.folder / f'{self.name}_{len(self.shards):03d}.bin', 'wb')
        self.digest, self.in_shard = hashlib.sha256(), 0

    def _end_shard(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.shards.append({'tokens': self.in_shard, 'sha256': self.digest.hexdigest()})


def read_chunk(path: Path, *names: str) -> list[NDArray[Any]]:
    """The arrays of these names in a chunk."""
    try:
        with np.load(path) as chunk:
            return [chunk[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorpusError(
            f'{path} is damaged ({one_line(error)}): delete it, and run the same command'
        ) from error


def join_chunks(work: Path, name: str, done: list[Path], shard_tokens: int) -> dict[str, Any]:
    """Join the chunks of a split to token files in `work`; its entry in meta.json."""
    split = TokenWriter(work, name, shard_tokens)
    for path in done:
        tokens, table = read_chunk(path, 'tokens', 'table')
        split.write(tokens, table)
    return split.finish()


def held_out(done: list[Path], holdout: Holdout) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The numbers of the documents held out, in the order of val; and of every document, whether it is."""
    count = sum(len(rows) for rows in document_rows(done))
    order = holdout.documents(count)
    is_held = np.zeros(count, bool)
    is_held[order] = True
    return order, is_held


def join_and_hold_out(
    work: Path, done: list[Path], order: NDArray[np.int64], is_held: NDArray[np.bool_], shard_tokens: int
) -> dict[str, dict[str, Any]]:
    """Join the chunks of one corpus to the token files of train and of val; their entries in meta.json.

    order, is_held: as `held_out` gives them
    """
    train, document = TokenWriter(work, 'train', shard_tokens), 0
    rows_of: dict[int, list[list[int]]] = {}  # the table of each document held out
    with open(work / 'held.bin', 'wb') as file:  # in the order of the corpus
        for path in done:
            tokens, table = read_chunk(path, 'tokens', 'table')
            ends = table[:, FLAGS] & ENDS > 0
            documents = document + np.cumsum(ends) - ends  # of each piece
            document += int(ends.sum())
            held = is_held[documents]
            of_held = np.repeat(held, table[:, TOKENS])
            file.write(tokens[of_held].data)
            train.write(tokens[~of_held], table[~held])
            for number, row in zip(documents[held].tolist(), table[held].tolist(), strict=True):
                rows_of.setdefault(number, []).append(row)
    tables = {number: np.array(rows_of[number]) for number in sorted(rows_of)}
    lengths = [int(table[:, TOKENS].sum()) for table in tables.values()]
    end_of = dict(zip(tables, np.cumsum(lengths).tolist(), strict=True))
    stored = np.memmap(work / 'held.bin', tokens.dtype, 'r') if any(lengths) else tokens[:0]
    val = TokenWriter(work, 'val', shard_tokens)
    for number in order.tolist():
        end = end_of[number]
        val.write(stored[end - int(tables[number][:, TOKENS].sum()) : end], tables[number])
    return {'train': train.finish(), 'val': val.finish()}


# Documents that splits share ------------------------------------------------


def document_rows(done: list[Path]) -> Iterator[NDArray[np.int64]]:
    """For each chunk (n, 2): the bytes and the key of each document that ends in it.

    The key of a document is the sum of its pieces' hashes of 64 bits; how a document is divided into pieces
    depends on its text alone.
    """
    before = np.zeros((1, 2), np.int64)  # of the pieces of a document that began in a chunk before
    for path in done:
        (table,) = read_chunk(path, 'table')
        sums = before + np.cumsum(table[:, [BYTES, KEY]], axis=0)  # keys wrap around
        ends = sums[table[:, FLAGS] & ENDS > 0]
        yield np.diff(ends, axis=0, prepend=0)
        before = sums[-1:] - (ends[-1:] if len(ends) else 0)


def shared_documents(
    done: dict[str, list[Path]], is_held: NDArray[np.bool_] | None
) -> dict[str, dict[str, int]]:
    """How many documents of val and of test are also in the splits before them: {'val': {'train': 3}, ...}.

    is_held: of the documents of 'train', whether they are those of val; None if val has chunks of its own
    """

    def keys(split: str) -> Iterator[NDArray[np.int64]]:
        number = 0
        held = is_held if split in ('train', 'val') else None
        for rows in document_rows(done['train' if held is not None else split]):
            wanted = rows[:, 0] > 0  # with text
            if held is not None:
                wanted &= held[number : number + len(rows)] == (split == 'val')
            number += len(rows)
            yield rows[wanted, 1]

    splits = [split for split in SPLITS if split in done or (split == 'val' and is_held is not None)]
    found: dict[str, dict[str, int]] = {}
    for i, split in enumerate(splits[1:], 1):
        mine, counts = np.unique(np.concatenate([*keys(split), np.zeros(0, np.int64)]), return_counts=True)
        found[split] = {}
        for other in splits[:i]:
            there = np.zeros(len(mine) + 1, bool)  # the last: beyond all of mine
            for theirs in keys(other):
                at = np.searchsorted(mine, theirs)
                there[at[np.append(mine, 0)[at] == theirs]] = True
            found[split][other] = int(counts[there[:-1]].sum())
    return found


def refuse_training_text(out_dir: Path, entries: dict[str, dict[str, Any]], holdout: Holdout | None) -> None:
    """CorpusError if all documents of val or of test are in train too."""
    for split, entry in entries.items():
        if split != 'train' and entry['documents'] == entry['also_in']['train']:
            fix = 'remove the repetitions' if split == 'val' and holdout else f'give other --{split}_files'
            raise CorpusError(
                f'{out_dir}: all {entry["documents"]:,} document(s) of {split} are in train too, so that a '
                f'loss on them would tell nothing of new text: {fix}'
            )


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
