"""Russian instructions, in the tokens of the GPT-2-shaped checkpoint that their model starts from.

    python data/russian_instructions/prepare.py
    python data/russian_instructions/prepare.py --files rows.jsonl --tokenizer path/to/checkpoint_folder

A document is a row: beginning-of-text token, question, a newline, answer, end-of-text token. 0.5 % of them
are held out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_program
from data.scripts import local_or_hub_splits, options, prepare_documents, template

HUB = ('Den4ikAI/russian_instructions_2', None)
CHECKPOINT = 'ai-forever/rugpt3large_based_on_gpt2'


def main(argv: list[str]) -> int:
    parser = options(Path(__file__).parent, __doc__, tokenizer=CHECKPOINT, hub=HUB, val_fraction=0.005)
    parser.add_argument(
        '--template',
        type=template,
        default='{question}\n{answer}',
        help=r'text of a document, from the fields of its row ({question}\n{answer})',
    )
    args = parser.parse_args(argv)
    splits, origin = local_or_hub_splits(args, args.template)
    prepare_documents(args, splits, origin, begin=True)
    return 0


if __name__ == '__main__':
    run_program(main)
