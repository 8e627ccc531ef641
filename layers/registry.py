"""The attentions by the names that configs give them, and how an attention string becomes layers.

To add one, name it in ATTENTIONS: a head plan is a function of layers/plans.py, anything else a subclass of
Attention (layers/contract.py). Its options are the keyword arguments of that function or of that constructor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from layers.contract import Attention, Place
from layers.depth import DepthAttention, MixtureOfDepthsAttention
from layers.gated_delta import GatedDeltaAttention
from layers.heads import HeadPlanAttention
from layers.leap import AdditiveAttention, LeapAttention
from layers.mixes import (
    ExclusiveAttention,
    LearnedSplitAttention,
    LimeAttention,
    MidpointAttention,
    ValueResidualAttention,
)
from layers.plans import (
    Head,
    HeadPlan,
    Shape,
    cla,
    fused_lite,
    grouped,
    layer0,
    reflex,
    reflex_all,
    reflex_all_oldest,
    reflex_all_values,
    shared_above,
    vanilla,
)
from layers.positions import POSITIONS
from layers.spec import Word, by_layer
from layers.tokens import BankAttention, EmbeddingValueAttention


class Kind(NamedTuple):
    """What a name stands for: a class of layers, and for those that publish keys and values their head
    plan."""

    layer: type[Attention] = HeadPlanAttention
    plan: Callable | None = None


ATTENTIONS = {
    # head plans
    'vanilla': Kind(plan=vanilla),
    'reflex': Kind(plan=reflex),
    'reflex_all': Kind(plan=reflex_all),
    'reflex_all_oldest': Kind(plan=reflex_all_oldest),
    'reflex_all_values': Kind(plan=reflex_all_values),
    'layer0': Kind(plan=layer0),
    'cla': Kind(plan=cla),
    'grouped': Kind(plan=grouped),
    'shared_above': Kind(plan=shared_above),
    'fused_lite': Kind(plan=fused_lite),
    # a head plan, and a mix of earlier layers with what it gives a layer of its own
    'value_residual': Kind(ValueResidualAttention, vanilla),
    'layer0_residual': Kind(ValueResidualAttention, layer0),
    'lime': Kind(LimeAttention, vanilla),
    'learned_split': Kind(LearnedSplitAttention, vanilla),
    'depth_attention': Kind(DepthAttention, vanilla),
    'moda': Kind(MixtureOfDepthsAttention, vanilla),
    # a head plan with other inputs or outputs
    'midpoint': Kind(MidpointAttention, vanilla),
    'exclusive': Kind(ExclusiveAttention, vanilla),
    'bank': Kind(BankAttention, vanilla),
    'embedding_values': Kind(EmbeddingValueAttention, vanilla),
    # no token-by-token scores: recurrences
    'additive': Kind(AdditiveAttention),
    'leap': Kind(LeapAttention),
    'gated_delta': Kind(GatedDeltaAttention),
}


def kinds_of(config) -> dict[str, Kind]:
    """What the words of config.attention stand for, by their names."""
    return {word.name: _kind(config, word) for word, _, _ in by_layer(config.attention, config.n_layer)}


def make_attentions(config) -> list[Attention]:
    """The attention of every layer. config: of n_layer, n_head, n_embd, head_size, attention, position,
    qk_norm, bias, dropout. ValueError, naming the value and the fix, where they do not fit together."""
    words = by_layer(config.attention, config.n_layer)
    kinds = [_kind(config, word) for word, _, _ in words]
    _check_facts(config, words, kinds)
    plan = head_plan(config)
    layers, planned = [], 0
    for l, ((word, i, n), kind) in enumerate(zip(words, kinds, strict=True)):
        place = Place(l, config.n_layer, i, n, plan, planned)
        layer = HeadPlanAttention if kind.layer.mixes_earlier and planned == 0 else kind.layer
        own = _values(config, word, _parameters(layer))
        try:
            layers.append(layer(config, place, **own))
        except ValueError as e:
            raise ValueError(f'attention={config.attention!r}: {e}') from None
        planned += kind.plan is not None
    return layers


def head_plan(config) -> HeadPlan | None:
    """Who reads what, over the layers that have keys and values; None where no layer has. ValueError where a
    plan does not fit, and where it comes to nothing but plain self-attention under another name."""
    words = [word._replace(n_layers=0) for word, _, _ in by_layer(config.attention, config.n_layer)]
    words = [word for word in words if _kind(config, word).plan]
    if not words:
        return None
    table = _table(config, words, Shape(len(words), config.n_head))
    layers = [_kind(config, word).layer for word in words]
    reading = [l for l, layer in enumerate(layers) if l and layer.reads_all]
    mixing = [l for l, layer in enumerate(layers) if l and layer.mixes_earlier]
    whole, mixed = range(max(reading, default=-1) + 1), range(max(mixing, default=0))
    plan = HeadPlan(table, config.n_head, frozenset(whole), frozenset(mixed))
    for l, heads in enumerate(plan.heads):
        for source in {layer for head in heads for layer, _ in head} - {l}:
            if source and not layers[source].published_past:
                raise ValueError(
                    f'attention={config.attention!r}: {words[l]} reads layer {source}, but {words[source]} '
                    'publishes new tokens alone, not those of the cache; let it read other layers'
                )
    _refuse_vanilla(config, words, plan)
    return plan


def _table(config, words: list[Word], shape: Shape) -> list[list[Head]]:
    """Each layer's row of the table that its own plan makes."""
    tables = {}
    for word in dict.fromkeys(words):
        plan = _kind(config, word).plan
        try:
            tables[word] = plan(shape, **_values(config, word, _parameters(plan)))
        except ValueError as e:
            raise ValueError(f'attention={config.attention!r}: {e}') from None
    return [tables[word][l] for l, word in enumerate(words)]


def _refuse_vanilla(config, words: list[Word], plan: HeadPlan):
    """Refuse a plan or a mix that comes to plain self-attention here, since it has too few layers."""
    for word in dict.fromkeys(words):
        kind, at = _kind(config, word), [l for l, other in enumerate(words) if other == word]
        mixes = kind.layer.mixes_earlier
        differs = kind.layer is not HeadPlanAttention and not (mixes and at == [0])
        if kind == Kind(plan=vanilla) or differs or not all(plan.own(l) for l in at):
            continue
        told = f'attention={config.attention!r}: {word} comes to plain self-attention in every layer'
        for n in range(len(words) + 1, len(words) + 65):  # with layers of this word on top
            longer = [*words, *[word] * (n - len(words))]
            try:
                table = HeadPlan(_table(config, longer, Shape(n, config.n_head)), config.n_head)
            except ValueError:
                break
            if mixes or not table.own(n - 1):
                raise ValueError(
                    f'{told} here: {len(words)} of n_layer={config.n_layer} layers have keys and values, '
                    f"and it needs {n}; add layers, or call it 'vanilla'"
                )
        raise ValueError(f"{told}; call it 'vanilla'")


def _check_facts(config, words, kinds: list[Kind]):
    """What layers and positions say of themselves must fit together."""
    for (word, _, _), kind in zip(words, kinds, strict=True):
        if POSITIONS[config.position].turns and not kind.layer.rotates:
            usable = ', '.join(repr(name) for name, position in POSITIONS.items() if not position.turns)
            raise ValueError(
                f'position={config.position!r}: attention={word.name!r} forms no product of query and key '
                f'that it could turn; use {usable}'
            )
        if config.qk_norm and not kind.layer.has_scores:
            raise ValueError(f'qk_norm=True: attention={word.name!r} has no scores for it to normalise')


def _kind(config, word: Word) -> Kind:
    if word.name not in ATTENTIONS:
        raise ValueError(
            f'attention={config.attention!r}: {word.name!r} is unknown, one of {", ".join(ATTENTIONS)}'
        )
    kind = ATTENTIONS[word.name]
    known = _known_options(kind)
    for name, text in word.options:
        if name and name not in known:
            has = f'it has {", ".join(known)}' if known else 'it has none'
            raise ValueError(f'attention={config.attention!r}: {word.name} has no option {name!r}; {has}')
        if not name and not known:
            raise ValueError(f'attention={config.attention!r}: {word.name} has no options, not {text!r}')
    given = [name or next(iter(known)) for name, _ in word.options]
    twice = [name for name, group in groupby(sorted(given)) if len(list(group)) > 1]
    if twice:
        raise ValueError(f'attention={config.attention!r}: {word} gives {twice[0]} twice')
    return kind


def _known_options(kind: Kind) -> dict[str, inspect.Parameter]:
    """Those of its plan, then those of its layers; the first one may be given without its name."""
    return {**(_parameters(kind.plan) if kind.plan else {}), **_parameters(kind.layer)}


def _parameters(of) -> dict[str, inspect.Parameter]:
    """The options that a plan (its arguments after the first) or a class of layers (its keyword-only
    arguments, and those of its bases where it passes them on) declares."""
    if not inspect.isclass(of):
        return dict(list(inspect.signature(of).parameters.items())[1:])
    found = {}
    for base in of.__mro__:
        parameters = inspect.signature(base.__init__).parameters if '__init__' in vars(base) else {}
        found |= {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in found}
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def _values(config, word: Word, wanted: dict[str, inspect.Parameter]) -> dict:
    """The options of a word that `wanted` declares, as values of their types."""
    first = next(iter(_known_options(ATTENTIONS[word.name])), None)
    return {
        name or first: _value(config, word, wanted[name or first], text)
        for name, text in word.options
        if (name or first) in wanted
    }


def _value(config, word: Word, option: inspect.Parameter, text: str):
    """The text of an option as a value of the type of its default."""
    kind = type(option.default)
    read = {'true': True, 'false': False}.__getitem__ if kind is bool else kind
    try:
        return read(text)
    except (ValueError, KeyError):
        named = {int: 'a whole number', float: 'a number', bool: 'true or false'}[kind]
        raise ValueError(
            f'attention={config.attention!r}: {word.name} wants {named} for {option.name}, not {text!r}'
        ) from None
