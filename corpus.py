"""Text to token files: the one path that every `data/*/prepare.py` takes.

    sources: text, JSON lines, parquet; compressed or not; local or on the Hugging Face Hub
      -> pieces of text -> chunks of about 4 MB -> tokens, on all cores -> train.bin, val.bin, meta.json

Memory does not grow with the corpus: a source is read as a stream, and at most two chunks per worker are
under way. A chunk is a file of its own in `.prepare/` until all are there, so a killed run goes on where it
stopped, and nothing looks finished before meta.json, which is written last. What a chunk holds depends on the
text alone: the token files are the same byte for byte however many processes made them and however often they
were killed.

Hugging Face `datasets` finds the files of a repository (configuration, splits, revision). Their rows are read
here, by json and pyarrow: the JSON reader of `datasets` 5.2 fails where a field first appears late in a file,
and its streaming parquet reader was seen to hold 1.1 GB for a file of 0.4 GB.
"""

import argparse
import codecs
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from glob import glob, has_magic
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokendata import DTYPES, FORMAT, META, WORK, DataError, dtype_for, open_data
from tokenizer import Chars, TokenizerError, from_spec, load, train_bpe, well_formed

ROOT = Path(__file__).resolve().parent
PIECE = 1 << 18  # characters: a longer document is encoded in pieces
CHUNK = 1 << 22  # bytes of text: what a worker takes at a time
BATCH = 1 << 20  # bytes of text whose ids are Python integers at the same time
FIT_BYTES = 1 << 30  # bytes of the training split that a BPE is trained on at most: the first
SMALL = 1 << 24  # bytes of text that are not worth starting processes for
STARTS, ENDS = 1, 2  # flags of a piece: it begins a document, it ends one
COMPRESSED = {
    '.gz': 4,
    '.xz': 5,
    '.bz2': 5,
    '.zst': 4,
    '.zip': 3,
}  # suffix -> about how much text a byte holds
RECORDS = {'.jsonl': 1, '.ndjson': 1, '.json': 1, '.parquet': 1.7}
TEXT = (
    '.txt',
    '.text',
    '.md',
    '.rst',
    '.tex',
    '.html',
    '.xml',
    '.py',
    '.c',
    '.h',
    '.cpp',
    '.rs',
    '.go',
    '.js',
)
BOUNDARY = re.compile(r'[^\W_](?=[ \n])')


class CorpusError(Exception):
    """Text that cannot be made into token files, in one line: what, why, and the mend."""


# --- reading: a source has `path` (or None) and `pieces()`, which yields (UTF-8 bytes, flags)
# -----------------


def suffixes(path):
    """'a/b.jsonl.xz' -> ('.jsonl', '.xz'): the format, and the compression or ''."""
    path = Path(path)
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSED else (last, '')


def open_bytes(path):
    """A local file or a URL that fsspec knows (hf://...), decompressed as its suffix says -> binary file."""
    import fsspec
    from fsspec.utils import infer_compression

    compression = suffixes(path)[1]
    if not compression and '://' not in path:
        return open(path, 'rb')
    if compression and infer_compression(path) is None:
        raise CorpusError(
            f'{path}: nothing here reads {compression}: pip install zstandard, or decompress it'
        )
    return fsspec.open(path, 'rb', compression='infer').open()


def stored_size(path):
    """Bytes of the file as it is stored."""
    if '://' not in path:
        return Path(path).stat().st_size
    import fsspec

    filesystem, inner = fsspec.core.url_to_fs(path)
    return filesystem.info(inner)['size']


def boundary(text, low, high):
    """The last place in text[low:high] where cutting does not change the tokens.

    That is between a letter or digit and a space or newline: the word patterns of GPT-2, of the newer
    tiktoken encodings and of byte-level BPEs never match across it and never look back over it. Where there
    is none the cut is at `high`, and a token or two may differ from those of the uncut text.
    """
    for start in (max(low, high - 4096), low):
        ends = [match.end() for match in BOUNDARY.finditer(text, start, high + 1)]
        if ends:
            return ends[-1]
    return high


def cut(strings):
    """str after str, together one document -> str after str of at most PIECE characters, cut at boundaries.

    The result depends on the document alone, not on how it was divided before.
    """
    held, size = [], 0
    for part in strings:
        held.append(part)
        size += len(part)
        if size > PIECE:
            text, at = ''.join(held), 0
            while len(text) - at > PIECE:
                end = boundary(text, at, at + PIECE)
                yield text[at:end]
                at = end
            held, size = [text[at:]], len(text) - at
    if size:
        yield ''.join(held)


def flagged(pieces):
    """The pieces (bytes) of one document -> (bytes, flags); a document without text is one empty piece."""
    held, flags = b'', STARTS
    for piece in pieces:
        if held:
            yield held, flags
            flags = 0
        held = piece
    yield held, flags | ENDS


def utf8(strings):
    return (well_formed(text).encode('utf-8') for text in strings)


@dataclass(frozen=True)
class TextFile:
    """A text file: one document. With start and stop a part of it, in bytes, moved to whole characters."""

    path: str
    start: int = 0
    stop: int | None = None
    raw: bool = False  # the bytes as they are, for the bytes tokenizer: any file will do, and cuts are exact

    def pieces(self):
        yield from flagged(self.blocks() if self.raw else utf8(cut(self.texts())))

    def texts(self):
        kind = 'utf-8' if self.start else 'utf-8-sig'  # a byte order mark is no text
        decoder, position = codecs.getincrementaldecoder(kind)(), self.start
        try:
            for block in self.blocks():
                yield decoder.decode(block)
                position += len(block)
            decoder.decode(b'', final=True)
        except UnicodeDecodeError as error:
            at = position - len(decoder.getstate()[0]) + error.start
            raise CorpusError(
                f'{self.path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {at:,}; convert it '
                '(iconv -f ENCODING -t utf-8), or read its bytes with --tokenizer bytes'
            ) from error

    def blocks(self):
        with open_bytes(self.path) as file:
            file.seek(self.start)
            left = math.inf if self.stop is None else self.stop - self.start
            skip = 3 if self.start and not self.raw else 0  # the end of a character that the part before has
            while left > 0 and (block := file.read(int(min(PIECE, left)))):
                left -= len(block)
                while skip and block and block[0] & 0xC0 == 0x80:
                    block, skip = block[1:], skip - 1
                skip = 0
                if left == 0 and not self.raw:
                    tail = file.read(3)
                    block += tail[: next((i for i, b in enumerate(tail) if b & 0xC0 != 0x80), len(tail))]
                yield block


def length(path):
    """Bytes of the decompressed file."""
    if not suffixes(path)[1]:
        return stored_size(path)
    return sum(len(block) for block in TextFile(path, raw=True).blocks())


@dataclass(frozen=True)
class Records:
    """JSON lines, a JSON array or parquet: each row a document, its text made by `template` from its fields.

    A null is the empty text. Other columns may hold anything.
    """

    path: str
    template: str = '{text}'

    def pieces(self):
        for text in self.texts():
            yield from flagged(utf8(cut([text])))

    def texts(self):
        fields = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        parquet = suffixes(self.path)[0] == '.parquet'
        for where, row in (_parquet_rows if parquet else _json_rows)(self.path, fields):
            if not isinstance(row, dict) or not all(name in row for name in fields):
                missing = [name for name in fields if not isinstance(row, dict) or name not in row]
                has = ', '.join(row) if isinstance(row, dict) else type(row).__name__
                raise CorpusError(f'{where} has no field {missing[0]!r}: it has {has}; give --field')
            values = {name: '' if row[name] is None else row[name] for name in fields}
            for name, value in values.items():
                if not isinstance(value, str):
                    raise CorpusError(f'{where}: field {name!r} is not text but {type(value).__name__}')
            yield self.template.format_map(values)


def _json_rows(path, fields):
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            where = f'{path}, line {number}'
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                if number == 1 and line.lstrip().startswith(b'['):  # an array: read as a whole
                    yield from (
                        (f'{path}, row {i}', row) for i, row in enumerate(json.loads(line + file.read()), 1)
                    )
                else:
                    yield where, json.loads(line)
            except ValueError as error:
                raise CorpusError(f'{where} is not JSON: {error}') from error


def _parquet_rows(path, fields):
    import pyarrow.parquet as pq

    with open_bytes(path) as file:
        table = pq.ParquetFile(file)
        columns = [name for name in fields if name in table.schema_arrow.names]
        if len(columns) < len(fields):
            yield f'{path}', dict.fromkeys(table.schema_arrow.names)  # what is missing is said in one place
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f'{path}, row {number}', row


@dataclass(frozen=True)
class Joined:
    """The rows of several sources as one document, joined as they stand."""

    sources: tuple

    @property
    def path(self):
        return self.sources[0].path

    def pieces(self):
        yield from flagged(utf8(cut(text for source in self.sources for text in source.texts())))


def paths(given):
    """Files, folders (everything below that looks like text or records), patterns and URLs -> sorted file
    names."""
    found = []
    for name in map(str, given):
        if '://' in name or Path(name).is_file():
            found.append(name)
        elif Path(name).is_dir():
            below = sorted(p for p in Path(name).rglob('*') if p.is_file() and not p.name.startswith('.'))
            usable = [str(p) for p in below if suffixes(p)[0] in (*TEXT, *RECORDS)]
            if len(usable) < len(below):
                print(
                    f'{name}: {len(below) - len(usable)} of {len(below)} files are neither text nor records'
                )
            found += usable
        elif has_magic(name):
            found += sorted(p for p in glob(name, recursive=True) if Path(p).is_file())
        else:
            raise CorpusError(f'{name} does not exist')
    if not found:
        raise CorpusError(f'no text in {", ".join(map(str, given))}')
    return found


def file_source(path, template='{text}', raw=False):
    """The source that reads a file of this name."""
    kind = suffixes(path)[0]
    if kind in RECORDS:
        return Records(path, template)
    if kind in ('.csv', '.tsv', '.arrow', '.feather', '.pdf', '.docx', '.tar', '.pkl', '.npy', '.bin'):
        raise CorpusError(f'{path}: {kind} is not read here; convert it to .jsonl, .parquet or plain text')
    return TextFile(path, raw=raw)


def file_sources(given, template='{text}', raw=False):
    return [file_source(path, template, raw) for path in paths(given)]


def hub_sources(repo, revision=None, config=None, template='{text}'):
    """The files of a dataset repository -> ({split: [Records]}, what meta.json says of the source).

    The revision becomes the commit that it names now. With HF_HUB_OFFLINE=1 the copy in the local cache is
    used.
    """
    import datasets
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if constants.HF_HUB_OFFLINE:
            place = snapshot_download(repo, repo_type='dataset', revision=revision, local_files_only=True)
            commit = Path(place).name
            builder = datasets.load_dataset_builder(place, name=config)
        else:
            commit = HfApi().dataset_info(repo, revision=revision).sha
            builder = datasets.load_dataset_builder(repo, name=config, revision=commit)
    except Exception as error:  # whatever the network brings: one line that says what to do without one
        at = f' --revision {revision}' if revision else ''
        raise CorpusError(
            f'cannot reach https://huggingface.co/datasets/{repo} ({type(error).__name__}: '
            f'{_one_line(error)}); where there is a network run: hf download {repo} --repo-type dataset{at}; '
            'then here set HF_HUB_OFFLINE=1, and HF_HOME to the folder of that cache, or give --files'
        ) from error
    names = {'validation': 'val', 'valid': 'val', 'dev': 'val'}
    splits = {
        names.get(str(split), str(split)): list(files) for split, files in builder.config.data_files.items()
    }
    return (
        {split: [file_source(str(file), template) for file in files] for split, files in splits.items()},
        {'repo': repo, 'revision': commit, **({'config': config} if config else {})},
    )


def download(url, sha256, folder):
    """Fetches a file once, checked against its SHA-256 -> path."""
    from urllib.request import urlopen

    path = Path(folder) / url.rsplit('/', 1)[-1]
    if path.is_file() and _sha256(path) == sha256:
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.part')
    try:
        with urlopen(url, timeout=60) as response, partial.open('wb') as file:
            shutil.copyfileobj(response, file, 1 << 20)
    except OSError as error:
        raise CorpusError(
            f'cannot download {url} ({_one_line(error)}); without a network: put it at {path}, or '
            'give another copy with --files'
        ) from error
    if _sha256(partial) != sha256:
        raise CorpusError(
            f'{url} is not what it was (SHA-256 {_sha256(partial)}, expected {sha256}): see {partial}'
        )
    os.replace(partial, path)
    return str(path)


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error):
    return ' '.join(str(error).split())[:300]


@contextmanager
def named(source):
    """Turns whatever reading a source may raise into one line with its name."""
    try:
        yield
    except (CorpusError, TokenizerError, BrokenProcessPool):
        raise
    except Exception as error:
        raise CorpusError(
            f'{source.path} cannot be read: {type(error).__name__}: {_one_line(error)}'
        ) from error


# --- encoding
# -------------------------------------------------------------------------------------------------


def chunks(sources, at=(0, 0)):
    """Divides the pieces of all sources into chunks, from position `at` on -> (pieces, flags, position
    after).

    A position is (source, piece of it), so that going on needs no look into the sources before.
    """
    pieces, flags, size = [], [], 0
    for i in range(at[0], len(sources)):
        with named(sources[i]):
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
def _tokenizer(spec_path):
    return from_spec(json.loads(Path(spec_path).read_text(encoding='utf-8')))


def encode_chunk(path, spec_path, pieces, flags, after, begin, end):
    """Encodes a chunk to the file `path`: tokens, a row (tokens, bytes, flags) per piece, the position after.

    `begin`, `end`: ids put before and after every document, or None -> bytes of text.
    """
    tokenizer = _tokenizer(spec_path)
    dtype = DTYPES[dtype_for(tokenizer.vocab_size)]
    arrays, low = [], 0
    while low < len(pieces):
        high, size = low, 0
        while high < len(pieces) and (size == 0 or size + len(pieces[high]) <= BATCH):
            size += len(pieces[high])
            high += 1
        for ids, flag in zip(tokenizer.encode_utf8_batch(pieces[low:high]), flags[low:high], strict=True):
            if begin is not None and flag & STARTS:
                ids = [begin, *ids]
            if end is not None and flag & ENDS:
                ids = [*ids, end]
            arrays.append(np.fromiter(ids, dtype, len(ids)))
        low = high
    sizes = [len(piece) for piece in pieces]
    table = np.array([[len(a) for a in arrays], sizes, flags], np.int64).T
    with replacing(path) as file:
        np.savez(file, tokens=np.concatenate(arrays), table=table, after=np.array(after))
    return sum(sizes)


@contextmanager
def replacing(path):
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


def write_json(path, content):
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + '\n').encode('utf-8'))


def _start_worker():
    """Workers leave Ctrl-C to the parent, use one thread each, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Inline(Executor):
    """An executor that works at once, in this process."""

    def submit(self, function, /, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def encode_split(folder, sources, spec_path, executor, under_way, bar, begin, end):
    """Encodes the chunks of a split that are not there yet to folder/000000.npz and so on -> their paths."""
    folder.mkdir(exist_ok=True)
    done, after = [], (0, 0)
    while (path := folder / f'{len(done):06d}.npz').is_file():
        try:
            with np.load(path) as chunk:
                size, after = int(chunk['table'][:, 1].sum()), tuple(int(i) for i in chunk['after'])
        except Exception:  # cut short, by a power failure: it is encoded again
            break
        done.append(path)
        bar.update(size)
    pending = set()

    def collect(least):
        """Waits until at most `least` chunks are under way."""
        nonlocal pending
        while len(pending) > least:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                bar.update(future.result())

    for pieces, flags, after_this in chunks(sources, after):
        path = folder / f'{len(done):06d}.npz'
        arguments = (path, spec_path, pieces, flags, after_this, begin, end)
        pending.add(executor.submit(encode_chunk, *arguments))
        done.append(path)
        collect(under_way)
    collect(0)
    return done


# --- the tokenizer
# --------------------------------------------------------------------------------------------


def fitted(name):
    """Whether a tokenizer of this name is made from the corpus."""
    return name == 'chars' or name.startswith('bpe:')


def fit(name, splits, holdout):
    """The tokenizer made from the corpus: 'chars' from all splits, 'bpe:N' from the training split."""
    if name == 'chars':
        seen = set()
        for sources in splits.values():
            for text in _texts(sources):
                seen.update(text)
        return Chars(sorted(seen))
    size = name.removeprefix('bpe:')
    if not size.isdecimal():
        raise CorpusError(f'{name!r}: a BPE is asked for with its vocabulary size, as in bpe:4096')
    held = frozenset()
    if holdout:
        held = frozenset(holdout.documents(sum(flag >> 1 for _, flag in _pieces(splits['train']))).tolist())
    return train_bpe(_texts(splits['train'], held, FIT_BYTES), int(size))


def _pieces(sources):
    for source in sources:
        with named(source):
            yield from source.pieces()


def _texts(sources, held=frozenset(), at_most=math.inf):
    """The texts of the sources' pieces, documents `held` left out, until `at_most` bytes."""
    document = size = 0
    for piece, flag in _pieces(sources):
        if document not in held:
            yield piece.decode('utf-8')
            size += len(piece)
            if size >= at_most:
                return
        document += bool(flag & ENDS)


# --- token files
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holdout:
    """The documents held out for validation: those that `datasets`' train_test_split(fraction, seed) holds
    out, in its order (the rest keeps the order of the corpus, which that function shuffles)."""

    fraction: float
    seed: int

    def documents(self, count):
        """Their numbers among `count` documents, in the order of the validation split."""
        held = math.ceil(self.fraction * count)
        if not 0 < held < count:
            raise CorpusError(
                f'holding out {self.fraction} of {count} document(s) leaves a split empty: give --val_files, '
                'or cut one text by position with data/shakespeare/prepare.py --files'
            )
        return np.random.default_rng(self.seed).permutation(count)[:held]


class Split:
    """A token file as it is written: counts and SHA-256."""

    def __init__(self, path):
        self.file, self.digest = open(path, 'wb'), hashlib.sha256()
        self.tokens = self.documents = self.bytes = 0

    def write(self, tokens, documents, size):
        block = np.ascontiguousarray(tokens).data
        self.file.write(block)
        self.digest.update(block)
        self.tokens += len(tokens)
        self.documents += int(documents)
        self.bytes += int(size)

    def finish(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        counts = {'tokens': self.tokens, 'documents': self.documents, 'bytes': self.bytes}
        return {**counts, 'sha256': self.digest.hexdigest()}


def _load_chunk(path):
    with np.load(path) as chunk:
        return chunk['tokens'], chunk['table']


def join_chunks(work, name, done):
    """The chunks of a split -> work/name.bin; its entry of meta.json."""
    split = Split(work / f'{name}.bin')
    for path in done:
        tokens, table = _load_chunk(path)
        split.write(tokens, (table[:, 2] & ENDS > 0).sum(), table[:, 1].sum())
    return split.finish()


def join_and_hold_out(work, done, holdout):
    """The chunks of one corpus -> work/train.bin and work/val.bin; their entries of meta.json."""
    count = 0
    for path in done:
        with np.load(path) as chunk:
            count += int((chunk['table'][:, 2] & ENDS > 0).sum())
    order = holdout.documents(count)
    is_held = np.zeros(count, bool)
    is_held[order] = True
    train, document = Split(work / 'train.bin'), 0
    tokens_of, bytes_of = Counter(), Counter()  # of the documents held out
    with open(work / 'held.bin', 'wb') as file:  # in the order of the corpus
        for path in done:
            tokens, table = _load_chunk(path)
            ends = table[:, 2] & ENDS > 0
            documents = document + np.cumsum(ends) - ends  # of each piece
            document += int(ends.sum())
            held = is_held[documents]
            of_held = np.repeat(held, table[:, 0])
            file.write(tokens[of_held].data)
            train.write(tokens[~of_held], ends[~held].sum(), table[~held, 1].sum())
            for number, row in zip(documents[held].tolist(), table[held].tolist(), strict=True):
                tokens_of[number] += row[0]
                bytes_of[number] += row[1]
    val, corpus_order = Split(work / 'val.bin'), sorted(tokens_of)
    starts = dict(
        zip(corpus_order, np.cumsum([0, *(tokens_of[n] for n in corpus_order)]).tolist(), strict=False)
    )
    stored = np.memmap(work / 'held.bin', tokens.dtype, 'r') if any(tokens_of.values()) else tokens[:0]
    for number in order.tolist():
        val.write(stored[starts[number] : starts[number] + tokens_of[number]], 1, bytes_of[number])
    return {'train': train.finish(), 'val': val.finish()}


# --- prepare
# --------------------------------------------------------------------------------------------------


def identity(source):
    """What makes a source another one, JSON-able: its class and fields, and size and time of its file."""
    if isinstance(source, Joined):
        return [identity(part) for part in source.sources]
    stat = Path(source.path).stat() if '://' not in source.path else None
    return [type(source).__name__, asdict(source), stat and [stat.st_size, stat.st_mtime_ns]]


def estimate(sources):
    """About how many bytes of text the sources hold, from the sizes of their files: for the bar and the
    disk."""
    total = 0
    for source in sources:
        if isinstance(source, Joined):
            total += estimate(source.sources)
        elif isinstance(source, TextFile) and source.stop is not None:
            total += source.stop - source.start
        else:
            kind, compression = suffixes(source.path)
            total += stored_size(source.path) * RECORDS.get(kind, 1) * COMPRESSED.get(compression, 1)
    return int(total)


def prepare(out_dir, tokenizer, splits, source=None, *, end=True, begin=False, holdout=None, num_proc=None):
    """Makes the token files of `splits` ({'train': sources, 'val': sources, ...}) in `out_dir` -> meta.json's
    content.

    tokenizer: a name that tokenizer.load knows, or 'bpe:N' or 'chars' to make one from the corpus. source:
    what meta.json says of where the text is from; else the files with their sizes. end, begin: whether every
    document is followed by the end-of-text token and preceded by the beginning-of-text token (the end-of-text
    token where the tokenizer has no other). holdout: takes the validation split out of the only split,
    'train'. num_proc: processes that encode; None is one per core.

    Does nothing where the folder holds just that already; goes on where an earlier call was killed.
    """
    from filelock import FileLock, Timeout

    out_dir = Path(out_dir)
    work = out_dir / WORK
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / 'lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CorpusError(
            f'another prepare is at work in {out_dir}: wait for it, or take another --out_dir'
        ) from None
    try:
        meta = _prepare(out_dir, work, tokenizer, splits, source, end, begin, holdout, num_proc)
    finally:
        lock.release()
    shutil.rmtree(work, ignore_errors=True)
    return meta


def _prepare(out_dir, work, name, splits, source, end, begin, holdout, num_proc):
    started = time.monotonic()
    num_proc = num_proc or len(
        os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count())
    )
    os.environ['TOKENIZERS_PARALLELISM'] = 'true' if num_proc > 1 else 'false'
    tokenizer = None if fitted(name) else load(name)
    job = {
        'format': [FORMAT, CHUNK, PIECE],
        'tokenizer': tokenizer.fingerprint if tokenizer else [name, FIT_BYTES],
        'documents': [begin, end, asdict(holdout) if holdout else None],
        'splits': {split: [identity(s) for s in sources] for split, sources in splits.items()},
    }
    job = hashlib.sha256(json.dumps(job, sort_keys=True).encode('ascii')).hexdigest()
    if meta := _already(out_dir, job):
        return meta
    if not _same_job(work, job):
        for path in work.iterdir():
            if path.name != 'lock':
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(work / 'job.json', job)
    else:
        print(f'going on with what {work} holds')
    spec_path = work / 'spec.json'
    if tokenizer is None and spec_path.is_file():
        tokenizer = _tokenizer(str(spec_path))
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
    text_bytes = {split: estimate(sources) for split, sources in splits.items()}
    _check_disk(out_dir, work, tokenizer, splits, sum(text_bytes.values()), DTYPES[dtype].itemsize)

    if num_proc == 1 or sum(text_bytes.values()) < SMALL:
        executor, under_way = Inline(), 0
    else:
        executor = ProcessPoolExecutor(num_proc, get_context('spawn'), _start_worker)
        under_way = 2 * num_proc
    bar = tqdm(
        total=sum(text_bytes.values()),
        unit='B',
        unit_scale=True,
        desc=f'{out_dir.name}: text',
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    done = {}
    try:
        for split, sources in splits.items():
            done[split] = encode_split(
                work / split, sources, str(spec_path), executor, under_way, bar, begin_id, end_id
            )
        bar.total = bar.n  # the total was an estimate
    except BrokenProcessPool as error:
        raise CorpusError(
            f'a process that encodes was killed (too little memory?): run it again with --num_proc below '
            f'{num_proc}; it goes on where it stopped'
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
        bar.close()
    if holdout:
        entries = join_and_hold_out(work, done['train'], holdout)
    else:
        entries = {split: join_chunks(work, split, paths) for split, paths in done.items()}
    for split, entry in entries.items():
        if entry['tokens'] == 0:
            raise CorpusError(f'{out_dir}: the split {split} has no text')
    files = {split: [[s.path, stored_size(s.path)] for s in sources] for split, sources in splits.items()}
    meta = {
        'format': FORMAT,
        'tokenizer': {k: v for k, v in tokenizer.spec.items() if k != 'json'},
        'vocab_size': tokenizer.vocab_size,
        'dtype': dtype,
        'splits': entries,
        'source': source or {'files': files},
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


def _already(out_dir, job):
    """meta.json's content where the folder holds the result of just this job, else None."""
    try:
        meta = open_data(out_dir).meta
    except DataError:
        return None
    if meta.get('job') != job:
        return None
    print(f'{out_dir} is prepared already, and whole')
    report(out_dir, meta)
    return meta


def _same_job(work, job):
    try:
        return json.loads((work / 'job.json').read_text(encoding='utf-8')) == job
    except (OSError, ValueError):
        return False


def _check_disk(out_dir, work, tokenizer, splits, text_bytes, itemsize):
    """Refuses to start where the tokens will not fit: the chunks and the files joined from them, side by
    side."""
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


def _put_in_place(out_dir, work, meta, tokenizer):
    """Moves the finished files to the folder: the old meta.json goes first, the new one comes last."""
    (out_dir / META).unlink(missing_ok=True)
    for old in ('train.bin', 'val.bin', 'test.bin', 'tokenizer.json'):
        (out_dir / old).unlink(missing_ok=True)
    for split in meta['splits']:
        os.replace(work / f'{split}.bin', out_dir / f'{split}.bin')
    if 'json' in tokenizer.spec:
        with replacing(out_dir / 'tokenizer.json') as file:
            file.write(tokenizer.spec['json'].encode('utf-8'))
    write_json(out_dir / META, meta)


def report(out_dir, meta):
    """Prints the counts of a data set."""
    tokenizer = meta['tokenizer']
    kind = tokenizer.get('name', tokenizer['kind'])
    print(f'{out_dir}: {kind}, vocabulary {meta["vocab_size"]:,}, {meta["dtype"]}')
    for name, split in meta['splits'].items():
        ratio = split['bytes'] / split['tokens']
        print(
            f'  {name:5} {split["tokens"]:>14,} tokens {split["documents"]:>11,} documents '
            f'{split["bytes"]:>15,} bytes of text  {ratio:.3f} bytes per token'
        )


def command_line():
    """The command that runs now, as one would type it in the repository, or None where no prepare.py runs."""
    script = Path(sys.argv[0]).resolve()
    if script.name != 'prepare.py':
        return None
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else str(script)
    words = ['python', shown, *sys.argv[1:]]
    return subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)


# --- what the scripts in data/*/ have in common
# -----------------------------------------------------------------


def parser(script, description, tokenizer, hub=None):
    """The options that every prepare.py has; `hub`: (repository, revision), for those with a Hub source."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = options.add_argument
    add('--out_dir', default=str(Path(script).resolve().parent), help='folder of the token files')
    add(
        '--tokenizer',
        default=tokenizer,
        help=f'{tokenizer} unless given; the module tokenizer lists the names',
    )
    add('--num_proc', type=int, help='processes that encode; one per core unless given')
    local = 'local text, .jsonl or .parquet (also .gz .xz .bz2 .zst .zip), folders or patterns'
    add('--files', nargs='+', metavar='FILE', help=f'{local}, in place of the usual source')
    add(
        '--val_files',
        nargs='+',
        metavar='FILE',
        help='the same for validation, else it is taken from --files',
    )
    add('--test_files', nargs='+', metavar='FILE', help='the same for a test split')
    if hub:
        add('--repo', default=hub[0], help=f'dataset on the Hugging Face Hub ({hub[0]})')
        add('--revision', default=hub[1], help=f'its branch, tag or commit ({hub[1] or "main"})')
    return options


def local_splits(args, template='{text}'):
    """--files, --val_files, --test_files -> {split: sources}."""
    given = {'train': args.files, 'val': args.val_files, 'test': args.test_files}
    if not args.files:
        raise CorpusError('--val_files and --test_files go with --files, which is missing')
    raw = args.tokenizer == 'bytes'
    return {split: file_sources(files, template, raw) for split, files in given.items() if files}


def run(main):
    """Runs a script's main: what goes wrong in a known way is one line, and the exit status is not 0."""
    try:
        main()
    except (CorpusError, TokenizerError, DataError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted: run the same command again to go on')
    except OSError as error:
        sys.exit(f'error: {_one_line(error)}')
