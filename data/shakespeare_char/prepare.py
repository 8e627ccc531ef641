"""Tiny Shakespeare, or one text in its place, as characters: the last tenth is validation.

python data/shakespeare_char/prepare.py
python data/shakespeare_char/prepare.py --files book.txt --out_dir data/book_char
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import corpus


def main():
    args = corpus.parser(__file__, __doc__, tokenizer='chars').parse_args()
    splits, origin = corpus.positional_splits(args, *corpus.TINY_SHAKESPEARE, {'train': 90, 'val': 100})
    corpus.prepare(args.out_dir, args.tokenizer, splits, origin, end=False, num_proc=args.num_proc)


if __name__ == '__main__':
    corpus.run(main)
