"""Text to chunks of tokens, on all cores: the work of a preparation, in files that a killed one finds again.

    sources -> pieces of text -> chunks of about 4 MB -> tokens, in .prepare/SPLIT/000000.npz and so on

At most two chunks more than there are workers are in memory. What a chunk holds depends on the text alone.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.files import CorpusError, named, one_line
from data.sources import ENDS, STARTS, Source, Splits
from data.tokendata import DTYPES, dtype_for
from data.tokenizer import Tokenizer, from_spec
from declared import Object, read_json

CHUNK = 1 << 22  # bytes of text: what a worker takes at a time
BATCH = 1 << 20  # bytes of text whose ids are Python integers at the same time
SMALL = 1 << 24  # bytes of text that are not worth starting processes for
CHUNK_FORMAT = 2  # of the files: chunks of another one are not used
TOKENS, BYTES, FLAGS, KEY = range(4)  # columns of a chunk's table, which has a row for each piece

Position = tuple[int, int]  # (source, piece of it): where to go on, without a look into the sources before
Chunk = tuple[list[bytes], list[int], Position]  # pieces, their flags, the position after them


def chunks_of(sources: list[Source], at: Position = (0, 0)) -> Iterator[Chunk]:
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
    for pieces, flags, after_this in chunks_of(sources, after):
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


def read_chunk(path: Path, *names: str) -> list[NDArray[Any]]:
    """The arrays of these names in a chunk."""
    try:
        with np.load(path) as chunk:
            return [chunk[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorpusError(
            f'{path} is damaged ({one_line(error)}): delete it, and run the same command'
        ) from error
