"""What the prepare.py scripts share: their options, and the sources that these name."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from data.corpus import prepare
from data.files import CorpusError, text_size
from data.join import SHARD_TOKENS, Holdout
from data.sources import Splits, TextFile, download, file_source, hub_sources, paths, template_parts

TINY_SHAKESPEARE = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/'
    'data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
)


# Options ---------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. `--key value` and `--key=value` mean the same."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise CorpusError(f'{message}; --help lists the options')


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least {least}')
        return value

    return parse


def fraction(text: str) -> float:
    """The type of an option that is a part of a whole."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:  # nan compares false
        raise argparse.ArgumentTypeError(f'{text!r} is not a number between 0 and 1')
    return value


def template(text: str) -> str:
    """The type of an option that makes the text of a document of the fields of its row."""
    text = text.replace('\\n', '\n')
    if not any(name is not None for _, name in template_parts(text)):
        raise argparse.ArgumentTypeError(f'{text!r} names no field; write {{name}} where its text belongs')
    return text


def field(text: str) -> str:
    """The type of an option that is the one field which holds the text: the template of it."""
    if not text or set(text) & set('{}:!'):
        raise argparse.ArgumentTypeError(f'{text!r} is not the name of a field')
    return f'{{{text}}}'


def options(
    out_dir: Path | None,
    description: str | None,
    tokenizer: str,
    hub: tuple[str, str | None] | None = None,
    val_fraction: float | None = None,
) -> Parser:
    """The options of a prepare.py.

    - out_dir: the usual folder of the token files; None for a script without text of its own, which needs
      --out_dir and --files
    - hub: (repository, revision or None for the newest), for a script that reads from the Hugging Face Hub
    - val_fraction: for a script that holds documents out
    """
    parser = Parser(description)
    add = parser.add_argument
    needed = out_dir is None
    usual = '' if needed else f' ({out_dir})'
    add('--out_dir', required=needed, default=out_dir, help=f'folder of the token files{usual}')
    add(
        '--tokenizer',
        default=tokenizer,
        help=f'gpt2, bpe:4096, bytes, chars, a tokenizer.json, a folder or a repository ({tokenizer})',
    )
    add('--num_proc', type=whole(1), help='processes that encode (one per core)')
    most = f'tokens of a file, beyond which a split is several files; 0 is no bound ({SHARD_TOKENS})'
    add('--shard_tokens', type=whole(0), default=SHARD_TOKENS, help=most)
    files: dict[str, Any] = {'nargs': '+', 'action': 'extend', 'metavar': 'FILE'}
    text = 'text files, .jsonl, .json or .parquet (also .gz .xz .bz2 .zst .zip), folders or patterns'
    add('--files', required=needed, **files, help=text + ('' if needed else ', in place of the usual source'))
    add('--val_files', **files, help='the same for validation (if left out: a part of --files)')
    add('--test_files', **files, help='the same for a test split')
    if hub:
        add('--repo', default=hub[0], help=f'dataset on the Hugging Face Hub ({hub[0]})')
        add('--revision', default=hub[1], help=f'its branch, tag or commit ({hub[1] or "main"})')
    if val_fraction:
        held = f'part that is held out where there are no validation files ({val_fraction})'
        add('--val_fraction', type=fraction, default=val_fraction, help=held)
        add('--split_seed', type=whole(0), default=2357, help='which documents are held out (2357)')
    return parser


def add_field(parser: Parser) -> None:
    """Add --field, whose value becomes the template of a row's text."""
    parser.add_argument(
        '--field', type=field, default='text', help='field of a row that holds its text (text)'
    )


# Sources --------------------------------------------------------------------


def local_splits(args: argparse.Namespace, template: str = '{text}') -> Splits:
    """The sources that --files, --val_files and --test_files name; {} if none is given."""
    given = {'train': args.files, 'val': args.val_files, 'test': args.test_files}
    given = {split: files for split, files in given.items() if files}
    if given and 'train' not in given:
        raise CorpusError('--val_files and --test_files go with --files, which is missing')
    raw = args.tokenizer == 'bytes'
    return {s: [file_source(path, template, raw) for path in paths(files)] for s, files in given.items()}


def local_or_hub_splits(
    args: argparse.Namespace, template: str = '{text}', config: str | None = None
) -> tuple[Splits, dict[str, str] | None]:
    """The local files if they are given, else those of the Hub; and the origin for `prepare`."""
    splits = local_splits(args, template)
    return (splits, None) if splits else hub_sources(args.repo, args.revision, config, template)


def parts_of_text(path: str, ends: dict[str, int], raw: bool) -> Splits:
    """The parts of one text file. ends: {split: the byte at which it ends}, moved to whole characters unless
    the bytes are taken as they are."""
    starts = [0, *ends.values()]
    return {split: [TextFile(path, a, b, raw)] for (split, b), a in zip(ends.items(), starts, strict=False)}


# Preparing ------------------------------------------------------------------


def how(args: argparse.Namespace) -> dict[str, Any]:
    """The options that every script passes on to `prepare`."""
    return {'num_proc': args.num_proc, 'shard_tokens': args.shard_tokens}


def prepare_documents(
    args: argparse.Namespace, splits: Splits, origin: dict[str, str] | None = None, begin: bool = False
) -> None:
    """Prepare documents: rows, or whole text files. Without a split val, some of them are held out for it."""
    holdout = None if 'val' in splits else Holdout(args.val_fraction, args.split_seed)
    prepare(args.out_dir, args.tokenizer, splits, origin, begin=begin, holdout=holdout, **how(args))


def prepare_one_text(args: argparse.Namespace, original: tuple[str, str], percents: dict[str, int]) -> None:
    """Prepare one text divided by position: the `original` (its URL and SHA-256), or the one of --files.

    percents: {split: percent of the bytes at which it ends}
    """
    splits, origin = {}, None
    if args.val_files or args.test_files:
        splits = local_splits(args)
    else:
        if args.files:
            found = paths(args.files)
        else:
            origin = {'url': original[0], 'sha256': original[1]}
            found = [download(*original, Path(args.out_dir) / 'download')]
        raw = args.tokenizer == 'bytes'
        if len(found) > 1 or not isinstance(file_source(found[0], raw=raw), TextFile):
            raise CorpusError(
                f'one text file is divided by position, not {len(found)} files or rows: give --val_files '
                'too, or use data/prepare.py, which holds documents out'
            )
        size = text_size(found[0])
        splits = parts_of_text(found[0], {s: size * percent // 100 for s, percent in percents.items()}, raw)
    prepare(args.out_dir, args.tokenizer, splits, origin, end=False, **how(args))
