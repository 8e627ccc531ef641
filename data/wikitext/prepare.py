"""WikiText-2 or -103, raw, as GPT-2 tokens, with the train, validation and test splits that they come with.

    python data/wikitext/prepare.py             # WikiText-103 in data/wikitext103
    python data/wikitext/prepare.py --size 2    # WikiText-2 in data/wikitext2
    python data/wikitext/prepare.py --files wiki.train.raw --val_files wiki.valid.raw

The lines of a split follow each other as they stand, as one text: no token is put between articles.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.corpus import prepare
from data.files import CorpusError
from data.scripts import how, local_or_hub_splits, options
from data.sources import Joined, Splits

FOLDER = Path(__file__).resolve().parents[1]  # of the data sets
HUB = ('Salesforce/wikitext', 'b08601e04326c79dfdd32d625aee71d232d685c3')


def main(argv: list[str]) -> int:
    parser = options(FOLDER / 'wikitext103', __doc__, tokenizer='gpt2', hub=HUB)
    parser.add_argument(
        '--size', choices=('2', '103'), default='103', help='WikiText-2 or WikiText-103 (103)'
    )
    args = parser.parse_args(argv)
    default = args.out_dir == parser.get_default('out_dir')
    out_dir = FOLDER / f'wikitext{args.size}' if default else args.out_dir
    splits, origin = local_or_hub_splits(args, config=f'wikitext-{args.size}-raw-v1')
    if 'val' not in splits:
        raise CorpusError('--files needs --val_files here')
    joined: Splits = {split: [Joined(tuple(parts))] for split, parts in splits.items()}
    prepare(out_dir, args.tokenizer, joined, origin, end=False, **how(args))
    return 0


if __name__ == '__main__':
    run_program(main)
