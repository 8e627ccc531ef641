"""What an `attention` string says: a name, its options in parentheses, how many layers; words for several
kinds.

    vanilla                      every layer
    reflex(5-2-1)                every layer, with a value for the first option
    leap(window=64)*4 reflex*2   four layers, then two; an option may be named

This module knows the syntax alone and imports nothing heavy; what names and options there are is up to
layers/registry.py. A string is kept in one canonical spelling, by which arms, checkpoints and tables call it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Spellings from before options stood in parentheses: the knob, the names that took it, what their first
# option is called now, and its default
OLDER = {
    'head_split': (('reflex', 'layer0', 'layer0_residual'), 'split', '4-2-2'),
    'windows': (('leap', 'additive'), 'window', 'auto'),
}
RENAMED = {'first': 'layer0', 'first_residual': 'layer0_residual'}
WORD = re.compile(r'(\w+)(?:\(([^()]*)\))?(?:\*(\d+))?')


class Word(NamedTuple):
    """One word of an attention string. options: (name, text) pairs, with '' for the name of the first option
    where it is not given; n_layers: how many layers, 0 where it is not given."""

    name: str
    options: tuple[tuple[str, str], ...] = ()
    n_layers: int = 0

    def __str__(self):
        inside = ', '.join(f'{name}={text}' if name else text for name, text in self.options)
        return self.name + (f'({inside})' if inside else '') + (f'*{self.n_layers}' if self.n_layers else '')


def parse(attention: str) -> list[Word]:
    """The words of an attention string; ValueError where it is none."""
    words = []
    for part in re.findall(r'(?:[^\s()]|\([^()]*\)|[()])+', attention):
        found = WORD.fullmatch(part)
        if not found:
            raise ValueError(
                f'attention={attention!r}: {part!r} cannot be read; write a name, its options in parentheses '
                "and a number of layers, as in 'leap(window=64)*4 reflex(4-2-2)*2'"
            )
        name, inside, count = found.groups()
        if count is not None and int(count) == 0:
            raise ValueError(f'attention={attention!r}: {part!r} stands for no layer; leave it out')
        words.append(Word(RENAMED.get(name, name), _options(attention, inside or ''), int(count or 0)))
    if not words:
        raise ValueError("attention='' names nothing: the usual one is 'vanilla'")
    return words


def _options(attention: str, inside: str) -> tuple[tuple[str, str], ...]:
    """'4-2-2, window=64' -> (('', '4-2-2'), ('window', '64'))"""
    options = []
    for i, text in enumerate(inside.split(',') if inside.strip() else []):
        name, equals, value = (part.strip() for part in text.rpartition('='))
        if not value or (equals and not name) or (not equals and i > 0):
            raise ValueError(
                f'attention={attention!r}: {text.strip()!r} is no option; write name=value, separated by '
                'commas (the first may go without its name)'
            )
        options.append((name, value))
    return tuple(options)


def canonical(attention: str, head_split: str = '', windows: str = '') -> str:
    """The one spelling of an attention string; head_split, windows: older spellings of the first option of
    some names, folded into it. ValueError where they do not fit together."""
    words = parse(attention)
    for knob, text in {'head_split': head_split, 'windows': windows}.items():
        words = _fold(words, attention, knob, text)
    merged = words[:1]
    for word in words[1:]:
        if word[:2] == merged[-1][:2]:
            merged[-1] = word._replace(n_layers=(merged[-1].n_layers or 1) + (word.n_layers or 1))
        else:
            merged.append(word)
    if len(merged) > 1:  # 'leap*1' and 'leap' are the same among others; alone, 'leap' is all layers
        merged = [word._replace(n_layers=0 if word.n_layers == 1 else word.n_layers) for word in merged]
    return ' '.join(map(str, merged))


def _fold(words: list[Word], attention: str, knob: str, text: str) -> list[Word]:
    names, option, default = OLDER[knob]
    takers = [word for word in words if word.name in names]
    if text not in ('', default):
        if not takers:
            raise ValueError(
                f'{knob}={text!r}: nothing in attention={attention!r} takes it; '
                f'it is an option of {", ".join(names)}'
            )
        if any(word.options for word in takers):
            raise ValueError(f'{knob}={text!r}, but attention={attention!r} says it too: give one of them')
    # windows may be listed for all layers of the model: each word takes its own
    total = sum(word.n_layers or 1 for word in words)
    listed = knob == 'windows' and len(words) > 1 and text.count('-') + 1 == total and total > 1
    folded, at = [], 0
    for word in words:
        count = word.n_layers or 1
        own = '-'.join(text.split('-')[at : at + count]) if listed else text
        if word.name in names:
            first, *rest = word.options or [('', own or default)]
            first = ('', first[1]) if first[0] == option else first
            word = word._replace(options=(first, *rest))
        folded.append(word)
        at += count
    return folded


def by_layer(attention: str, n_layer: int) -> list[tuple[Word, int, int]]:
    """For each layer: its word, which of the word's layers it is, and how many those are; ValueError where
    the numbers do not add up."""
    words = parse(attention)
    layers = []
    for word in words:
        count = word.n_layers or (n_layer if len(words) == 1 else 1)
        layers += [(word, i, count) for i in range(count)]
    if len(layers) != n_layer:
        raise ValueError(f'attention={attention!r} speaks of {len(layers)} layers, but n_layer={n_layer}')
    return layers
