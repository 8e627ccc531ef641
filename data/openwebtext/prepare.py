"""OpenWebText as GPT-2 tokens, each document followed by <|endoftext|>.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files openwebtext/*.parquet

Without --val_files, 0.0005 of the documents are held out: for OpenWebText, nanoGPT's validation documents.
For text of your own there is data/prepare.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.scripts import add_field, local_or_hub_splits, options, prepare_documents

# plain_text/train-*-of-00080.parquet: 8,013,769 documents
HUB = ('Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c')


def main(argv: list[str]) -> int:
    parser = options(Path(__file__).parent, __doc__, tokenizer='gpt2', hub=HUB, val_fraction=0.0005)
    add_field(parser)
    args = parser.parse_args(argv)
    splits, origin = local_or_hub_splits(args, args.field)
    prepare_documents(args, splits, origin)
    return 0


if __name__ == '__main__':
    run_program(main)
