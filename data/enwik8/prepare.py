"""enwik8, the first 10^8 bytes of a Wikipedia dump, as bytes.

    python data/enwik8/prepare.py
    python data/enwik8/prepare.py --files enwik8.zip

The first 90 million bytes are for training, the next 5 for validation and the last 5 for test, as is usual.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.scripts import options, prepare_one_text

# the SHA-256 is that of the 10^8 bytes inside
ENWIK8 = (
    'http://mattmahoney.net/dc/enwik8.zip',
    '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8',
)


def main(argv: list[str]) -> int:
    args = options(Path(__file__).parent, __doc__, tokenizer='bytes').parse_args(argv)
    prepare_one_text(args, ENWIK8, {'train': 90, 'val': 95, 'test': 100})
    return 0


if __name__ == '__main__':
    run_program(main)
