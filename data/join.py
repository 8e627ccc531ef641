"""Chunks of tokens to token files: joined, some documents held out, and compared between the splits."""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chunks import BYTES, FLAGS, KEY, TOKENS, read_chunk
from data.files import CorpusError
from data.sources import ENDS, STARTS
from data.tokendata import SPLITS

SHARD_TOKENS = 10**9  # of a token file at most: 2 GB of uint16


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
