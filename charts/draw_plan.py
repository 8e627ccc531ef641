"""Draw the head plan of any config as an SVG: which layer each head reads, and what is never computed.

    python charts/draw_plan.py config/reflex_422.py > charts/reflex_422.svg

Any knob of train.py may be given.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import ConfigError, configure, run_program
from runs.knobs import Knobs, check, model_config

OWN = '#dbe5f1'  # the colour of a head that reads its own layer
LAGGED = [
    '#f2a65a',
    '#7fb069',
    '#b388c9',
    '#d96c6c',
    '#6cc2bd',
    '#c9b458',
    '#8d99ae',
]  # 1 before, 2 before, …
CELL, STEP, LEFT, TOP = 58, 66, 96, 112  # of a square, from head to head, and where the first one is
ROW = 80  # from layer to layer
LEGEND, LETTER = 42, 7  # of the legend: a square with its gaps, and a letter
CAPTION = (
    'Each square is a head. Its queries come from its own layer; the number is the',
    'layer whose keys and values it reads. Arrows show it for the last layer. A dot:',
    "nobody reads this head's own key and value, so they are never computed.",
)
APART = '5/2: the key of layer 5, the value of layer 2'


def text(x, y, size, words, more=''):
    return f'<text x="{x}" y="{y}" font-size="{size}" {more}>{words}</text>'


def square(x, y, size, lag):
    colour = LAGGED[(lag - 1) % len(LAGGED)] if lag else OWN
    return f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="6" fill="{colour}" stroke="#555"/>'


def svg(config, title: str) -> str:
    """The picture of config's plan; label 'a/b' where a head reads key and value of different layers."""
    plan, n_head = config.head_plan(), config.n_head
    n_layer = len(plan.heads)  # those that have keys and values
    apart = any(head.key != head.value for layer in plan.heads for head in layer)
    found = sorted({l - min(h.key[0], h.value[0]) for l, layer in enumerate(plan.heads) for h in layer})
    lags = {lag: {0: 'own layer', 1: 'layer before'}.get(lag, f'{lag} before') for lag in found}
    legend = 20 + sum(LEGEND + LETTER * len(name) for name in lags.values())
    width, height = max(640, LEFT + n_head * STEP + 16, legend), TOP + n_layer * ROW + 44 + 24 * apart
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" fill="#222">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(20, 34, 20, title, 'font-weight="bold"'),
        *(text(20, 58 + 18 * i, 14, line, 'fill="#555"') for i, line in enumerate(CAPTION)),
    ]

    def corner(l, h):  # the first layer is at the bottom
        return LEFT + h * STEP, TOP + (n_layer - 1 - l) * ROW

    for l, layer in enumerate(plan.heads):
        out.append(text(20, corner(l, 0)[1] + CELL / 2 + 5, 15, f'layer {l}'))
        for h, head in enumerate(layer):
            x, y = corner(l, h)
            label = f'{head.key[0]}' if head.key == head.value else f'{head.key[0]}/{head.value[0]}'
            out.append(square(x, y, CELL, l - min(head.key[0], head.value[0])))
            out.append(text(x + CELL / 2, y + CELL / 2 + 8, 22, label, 'text-anchor="middle"'))
            if h not in plan.keys[l] and h not in plan.values[l]:
                out.append(f'<circle cx="{x + CELL - 10}" cy="{y + 10}" r="4"/>')
    last = n_layer - 1
    for h, head in enumerate(plan.heads[last]):
        source, i = min(head.key, head.value)
        if source == last:
            continue
        (x, y), (x_end, y_end) = corner(last, h), corner(source, i)
        x, x_end, y = x + CELL / 2, x_end + CELL / 2, y + CELL
        side = x + (STEP / 2 if source < last - 1 else 0)  # pass between the squares of the layers between
        out.append(
            f'<path d="M {x} {y} Q {side} {y + 4} {side} {y + 22} L {side} {y_end - 22} '
            f'Q {side} {y_end - 8} {x_end} {y_end - 3}" fill="none" stroke="#222" stroke-width="2" '
            'marker-end="url(#tip)"/>'
        )
    at = 20
    for lag, name in lags.items():
        out += [square(at, height - 30, 18, lag), text(at + 26, height - 16, 14, name)]
        at += LEGEND + LETTER * len(name)
    if apart:
        out.append(text(20, height - 46, 14, APART))
    return '\n'.join([*out, '</svg>'])


def main(argv: list[str]) -> int:
    k = configure(Knobs, argv, __doc__).knobs
    check(k)
    config = model_config(k, vocab_size=64, vocab_used=64)
    if config.head_plan() is None:
        raise ConfigError(
            f'attention={k.attention!r}: there is no plan to draw, no layer has keys and values'
        )
    print(svg(config, k.attention))
    return 0


if __name__ == '__main__':
    run_program(main)
