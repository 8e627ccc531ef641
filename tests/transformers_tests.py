"""transformers' own tests of models and of generation, run on the models of this project.

    python tests/transformers_tests.py FOLDER            # the folder `tests` of a transformers checkout
    python tests/transformers_tests.py FOLDER leap       # on one kind

The folder must be of the transformers that is installed; pip does not bring it. The program prints how many
tests passed, failed and were skipped, and why. docs/transformers.md keeps that table.
"""

from __future__ import annotations

import re
import sys
import unittest
from collections import Counter, defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hf  # noqa: E402
from modeling_reflex import ReflexCache  # noqa: E402

SHAPE = {'vocab_size': 99, 'block_size': 128, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
LEVELS = {'groups': 16, 'latents': '2', 'widths': '32-32'}
KINDS = {
    'vanilla': hf.ReflexConfig(**SHAPE),
    'reflex': hf.ReflexConfig(**SHAPE, attention='reflex(2-2)'),
    'leap': hf.ReflexConfig(**SHAPE, attention='leap'),
    'gated_delta': hf.ReflexConfig(**SHAPE, attention='gated_delta'),
    'hierarchy': hf.HierarchicalConfig(**SHAPE, **LEVELS),
}


LOOKING = ('vanilla', 'reflex')  # whose attention has weights of token by token


class Tester:
    """What the tests ask about a model."""

    is_training = True
    batch_size, seq_length = 13, 7
    num_hidden_layers, num_attention_heads, hidden_size = (SHAPE[n] for n in ('n_layer', 'n_head', 'n_embd'))

    def __init__(self, config, padded: bool):
        """padded: the last token of each row is padding, in generation too."""
        self.config, self.padded = config, padded

    def get_config(self):
        return type(self.config)(**self.config.to_dict())

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(SHAPE['vocab_size'], (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[:, -1] = not self.padded
        return self.get_config(), {'input_ids': ids, 'attention_mask': mask}


def case(kind: str, mixins: tuple[type, ...]) -> type:
    """The tests of one kind."""
    config = KINDS[kind]
    model_class = next(model for own, model in hf.CLASSES.values() if type(config) is own)

    def setUp(self):
        self.model_tester = Tester(config, kind in LOOKING)

    def check_cache(self, batch_size, past_key_values, seq_length, config):
        """For models whose cache is no list of keys and values of all layers."""
        self.assertIsInstance(past_key_values, ReflexCache)
        held = past_key_values.rows, past_key_values.get_seq_length()
        self.assertEqual(held, (batch_size, seq_length))

    own = {'all_model_classes': (model_class,), 'has_attentions': kind in LOOKING, 'setUp': setUp}
    own |= {'_check_past_key_values_for_generate': check_cache}
    return type(f'Test_{kind}', (*mixins, unittest.TestCase), own)


class Outcomes(unittest.TestResult):
    """Which tests passed, and why others failed or were skipped."""

    def __init__(self):
        super().__init__()
        self.passed, self.reasons, self.skips = [], {}, {}

    def addSuccess(self, test):
        self.passed.append(test.id())

    def addFailure(self, test, error):
        self.reasons[name_of(test)] = reason_of(error)

    def addError(self, test, error):
        self.addFailure(test, error)

    def addSkip(self, test, reason):
        self.skips[name_of(test)] = reason.splitlines()[0]

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addFailure(test, error)


def name_of(test) -> str:
    return test.id().rpartition('.')[2]


def reason_of(error) -> str:
    """The first line of an exception's message."""
    kind, value, _ = error
    lines = [line for line in str(value).splitlines() if line.strip()]
    return f'{kind.__name__}: {lines[0] if lines else ""}'[:160]


def main(argv: list[str]):
    folder, *kinds = argv
    sys.path.insert(0, str(Path(folder).resolve().parent))
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_modeling_common import ModelTesterMixin

    rows, failed, skipped = [], defaultdict(list), defaultdict(Counter)
    for kind in kinds or KINDS:
        tests = unittest.defaultTestLoader.loadTestsFromTestCase(
            case(kind, (ModelTesterMixin, GenerationTesterMixin))
        )
        outcomes = Outcomes()
        tests.run(outcomes)
        for name, reason in outcomes.reasons.items():
            failed[re.sub(r'_\d+(_.*)?$', '', name), reason].append(kind)
        for reason in outcomes.skips.values():
            skipped[reason][kind] += 1
        rows.append((kind, len(outcomes.passed), len(outcomes.reasons), len(outcomes.skips)))
        print(*rows[-1], sep='\t', file=sys.stderr)
    print('| kind | passed | failed | skipped |\n| --- | --- | --- | --- |')
    for row in rows:
        print('|', ' | '.join(map(str, row)), '|')
    print('\n| test | kinds | what it says |\n| --- | --- | --- |')
    for (name, reason), kinds in sorted(failed.items()):
        print(f'| `{name}` | {", ".join(dict.fromkeys(kinds))} | {reason} |')
    print('\n| skipped, by kind | for what reason |\n| --- | --- |')
    for reason, kinds in sorted(skipped.items(), key=lambda entry: -entry[1].total()):
        print('|', ', '.join(f'{kind} {n}' for kind, n in kinds.items()), '|', reason, '|')


if __name__ == '__main__':
    main(sys.argv[1:])
