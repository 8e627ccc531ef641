"""Where text comes from: files, rows of files, repositories of the Hugging Face Hub, all read as streams.

A source is a dataclass with the `path` of a file, `texts()`, which yields its text bit by bit, and
`pieces()`, which yields (UTF-8 bytes, flags): documents, long ones in several pieces.

`datasets` finds the files of a Hub repository (configuration, splits, revision). The rows are read here, by
json and pyarrow: the JSON reader of `datasets` 5.2 fails where a field first appears late in a file, and its
streaming parquet reader took 1.1 GB of memory for a file of 0.4 GB.
"""

import codecs
import json
import math
import os
import re
import shutil
import string
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Protocol

from data.files import (
    BLOCK,
    COMPRESSED,
    CorpusError,
    archive_and_member,
    members,
    named,
    one_line,
    open_bytes,
    open_seekable,
    stored_size,
    suffixes,
    text_sha256,
)
from data.tokenizer import well_formed

PIECE = 1 << 18  # characters: a longer document is encoded in pieces
STARTS, ENDS = 1, 2  # flags of a piece: it begins a document, it ends one
# format -> about how many bytes of text a byte of the file holds
RECORDS = {'.jsonl': 1.0, '.ndjson': 1.0, '.json': 1.0, '.parquet': 1.7}
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
ARCHIVES = ('.tar', '.tgz', '.7z', '.rar')
NOT_TEXT = ('.csv', '.tsv', '.arrow', '.feather', '.pdf', '.docx', '.pkl', '.npy', '.npz', '.bin')
Piece = tuple[bytes, int]  # UTF-8 text, flags
BOUNDARY = re.compile(r'[^\W_](?=[ \n])')


class Source(Protocol):
    """Text to be encoded; see the top of this file."""

    @property
    def path(self) -> str: ...

    def texts(self) -> Iterator[str]: ...

    def pieces(self) -> Iterator[Piece]: ...


Splits = dict[str, list[Source]]  # train, val, test


# Pieces ---------------------------------------------------------------------


def boundary(text: str, low: int, high: int) -> int:
    """The last place in text[low:high] where dividing the text does not change its tokens.

    That is between a letter or digit and a space or newline: the word patterns of GPT-2, of the newer
    tiktoken encodings and of byte-level BPEs never match across it and never look back over it. If there is
    none, the result is `high`, and a token or two may differ from those of the undivided text.
    """
    for start in (max(low, high - 4096), low):
        ends = [match.end() for match in BOUNDARY.finditer(text, start, high + 1)]
        if ends:
            return ends[-1]
    return high


def in_pieces(strings: Iterable[str]) -> Iterator[str]:
    """Divide a document, given as strings that follow each other, into strings of at most PIECE characters.

    The division is at boundaries, and depends on the document alone, not on how it was divided before.
    """
    held: list[str] = []
    size = 0
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


def flagged(pieces: Iterable[bytes]) -> Iterator[Piece]:
    """The pieces of one document with their flags; a document without text is one empty piece."""
    held, flags = b'', STARTS
    for piece in pieces:
        if held:
            yield held, flags
            flags = 0
        held = piece
    yield held, flags | ENDS


def document(strings: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document, given as strings that follow each other."""
    return flagged(well_formed(text).encode('utf-8') for text in in_pieces(strings))


# Sources --------------------------------------------------------------------


@dataclass(frozen=True)
class TextFile:
    """A text file is one document. start and stop take a part of it, in bytes, moved to whole characters.

    raw: the bytes as they are, for the bytes tokenizer: any file will do, and start and stop are exact.
    """

    path: str
    start: int = 0
    stop: int | None = None
    raw: bool = False

    def pieces(self) -> Iterator[Piece]:
        return flagged(self.blocks()) if self.raw else document(self.texts())

    def texts(self) -> Iterator[str]:
        # a byte order mark at the start of a file is not part of the text
        decoder = codecs.getincrementaldecoder('utf-8' if self.start else 'utf-8-sig')()
        position = self.start
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

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the part; whole characters unless `raw`."""
        with open_bytes(self.path) as file:
            to_skip = self.start
            while to_skip and (block := file.read(min(BLOCK, to_skip))):
                to_skip -= len(block)
            left = math.inf if self.stop is None else self.stop - self.start
            # a part that begins within a character leaves its end to the part before
            skip = 3 if self.start and not self.raw else 0
            while left > 0 and (block := file.read(int(min(PIECE, left)))):
                left -= len(block)
                while skip and block and block[0] & 0xC0 == 0x80:
                    block, skip = block[1:], skip - 1
                skip = 0
                if left == 0 and not self.raw:
                    tail = file.read(3)
                    block += tail[: next((i for i, b in enumerate(tail) if b & 0xC0 != 0x80), len(tail))]
                yield block
            if self.stop is not None and left > 0:
                raise CorpusError(f'{self.path} ends before byte {self.stop:,}: it changed; run it again')


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, as it would be prepared: without a byte order mark, line ends as they are.

    The file may be compressed. CorpusError says what is wrong, and where.
    """
    source = TextFile(str(path))
    with named(source.path):
        return ''.join(source.texts())


@dataclass(frozen=True)
class Records:
    """JSON lines, a JSON array or parquet: each row is a document, whose text `template` makes of its fields.

    A null is the empty text. Other fields may hold anything. An array is read as a whole.
    """

    path: str
    template: str = '{text}'

    def pieces(self) -> Iterator[Piece]:
        for text in self.texts():
            yield from document([text])

    def texts(self) -> Iterator[str]:
        parts = template_parts(self.template)
        fields = [name for _, name in parts if name is not None]
        rows: Callable[[str, list[str]], Iterator[tuple[str, Any]]]
        rows = parquet_rows if suffixes(self.path)[0] == '.parquet' else json_rows
        for where, row in rows(self.path, fields):
            row = row if isinstance(row, dict) else {}
            for name in fields:
                if name not in row:
                    raise CorpusError(
                        f'{where} has no field {name!r}, only {", ".join(row) or "none"}: say which one '
                        'holds the text (--field, --template)'
                    )
                if not isinstance(row[name], str | None):
                    raise CorpusError(f'{where}: field {name!r} is not text but {type(row[name]).__name__}')
            yield ''.join(before + (row[name] or '' if name else '') for before, name in parts)


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """The parts of a template such as '{question} {answer}': the text before each field, and its name; None
    after the last."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise CorpusError(f'template {template!r}: {error}; write {{{{ and }}}} for braces') from error
    for _, name, spec, conversion in parts:
        if name == '' or spec or conversion:
            raise CorpusError(f'template {template!r}: write {{name}}, with the name of a field')
    return [(before, name) for before, name, _, _ in parts]


def json_rows(path: str, fields: list[str]) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row, with all its fields."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                if number == 1 and line.lstrip().startswith(b'['):
                    rows = json.loads(line + file.read())
                    yield from ((f'{path}, row {i}', row) for i, row in enumerate(rows, 1))
                elif line.strip():
                    yield f'{path}, line {number}', json.loads(line)
            except ValueError as error:
                raise CorpusError(f'{path}, line {number}, is not JSON: {error}') from error


def parquet_rows(path: str, fields: list[str]) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row, with the columns in `fields`; with all columns if one of them is missing."""
    import pyarrow.parquet as pq

    with open_seekable(path) as file:
        table, number = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20), 0
        names = table.schema_arrow.names
        columns = fields if set(fields) <= set(names) else names
        for batch in table.iter_batches(batch_size=16, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f'{path}, row {number}', row
        if number != table.metadata.num_rows:
            rows = table.metadata.num_rows
            raise CorpusError(f'{path} is damaged: it gave {number:,} of its {rows:,} rows')


@dataclass(frozen=True)
class Joined:
    """The texts of several sources as one document, joined as they stand."""

    sources: tuple[Source, ...]

    @property
    def path(self) -> str:
        return self.sources[0].path

    def texts(self) -> Iterator[str]:
        for source in self.sources:
            yield from source.texts()

    def pieces(self) -> Iterator[Piece]:
        return document(self.texts())


def identity(source: Source) -> list[Any]:
    """What identifies a source, JSON-able: its class and fields, and the size and time of its file."""
    if isinstance(source, Joined):
        return [identity(part) for part in source.sources]
    stat = Path(archive_and_member(source.path)[0]).stat() if '://' not in source.path else None
    fields: dict[str, Any] = asdict(source)  # type: ignore[call-overload]  # every source is a dataclass
    return [type(source).__name__, fields, stat and [stat.st_size, stat.st_mtime_ns]]


def stored_files(sources: Iterable[Source]) -> list[list[Any]]:
    """[path, bytes as stored] of each file that the sources read."""
    found = []
    for source in sources:
        parts = source.sources if isinstance(source, Joined) else [source]
        found += [[part.path, stored_size(part.path)] for part in parts]
    return found


def estimate(sources: Iterable[Source]) -> int:
    """About how many bytes of text the sources hold, judged by the sizes of their files."""
    total = 0.0
    for source in sources:
        if isinstance(source, Joined):
            total += estimate(source.sources)
        elif isinstance(source, TextFile) and source.stop is not None:
            total += source.stop - source.start
        else:
            kind, compression = suffixes(source.path)
            total += (stored_size(source.path) or 0) * RECORDS.get(kind, 1) * COMPRESSED.get(compression, 1)
    return int(total)


# Finding them ---------------------------------------------------------------


def paths(given: Iterable[str | Path]) -> list[str]:
    """The files that files, folders (all files below that are text or records), patterns and URLs name, those
    of each in order."""
    found: list[str] = []
    for name in map(str, given):
        if '://' in name:
            found.append(name)
        elif Path(name).is_file():
            found += in_archive(name) if suffixes(name)[1] == '.zip' else [name]
        elif Path(name).is_dir():
            below = sorted(p for p in Path(name).rglob('*') if p.is_file() and not passed_over(p, Path(name)))
            found += only_text(name, [str(path) for path in below])
        elif has_magic(name):
            found += sorted(p for p in glob(name, recursive=True) if Path(p).is_file())
        else:
            there = Path(name).exists()
            raise CorpusError(f'{name} is neither a file nor a folder' if there else f'{name} does not exist')
    if not found:
        raise CorpusError(f'no text in {", ".join(map(str, given))}')
    return found


def in_archive(path: str) -> list[str]:
    """The files in a .zip, as if it were a folder. One that holds a single file may tell its format by its
    own name (rows.jsonl.zip), and then stands for that file."""
    with named(path):
        inside = members(path)
    alone = len(inside) == 1
    if alone and (suffixes(path)[0] in (*TEXT, *RECORDS) or not suffixes(inside[0])[0]):
        return [path]
    names = [f'{path}/{name}' for name in inside]
    return names if alone else only_text(path, names)


def only_text(where: str, names: list[str]) -> list[str]:
    """Those of the files that are text or records; how many are not is told."""
    usable = [name for name in names if suffixes(name)[0] in (*TEXT, *RECORDS)]
    if len(usable) < len(names):
        print(f'{where}: {len(names) - len(usable)} of {len(names)} files are neither text nor records')
    return usable


def passed_over(path: Path, folder: Path) -> bool:
    """Whether a file is hidden, lies in a hidden folder, or is the description of a prepared data set."""
    if any(part.startswith('.') for part in path.relative_to(folder).parts):
        return True
    return path.name in ('meta.json', 'tokenizer.json') and any(path.parent.glob('*.bin'))


def file_source(path: str, template: str = '{text}', raw: bool = False) -> Source:
    """The source that reads a file: rows if its suffix is one of records, else text."""
    kind = suffixes(path)[0]
    if kind in ARCHIVES and not raw:
        raise CorpusError(f'{path}: {kind} is not read here; unpack it and give the folder')
    if kind in NOT_TEXT and not raw:
        raise CorpusError(f'{path}: {kind} is not read here; convert it to .jsonl, .parquet or plain text')
    return Records(path, template) if kind in RECORDS else TextFile(path, raw=raw)


def hub_sources(
    repo: str, revision: str | None = None, config: str | None = None, template: str = '{text}'
) -> tuple[Splits, dict[str, str]]:
    """The files of a dataset repository, and what meta.json tells of their origin.

    The revision is resolved to the commit that it names now. With HF_HUB_OFFLINE=1 the copy in the local
    cache is used.
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
    except Exception as error:  # any failure of the network: one line that says what to do without one
        at = f' --revision {revision}' if revision else ''
        raise CorpusError(
            f'cannot reach https://huggingface.co/datasets/{repo} ({one_line(error)}); on a machine '
            f'with a network run: hf download {repo} --repo-type dataset{at}; then set HF_HUB_OFFLINE=1 '
            'here, and HF_HOME to the folder of that cache, or give --files'
        ) from error
    names = {'validation': 'val', 'valid': 'val', 'dev': 'val'}
    splits: Splits = {}
    for split, files in builder.config.data_files.items():
        splits[names.get(str(split), str(split))] = [file_source(str(file), template) for file in files]
    if 'train' not in splits:
        raise CorpusError(
            f'{repo} has no split train, only {", ".join(splits)}: give files of it with --files'
        )
    splits = {split: splits[split] for split in ('train', 'val', 'test') if split in splits}
    return splits, {'repo': repo, 'revision': commit, **({'config': config} if config else {})}


def download(url: str, sha256: str, folder: str | Path) -> str:
    """Fetch a file once and return its path. `sha256` is that of its content after decompression."""
    from urllib.request import urlopen

    path = Path(folder) / url.rsplit('/', 1)[-1]
    with suppress(CorpusError):  # a file that cannot be read is fetched again
        if path.is_file() and text_sha256(path) == sha256:
            return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name('part-' + path.name)
    try:
        with urlopen(url, timeout=60) as response, partial.open('wb') as file:
            shutil.copyfileobj(response, file, 1 << 20)
    except OSError as error:
        raise CorpusError(
            f'cannot download {url} ({one_line(error)}); without a network: put it at {path}, or give '
            'another copy with --files'
        ) from error
    if text_sha256(partial) != sha256:
        raise CorpusError(
            f'{partial}, from {url}, is not the file that was expected: its SHA-256 is not {sha256}'
        )
    os.replace(partial, path)
    return str(path)
