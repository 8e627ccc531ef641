"""OpenWebText, or any text in its place, as GPT-2 tokens: each document followed by <|endoftext|>.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files train.jsonl.xz --val_files val.jsonl.xz
    python data/openwebtext/prepare.py --files notes/ --tokenizer bpe:4096 --out_dir data/notes

Without --val_files, 0.0005 of the documents are held out: for OpenWebText, nanoGPT's validation documents.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus

# plain_text/train-*-of-00080.parquet: 8,013,769 documents
HUB = ('Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c')


def main():
    parser = corpus.parser(__file__, __doc__, tokenizer='gpt2', hub=HUB, val_fraction=0.0005)
    parser.add_argument('--field', default='text', help='field of a record that holds the text (text)')
    args = parser.parse_args()
    corpus.prepare_documents(args, f'{{{args.field}}}')


if __name__ == '__main__':
    corpus.run(main)
