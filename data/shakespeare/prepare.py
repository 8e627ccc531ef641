"""Tiny Shakespeare, or one text in its place, as GPT-2 tokens.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --files book.txt --out_dir data/book

The last tenth is for validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.scripts import TINY_SHAKESPEARE, options, prepare_one_text


def main(argv: list[str]) -> int:
    args = options(Path(__file__).parent, __doc__, tokenizer='gpt2').parse_args(argv)
    prepare_one_text(args, TINY_SHAKESPEARE, {'train': 90, 'val': 100})
    return 0


if __name__ == '__main__':
    run_program(main)
