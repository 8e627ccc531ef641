"""How an arm's lead goes on: kept studies of several lengths and sizes side by side.

    python studies/lead_study.py results/controls-2M results/controls-17M --arm=embedding_values
    python studies/lead_study.py results/controls-* results/ladder-* --arm=skip_v1 --insert=docs/results.md

Prints a row per study: the paired difference at the end of its schedule, and how many tokens the baseline
needs for the arm's loss. That is read off the baseline's own ends, of whole schedules of several lengths, by
straight lines of loss over log tokens: a run of twice the length decays its rate later, so the middle of its
curve would say too much. Where one model has three lengths, a line is fitted: the lead per doubling of the
tokens. A picture goes to charts/leads/ARM.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import Compared, Comparison, Difference, figure_of, insert, share, with_interval
from configurator import UserError, run_program
from runs.records import find_runs

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    """What one study says of the arm."""

    study: str
    model: tuple  # what rows of one line of lengths have in common: parameters, tokens' fingerprint
    tokens: int
    base: Compared
    arm: Compared
    difference: Difference

    @property
    def base_loss(self) -> float:
        """Over the seeds that both have."""
        losses = self.base.by_seed('val_loss')
        return statistics.fmean(losses[seed] for seed in self.difference.seeds)


def row_of(path: str, arm: str, baseline: str) -> Row | None:
    """None where the study has no finished seed of both."""
    c = Comparison(find_runs([path]), baseline)
    found = next((other for other in c.others if other.name == arm), None)
    if found is None or not found.difference:
        return None
    run = c.base.one.run
    tokens = run['config']['max_iters'] * run['tokens_per_step']
    model = (run['model']['params'], c.base.one.fingerprint)
    return Row(Path(path).name.removesuffix('.jsonl'), model, tokens, c.base, found, found.difference)


def tokens_for(loss: float, ends: list[tuple[int, float]]) -> tuple[float, bool] | None:
    """(tokens after which the baseline has this loss, whether that lies outside what was run), by lines
    between ends, [(tokens, loss), …] by their tokens; None where two ends are not there or do not fall."""
    if len(ends) < 2:
        return None
    for (n, high), (m, low) in pairwise(ends):
        last = (m, low) == ends[-1]
        if high > low and (loss >= low or last):
            part = (high - loss) / (high - low)
            return n * (m / n) ** part, not low <= loss <= high
    return None


def per_doubling(rows: list[Row]) -> float | None:
    """The slope of the difference over log2 tokens, by least squares; None with fewer than three lengths."""
    if len({row.tokens for row in rows}) < 3:
        return None
    x = [math.log2(row.tokens) for row in rows]
    return statistics.linear_regression(x, [row.difference.mean for row in rows]).slope


def table(rows: list[Row], arm: str) -> str:
    lines = [
        f'| study | parameters | tokens | per parameter | seeds | {rows[0].base.name} | difference of {arm} '
        '[95 % CI] | of its tokens, of its time to the same loss | tokens it needs for that of the arm |',
        '| --- ' * 9 + '|',
    ]
    for row in rows:
        ends = {other.tokens: other.base_loss for other in rows if other.model == row.model}
        needs = tokens_for(row.base_loss + row.difference.mean, sorted(ends.items()))
        beyond = '≈ ' if needs and needs[1] else ''
        cells = [
            row.study,
            f'{row.model[0] / 1e6:.2f}M',
            f'{row.tokens / 1e6:.1f}M',
            f'{row.tokens / row.model[0]:.1f}',
            str(len(row.difference.seeds)),
            f'{row.base_loss:.4f}',
            with_interval(row.difference, '+.4f').replace('-', '−'),
            f'{share(row.arm.sooner)}, {share(row.arm.sooner, row.arm.speedup)}',
            f'{beyond}{needs[0] / row.tokens:.2f} times as many' if needs else '–',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    lines.append('')
    for model in dict.fromkeys(row.model for row in rows):
        slope = per_doubling([row for row in rows if row.model == model])
        if slope is not None:
            told = f'{slope:+.4f}'.replace('-', '−')
            lines += [f'With {model[0] / 1e6:.2f}M parameters: {told} nats per doubling of the tokens.', '']
    return '\n'.join(lines)


def draw(rows: list[Row], arm: str, path: Path):
    figure, (ax,) = figure_of(1, (6.4, 4.2))
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        ax.plot(
            [row.tokens for row in own],
            [row.difference.mean for row in own],
            'o-',
            label=f'{model[0] / 1e6:.2f}M parameters',
        )
        for row in own:
            if row.difference.low is not None:
                ax.vlines(row.tokens, row.difference.low, row.difference.high, color='#777777')
    ax.axhline(0, color='#000000', linewidth=0.8)
    ax.set_xscale('log')
    ax.set_xlabel('tokens trained on, whole schedules')
    ax.set_ylabel(f'{arm} - {rows[0].base.name}, nats per token')
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('studies', nargs='+', help='as compare.py takes them')
    parser.add_argument('--arm', required=True)
    parser.add_argument('--baseline', default='vanilla')
    parser.add_argument('--insert', help='a Markdown file with <!-- lead ARM --> … <!-- /lead ARM -->')
    k = parser.parse_args(argv)
    rows = [row for path in k.studies if (row := row_of(path, k.arm, k.baseline))]
    if not rows:
        raise UserError(f'no study has finished seeds of both {k.arm} and {k.baseline}')
    rows.sort(key=lambda row: (row.model[0], row.tokens))
    told = table(rows, k.arm)
    print(told)
    draw(rows, k.arm, ROOT / 'charts' / 'leads' / f'{k.arm}.png')
    if k.insert:
        insert(told, f'lead {k.arm}', Path(k.insert))


if __name__ == '__main__':
    run_program(main)
