"""Text of your own as token files: text, JSON lines, JSON, parquet; files, folders, archives; in any mixture.

    python data/prepare.py --files notes/ --out_dir data/notes
    python data/prepare.py --files book.txt --tokenizer bpe:4096 --out_dir data/book
    python data/prepare.py --files posts/*.jsonl.zst --val_files val.jsonl --field body --out_dir data/posts

A text file is a document, and so is a row of the other formats. Without --val_files a part is held out for
validation: random documents, or the end of the text if there is only one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import run_program
from data.corpus import prepare
from data.files import CorpusError, text_size
from data.scripts import add_field, how, local_splits, options, parts_of_text, prepare_documents
from data.sources import TextFile


def main(argv: list[str]) -> int:
    parser = options(None, __doc__, tokenizer='gpt2', val_fraction=0.05)
    add_field(parser)
    args = parser.parse_args(argv)
    splits = local_splits(args, args.field)
    train = splits['train']
    if len(train) == 1 and isinstance(train[0], TextFile) and 'val' not in splits:
        path, size = train[0].path, text_size(train[0].path)
        held = round(args.val_fraction * size)
        if not 0 < held < size:
            raise CorpusError(
                f'{path} has {size:,} bytes of text, of which {held:,} are for validation: give more text, '
                '--val_files or another --val_fraction'
            )
        ends = {'train': size - held, 'val': size}
        splits |= parts_of_text(path, ends, train[0].raw)
        prepare(args.out_dir, args.tokenizer, splits, end=False, **how(args))
    else:
        prepare_documents(args, splits)
    return 0


if __name__ == '__main__':
    run_program(main)
