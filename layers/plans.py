"""Head plans: for every layer and head, which layer and head its key and its value are read from.

A plan is a table of `Head(key=(layer, head), value=(layer, head))`, made by one small function of the shape
(n_layer and n_head, counting the layers that have keys and values) and of options of its own. To try an idea,
write such a function, give it a name in layers/registry.py, and use it: `attention = 'my_plan'`. Nothing else
has to change: `HeadPlan` works out which heads a layer must produce, and the attention in layers/heads.py
projects just those, reads what the table says and counts its FLOPs.

    lag 0  self-attention: the layer's own key and value
    lag d  the key and value that the layer d before has computed

In a model with several kinds of layers, each plan makes the whole table, and the rows of its own layers are
used: lags count all layers that have keys and values."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple


class Head(NamedTuple):
    """Where one head reads its key and its value: (layer, head) pairs, of this layer or an earlier one."""

    key: tuple[int, int]
    value: tuple[int, int]


class Shape(NamedTuple):
    """What a plan is made for: n_layer layers that have keys and values, of n_head heads each."""

    n_layer: int
    n_head: int


def vanilla(shape) -> list[list[Head]]:
    """Every head reads its own key and value."""
    return [[Head((l, h), (l, h)) for h in range(shape.n_head)] for l in range(shape.n_layer)]


def parse_split(split: str, n_head: int) -> list[int]:
    """'4-2-2' -> [4, 2, 2]: how many of the n_head heads have lag 0, 1, 2, …; a count may be 0."""
    parts = split.split('-')
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"head split {split!r}: write numbers of heads joined by '-', such as '4-2-2'")
    counts = [int(part) for part in parts]
    if sum(counts) != n_head:
        raise ValueError(f'head split {split!r} adds up to {sum(counts)} heads, but n_head={n_head}')
    return counts


def split_plan(shape, split: str, source_layers) -> list[list[Head]]:
    """The plan that a split describes; a head reads the same head index of another layer.

    'keys/values', such as '8/4-2-2', splits the two apart: all keys are the layer's own, values are not.
    source_layers(counts, l) says for each head of layer l which layer it reads.
    """
    keys, *apart = split.split('/', 1)
    keys = parse_split(keys, shape.n_head)
    values = parse_split(apart[0], shape.n_head) if apart else keys
    table = []
    for l in range(shape.n_layer):
        sources = zip(source_layers(keys, l), source_layers(values, l), strict=True)
        table.append([Head((k, h), (v, h)) for h, (k, v) in enumerate(sources)])
    return table


def lagged(counts: list[int], l: int) -> list[int]:
    """Lag 0 for the first counts[0] heads, lag 1 for the next counts[1], …; all 0 where l is too small."""
    if l < len(counts) - 1:
        return [l] * sum(counts)
    return [l - lag for lag, count in enumerate(counts) for _ in range(count)]


def reflex(shape, split: str = '4-2-2') -> list[list[Head]]:
    """split 'sa-ca2-ca1' (or longer): the first heads have lag 0, the next lag 1, the last lag 2.

    Layers that have not enough layers before them (the first two of '4-2-2') are all self-attention.
    """
    return split_plan(shape, split, lagged)


def layer0(shape, split: str = '4-2-2') -> list[list[Head]]:
    """split as in `reflex`, but its last heads read layer 0: '6-2' is 6 own heads and 2 of layer 0.

    '8/4-4' is SkipV1Former (Wu et al., 2025): own keys, and layer 0's values in half of the heads. '8/0-8' is
    SVFormer (Zhou et al., 2024): own keys, and layer 0's values in all.
    """

    def source_layers(counts, l):
        return lagged(counts[:-1], l) + [0] * counts[-1] if len(counts) > 1 else lagged(counts, l)

    return split_plan(shape, split, source_layers)


def reflex_all(shape) -> list[list[Head]]:
    """Layer l: n_head - l heads of its own, then one head each of lag 1, 2, … l, nearest first.

    Layer j publishes one head, its last own one (head n_head - 1 - j), and every later layer reads that one.
    """
    n_layer, n_head = shape.n_layer, shape.n_head
    if n_layer > n_head:
        raise ValueError(
            f'reflex_all gives up one head per layer: n_layer={n_layer} layers need at least '
            f'{n_layer} heads, but n_head={n_head}; raise n_head or use fewer layers'
        )
    table = []
    for l in range(n_layer):
        own = [Head((l, h), (l, h)) for h in range(n_head - l)]
        table.append(own + [Head((j, n_head - 1 - j), (j, n_head - 1 - j)) for j in range(l - 1, -1, -1)])
    return table


def reflex_all_oldest(shape) -> list[list[Head]]:
    """`reflex_all`, oldest layer first: a control that must tie, since only the order of heads differs."""
    return [
        layer[: shape.n_head - l] + layer[shape.n_head - l :][::-1]
        for l, layer in enumerate(reflex_all(shape))
    ]


def reflex_all_values(shape) -> list[list[Head]]:
    """The values of `reflex_all`; every key is the layer's own."""
    return [
        [Head((l, h), head.value) for h, head in enumerate(layer)]
        for l, layer in enumerate(reflex_all(shape))
    ]


def cla(shape) -> list[list[Head]]:
    """Cross-layer attention (Brandon et al., 2024): every other layer reads all of the layer before."""
    return [[Head((l - l % 2, h), (l - l % 2, h)) for h in range(shape.n_head)] for l in range(shape.n_layer)]


def grouped(shape, groups: int = 2) -> list[list[Head]]:
    """Grouped-query attention (Ainslie et al., 2023): `groups` sets of keys and values, shared by as many
    heads each."""
    if not 1 <= groups <= shape.n_head or shape.n_head % groups:
        raise ValueError(f'groups={groups}: must divide n_head={shape.n_head}')
    size = shape.n_head // groups
    return [
        [Head((l, h - h % size), (l, h - h % size)) for h in range(shape.n_head)]
        for l in range(shape.n_layer)
    ]


def shared_above(shape, layer: int = 2) -> list[list[Head]]:
    """Layers above `layer` read all of its keys and values and have none of their own (YOCO's upper half;
    Sun et al., 2024)."""
    _check_layer(shape, layer)
    return [
        [Head((min(l, layer), h), (min(l, layer), h)) for h in range(shape.n_head)]
        for l in range(shape.n_layer)
    ]


def fused_lite(shape, layer: int = 2) -> list[list[Head]]:
    """Layers above `layer` read its keys, and the values of layer 0, as they are (FusedKV-Lite,
    arXiv:2512.03870)."""
    _check_layer(shape, layer)
    return [
        [Head((min(l, layer), h), (0 if l > layer else l, h)) for h in range(shape.n_head)]
        for l in range(shape.n_layer)
    ]


def _check_layer(shape, layer: int):
    if not 0 <= layer < shape.n_layer:
        raise ValueError(f'layer={layer}: from 0 to {shape.n_layer - 1}')


class HeadPlan:
    """A checked table, and what follows from it for every layer.

    heads[l][h]        Head: where head h of layer l reads
    keys[l], values[l] the head indices whose key (value) some layer reads, ascending: the only ones projected
    key_reads[l]       what layer l gathers, as (source layer, segment) pairs in the order of its heads;
                       None where that is exactly the layer's own keys, as they are
    key_cuts[l]        sizes of the segments that layer l's produced keys are split into for its readers
    value_reads, value_cuts  the same for values

    whole: layers all of whose heads are produced, whoever reads them. mixed: layers that one above mixes into
    its own, whatever its heads read.
    """

    def __init__(
        self,
        table: list[list[Head]],
        n_head: int,
        whole: frozenset[int] = frozenset(),
        mixed: frozenset[int] = frozenset(),
    ):
        self.mixed = mixed
        self.heads = [[Head(*head) for head in layer] for layer in table]
        for l, layer in enumerate(self.heads):
            if len(layer) != n_head:
                raise ValueError(f'the plan gives layer {l} {len(layer)} heads, but n_head={n_head}')
            for h, head in enumerate(layer):
                for what, (source, i) in zip(('key', 'value'), head, strict=True):
                    if not (0 <= source <= l and 0 <= i < n_head):
                        raise ValueError(
                            f'head {h} of layer {l} reads the {what} of layer {source}, head {i}: '
                            f'layers 0 to {l} and heads 0 to {n_head - 1} can be read'
                        )
        keys, values = ([[head[i] for head in layer] for layer in self.heads] for i in (0, 1))
        self.keys, self.key_cuts, self.key_reads = _gather_plan(keys, n_head, whole)
        self.values, self.value_cuts, self.value_reads = _gather_plan(values, n_head, whole)

    def read_above(self, layer: int) -> bool:
        """Whether a layer above reads keys or values of this one."""
        above = {source for row in self.heads[layer + 1 :] for head in row for source, _ in head}
        return layer in above or layer in self.mixed

    def own(self, layer: int) -> bool:
        """Whether all heads of the layer read their own key and value: plain self-attention."""
        return self.heads[layer] == [Head((layer, h), (layer, h)) for h in range(len(self.heads[layer]))]

    def runs(self, layer: int) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Sizes of the runs of heads that read one piece of keys and one of values, and how each piece that
        the layer reads is cut into those runs: (runs, cuts per key piece, cuts per value piece)."""
        sizes = []
        for cuts, reads in ((self.key_cuts, self.key_reads), (self.value_cuts, self.value_reads)):
            whole = [len(self.heads[layer])]
            sizes.append(whole if reads[layer] is None else [cuts[s][piece] for s, piece in reads[layer]])
        ends = [list(accumulate(pieces)) for pieces in sizes]
        bounds = sorted({0, *ends[0], *ends[1]})
        keys, values = [
            [
                [b - a for a, b in pairwise(bounds) if end - size <= a < end]
                for end, size in zip(*both, strict=True)
            ]
            for both in zip(ends, sizes, strict=True)
        ]
        return [b - a for a, b in pairwise(bounds)], keys, values

    def describe(self, layer: int) -> str:
        """One line: per head its lag, or 'layer.head' of another index; key/value where they differ."""

        def name(h, source):
            return str(layer - source[0]) if source[1] == h else f'{source[0]}.{source[1]}'

        heads = []
        for h, head in enumerate(self.heads[layer]):
            key, value = name(h, head.key), name(h, head.value)
            heads.append(key if key == value else f'{key}/{value}')
        return 'head plan ' + ' '.join(heads)


def _gather_plan(reads: list[list[tuple[int, int]]], n_head: int, whole: frozenset[int]):
    """From the (layer, head) that heads read: what to produce, where to cut it, which pieces to gather.

    Neighbouring heads of one source travel together, so that a gather is a few slices and one concatenation;
    pieces are cut once at the source, because autograd joins the gradients of a split by one concatenation
    where independent slices would each be padded with zeros and added.
    """
    n_layer = len(reads)
    read = [{h for layer in reads for (source, h) in layer if source == l} for l in range(n_layer)]
    produced = [sorted(range(n_head) if l in whole else read[l]) for l in range(n_layer)]
    runs = []  # per layer: [source layer, first, last + 1] in positions among the source's produced heads
    for layer in reads:
        layer_runs = []
        for source, h in layer:
            i = produced[source].index(h)
            if layer_runs and layer_runs[-1][0] == source and layer_runs[-1][2] == i:
                layer_runs[-1][2] = i + 1
            else:
                layer_runs.append([source, i, i + 1])
        runs.append(layer_runs)
    as_is = [layer_runs == [[l, 0, len(produced[l])]] for l, layer_runs in enumerate(runs)]
    bounds = [{0, len(produced[l])} for l in range(n_layer)]
    for l, layer_runs in enumerate(runs):
        for source, first, last in layer_runs if not as_is[l] else ():
            bounds[source] |= {first, last}
    bounds = [sorted(b) for b in bounds]
    cuts = [[b - a for a, b in pairwise(edge)] for edge in bounds]
    pieces: list[list[tuple[int, int]] | None] = []
    for l, layer_runs in enumerate(runs):
        if as_is[l]:
            pieces.append(None)
            continue
        edges = [(source, bounds[source].index(a), bounds[source].index(b)) for source, a, b in layer_runs]
        pieces.append([(source, piece) for source, a, b in edges for piece in range(a, b)])
    return produced, cuts, pieces
