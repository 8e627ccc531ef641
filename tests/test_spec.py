"""Attention strings: what they say, their one spelling, the older spellings, and what is refused."""

import pytest

from layers.spec import Word, by_layer, canonical, parse
from model import GPT, GPTConfig

SIZE = {'block_size': 16, 'vocab_size': 64, 'n_layer': 6, 'n_head': 8, 'n_embd': 32}


def test_words():
    assert parse('vanilla') == [Word('vanilla')]
    assert parse('swa(window=64)*3 reflex(4-2-2, window = 7)') == [
        Word('swa', (('window', '64'),), 3),
        Word('reflex', (('', '4-2-2'), ('window', '7'))),
    ]
    assert [(str(w), i, n) for w, i, n in by_layer('a*2 b', 3)] == [('a*2', 0, 2), ('a*2', 1, 2), ('b', 0, 1)]


@pytest.mark.parametrize(
    ('given', 'wanted'),
    [
        (('vanilla',), 'vanilla'),
        (('reflex',), 'reflex(4-2-2)'),
        (('reflex', '5-2-1'), 'reflex(5-2-1)'),
        (('reflex( split = 5-2-1 )',), 'reflex(5-2-1)'),
        (('first', '8/4-4'), 'layer0(8/4-4)'),
        (('first_residual', '8/4-4', 'auto'), 'layer0_residual(8/4-4)'),
        (('vanilla', '4-2-2', 'auto'), 'vanilla'),  # defaults of knobs that say nothing here
        (('reflex_all', '4-2-2'), 'reflex_all'),
        (('leap',), 'leap(auto)'),
        (('leap', '', 'global'), 'leap(global)'),
        (('leap(window=64)',), 'leap(64)'),
        (('leap', '4-2-2', '4-8-16-32-64-0'), 'leap(4-8-16-32-64-0)'),
        (('leap*3  reflex*3', '5-2-1', '4-8-16-0-0-0'), 'leap(4-8-16)*3 reflex(5-2-1)*3'),
        (('leap leap leap reflex*3',), 'leap(auto)*3 reflex(4-2-2)*3'),
        (('vanilla*1 lime*1',), 'vanilla lime'),
    ],
)
def test_one_spelling(given, wanted):
    assert canonical(*given) == wanted and canonical(wanted) == wanted


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        (('',), 'names nothing'),
        (('leap((3)',), 'cannot be read'),
        (('leap-2',), "'leap-2' cannot be read"),
        (('leap*0',), 'stands for no layer'),
        (('leap(3, 4)',), "'4' is no option"),
        (('leap(window=)',), 'is no option'),
        (('vanilla', '5-2-1'), "head_split='5-2-1': nothing in attention='vanilla' takes it"),
        (('reflex(4-2-2)', '5-2-1'), 'says it too'),
    ],
)
def test_what_cannot_be_read_is_refused(given, words):
    with pytest.raises(ValueError) as e:
        canonical(*given)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ('attention', 'words'),
    [
        ('refelx', "'refelx' is unknown, one of vanilla, reflex, "),
        ('leap(depth=3)', "leap has no option 'depth'; it has window"),
        ('lime(window=few)', "lime wants a whole number for window, not 'few'"),
        ('vanilla(window=-1)', 'window=-1'),
        ('leap(3, window=4)', 'gives window twice'),
        ('reflex(4-2-2)*5', 'speaks of 5 layers, but n_layer=6'),
        ('lime*3 reflex(4-2-2)*3', 'lime publishes new tokens alone'),
    ],
)
def test_a_layer_refuses_options_that_it_has_not(attention, words):
    with pytest.raises(ValueError) as e:
        GPTConfig(**SIZE, attention=attention)
    assert words in str(e.value)


@pytest.mark.parametrize(
    'older',
    [
        {'attention': 'reflex', 'head_split': '5-2-1', 'windows': 'auto'},
        {'attention': 'first', 'head_split': '8/4-4', 'windows': 'auto'},
        {'attention': 'leap*3 reflex*3', 'head_split': '4-2-2', 'windows': '4-8-16-0-0-0'},
    ],
)
def test_weights_saved_under_an_older_spelling_load(older):
    """What the layers say of themselves is kept with the weights: it has not changed with the spelling."""
    old = GPT(GPTConfig(**SIZE, **older), seed=1)
    new = GPT(GPTConfig(**SIZE, attention=old.config.attention), seed=2)
    assert new.config == old.config
    new.load_state_dict(old.state_dict())
    described = {
        'reflex(5-2-1)': 'head plan 0 0 0 0 0 1 1 2',
        'layer0(8/4-4)': 'head plan 0 0 0 0 0/5 0/5 0/5 0/5',
    }
    last = old.describe().splitlines()[-1]
    assert last == described.get(old.config.attention, last)
