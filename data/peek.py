"""What a folder of token files holds: counts, how the text reads, which tokens are frequent.

    python data/peek.py data/stdlib
    python data/peek.py data/plain --vocab_size 50257 --tokenizer gpt2

The second is for .bin files without meta.json.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import run_program
from data.corpus import report
from data.scripts import Parser, whole
from data.tokendata import open_data
from data.tokenizer import from_spec, load

BLOCK = 1 << 22  # tokens counted at a time


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument('folder', help='folder with train.bin, val.bin and meta.json')
    parser.add_argument('--tokens', type=whole(0), default=120, help='tokens shown of each split (120)')
    parser.add_argument('--at', type=whole(0), default=0, help='position of the first one (0)')
    parser.add_argument('--top', type=whole(0), default=20, help='most frequent tokens shown (20)')
    parser.add_argument('--vocab_size', type=whole(1), help='for .bin files without meta.json')
    parser.add_argument('--tokenizer', help='the tokenizer of .bin files without meta.json')
    args = parser.parse_args(argv)

    data = open_data(args.folder, vocab_size=args.vocab_size)
    if data.meta:
        report(args.folder, data.meta)
    tokenizer = None
    if data.tokenizer_spec:
        tokenizer = from_spec(data.tokenizer_spec)
    elif args.tokenizer:
        tokenizer = load(args.tokenizer)

    for name, tokens in data.splits.items():
        shown = tokens[args.at : args.at + args.tokens].tolist()
        print(f'\n--- {name}: tokens {args.at:,} to {args.at + len(shown):,} of {len(tokens):,}')
        print(tokenizer.decode(shown) if tokenizer else ' '.join(map(str, shown)))

    tokens = data.splits['train']
    counts = np.zeros(data.vocab_size, np.int64)
    for start in range(0, len(tokens), BLOCK):
        counts += np.bincount(tokens[start : start + BLOCK], minlength=data.vocab_size)
    used = counts[counts > 0] / len(tokens)
    bits = -(used * np.log2(used)).sum()
    print(f'\n--- train: {len(used):,} of {data.vocab_size:,} ids occur, entropy {bits:.3f} bits per token')
    for i in np.argsort(-counts, kind='stable')[: args.top].tolist():
        text = repr(tokenizer.decode([i])) if tokenizer else ''
        print(f'{i:8} {counts[i]:>13,} {100 * counts[i] / len(tokens):6.2f} %  {text}')
    return 0


if __name__ == '__main__':
    run_program(main)
