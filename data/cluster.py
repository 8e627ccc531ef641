"""A prepared data set to parts: by balanced k-means over tf-idf, or by a field of its documents.

    python data/cluster.py --dataset=data/notes --clusters=8 --out_dir=data/parts
    python data/cluster.py --dataset=data/notes --by=source --files notes.jsonl --out_dir=data/parts
    python data/cluster.py --dataset=data/notes --clusters=8 --held_out=7 --out_dir=data/parts

Each part is a data set of its own with the same tokenizer, data/parts/NAME: models that are trained on parts
can be joined (compose.py). Documents of validation go to the nearest centre. With --held_out, the other parts
together become data/parts/seen. Beside them are centres.npz (data/centres.py), and report.md with the sizes
and the typical words of each part. Clusters need scikit-learn (requirements-extras.txt).
"""

import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import run_program
from data.centres import (
    FILE,
    Centres,
    balanced_k_means,
    centres_of,
    fit_vectors,
    squared_distances,
    vectors,
)
from data.chunks import write_json
from data.corpus import report
from data.files import CorpusError, suffixes
from data.join import SHARD_TOKENS, TokenWriter
from data.scripts import Parser, field, whole
from data.sources import ENDS, STARTS, json_rows, parquet_rows, paths, template_parts
from data.tokendata import META, DataError, TokenData, Tokens, open_data
from data.tokenizer import Tokenizer, from_spec, well_formed

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 1 << 22  # tokens looked through at a time
BATCH = 1000  # documents whose vectors are made at a time
SEEN, REPORT = 'seen', 'report.md'
TYPICAL = 8  # words of a part that are shown


class Documents(NamedTuple):
    """The documents of a split, of which the tokens are read when they are asked for."""

    tokens: Tokens
    ends: NDArray[np.int64]  # (documents,): where each ends, its end-of-text token included
    tokenizer: Tokenizer
    special: frozenset[int]  # tokens around a text that are none of it

    def ids(self, i: int) -> NDArray[Any]:
        """The tokens of document i, (n,), with those around it."""
        start = int(self.ends[i - 1]) if i else 0
        found: NDArray[Any] = self.tokens[start : int(self.ends[i])]
        return found

    def sizes(self) -> NDArray[np.int64]:
        """The tokens of each."""
        return np.diff(self.ends, prepend=0)

    def text(self, i: int) -> str:
        ids = self.ids(i).tolist()
        first = 1 if ids[0] in self.special else 0
        return self.tokenizer.decode(ids[first:-1])

    def texts(self, which: Iterable[int]) -> Iterator[str]:
        return (self.text(i) for i in which)


def documents(data: TokenData, split: str) -> Documents:
    """The documents of a split; DataError where the tokens do not tell where they end."""
    if data.tokenizer_spec is None:
        raise DataError(f'{data.folder} has no {META}, so that its texts are not known: prepare it anew')
    tokens, eot, begin = data.splits[split], data.tokenizer_spec['eot'], data.meta.get('begin')
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(tokens) if eot is not None else 0, BLOCK):
        found.append(start + np.flatnonzero(tokens[start : start + BLOCK] == eot))
    ends = np.concatenate(found) + 1
    ends = ends[1::2] if begin == eot and eot is not None else ends  # it stands on both sides of a document
    known = data.meta['splits'][split].get('documents', len(ends))
    if len(ends) != known or not len(ends) or ends[-1] != len(tokens):
        raise DataError(
            f'{data.folder}: {split} has {known:,} documents, of which {len(ends):,} end with an end-of-text '
            'token: prepare it with a tokenizer that has one, and from several documents'
        )
    special = frozenset(token for token in (begin,) if token is not None)
    return Documents(tokens, ends, from_spec(data.tokenizer_spec), special)


def values_by_text(files: list[str], text_field: str, by: str) -> dict[bytes, str]:
    """Hash of a text -> the value of the field `by` in its row."""
    found: dict[bytes, str] = {}
    parts = template_parts(text_field)
    (name,) = [field for _, field in parts if field is not None]
    for path in files:
        rows = parquet_rows if suffixes(path)[0] == '.parquet' else json_rows
        for where, row in rows(path, [name, by]):
            for wanted in (name, by):
                if not isinstance(row, dict) or not isinstance(row.get(wanted), str | None) or by not in row:
                    has = ', '.join(row) if isinstance(row, dict) else 'none'
                    raise CorpusError(f'{where} has no text in a field {wanted!r}; its fields: {has}')
            found[key_of(well_formed(row[name] or ''))] = row[by] or 'none'
    return found


def key_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode('utf-8'), digest_size=16).digest()


def parts_by_field(of: dict[str, Documents], values: dict[bytes, str]) -> dict[str, list[str]]:
    """For every split the name of each document's part; CorpusError where no row has a document's text."""
    found = {}
    for split, docs in of.items():
        known = [values.get(key_of(docs.text(i))) for i in range(len(docs.ends))]
        if missing := known.count(None):
            raise CorpusError(
                f'{missing:,} of {len(known):,} documents of {split} are not in the rows of --files: give '
                'the files that the data set was prepared from, and --field'
            )
        found[split] = [re.sub(r'[^A-Za-z0-9_-]+', '-', value or '').strip('-') or 'none' for value in known]
    return found


def find_parts(
    of: dict[str, Documents], given: dict[str, list[str]] | None, k: int, at_most: int, seed: int
) -> tuple[dict[str, list[str]], Centres, dict[str, list[str]]]:
    """The part of every document by split, the centres, and the typical words of each part.

    given: the parts, where a field tells them; else k clusters are found, on `at_most` documents of train,
    and the others go to the nearest centre.
    """
    train = of['train']
    n = len(train.ends)
    sample = np.sort(np.random.default_rng(seed).permutation(n)[:at_most])
    words, idf, axes, table = fit_vectors(train.texts(sample.tolist()), seed)
    points = vectors(table, axes)
    if given is None:
        if len(sample) < k:
            raise CorpusError(f'--clusters {k}: train has {n:,} documents, which are too few')
        part = balanced_k_means(points, train.sizes()[sample], k, seed)
        names = [str(i) for i in range(k)]
    else:
        names = sorted(set(given['train']))
        part = np.array([names.index(given['train'][i]) for i in sample.tolist()])
    centres = Centres(names, centres_of(points, part, len(names)), words, idf, axes)
    typical = typical_words(table, part, centres)
    if given is not None:
        return given, centres, typical
    found: dict[str, list[str]] = {}
    for split, docs in of.items():
        nearest = [0] * len(docs.ends)
        for start in range(0, len(docs.ends), BATCH):
            some = range(start, min(start + BATCH, len(docs.ends)))
            here = vectors(centres.tf_idf(docs.texts(some)), axes)
            nearest[start : some.stop] = squared_distances(here, centres.points).argmin(1).tolist()
        found[split] = [names[p] for p in nearest]
    for i, p in zip(sample.tolist(), part.tolist(), strict=True):
        found['train'][i] = names[p]
    return found, centres, typical


def typical_words(table: Any, part: NDArray[np.int64], centres: Centres) -> dict[str, list[str]]:
    """The words that stand out most in each part, by the mean of their tf-idf less that of all documents."""
    overall, found = np.asarray(table.mean(0)).ravel(), {}
    for p, name in enumerate(centres.names):
        own = np.asarray(table[part == p].mean(0)).ravel()
        found[name] = [centres.words[w] for w in np.argsort(overall - own)[:TYPICAL].tolist()]
    return found


def write_parts(
    folder: Path,
    data: TokenData,
    of: dict[str, Documents],
    parts: dict[str, list[str]],
    groups: dict[str, set[str]],
    shard_tokens: int,
) -> dict[str, dict[str, Any]]:
    """Write a data set for every group, {its name: the parts in it}; the content of their meta.json."""
    metas = {}
    for name, members in groups.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / META).unlink(missing_ok=True)
        entries: dict[str, dict[str, Any]] = {}
        for split, docs in of.items():
            mine = [i for i, part in enumerate(parts[split]) if part in members]
            if not mine:
                raise CorpusError(
                    f'part {name} has no document of {split}: ask for fewer clusters, or prepare the data '
                    'set with more text for validation'
                )
            writer = TokenWriter(place, split, shard_tokens)
            for i in mine:
                ids, size = docs.ids(i), len(docs.text(i).encode('utf-8'))
                writer.write(ids, np.array([[len(ids), size, STARTS | ENDS, 0]], np.int64))
            entries[split] = writer.finish()
        if (source := data.folder / 'tokenizer.json').exists():
            (place / 'tokenizer.json').write_bytes(source.read_bytes())
        origin = {'dataset': str(data.folder), 'fingerprint': data.fingerprint, 'parts': sorted(members)}
        metas[name] = {**data.meta, 'splits': entries, 'source': origin, 'command': command_line()}
        metas[name].pop('job', None)
        write_json(place / META, metas[name])
    return metas


def command_line() -> str:
    return shlex.join(['python', 'data/cluster.py', *sys.argv[1:]])


def table_of(metas: dict[str, dict[str, Any]], typical: dict[str, list[str]]) -> str:
    """The report: a Markdown table with a row for each part."""
    lines = ['# Parts', '', f'Made by `{command_line()}`.', '']
    splits = list(next(iter(metas.values()))['splits'])
    head = ['part', *(f'{what} of {split}' for split in splits for what in ('documents', 'tokens'))]
    lines += ['| ' + ' | '.join([*head, 'typical words']) + ' |', '| --- ' * (len(head) + 1) + '|']
    for name, meta in metas.items():
        counts = [f'{meta["splits"][s][what]:,}' for s in splits for what in ('documents', 'tokens')]
        lines.append('| ' + ' | '.join([name, *counts, ', '.join(typical.get(name, []))]) + ' |')
    return '\n'.join(lines) + '\n'


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--dataset', required=True, help='a folder of data/, or any path, that prepare.py has filled')
    add('--out_dir', required=True, help='the folder in which the parts are made')
    add('--clusters', type=whole(2), default=8, help='how many parts (8)')
    add('--by', help='the field whose values are the parts, in place of clusters')
    add('--files', nargs='+', help='with --by: the rows that the data set was prepared from')
    add('--field', type=field, default='text', help='with --by: the field that holds the text (text)')
    add('--held_out', default='', help='parts that the data set "seen" leaves out, separated by commas')
    add('--seed', type=whole(0), default=1337, help='of the clusters (1337)')
    add('--fit_documents', type=whole(2), default=50_000, help='that clusters are found on (50,000)')
    add('--shard_tokens', type=whole(0), default=SHARD_TOKENS, help=f'of a file at most ({SHARD_TOKENS})')
    args = parser.parse_args(argv)
    folder, out_dir = Path(args.dataset), Path(args.out_dir)
    folder = folder if folder.is_dir() else ROOT / 'data' / args.dataset
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / REPORT).exists():
        raise CorpusError(f'{out_dir} holds other things: give another --out_dir')
    if args.by and not args.files:
        raise CorpusError('--by needs --files: the rows that the data set was prepared from')
    data = open_data(folder)
    of = {split: documents(data, split) for split in data.splits}
    given = None
    if args.by:
        given = parts_by_field(of, values_by_text(paths(args.files), args.field, args.by))
    parts, centres, typical = find_parts(of, given, args.clusters, args.fit_documents, args.seed)
    groups = {name: {name} for name in centres.names}
    held = {name for name in args.held_out.split(',') if name}
    if unknown := held - groups.keys():
        raise CorpusError(f'--held_out {min(unknown)}: the parts are {", ".join(groups)}')
    if held:
        groups[SEEN] = groups.keys() - held
    old = {path.parent.name for path in out_dir.glob(f'*/{META}')} - groups.keys()
    if old:
        raise CorpusError(
            f'{out_dir} holds parts of another division ({", ".join(sorted(old))}): delete it, or give '
            'another --out_dir'
        )
    metas = write_parts(out_dir, data, of, parts, groups, args.shard_tokens)
    centres.save(out_dir / FILE)
    (out_dir / REPORT).write_text(table_of(metas, typical), encoding='utf-8')
    for name, meta in metas.items():
        report(out_dir / name, meta)
    print(table_of(metas, typical))
    return 0


if __name__ == '__main__':
    run_program(main)
