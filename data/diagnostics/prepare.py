"""Diagnostics: data sets that are generated, each of examples that ask for one ability, scored by accuracy.

    python data/diagnostics/prepare.py mqar                     # in data/diagnostics/mqar
    python data/diagnostics/prepare.py depth --examples 200000

The same task, seed and number of examples give the same bytes everywhere, and more examples begin with the
same ones. train.py makes a data set of these by itself when it is used for the first time. readme.md shows an
example of each task, and says where it comes from.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.chunks import replacing, write_json
from data.corpus import command_line
from data.files import CorpusError, one_line
from data.scripts import Parser, whole
from data.tokendata import DTYPES, FORMAT, META, Int64s, dtype_for
from data.tokenizer import Chars

CHUNK = 4096  # examples that are drawn together
BEGIN, FILLER, END = range(3)  # ids: before every example, between symbols, after what is to be copied
SIGNS = '\n.|'  # how those three are written; symbols are letters
FIRST = len(SIGNS)  # id of the first symbol
LETTERS = [c for c in map(chr, range(0x41, 0x530)) if c.isalpha()]  # of symbols, in the order of their ids


class Draws:
    """Random numbers that stay the same: numpy promises the raw output of a bit generator for good, which it
    does not for what its distributions make of it."""

    def __init__(self, *entropy: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def raw(self, *shape: int) -> NDArray[np.uint64]:
        return np.asarray(self.bits.random_raw(int(np.prod(shape))), dtype=np.uint64).reshape(shape)

    def below(self, m: int, *shape: int) -> Int64s:
        """Whole numbers from 0 to m - 1."""
        found: Int64s = (self.raw(*shape) % np.uint64(m)).astype(np.int64)
        return found

    def some(self, n: int, k: int, m: int) -> Int64s:
        """n times k different ones of 0 to m - 1 in a random order, (n, k)."""
        return np.argsort(self.raw(n, m), axis=1, kind='stable')[:, :k]


class Made(NamedTuple):
    rows: Int64s  # (n, tokens of an example)
    asked: dict[str, list[int]]  # group -> places in an example


def pairs(keys: Int64s, values: Int64s) -> Int64s:
    """(n, m) and (n, m) -> (n, 2 m): every key with its value behind it."""
    return np.stack([keys, values], axis=2).reshape(len(keys), -1)


def at(rows: Int64s, places: Int64s) -> Int64s:
    found: Int64s = np.take_along_axis(rows, places, axis=1)
    return found


def assemble(*parts: Int64s) -> Int64s:
    """The parts of n examples, (n, …) each, behind the sign that begins one."""
    return np.concatenate([np.full((len(parts[0]), 1), BEGIN), *parts], axis=1)


# Tasks: how n examples are drawn ---------------------------------------------


def mqar(draws: Draws, n: int, held: int = 16, symbols: int = 64) -> Made:
    """Multi-query associative recall: pairs of a key and a value, then every key once more, in another order;
    its value is asked for (Arora et al., 2023)."""
    keys, values = FIRST + draws.some(n, held, symbols), FIRST + symbols + draws.below(symbols, n, held)
    order = draws.some(n, held, held)
    rows = assemble(pairs(keys, values), pairs(at(keys, order), at(values, order)))
    return Made(rows, {'value': list(range(2 * held + 2, 4 * held + 1, 2))})


def induction(draws: Draws, n: int, length: int = 48, asks: int = 4, symbols: int = 96) -> Made:
    """Different symbols without any form; then some of them again, and the one that followed is asked for.

    Near: it stands among the last 18 of them; far: before those (after Olsson et al., 2022)."""
    text = FIRST + draws.some(n, length, symbols)
    slots = (
        length // 2 - 1
    )  # places of pairs without overlap, which begin with the first or the second symbol
    near, far = draws.some(n, asks, 8) + slots - 8, draws.some(n, asks, slots - 8)
    first = 2 * np.stack([near, far], axis=2).reshape(n, -1) + draws.below(2, n, 1)
    rows = assemble(text, pairs(at(text, first), at(text, first + 1)))
    asked = range(length + 2, length + 4 * asks + 1, 2)
    return Made(rows, {'near': list(asked[::2]), 'far': list(asked[1::2])})


def copy(draws: Draws, n: int, field: int = 43, copied: int = 20, symbols: int = 32) -> Made:
    """Symbols in a row somewhere in a field of fillers; after its end they are asked for, one by one."""
    text = FIRST + draws.below(symbols, n, copied)
    return copied_from(text, draws.below(field - copied + 1, n, 1) + np.arange(copied), field)


def selective_copy(draws: Draws, n: int, field: int = 47, copied: int = 16, symbols: int = 32) -> Made:
    """The same, but the symbols are scattered over the field (Jing et al., 2019; Gu and Dao, 2023)."""
    text = FIRST + draws.below(symbols, n, copied)
    return copied_from(text, np.sort(draws.some(n, copied, field), axis=1), field)


def copied_from(text: Int64s, places: Int64s, field: int) -> Made:
    n, copied = text.shape
    fielded = np.full((n, field), FILLER)
    np.put_along_axis(fielded, places, text, axis=1)
    rows = assemble(fielded, np.full((n, 1), END), text)
    return Made(rows, {'copy': list(range(field + 2, field + 2 + copied))})


def depth(
    draws: Draws, n: int, classes: int = 6, aliases: int = 3, asks: int = 4, names: int = 64, values: int = 64
) -> Made:
    """Recall through a class that the names of an item have in common.

    A dictionary tells the class of every name, several names a class; items tell a name and a value, one for
    each class. Then names are told again, and the values of their classes are asked for: for a third of them
    that of an item of the same name ('direct', as in mqar), else of an item of another name ('alias').

    An alias takes three layers at least: one puts a name beside what follows it; the next reads the class of
    the name, both where a value stands and where it is asked for; only then can the two meet. What is read
    there is the value, which that place has known since before the first layer, and has kept beside the name
    and the class that were written over it."""
    width = aliases - 1  # names of a class that no item has
    of_class = FIRST + draws.some(n, classes, 16)
    name = FIRST + 16 + draws.some(n, classes * aliases, names)
    value = FIRST + 16 + names + draws.some(n, classes, values)
    order = draws.some(n, classes * aliases, classes * aliases)
    dictionary = pairs(at(name, order), at(of_class, order // aliases))
    told = draws.below(aliases, n, classes)  # which of its names the item of a class has
    order = draws.some(n, classes, classes)
    items = pairs(at(name, aliases * order + at(told, order)), at(value, order))
    same = draws.some(n, asks, classes)
    other = draws.some(n, 2 * asks, classes * width)
    other_class = other // width
    other_name = aliases * other_class + (at(told, other_class) + 1 + other % width) % aliases
    ask_class = np.stack([other_class[:, ::2], other_class[:, 1::2], same], axis=2).reshape(n, -1)
    ask_name = np.stack(
        [other_name[:, ::2], other_name[:, 1::2], aliases * same + at(told, same)], axis=2
    ).reshape(n, -1)
    rows = assemble(dictionary, items, pairs(at(name, ask_name), at(value, ask_class)))
    asked = range(2 * classes * (aliases + 1) + 2, rows.shape[1], 2)
    alias = [place for i, place in enumerate(asked) if i % 3 < 2]
    return Made(rows, {'direct': list(asked[2::3]), 'alias': alias})


TASKS: dict[str, Callable[[Draws, int], Made]] = {
    'mqar': mqar,
    'induction': induction,
    'copy': copy,
    'selective_copy': selective_copy,
    'depth': depth,
}
VOCABULARY = {'mqar': 128, 'induction': 96, 'copy': 32, 'selective_copy': 32, 'depth': 144}  # symbols


# Files -----------------------------------------------------------------------


def examples(task: str, seed: int, split: int, n: int) -> Made:
    """The first n examples of a split (0: train, 1: val)."""
    made = [TASKS[task](Draws(seed, split, chunk), CHUNK) for chunk in range(-(-n // CHUNK))]
    return Made(np.concatenate([chunk.rows for chunk in made])[:n], made[0].asked)


def prepare(folder: Path, task: str, counts: dict[str, int], seed: int) -> dict[str, Any]:
    """Write the data set; the content of its meta.json. counts: examples of 'train' and 'val'."""
    tokenizer = Chars([*SIGNS, *LETTERS[: VOCABULARY[task]]])
    dtype = dtype_for(tokenizer.vocab_size)
    splits: dict[str, dict[str, Any]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    for number, (split, n) in enumerate(counts.items()):
        rows, asked = examples(task, seed, number, n)
        content = rows.astype(DTYPES[dtype]).tobytes()
        with replacing(folder / f'{split}.bin') as file:
            file.write(content)
        sha256 = hashlib.sha256(content).hexdigest()
        splits[split] = {'tokens': rows.size, 'documents': n, 'sha256': sha256}
    meta = {
        'format': FORMAT,
        'tokenizer': tokenizer.spec,
        'vocab_size': tokenizer.vocab_size,
        'dtype': dtype,
        'splits': splits,
        'source': {'task': task, 'seed': seed},
        'command': command_line(),
        'example': {'tokens': rows.shape[1], 'asked': asked},
    }
    write_json(folder / META, meta)
    return meta


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('task', choices=TASKS, help='what is asked for')
    add('--examples', type=whole(1), default=100_000, help='examples of the training split (100000)')
    add('--val_examples', type=whole(1), default=2_000, help='examples of the validation split (2000)')
    add('--seed', type=whole(0), default=0, help='of the random draws (0)')
    add('--out_dir', type=Path, help='folder of the token files (data/diagnostics/TASK)')
    args = parser.parse_args(argv)
    folder = args.out_dir or Path(__file__).resolve().parent / args.task
    try:
        meta = prepare(folder, args.task, {'train': args.examples, 'val': args.val_examples}, args.seed)
    except OSError as error:
        raise CorpusError(
            f'{folder} cannot be written to ({one_line(error)}): take another --out_dir'
        ) from None
    example = meta['example']
    asked = ', '.join(f'{len(places)} {name}' for name, places in example['asked'].items())
    print(
        f'{folder}: {args.examples:,} examples of {example["tokens"]} tokens and {args.val_examples:,} for '
        f'validation, vocabulary {meta["vocab_size"]}; asked for in each: {asked}'
    )
    return 0


if __name__ == '__main__':
    run_program(main)
