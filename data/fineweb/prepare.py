"""FineWeb-Edu as GPT-2 tokens, each document followed by <|endoftext|>.

    python data/fineweb/prepare.py                          # the sample of about 10 billion tokens
    python data/fineweb/prepare.py --subset sample-100BT --out_dir data/fineweb100
    python data/fineweb/prepare.py --files sample/10BT/*.parquet

Without --val_files, 0.0005 of the documents are held out. The training tokens are in shards of 10^9.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.scripts import add_field, local_or_hub_splits, options, prepare_documents

HUB = ('HuggingFaceFW/fineweb-edu', None)


def main(argv: list[str]) -> int:
    parser = options(Path(__file__).parent, __doc__, tokenizer='gpt2', hub=HUB, val_fraction=0.0005)
    parser.add_argument(
        '--subset', default='sample-10BT', help='part of the data set, a "subset" on the Hub (sample-10BT)'
    )
    add_field(parser)
    args = parser.parse_args(argv)
    splits, origin = local_or_hub_splits(args, args.field, args.subset)
    prepare_documents(args, splits, origin)
    return 0


if __name__ == '__main__':
    run_program(main)
