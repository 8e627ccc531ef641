"""Tiny Shakespeare, or one text in its place, as GPT-2 tokens.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --files book.txt --out_dir data/book

The last tenth is validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus


def main():
    cuts = {'train': 90, 'val': 100}
    corpus.prepare_by_position(__file__, __doc__, 'gpt2', corpus.TINY_SHAKESPEARE, cuts)


if __name__ == '__main__':
    corpus.run(main)
