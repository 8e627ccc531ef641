"""OpenWebText, or any text in its place, as GPT-2 tokens: each document followed by <|endoftext|>.

    python data/openwebtext/prepare.py python data/openwebtext/prepare.py --files train.jsonl.xz --val_files
    val.jsonl.xz python data/openwebtext/prepare.py --files notes/ --val_files more.txt --tokenizer bpe:4096
    --out_dir data/notes

Without --val_files, 0.0005 of the documents are held out: for OpenWebText, nanoGPT's validation documents.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import corpus

# plain_text/train-*-of-00080.parquet, 8,013,769 documents
HUB = ('Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c')


def main():
    parser = corpus.parser(__file__, __doc__, tokenizer='gpt2', hub=HUB)
    parser.add_argument('--field', default='text', help='field of a record that holds the text (text)')
    parser.add_argument('--val_fraction', type=float, default=0.0005, help='documents held out (0.0005)')
    parser.add_argument('--split_seed', type=int, default=2357, help='which documents are held out (2357)')
    args = parser.parse_args()
    template = f'{{{args.field}}}'
    if args.files or args.val_files or args.test_files:
        splits, source = corpus.local_splits(args, template), None
    else:
        splits, source = corpus.hub_sources(args.repo, args.revision, template=template)
    holdout = None if 'val' in splits else corpus.Holdout(args.val_fraction, args.split_seed)
    corpus.prepare(args.out_dir, args.tokenizer, splits, source, holdout=holdout, num_proc=args.num_proc)


if __name__ == '__main__':
    corpus.run(main)
