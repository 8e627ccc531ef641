"""Token files: what the prepare.py scripts write and training reads.

A data set is a folder with `train.bin`, `val.bin` and sometimes `test.bin` (raw little-endian uint16, or
uint32 where the vocabulary needs it) and `meta.json`, which describes them. `open_data` trusts none of it: it
compares every file with meta.json once, and an error is one line that names the file, what it holds, what was
expected and the fix.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configurator import UserError
from data.tokenizer import fingerprint

FORMAT = 1  # of meta.json
SPLITS = ('train', 'val', 'test')
META, STAMP = 'meta.json', '.verified.json'
WORK, JOB = '.prepare', 'job.json'  # the folder of a preparation under way, and what it is to make
DTYPES: dict[str, np.dtype[Any]] = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
SCAN_BYTES = 1 << 23  # read at a time when a file is verified

Meta = dict[str, Any]  # the content of meta.json
Tokens = np.memmap | NDArray[Any]  # (n_tokens,) of uint16 or uint32
Int64s = NDArray[np.int64]


class DataError(UserError):
    """Data that cannot be used, in one line: the file, what it holds, what was expected, and the fix."""


@dataclass(frozen=True)
class TokenData:
    folder: Path
    splits: dict[str, Tokens]  # name -> read-only np.memmap (n_tokens,) of uint16 or uint32
    meta: Meta  # the content of meta.json; {} for a plain .bin
    vocab_size: int
    tokenizer_spec: dict[str, Any] | None  # complete: tokenizer.from_spec builds the tokenizer from it
    fingerprint: str | None  # SHA-256 over the splits' SHA-256; None for a plain .bin that was not verified


def dtype_for(vocab_size: int) -> str:
    """The name of the smallest of the two dtypes that holds every id of the vocabulary."""
    return 'uint16' if vocab_size <= 1 << 16 else 'uint32'


def open_data(
    folder: str | Path, block_size: int | None = None, vocab_size: int | None = None, verify: bool = True
) -> TokenData:
    """Open the data set in `folder` for windows of `block_size` tokens and their targets.

    `vocab_size` is for a folder without meta.json (nanoGPT's raw .bin); with meta.json it must agree.
    `verify` reads every file to its end, to compute its SHA-256 and to find ids outside the vocabulary. That
    happens once per file: `.verified.json` beside it remembers its size, time of change and SHA-256, if the
    folder is writable. Everything else (names, sizes, meta.json, tokenizer) is checked at every call.
    DataError names what is wrong and the fix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f'{folder} does not exist: {_how_to_make(folder, {})}')
    has_meta = (folder / META).is_file()
    if not has_meta and (folder / WORK).is_dir():
        fix = _how_to_make(folder, read_json(folder / WORK / JOB))
        raise DataError(f'{folder} holds an unfinished preparation: {fix}; it goes on where it stopped')
    meta = _read_meta(folder, vocab_size) if has_meta else {}
    fix = _how_to_make(folder, meta)
    if not has_meta and not vocab_size:
        raise DataError(
            f'{folder / META} is missing, and nothing else says which vocabulary the tokens are of: {fix}; '
            'or give vocab_size (50257 for GPT-2 tokens) to use plain .bin files'
        )
    vocab_size = int(meta.get('vocab_size') or vocab_size or 0)
    dtype = DTYPES[meta.get('dtype') or dtype_for(vocab_size)]
    names = list(meta['splits']) if meta else [s for s in SPLITS if (folder / f'{s}.bin').exists()]
    for name in ('train', 'val'):
        if name not in names:
            raise DataError(f'{folder / name}.bin is missing: {fix}')
    spec = _tokenizer_spec(folder, meta, fix)
    files = {name: folder / f'{name}.bin' for name in names}
    for name, path in files.items():
        _check_size(path, dtype, meta.get('splits', {}).get(name), block_size, fix)
    hashes = {name: split['sha256'] for name, split in meta.get('splits', {}).items()}
    if verify:
        stamps = read_json(folder / STAMP)
        found = {
            name: _verified(path, dtype, vocab_size, hashes.get(name), stamps, fix)
            for name, path in files.items()
        }
        if found != stamps:
            _write_stamps(folder, found)
        hashes = {name: stamp['sha256'] for name, stamp in found.items()}
    return TokenData(
        folder=folder,
        splits={name: np.memmap(path, dtype=dtype, mode='r') for name, path in files.items()},
        meta=meta,
        vocab_size=vocab_size,
        tokenizer_spec=spec,
        fingerprint=fingerprint(hashes) if hashes else None,
    )


def _how_to_make(folder: Path, meta: Meta) -> str:
    """What to do about a broken or missing data set: the command that makes it."""
    if isinstance(meta.get('command'), str):
        return f'run {meta["command"]}'
    if (folder / 'prepare.py').is_file():
        return f'run python {folder / "prepare.py"}'
    return f'make it with one of data/*/prepare.py --out_dir {folder}'


def _read_meta(folder: Path, vocab_size: int | None) -> Meta:
    path = folder / META
    fix = _how_to_make(folder, {})
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise DataError(f'{path} is not JSON ({error}): {fix}') from error
    wanted = {'format': int, 'vocab_size': int, 'dtype': str, 'splits': dict, 'tokenizer': dict}
    for key, kind in wanted.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise DataError(f'{path} has no {key!r} ({kind.__name__}): {fix}')
    if meta['format'] != FORMAT:
        raise DataError(f'{path} has format {meta["format"]}, this program reads {FORMAT}: {fix}')
    if meta['dtype'] not in DTYPES:
        raise DataError(f'{path} has dtype {meta["dtype"]!r}, expected one of {", ".join(DTYPES)}: {fix}')
    for name, split in meta['splits'].items():
        if name not in SPLITS:
            raise DataError(f'{path} has a split {name!r}, expected {", ".join(SPLITS)}: {fix}')
        if not isinstance(split, dict) or not isinstance(split.get('tokens'), int) or 'sha256' not in split:
            raise DataError(f"{path} does not say the tokens and sha256 of split '{name}': {fix}")
    if vocab_size and int(vocab_size) != meta['vocab_size']:
        raise DataError(
            f'{path} says a vocabulary of {meta["vocab_size"]}, vocab_size={vocab_size} was given: leave out '
            'vocab_size'
        )
    return dict(meta)


def _tokenizer_spec(folder: Path, meta: Meta, fix: str) -> dict[str, Any] | None:
    """The spec in meta.json, completed with the text of the tokenizer.json that stands beside it."""
    if not meta:
        return None
    spec = dict(meta['tokenizer'])
    if spec.get('kind') == 'tokenizers':
        path = folder / 'tokenizer.json'
        try:
            spec['json'] = path.read_text(encoding='utf-8')
        except (OSError, ValueError) as error:
            raise DataError(f'{path} cannot be read ({error}): {fix}') from error
    # a tiktoken encoding is known by its name only; tokenizer.from_spec checks it when it is loaded
    if spec.get('kind') != 'tiktoken' and fingerprint(spec) != spec.get('fingerprint'):
        raise DataError(
            f'the tokenizer in {folder} has fingerprint {fingerprint(spec)[:12]}, the tokens were made with '
            f'{str(spec.get("fingerprint"))[:12]}: {fix}'
        )
    return spec


def _check_size(
    path: Path, dtype: np.dtype[Any], split: Meta | None, block_size: int | None, fix: str
) -> None:
    """Check what the directory entry alone tells: missing, empty, truncated, of another dtype, too short."""
    if not path.is_file():
        raise DataError(f'{path} is missing: {fix}')
    size = path.stat().st_size
    if size == 0:
        raise DataError(f'{path} is empty: {fix}')
    if size % dtype.itemsize:
        raise DataError(
            f'{path} holds {size:,} bytes, not a whole number of {dtype.itemsize}-byte {dtype.name} tokens: '
            f'it was cut short or is not a token file; {fix}'
        )
    tokens = size // dtype.itemsize
    if split is not None and tokens != split['tokens']:
        other = {
            2 * split['tokens']: 'uint16',
            4 * split['tokens']: 'uint32',
            8 * split['tokens']: 'int64',
        }.get(size)
        why = (
            f'it looks like {other}'
            if other
            else 'it was cut short'
            if tokens < split['tokens']
            else 'it grew'
        )
        raise DataError(
            f'{path} holds {tokens:,} tokens of {dtype.name}, {META} says {split["tokens"]:,}: {why}; {fix}'
        )
    if block_size is not None and tokens <= block_size:
        raise DataError(
            f'{path} holds {tokens:,} tokens, block_size {block_size} needs at least {block_size + 1:,}: '
            'take a smaller block_size or more text'
        )


def _verified(
    path: Path, dtype: np.dtype[Any], vocab_size: int, sha256: str | None, stamps: Meta, fix: str
) -> Meta:
    """Compare the file's content with the vocabulary and with `sha256` (None: unknown); its stamp."""
    stat = path.stat()
    stamp = {
        'size': stat.st_size,
        'mtime_ns': stat.st_mtime_ns,
        'dtype': dtype.name,
        'vocab_size': vocab_size,
    }
    known = stamps.get(path.stem)
    if not isinstance(known, dict) or {k: known.get(k) for k in stamp} != stamp or 'sha256' not in known:
        known = {**stamp, 'sha256': _scan(path, dtype, vocab_size, sha256 is None, fix)}
    if sha256 is not None and known['sha256'] != sha256:
        raise DataError(
            f'{path} has SHA-256 {known["sha256"][:12]}..., {META} says {sha256[:12]}...: it changed; {fix}'
        )
    return known


def _scan(path: Path, dtype: np.dtype[Any], vocab_size: int, plain: bool, fix: str) -> str:
    """Read the file once and return its SHA-256; DataError at the first id outside the vocabulary."""
    if path.stat().st_size >= 1 << 30:
        print(f'verifying {path} ({path.stat().st_size / 1e9:.1f} GB), once', file=sys.stderr)
    digest, position = hashlib.sha256(), 0
    with path.open('rb') as file:
        while block := file.read(SCAN_BYTES):
            digest.update(block)
            tokens = np.frombuffer(block, dtype)
            if plain and position == 0:
                _check_plain(path, block, tokens)
            if tokens.max() >= vocab_size:
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one if the file is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_stamps(folder: Path, stamps: Meta) -> None:
    temporary = folder / f'{STAMP}.{os.getpid()}'
    try:
        temporary.write_text(json.dumps(stamps, indent=1), encoding='utf-8')
        os.replace(temporary, folder / STAMP)
    except OSError:  # a folder that cannot be written to is verified again next time
        temporary.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Batches: pure functions of their arguments. Nothing is consumed, so nothing has to be restored on resume,
# and neither the number of ranks nor the evaluation nor the architecture changes what a step trains on.


def batch_starts(n_tokens: int, seed: int, step: int, micro: int, batch_size: int, block_size: int) -> Int64s:
    """Where the windows of one micro-batch start: (batch_size,), uniform over the split, with replacement.

    micro counts the micro-batches of a step over all ranks. SeedSequence is used as a hash of its arguments:
    numpy promises its output for good, which it does not for the distributions of its generators. The memory
    does not depend on n_tokens.
    """
    draws = np.random.SeedSequence([seed, step, micro]).generate_state(batch_size, np.uint64)
    starts: Int64s = (draws % np.uint64(n_tokens - block_size)).astype(np.int64)
    return starts


def get_batch(
    tokens: Tokens, seed: int, step: int, micro: int, batch_size: int, block_size: int
) -> tuple[Int64s, Int64s]:
    """One micro-batch of a split: int64 arrays x and y (batch_size, block_size), y one token ahead of x."""
    starts = batch_starts(len(tokens), seed, step, micro, batch_size, block_size)
    return read_windows(tokens, starts, block_size)


def read_windows(tokens: Tokens, starts: Int64s, block_size: int) -> tuple[Int64s, Int64s]:
    """The windows at `starts` (n,): int64 arrays x and y (n, block_size), y one token ahead of x."""
    rows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    return rows[:, :-1].copy(), rows[:, 1:].copy()  # copies: masking targets must leave the inputs alone


def eval_starts(n_tokens: int, block_size: int, n_windows: int) -> tuple[Int64s, Int64s]:
    """The fixed windows of an evaluation: their starts (n,), and how many leading targets of each do not
    count (n,).

    n_windows are spaced evenly over the split; 0, or more than there are, means the whole split: every token
    except the first is a target once (the last window overlaps the one before it, and counts only its end).
    """
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
