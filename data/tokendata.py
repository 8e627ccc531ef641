"""Token files: what the prepare.py scripts write and training reads.

A data set is a folder with `train.bin`, `val.bin` and sometimes `test.bin` (raw little-endian uint16, or
uint32 where the vocabulary needs it) and `meta.json`, which describes them. A split of many tokens is several
files, `train_000.bin`, `train_001.bin` and so on, which are read as one. `open_data` trusts none of it: it
compares every file with meta.json once, and an error is one line that names the file, what it holds, what was
expected and the fix.

A data set may consist of examples of equal length, of which only some tokens are asked for (the diagnostics
do): then meta.json has an `example`, a window is an example, and the other targets do not count.
"""

import hashlib
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from configurator import UserError
from data.tokenizer import TOKEN_ID, Spec, TokenizerError, check_spec, fingerprint, vocab_size_of
from declared import (
    LINE,
    SHA256,
    Anything,
    Either,
    List,
    Null,
    Object,
    OneOf,
    Shape,
    ShapeError,
    Table,
    Text,
    Whole,
    read_json,
)

FORMAT = 1  # of meta.json
SPLITS = ('train', 'val', 'test')
META, STAMPS = 'meta.json', '.verified.json'
WORK, JOB = '.prepare', 'job.json'  # the folder of a preparation under way, and what it is to make
DTYPES: dict[str, np.dtype[Any]] = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
LARGEST = 1 << 32  # vocabulary whose ids fit
SCAN_BYTES = 1 << 23  # read at a time when a file is verified

Meta = dict[str, Any]  # the content of meta.json
Int64s = NDArray[np.int64]

# What the files of a data set hold
COUNT = Whole(0)
FILE_SHAPE: dict[str, Shape] = {'tokens': Whole(1), 'sha256': SHA256}
SPLIT_SHAPE = Object(
    {'tokens': Whole(1)},
    optional={
        'sha256': SHA256,  # of its file
        'shards': List(Object(FILE_SHAPE, closed=True), least=2),  # in place of that, if it is several
        'documents': COUNT,  # that have text
        'empty': COUNT,  # documents without text, which were left out
        'bytes': COUNT,  # of text
        'also_in': Table(OneOf(*SPLITS), COUNT),  # how many of its documents are in that split too
    },
    closed=True,
)
EXAMPLE_SHAPE = Object(
    {
        'tokens': Whole(2),  # of an example: block_size + 1
        # the name of a group -> the places in an example (from 0) of the tokens that are asked for
        'asked': Table(Text(r'[^\s/]+', 'a word'), List(Whole(1), least=1)),
    },
    closed=True,
)
META_SHAPE = Object(
    {
        'format': OneOf(FORMAT),
        'vocab_size': Whole(1, LARGEST),
        'dtype': OneOf(*DTYPES),
        'splits': Table(OneOf(*SPLITS), SPLIT_SHAPE),
        'tokenizer': Object(),  # tokenizer.SPECS tells what is in it
    },
    optional={
        'begin': Either(TOKEN_ID, Null()),  # the token before every document
        'source': Anything(),
        'command': Either(LINE, Null()),
        'job': LINE,
        'example': EXAMPLE_SHAPE,
    },
)
JOB_SHAPE = Object({'job': LINE}, optional={'command': Either(LINE, Null())})
STAMPS_SHAPE = Table(
    Text(),
    Object(
        {
            'size': COUNT,
            'mtime_ns': Whole(),
            'ctime_ns': Whole(),
            'inode': COUNT,
            'dtype': OneOf(*DTYPES),
            'vocab_size': Whole(1, LARGEST),
            'sha256': SHA256,
        }
    ),
)


class DataError(UserError):
    """Data that cannot be used, in one line: the file, what it holds, what was expected, and the fix."""


class FileStamp(NamedTuple):
    """What the file system tells of a file. The size and the time of change can be set back after a change;
    the time of status change (ctime) cannot."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> 'FileStamp':
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Shards:
    """The tokens of several files as one array (n_tokens,): `len`, `[i]` and `[start:stop]`."""

    def __init__(self, files: Sequence[NDArray[Any]]) -> None:
        """files: each (n,), of the same dtype"""
        self.files = files
        self.ends = np.cumsum([len(file) for file in files]).tolist()
        self.dtype: np.dtype[Any] = files[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    @overload
    def __getitem__(self, key: slice) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, key: int) -> Any: ...

    def __getitem__(self, key: slice | int) -> Any:
        if not isinstance(key, slice):
            at = range(len(self))[key]
            return self[at : at + 1][0]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f'tokens in shards are read one after the other, not in steps of {step}')
        parts = [self.files[0][:0]]
        shard = bisect_right(self.ends, start)
        while start < stop:
            end = self.ends[shard]
            first = end - len(self.files[shard])
            parts.append(self.files[shard][start - first : stop - first])
            start, shard = end, shard + 1
        return parts[1] if len(parts) == 2 else np.concatenate(parts)


class Examples:
    """The tokens of a split of examples of equal length: `len`, `[i]` and `[start:stop]`."""

    def __init__(self, tokens: NDArray[Any] | Shards, size: int, asked: Mapping[str, Sequence[int]]) -> None:
        """size: tokens of an example. asked: name of a group -> places in an example, from 1 to size - 1, of
        the tokens that are asked for."""
        self.tokens, self.size = tokens, size
        self.asked = {name: sorted(places) for name, places in asked.items()}
        self.dtype: np.dtype[Any] = tokens.dtype
        places = [place - 1 for group in self.asked.values() for place in group]
        self.counts = np.zeros(size - 1, dtype=bool)  # of the targets of a window, which are one token ahead
        self.counts[places] = True

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: slice | int) -> Any:
        return self.tokens[key]


Tokens = NDArray[Any] | Shards | Examples  # (n_tokens,) of uint16 or uint32


@dataclass(frozen=True)
class TokenData:
    folder: Path
    splits: dict[str, Tokens]  # name -> (n_tokens,), read-only: an np.memmap, Shards of them, or Examples
    meta: Meta  # the content of meta.json; {} for a plain .bin
    vocab_size: int
    tokenizer_spec: Spec | None  # complete: tokenizer.from_spec builds the tokenizer from it
    fingerprint: str | None  # SHA-256 over the splits' SHA-256; None for a plain .bin that was not verified
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)  # of the token files, as they were opened

    def changed(self) -> str | None:
        """None if the token files are still those that were opened, else one line that says what changed.

        It asks the file system alone, so it is cheap enough for every save of a run. A change of mode or of
        hard links counts too: `open_data` reads the files again and tells by its fingerprint whether the
        tokens are the same.
        """
        for path, then in self.stamps.items():
            try:
                now = FileStamp.of(path.stat())
            except OSError as error:
                return f'{path} cannot be read any more ({error.strerror})'
            for what, old, new in zip(then._fields, then, now, strict=True):
                if old != new:
                    return f'{path} changed since it was opened: its {what} was {old}, now it is {new}'
        return None


def dtype_for(vocab_size: int) -> str:
    """The name of the smallest of the two dtypes that holds every id of the vocabulary."""
    return 'uint16' if vocab_size <= 1 << 16 else 'uint32'


def open_data(
    folder: str | Path, block_size: int | None = None, vocab_size: int | None = None, verify: bool = True
) -> TokenData:
    """Open the data set in `folder` for windows of `block_size` tokens and their targets.

    `vocab_size` is for a folder without meta.json (nanoGPT's raw .bin); with meta.json it must agree.
    `verify` builds the tokenizer, to compare its vocabulary, and reads every file to its end, to compute its
    SHA-256 and to find ids outside the vocabulary. A file is read once: `.verified.json` beside it remembers
    its stamp and SHA-256, if the folder is writable. Everything else (names, sizes, the shape of meta.json,
    fingerprints) is checked at every call. DataError names what is wrong and the fix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f'{folder} does not exist: {_how_to_make(folder, {})}')
    has_meta = (folder / META).is_file()
    if not has_meta and (folder / WORK).is_dir():
        fix = _how_to_make(folder, read_if_whole(folder / WORK / JOB, JOB_SHAPE))
        raise DataError(f'{folder} holds an unfinished preparation: {fix}; it goes on where it stopped')
    meta = _read_meta(folder, vocab_size) if has_meta else {}
    fix = _how_to_make(folder, meta)
    if not has_meta and not vocab_size:
        raise DataError(
            f'{folder / META} is missing, and nothing else says which vocabulary the tokens are of: {fix}; '
            'or give vocab_size (50257 for GPT-2 tokens) to use plain .bin files'
        )
    vocab_size = int(meta.get('vocab_size') or vocab_size or 0)
    if not 1 <= vocab_size <= LARGEST:
        raise DataError(f'vocab_size={vocab_size}: a vocabulary has from 1 to {LARGEST:,} ids')
    dtype = DTYPES[meta.get('dtype') or dtype_for(vocab_size)]
    example = meta.get('example')
    if example is not None:
        _check_example(folder, meta, block_size, fix)
    names = list(meta['splits']) if meta else [s for s in SPLITS if (folder / f'{s}.bin').exists()]
    for name in ('train', 'val'):
        if name not in names:
            raise DataError(f'{folder / name}.bin is missing: {fix}')
    spec = _tokenizer_spec(folder, meta, verify, fix) if meta else None
    files_of = {name: token_files(name, meta['splits'][name] if meta else {}) for name in names}
    entries = {file: entry for files in files_of.values() for file, entry in files.items()}
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(_open_file(folder / name, fix)) for name in entries}
            stamps = {folder / name: FileStamp.of(os.fstat(file.fileno())) for name, file in files.items()}
            for name, entry in entries.items():
                _check_size(folder / name, stamps[folder / name].size, dtype, entry.get('tokens'), fix)
            for name, parts in files_of.items():
                size = sum(stamps[folder / part].size for part in parts)
                _check_block_size(folder / f'{name}.bin', size // dtype.itemsize, block_size)
            hashes = {name: entry.get('sha256') for name, entry in entries.items()}
            if verify:
                hashes = _verify(folder, files, stamps, dtype, vocab_size, hashes, fix)
            maps = {name: np.memmap(file, dtype, 'r') for name, file in files.items()}
    except OSError as error:
        raise DataError(f'{error.filename or folder} cannot be read ({error.strerror or error})') from error
    splits: dict[str, Tokens] = {}
    content: dict[str, Any] = {}  # the SHA-256 of each split, or those of its shards
    for name, parts in files_of.items():
        one = len(parts) == 1
        tokens = maps[f'{name}.bin'] if one else Shards([maps[part] for part in parts])
        splits[name] = tokens if example is None else Examples(tokens, example['tokens'], example['asked'])
        content[name] = hashes[f'{name}.bin'] if one else [hashes[part] for part in parts]
    if example is not None:
        content['example'] = example
    return TokenData(
        folder=folder,
        splits=splits,
        meta=meta,
        vocab_size=vocab_size,
        tokenizer_spec=spec,
        fingerprint=fingerprint(content) if all(hashes.values()) else None,
        stamps=stamps,
    )


def _how_to_make(folder: Path, meta: Meta) -> str:
    """What to do about a broken or missing data set: the command that makes it."""
    if meta.get('command'):
        return f'run {meta["command"]}'
    if (folder / 'prepare.py').is_file():
        return f'run python {folder / "prepare.py"}'
    return f'make it with python data/prepare.py --files YOUR_TEXT --out_dir {folder}'


def _read_meta(folder: Path, vocab_size: int | None) -> Meta:
    fix = _how_to_make(folder, {})
    try:
        meta: Meta = read_json(folder / META, META_SHAPE)
    except ShapeError as error:
        raise DataError(f'{error}: {fix}') from error
    if vocab_size and int(vocab_size) != meta['vocab_size']:
        raise DataError(
            f'{folder / META} says a vocabulary of {meta["vocab_size"]}, vocab_size={vocab_size} was given: '
            'leave out vocab_size'
        )
    for name, split in meta['splits'].items():
        shards = split.get('shards')
        if ('sha256' in split) == (shards is not None):
            raise DataError(f'{folder / META}: splits.{name} has either sha256 or shards: {fix}')
        if shards and sum(shard['tokens'] for shard in shards) != split['tokens']:
            raise DataError(f'{folder / META}: splits.{name}.tokens is not the sum of its shards: {fix}')
    return meta


def token_files(name: str, entry: Meta) -> dict[str, Meta]:
    """The names of the files of a split, each with its tokens and sha256. entry: of the split in meta.json"""
    if 'shards' not in entry:
        return {f'{name}.bin': entry}
    return {f'{name}_{i:03d}.bin': shard for i, shard in enumerate(entry['shards'])}


def _tokenizer_spec(folder: Path, meta: Meta, verify: bool, fix: str) -> Spec:
    """The spec in meta.json, completed with the text of the tokenizer.json that stands beside it.

    It must be the tokenizer of this vocabulary: one that has fewer ids would leave some that never occur. To
    know that it must be built, which takes a second for a large one.
    """
    spec = dict(meta['tokenizer'])
    if spec.get('kind') == 'tokenizers':
        path = folder / 'tokenizer.json'
        try:
            spec['json'] = path.read_text(encoding='utf-8')
        except (OSError, ValueError) as error:
            raise DataError(f'{path} cannot be read ({error}): {fix}') from error
    try:
        check_spec(spec)
        # an encoding of tiktoken is known by its name only; from_spec checks it when it is needed
        if spec['kind'] != 'tiktoken' and fingerprint(spec) != spec['fingerprint']:
            raise DataError(
                f'the tokenizer in {folder} has fingerprint {fingerprint(spec)[:12]}, the tokens were made '
                f'with {spec["fingerprint"][:12]}: {fix}'
            )
        known = vocab_size_of(spec) if verify else int(meta['vocab_size'])
    except TokenizerError as error:
        raise DataError(f'the tokenizer in {folder} cannot be used ({error}): {fix}') from error
    if known != meta['vocab_size']:
        raise DataError(
            f'{folder / META} has vocab_size {meta["vocab_size"]:,}, its tokenizer has {known:,} ids: {fix}'
        )
    for what, token in (('begin', meta.get('begin')), ('eot', spec['eot']), ('bos', spec['bos'])):
        if token is not None and token >= known:
            raise DataError(f'{folder / META} has {what} {token}, the vocabulary has {known:,} ids: {fix}')
    return spec


def _open_file(path: Path, fix: str) -> IO[bytes]:
    if not path.is_file():
        raise DataError(f'{path} is missing: {fix}')
    return path.open('rb')


def _check_size(path: Path, size: int, dtype: np.dtype[Any], expected: int | None, fix: str) -> None:
    """Check what the size in bytes tells: an empty or truncated file, or one of another dtype.

    expected: the number of tokens, or None if it is not known
    """
    if size == 0:
        raise DataError(f'{path} is empty: {fix}')
    if size % dtype.itemsize:
        raise DataError(
            f'{path} holds {size:,} bytes, not a whole number of {dtype.itemsize}-byte {dtype.name} tokens: '
            f'it is truncated, or it is not a token file; {fix}'
        )
    tokens = size // dtype.itemsize
    if expected is not None and tokens != expected:
        other = {2 * expected: 'uint16', 4 * expected: 'uint32', 8 * expected: 'int64'}.get(size)
        guess = 'it is truncated' if tokens < expected else 'it grew'
        raise DataError(
            f'{path} holds {tokens:,} tokens of {dtype.name}, {META} says {expected:,}: '
            f'{f"it looks like {other}" if other else guess}; {fix}'
        )


def _check_block_size(path: Path, tokens: int, block_size: int | None) -> None:
    """Check that a split has a window and its targets."""
    if block_size is not None and tokens <= block_size:
        raise DataError(
            f'{path} holds {tokens:,} tokens, block_size {block_size} needs at least {block_size + 1:,}: '
            'take a smaller block_size or more text'
        )


def _check_example(folder: Path, meta: Meta, block_size: int | None, fix: str) -> None:
    """Check that the splits consist of whole examples, and that a window is one of them."""
    size, asked = meta['example']['tokens'], meta['example']['asked']
    for name, split in meta['splits'].items():
        if split['tokens'] % size:
            raise DataError(
                f'{folder / META}: splits.{name} has {split["tokens"]:,} tokens, not a whole number of '
                f'examples of {size}: {fix}'
            )
    places = [place for group in asked.values() for place in group]
    if not places or max(places) >= size or len(set(places)) < len(places):
        raise DataError(
            f'{folder / META}: example.asked needs places from 1 to {size - 1}, each of them once: {fix}'
        )
    if block_size is not None and block_size != size - 1:
        raise DataError(
            f'{folder} consists of examples of {size} tokens, each of which is a window, but block_size is '
            f'{block_size}: take block_size={size - 1}'
        )


def _verify(
    folder: Path,
    files: Mapping[str, IO[bytes]],
    stamps: Mapping[Path, FileStamp],
    dtype: np.dtype[Any],
    vocab_size: int,
    hashes: Mapping[str, str | None],
    fix: str,
) -> dict[str, str | None]:
    """Compare the content of every file with the vocabulary and, if it is known, with its SHA-256.

    Returns the SHA-256 of each. A file whose stamp is that of an earlier call is not read again.
    """
    known = read_if_whole(folder / STAMPS, STAMPS_SHAPE)
    found = {}
    for name, file in files.items():
        path = folder / name
        stamp = {**stamps[path]._asdict(), 'dtype': dtype.name, 'vocab_size': vocab_size}
        before = known.get(name, {})
        if stamp != {key: before.get(key) for key in stamp}:
            before = {**stamp, 'sha256': _scan(path, file, dtype, vocab_size, hashes[name] is None, fix)}
            if FileStamp.of(path.stat()) != stamps[path]:
                raise DataError(f'{path} changed while it was read: wait until it is complete; {fix}')
        wanted = hashes[name]
        if wanted is not None and before['sha256'] != wanted:
            raise DataError(
                f'{path} has SHA-256 {before["sha256"][:12]}..., {META} says {wanted[:12]}...: '
                f'it changed; {fix}'
            )
        found[name] = before
    if found != known:
        _write_stamps(folder, found)
    return {name: stamp['sha256'] for name, stamp in found.items()}


def _scan(path: Path, file: IO[bytes], dtype: np.dtype[Any], vocab_size: int, plain: bool, fix: str) -> str:
    """Read the file once and return its SHA-256; DataError at the first id outside the vocabulary."""
    size = os.fstat(file.fileno()).st_size
    if size >= 1 << 30:
        print(f'verifying {path} ({size / 1e9:.1f} GB), once', file=sys.stderr)
    digest, position = hashlib.sha256(), 0
    while block := file.read(SCAN_BYTES):
        digest.update(block)
        tokens = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
        if plain and position == 0:
            _check_plain(path, block, tokens)
        if tokens.max(initial=0) >= vocab_size:
            at = int(np.argmax(tokens >= vocab_size))
            raise DataError(
                f'{path} holds token id {tokens[at]} at position {position + at:,}, the vocabulary has '
                f'{vocab_size:,} ids: another tokenizer wrote it, or not as {dtype.name}; {fix}'
            )
        position += len(tokens)
    return digest.hexdigest()


def _check_plain(path: Path, block: bytes, tokens: NDArray[Any]) -> None:
    """A file that no meta.json describes may be of another format although all its ids are in range."""
    if block.startswith(b'\x93NUMPY'):
        raise DataError(f'{path} is a .npy file, raw tokens were expected: write them with array.tofile(...)')
    if block.startswith(b'version https://git-lfs'):
        raise DataError(f'{path} is a Git LFS pointer, not the file itself: run git lfs pull')
    # ids below 2**16 in 4 or 8 bytes each: every second 16-bit number is 0
    if tokens.dtype.itemsize == 2 and len(tokens) >= 16 and not tokens[1::2].any() and tokens[::2].any():
        raise DataError(
            f'{path} looks like tokens of 4 or 8 bytes, uint16 was expected: write them as uint16'
        )


def read_if_whole(path: Path, shape: Shape) -> dict[str, Any]:
    """The object in a file that only saves work: an empty one if the file is missing or broken."""
    try:
        return dict(read_json(path, shape))
    except ShapeError:
        return {}


def _write_stamps(folder: Path, stamps: Mapping[str, Any]) -> None:
    """Remember what was verified; a folder that cannot be written to only costs that next time."""
    temporary = folder / f'{STAMPS}.{os.getpid()}'
    try:
        temporary.write_text(json.dumps(stamps, indent=1), encoding='utf-8')
        os.replace(temporary, folder / STAMPS)
    except OSError as error:
        print(
            f'{folder} is verified again at every start: {STAMPS} cannot be written there '
            f'({error.strerror or error})',
            file=sys.stderr,
        )
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Batches: pure functions of their arguments. Nothing is consumed, so nothing has to be restored on resume,
# and neither the number of ranks nor the evaluation nor the architecture changes what a step trains on.


def batch_starts(
    n_tokens: int, seed: int, step: int, micro: int, batch_size: int, block_size: int, every: int = 1
) -> Int64s:
    """Where the windows of one micro-batch start: (batch_size,), uniform over the split, with replacement.

    micro counts the micro-batches of a step over all ranks; every: windows start at multiples of it.
    SeedSequence is used as a hash of its arguments: numpy promises its output for good, which it does not for
    the distributions of its generators. The memory does not depend on n_tokens.
    """
    draws = np.random.SeedSequence([seed, step, micro]).generate_state(batch_size, np.uint64)
    starts: Int64s = (draws % np.uint64(-(-(n_tokens - block_size) // every))).astype(np.int64)
    return starts * every


def _every(tokens: Tokens) -> int:
    """Windows of the split start at multiples of this."""
    return tokens.size if isinstance(tokens, Examples) else 1


def get_batch(
    tokens: Tokens, seed: int, step: int, micro: int, batch_size: int, block_size: int
) -> tuple[Int64s, Int64s]:
    """One micro-batch of a split: int64 arrays x and y (batch_size, block_size), y one token ahead of x, -1
    where it does not count."""
    starts = batch_starts(len(tokens), seed, step, micro, batch_size, block_size, _every(tokens))
    return read_windows(tokens, starts, block_size)


def read_windows(tokens: Tokens, starts: Int64s, block_size: int) -> tuple[Int64s, Int64s]:
    """The windows at `starts` (n,): int64 arrays x and y (n, block_size), y one token ahead of x, -1 where it
    does not count."""
    rows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    x, y = rows[:, :-1].copy(), rows[:, 1:].copy()  # copies: masking targets must leave the inputs alone
    if isinstance(tokens, Examples):
        y[:, ~tokens.counts] = -1
    return x, y


def eval_windows(tokens: Tokens, block_size: int, n_windows: int) -> tuple[Int64s, Int64s]:
    """The fixed windows of an evaluation of a split, as of `eval_starts`."""
    return eval_starts(len(tokens), block_size, n_windows, _every(tokens))


def eval_starts(n_tokens: int, block_size: int, n_windows: int, every: int = 1) -> tuple[Int64s, Int64s]:
    """The fixed windows of an evaluation: their starts (n,), and how many leading targets of each do not
    count (n,).

    n_windows are spaced evenly over the split; 0, or more than there are, means the whole split: every token
    except the first is a target once (the last window overlaps the one before it, and counts only its end).
    every: windows start at multiples of it, which follow each other without overlap if it is not 1.
    """
    if every > 1:
        n_whole = n_tokens // every
        if n_windows == 0 or n_windows > n_whole:
            n_windows = n_whole
        starts = np.arange(n_windows) * (n_whole - 1) // max(1, n_windows - 1) * every
        return starts, np.zeros(n_windows, dtype=np.int64)
    n_targets = n_tokens - 1
    n_whole = -(-n_targets // block_size)
    if n_windows == 0 or n_windows >= n_whole:
        starts = np.arange(n_whole) * block_size
        last = n_targets - block_size
        skip = np.where(starts > last, starts - last, 0)
        return np.minimum(starts, last), skip
    starts = np.arange(n_windows) * (n_targets - block_size) // max(1, n_windows - 1)
    return starts, np.zeros(n_windows, dtype=np.int64)


def eval_batch(
    tokens: Tokens, starts: Int64s, skip: Int64s, index: int, batch_size: int, block_size: int
) -> tuple[Int64s, Int64s]:
    """Batch `index` of an evaluation: x, y as from get_batch; targets that do not count are -1.

    The last batch is filled up with rows that do not count, so that every batch has the same shape.
    """
    mine = slice(index * batch_size, (index + 1) * batch_size)
    x, y = read_windows(tokens, starts[mine], block_size)
    for row, n in enumerate(skip[mine]):
        y[row, : int(n)] = -1
    missing = batch_size - len(x)
    if missing:
        x = np.concatenate([x, np.zeros((missing, block_size), dtype=np.int64)])
        y = np.concatenate([y, np.full((missing, block_size), -1)])
    return x, y
