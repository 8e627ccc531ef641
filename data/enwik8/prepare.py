"""enwik8, the first 10^8 bytes of a Wikipedia dump, as bytes.

    python data/enwik8/prepare.py
    python data/enwik8/prepare.py --files enwik8.zip

90 million bytes are for training, 5 for validation and 5 for test, as is the custom.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus

# the SHA-256 is that of the 10^8 bytes inside
ENWIK8 = (
    'http://mattmahoney.net/dc/enwik8.zip',
    '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8',
)


def main():
    cuts = {'train': 90, 'val': 95, 'test': 100}
    corpus.prepare_by_position(__file__, __doc__, 'bytes', ENWIK8, cuts)


if __name__ == '__main__':
    corpus.run(main)
