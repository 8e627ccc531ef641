"""Compare runs: curves, paired differences and their uncertainty, speed and cost, from the files runs leave.

    python compare.py out/experiments/mine               # what experiments.py made: a folder per arm and seed
    python compare.py results/4-cpu                      # a study that is kept here: results/4-cpu.jsonl
    python compare.py out/vanilla out/reflex_422         # any output folders of train.py
    python compare.py base=out/a new=out/b1 new=out/b2   # named: two seeds of the arm `new`
    python compare.py results/4-cpu --insert=docs/results.md   # also put the table between its markers there
    python compare.py out/experiments/mine --pack=results/mine  # keep all runs of a study as one text file

Writes out/charts/NAME/, or charts/NAME/ for a study that is kept: loss.png, cost.png, difference.png,
speed.png, pareto.png, table.md, and index.html, which opens from disk and needs no network. Everything in
them is computed from run.json and metrics.jsonl.

What is compared is the validation loss at the last step. For one seed all arms see the same batches and share
initial values, so arms are compared seed by seed: mean and 95 % interval of the difference (paired t), p with
Holm's correction over the arms. Unfinished and failed runs are named and never counted.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from configurator import ConfigError, UserError, configure, run_program
from runs.files import check_name, write_failed, write_text
from runs.records import (
    Arm,
    Run,
    find_runs,
    pack,
    root_of,
    sweep_of,
    unlike,
    unpacked,
    validation_set,
    what_is_learned,
)

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Knobs:
    baseline: str = ''  # the arm that others are compared with; '' = vanilla, else the first
    arms: str = ''  # only these arms, separated by commas, and the baseline
    name: str = ''  # the name of the comparison; '' = that of the first folder
    out: str = ''  # the folder in which NAME/ is written; '' = charts for kept studies, else out/charts
    insert: str = ''  # a Markdown file: put the table between its markers <!-- NAME --> as well
    pack: str = ''  # results/NAME: keep the runs and their sweep as results/NAME.jsonl, do not compare them


# The baseline is black; then Okabe and Ito's colours without yellow, which a white page swallows, and others
COLOURS = [
    *('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9'),
    *('#a0522d', '#7b4fbf', '#8a9a00', '#c2185b', '#00a3a3', '#808080'),
]
DASHES = ['', '6 3', '2 2', '8 3 2 3']  # of the first so many arms, the next ones, …
SHOWN_FROM = 0.3  # of the steps: the y axis of a picture fits what comes after, the start would flatten it


class CompareError(UserError):
    """Runs that cannot be compared: which, why, and the fix, in one line."""


# -----------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Difference:
    """Of paired values, new - base, over the seeds that both have."""

    seeds: list
    values: list
    mean: float
    low: float | None  # 95 % confidence interval of the mean; None with fewer than two seeds
    high: float | None
    p: float | None  # two-sided paired t


def paired(new: dict[int, float], base: dict[int, float]) -> Difference | None:
    """new and base: seed -> value. None where no seed is in both."""
    seeds = sorted(new.keys() & base.keys())
    if not seeds:
        return None
    values = [new[s] - base[s] for s in seeds]
    mean = statistics.fmean(values)
    if len(seeds) < 2:
        return Difference(seeds, values, mean, None, None, None)
    if len(set(values)) == 1:  # identical models: t has no spread to divide by
        return Difference(seeds, values, mean, mean, mean, 1.0 if mean == 0 else None)
    from scipy import stats  # here: it takes a second to import, and --help needs none of it

    test = stats.ttest_rel([new[s] for s in seeds], [base[s] for s in seeds])
    interval = test.confidence_interval(0.95)
    return Difference(seeds, values, mean, float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: the chance of one false finding among all of them stays below p."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


class Compared(Arm):
    """An arm in a comparison: how it is drawn, and how it stands to the baseline."""

    def __init__(self, name: str, runs: list[Run]):
        super().__init__(name, runs)
        self.colour, self.dash = '#000000', ''
        self.difference: Difference | None = None  # of the validation loss to the baseline's
        self.p_holm: float | None = None
        self.speedup: Difference | None = None  # of log tokens per second to the baseline's
        self.sooner: float | None = (
            None  # of the baseline's tokens: what it needs to reach the baseline's loss
        )
        self.sweep = sweep_of(self) if self.one else {}  # learning rate -> loss

    @property
    def seconds(self) -> float | None:
        """Of training, at the mean speed."""
        return (
            self.one.config['max_iters'] * self.one.run['tokens_per_step'] / self.speed
            if self.speed
            else None
        )

    def accuracies(self) -> dict[str, dict[int, float]]:
        """{what is asked for: {seed: accuracy at the last step}}; empty where the data do not ask."""
        found = {'accuracy': self.by_seed('accuracy')} if self.by_seed('accuracy') else {}
        for run in self.finished:
            for name, value in run.accuracies.items():
                found.setdefault(f'accuracy: {name}', {})[run.seed] = value
        return found

    @property
    def bits_per_byte(self) -> float | None:
        """The mean validation loss in bits per byte of text; None where the data do not tell their bytes."""
        sizes = ((self.one.run.get('data') or {}).get('bytes_per_token') or {}) if self.one else {}
        loss = self.mean('val_loss')
        return loss / (math.log(2) * sizes['val']) if sizes.get('val') and loss is not None else None

    def sensitivity(self) -> list[float | None]:
        """How much higher the sweep's loss is at half its best rate, and at twice; None where not swept."""
        if not self.sweep:
            return [None, None]
        best = min(self.sweep, key=self.sweep.__getitem__)
        found = []
        for wanted in (best / 2, best * 2):
            rate = next((r for r in self.sweep if math.isclose(r, wanted, rel_tol=0.01)), None)
            found.append(None if rate is None else self.sweep[rate] - self.sweep[best])
        return found

    def points(self, base: Arm | None) -> list[dict]:
        """One per evaluation that every finished run has: means and spread over seeds, and what it cost."""
        if not self.finished:
            return []
        runs = {r.seed: {e['iter']: e for e in r.evals} for r in self.finished}
        others = {r.seed: {e['iter']: e for e in r.evals} for r in base.finished} if base else {}
        flops = self.one.run['model']['flops_per_token']
        points = []
        for it in sorted(set.intersection(*(set(evals) for evals in runs.values()))):
            tokens = it * self.one.run['tokens_per_step']
            point = {'iter': it, 'tokens': tokens, 'flops': tokens * flops}
            point['seconds'] = tokens / self.speed if self.speed else None
            for name, key in {'val': 'val/loss', 'train': 'train/loss', 'accuracy': 'val/accuracy'}.items():
                values = [evals[it].get(key) for evals in runs.values()]
                known = None not in values
                point[name] = statistics.fmean(values) if known else None
                point[f'{name}_sd'] = statistics.stdev(values) if known and len(values) > 1 else 0.0
            point['seeds'] = {seed: evals[it]['val/loss'] for seed, evals in runs.items()}
            d = paired(
                point['seeds'], {s: evals[it]['val/loss'] for s, evals in others.items() if it in evals}
            )
            point |= {'difference': d and d.mean, 'low': d and d.low, 'high': d and d.high}
            points.append(point)
        return points


class Comparison:
    """Arms, each held against the baseline, with what is not equal among them.

    baseline: the name of an arm; None is 'vanilla', else the first. chosen: only these arms and the baseline.
    """

    def __init__(self, runs: list[Run], baseline: str | None = None, chosen: list[str] | None = None):
        names = list(dict.fromkeys(r.arm for r in runs))
        for name in [*(chosen or []), *([baseline] if baseline else [])]:
            if name not in names:
                raise CompareError(f'no arm {name!r}: there are {", ".join(names)}')
        if baseline is None and len(names) > 1:
            baseline = 'vanilla' if 'vanilla' in names else names[0]
        names = [n for n in names if chosen is None or n in (*chosen, baseline)]
        arms = [Compared(n, [r for r in runs if r.arm == n]) for n in names]
        self.base = next((a for a in arms if a.name == baseline), None)
        losses = {a.name: a.mean('val_loss') for a in arms}
        self.others = sorted(
            (a for a in arms if a is not self.base),
            key=lambda a: math.inf if losses[a.name] is None else losses[a.name],
        )
        self.arms = [self.base, *self.others] if self.base else self.others
        refuse_other_validation_sets(self.arms)
        for i, arm in enumerate(self.others):
            arm.colour, arm.dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        if self.base:
            self._hold_against_base()
        self.points = {a.name: a.points(None if a is self.base else self.base) for a in self.arms}
        for arm in self.others if self.base else ():
            arm.sooner = sooner(self.points[arm.name], self.points[self.base.name])
        self.warnings = list(cautions(self.arms, self.base))

    def _hold_against_base(self):
        logs = {a.name: {s: math.log(v) for s, v in a.by_seed('tokens_per_s').items()} for a in self.arms}
        for arm in self.others:
            arm.difference = paired(arm.by_seed('val_loss'), self.base.by_seed('val_loss'))
            arm.speedup = paired(logs[arm.name], logs[self.base.name])
        tested = [a for a in self.others if a.difference and a.difference.p is not None]
        for arm, p in zip(tested, holm([a.difference.p for a in tested]), strict=True):
            arm.p_holm = p


def sooner(points: list[dict], base: list[dict]) -> float | None:
    """The share of the baseline's tokens after which an arm's mean curve reaches the baseline's last loss.

    Over the seeds that both have, with straight lines between evaluations. inf where it never does; None
    where they have no seed in common, or no evaluation.
    """
    seeds = points[-1]['seeds'].keys() & base[-1]['seeds'].keys() if points and base else ()
    if not seeds or not base[-1]['tokens']:
        return None
    target = statistics.fmean(base[-1]['seeds'][s] for s in seeds)
    curve = [(p['tokens'], statistics.fmean(p['seeds'][s] for s in seeds)) for p in points]
    before = None
    for tokens, loss in curve:
        if loss <= target:
            if before and before[1] > loss:
                tokens = before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - loss)
            return tokens / base[-1]['tokens']
        before = tokens, loss
    return math.inf


def refuse_other_validation_sets(arms: list[Compared]):
    """Losses over different tokens say nothing about each other."""
    sets = {}
    for run in (r for a in arms for r in a.runs if r.run):
        sets.setdefault(validation_set(run), []).append(run)
    if len(sets) > 1:
        kinds = [
            f'{what} of data {str(data)[:12]} in {runs[0].folder}' for (data, what), runs in sets.items()
        ]
        raise CompareError(
            f'the validation sets differ, so the losses cannot be compared: {"; ".join(kinds)}. Compare runs '
            'on one dataset with equal eval_iters, batch_size and block_size, or with eval_iters=0 (all)'
        )


NO_SPEEDS = 'their speeds cannot be compared'
NOTHING_ALIKE = 'their losses and speeds cannot be compared'
APART = {  # what follows where two runs of a pair differ in one of their `surroundings`
    'device': NO_SPEEDS,
    'ranks': NO_SPEEDS,
    'dtype': NOTHING_ALIKE,
    'compile': NO_SPEEDS,
    'threads': NO_SPEEDS,
    'shard': NO_SPEEDS,
    'activation_checkpointing': NO_SPEEDS,
    'torch': NOTHING_ALIKE,
    'commit': 'comparable only if nothing in between changes what either computes',
}


def cautions(arms: list[Compared], base: Compared | None):
    """What is not equal and should be, and what is too little, line by line: shown above everything else."""
    for arm in arms:
        for run in (r for r in arm.runs if not r.finished):
            yield f'{arm.name}, seed {run.seed}: {run.state}; it does not count ({run.folder.as_posix()})'
        for run in (r for r in arm.finished if r.evaluated_from is not None):
            yield (
                f'{arm.name}, seed {run.seed}: its evaluation settings changed at step {run.evaluated_from}; '
                'its curve begins there'
            )
        kinds = {json.dumps(what_is_learned(r.config), sort_keys=True): r for r in arm.runs if r.run}
        if len(kinds) > 1:
            a, b = list(kinds.values())[:2]
            knobs = ', '.join(f'{k} {v!r} and {w!r}' for k, v, w in unlike(a.config, b.config))
            yield f'{arm.name}: its runs differ in more than the seed (seeds {a.seed} and {b.seed}: {knobs})'
        if arm.finished and not arm.points(None):
            yield f'{arm.name}: its runs have no evaluation in common, so no curve of it is drawn'
    yield from same_models(arms)
    few = [
        f'{a.name} ({len(a.difference.seeds)})' for a in arms if a.difference and len(a.difference.seeds) < 5
    ]
    if few:
        yield f'fewer than 5 seeds in common with {base.name}, too few for a headline: {", ".join(few)}'
    for arm in arms:
        if base is None or arm is base or not (arm.one and base.one):
            continue
        ours, theirs = ([r.seed for r in a.finished] for a in (arm, base))
        if ours != theirs:
            ours, theirs = (', '.join(map(str, seeds)) or 'none' for seeds in (ours, theirs))
            yield (
                f'{arm.name} has finished seeds {ours}, {base.name} {theirs}: '
                'differences are over those in both, means are not'
            )
        for name in ('tokens_per_step', 'max_iters'):
            a, b = (x.run.get(name, x.config.get(name)) for x in (arm.one, base.one))
            if a != b:
                yield f'{arm.name} has {name}={a}, {base.name} {b}: it has seen other data, or another amount'
        # seed by seed: an experiment that went on on another machine may still have whole pairs on each
        ours, theirs = ({r.seed: surroundings(r) for r in x.finished} for x in (arm, base))
        for name, follows in APART.items():
            pairs = {
                seed: (ours[seed].get(name, False), theirs[seed].get(name, False))
                for seed in ours
                if seed in theirs
            }
            apart = {seed: pair for seed, pair in pairs.items() if pair[0] != pair[1]}
            if apart:
                seeds, (a, b) = ', '.join(map(str, apart)), next(iter(apart.values()))
                yield f'{arm.name} ran with {name} {a}, {base.name} with {b} (seeds {seeds}): {follows}'


def same_models(arms: list[Compared]):
    """A line for every arm that is the same model as another one, trained alike except for the rate."""
    known = {}
    for arm in arms:
        if not arm.one:
            continue
        learned, model = what_is_learned(arm.one.config), arm.one.run['model']
        attention = learned.pop('attention')
        described = arm.one.run.get('describe') or attention
        rest = {k: v for k, v in learned.items() if k not in ('learning_rate', 'muon_learning_rate')}
        sizes = [model['params'], model['flops_per_token'], model['cache_bytes_per_token']]
        first = known.setdefault(json.dumps([described, rest, sizes], sort_keys=True), arm)
        if first is not arm:
            yield (
                f'{arm.name} and {first.name} are the same model: their heads read the same keys and values, '
                'and they are trained alike'
            )


def surroundings(run: Run) -> dict:
    """What a run's results depend on beside its knobs."""
    device = run.run.get('device') or {}
    return {
        'device': device.get('name'),
        'ranks': device.get('ranks'),
        'dtype': device.get('dtype'),
        'commit': str(run.run.get('commit'))[:10],
        'threads': run.run.get('threads'),
        'compile': run.config.get('compile'),
        'torch': (run.run.get('versions') or {}).get('torch'),
        **{name: True for name in ('shard', 'activation_checkpointing') if run.config.get(name)},
    }


# -----------------------------------------------------------------------------
# Text

NOTHING = '–'


def spread(values) -> str:
    values = list(values)
    if not values:
        return NOTHING
    return f'{statistics.fmean(values):.4f}' + (
        f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
    )


def with_interval(d: Difference | None, spec: str, f=lambda value: value) -> str:
    if d is None:
        return NOTHING
    text = format(f(d.mean), spec) + (
        f' [{f(d.low):{spec}}, {f(d.high):{spec}}]' if d.low is not None else ''
    )
    return text.replace('-', '\N{MINUS SIGN}')


def probability(p: float | None) -> str:
    return NOTHING if p is None else '< 0.0001' if p < 0.0001 else f'{p:.4f}'


def verdict(arm: Compared) -> str:
    if arm.p_holm is None:
        return 'not tested'
    return 'no difference shown' if arm.p_holm >= 0.05 else 'better' if arm.difference.mean < 0 else 'worse'


def duration(seconds: float) -> str:
    hours, minutes = divmod(seconds / 60, 60)
    return (
        f'{hours:.0f} h {minutes:02.0f} min'
        if hours
        else f'{minutes:.1f} min'
        if minutes >= 1
        else f'{seconds:.1f} s'
    )


COSTS = 'learning rate'  # the first column of the second table: how arms were trained, and what they cost


def table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, one row per arm, for Markdown and for the page."""
    to = c.base.name if c.base else 'the baseline'
    rows = []
    for arm in c.arms:
        n, of = len(arm.finished), len(arm.runs)
        config, run = (arm.one.config, arm.one.run) if arm.one else ({}, {})
        model, base = run.get('model', {}), arm is c.base
        train, bits = arm.mean('train_loss'), arm.bits_per_byte
        mfu, memory = arm.mean('mfu'), arm.mean('peak_memory')
        fixed = model.get('state_bytes')  # of a recurrence, whatever the length
        row = {'arm': arm.name, 'seeds': str(n) if n == of else f'{n} of {of}'}
        row['val loss'] = spread(arm.by_seed('val_loss').values())
        row['bits per byte'] = NOTHING if bits is None else f'{bits:.4f}'
        for asked, shares in arm.accuracies().items():
            row[asked] = spread(shares.values())
            others = c.base.accuracies().get(asked, {}) if c.base and not base else {}
            row[f'{asked}, difference to {to} [95 % CI]'] = with_interval(paired(shares, others), '+.4f')
        row[f'difference to {to} [95 % CI]'] = with_interval(arm.difference, '+.4f')
        row['p (Holm)'] = probability(arm.p_holm)
        row['verdict'] = 'baseline' if base else verdict(arm)
        row[f"tokens to {to}'s loss"] = share(arm.sooner)
        row[f"time to {to}'s loss"] = share(arm.sooner, arm.speedup) if arm.speedup else NOTHING
        row['train loss'] = NOTHING if train is None else f'{train:.4f}'
        row[COSTS] = f'{config["learning_rate"]:g}' if config else NOTHING
        row['at half, twice the rate'] = ', '.join(higher(loss) for loss in arm.sensitivity())
        row['steps'] = f'{config["max_iters"]}' if config.get('max_iters') else NOTHING
        row['parameters'] = f'{model["params"] / 1e6:.3f}M' if model else NOTHING
        row['FLOPs per token'] = f'{model["flops_per_token"] / 1e6:.2f}M' if model else NOTHING
        row['tokens/s'] = f'{arm.speed:,.0f}' if arm.speed else NOTHING
        row[f'speed / {to} [95 % CI]'] = with_interval(arm.speedup, '.3f', math.exp)
        row['training time'] = duration(arm.seconds) if arm.speed else NOTHING
        row['MFU'] = f'{mfu:.1%}' if mfu else NOTHING
        row['peak memory'] = f'{memory / 2**20:,.0f} MiB' if memory else NOTHING
        row['KV cache per token'] = f'{model["cache_bytes_per_token"]:,} B' if model else NOTHING
        row['state per sequence'] = f'{fixed:,} B' if fixed else NOTHING
        rows.append(row)
    nothing = {NOTHING, f'{NOTHING}, {NOTHING}'}
    fullest = max(rows, key=len)  # arms without a finished run have no accuracies
    shown = [name for name in fullest if any(row.get(name, NOTHING) not in nothing for row in rows)]
    return shown, [[row.get(name, NOTHING) for name in shown] for row in rows]


def share(tokens: float | None, speedup: Difference | None = None) -> str:
    """What an arm needs of the baseline's tokens, or, with its speed, of the baseline's time."""
    if tokens is None:
        return NOTHING
    if math.isinf(tokens):
        return 'not reached'
    return f'{tokens / (math.exp(speedup.mean) if speedup else 1):.2f}'


def higher(loss: float | None) -> str:
    return NOTHING if loss is None else 'failed' if math.isinf(loss) else f'+{loss:.4f}'


def one_line(text: str) -> str:
    """Text that breaks neither a line nor a table of Markdown."""
    text = text.replace('|', '\\|').replace('$', '\\$')
    return ' '.join(re.sub(r'<(?=[A-Za-z/!])', '&lt;', text).split())


def what_differs(c: Comparison) -> list[str]:
    """Per arm: the knobs that are not the baseline's."""
    lines = []
    for arm in c.others:
        if c.base and arm.one and c.base.one:
            knobs = unlike(arm.one.config, c.base.one.config)
            lines.append(f'{arm.name}: ' + (', '.join(f'{k}={v!r}' for k, v, _ in knobs) or 'nothing'))
    return lines


def provenance(c: Comparison) -> list[str]:
    """Where the numbers come from: machine, code, data."""
    facts = {}
    for run in (r for a in c.arms for r in a.runs if r.run):
        commit, changes = re.fullmatch(r'(\w{0,10})\w*(.*)', str(run.run.get('commit')), re.DOTALL).groups()
        fingerprint, validated = validation_set(run)
        data = f'{run.config.get("dataset")}, fingerprint {str(fingerprint)[:12]}'
        known = surroundings(run) | {'commit': commit + changes, 'data': data, 'validated on': validated}
        for name, value in known.items():
            facts.setdefault(name, {})[str(value)] = None
    return [f'{name}: {"; ".join(values)}' for name, values in facts.items()]


def reading_guide(c: Comparison) -> str:
    text = 'Validation loss at the last step in nats per token, mean ± standard deviation over seeds.'
    if c.base:
        base = c.base.name
        text += (
            f' Differences to {base} are paired by seed: mean and 95 % confidence interval (paired t), p '
            "with Holm's correction over all arms of this table; negative is better. Tokens and time to "
            f"{base}'s loss: the share of {base}'s tokens and time after which an arm's mean curve reaches "
            f"{base}'s last loss (straight lines between evaluations, at a learning rate still high). "
            'Speed is the ratio of the median tokens per second, paired by seed, with its 95 % interval; '
            'training time is that of all steps at the mean speed.'
        )
    if any(arm.accuracies() for arm in c.arms):
        text += (
            ' Accuracy is the share of the asked tokens that are predicted right, at the last step; higher is'
        )
        text += ' better.'
    if any(arm.sweep for arm in c.arms):
        text += " At half, twice the rate: how much higher the sweep's loss is there than at its best rate."
    return text + ' FLOPs are of forward and backward pass; parameters are without position embeddings.'


def markdown(c: Comparison, title: str, command: str) -> str:
    header, rows = table(c)
    lines = [f'### {one_line(title)}', '']
    for warning in c.warnings:
        lines += [f'> **Caution:** {one_line(warning)}', '>']
    lines += [''] * bool(c.warnings)
    cut = header.index(COSTS) if COSTS in header else len(header)
    costs = [[row[0], *row[cut:]] for row in (header, *rows)]
    for head, *body in ([row[:cut] for row in (header, *rows)], *[costs] * (cut < len(header))):
        rule = ['---'] * len(head)
        lines += ['| ' + ' | '.join(map(one_line, row)) + ' |' for row in (head, rule, *body)]
        lines.append('')
    lines += [reading_guide(c), '']
    if c.others and c.base:
        lines += [
            'Knobs that differ from the baseline:',
            '',
            *(f'- {one_line(line)}' for line in what_differs(c)),
            '',
        ]
    lines += ['Where the numbers come from:', '', *(f'- {one_line(line)}' for line in provenance(c))]
    lines += [f'- made by `{command}`', '']
    return '\n'.join(lines)


def insert(text: str, name: str, path: Path):
    """Replace what stands between <!-- NAME --> and <!-- /NAME --> in a Markdown file."""
    try:
        document = path.read_text(encoding='utf-8')
    except (OSError, ValueError) as e:
        raise CompareError(f'--insert={path} cannot be read ({e}): give a Markdown file') from None
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    if document.count(start) != 1 or document.count(end) != 1:
        raise CompareError(f'{path}: put a line {start} and a line {end} where the table belongs')
    before, rest = document.split(start)
    write_text(path, before + start + '\n' + text + end + rest.split(end)[1])


# -----------------------------------------------------------------------------
# Pictures

X_AXES = {
    'iter': 'steps',
    'tokens': 'tokens trained on',
    'flops': 'training FLOPs',
    'seconds': 'training seconds at the mean speed',
}


def figure_of(columns: int, size: tuple, **options):
    """A figure and its axes in a row. matplotlib is imported here, because it takes a second to import."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {'font.size': 9, 'text.parse_math': False}  # a $ in a name is a $
    figure = Figure(figsize=size, layout='constrained')
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def style(arm: Compared) -> dict:
    return {'color': arm.colour, 'linestyle': (0, tuple(map(float, arm.dash.split()))) if arm.dash else '-'}


def label_of(arm: Arm) -> str:
    """Its name in a line; matplotlib leaves a name that begins with _ out of legends."""
    name = ' '.join(arm.name.split())
    return f' {name}' if name.startswith('_') else name


def fit_y(ax, values: list[float]):
    if values:
        room = 0.06 * (max(values) - min(values) or 0.1)
        ax.set_ylim(min(values) - room, max(values) + room)


def late(curve: list[dict]) -> list[dict]:
    return [p for p in curve if p['iter'] >= SHOWN_FROM * curve[-1]['iter']]  # none of an empty curve


def draw_curves(ax, c: Comparison, x: str, y: str):
    """Means over seeds with a band of one standard deviation; unfinished runs one by one, thin and dotted."""
    shown = []
    for arm in c.arms:
        curve = [p for p in c.points[arm.name] if p[x] is not None and p[y] is not None]
        if curve:
            xs, ys, sds = ([p[name] for p in curve] for name in (x, y, f'{y}_sd'))
            ax.plot(xs, ys, label=label_of(arm), linewidth=1.4, **style(arm))
            low, high = ([v + sign * sd for v, sd in zip(ys, sds, strict=True)] for sign in (-1, 1))
            ax.fill_between(xs, low, high, color=arm.colour, alpha=0.15, linewidth=0)
            shown += [p[y] for p in late(curve)]
        for run in arm.runs:
            evals = [e for e in run.evals if e.get(f'{y}/loss') is not None]
            if not run.finished and evals and x in ('iter', 'tokens'):
                xs, ys = ([e[name] for e in evals] for name in (x, f'{y}/loss'))
                ax.plot(xs, ys, color=arm.colour, linewidth=0.8, linestyle=':')
                ax.plot(xs[-1], ys[-1], 'x', color=arm.colour, markersize=5)
    fit_y(ax, shown)
    ax.set_xlabel(X_AXES[x])
    ax.grid(alpha=0.25, linewidth=0.5)


def legend_below(figure, ax, columns: int):
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize=8)


def draw_loss(c: Comparison):
    panels = {'train': 'training loss, nats per token', 'val': 'validation loss, nats per token'}
    if any(arm.accuracies() for arm in c.arms):
        panels['accuracy'] = 'accuracy on the asked tokens of validation'
    figure, axes = figure_of(len(panels), (5 * len(panels), 4.4))
    for ax, (y, label) in zip(axes, panels.items(), strict=True):
        draw_curves(ax, c, 'iter', y)
        ax.set_ylabel(label)
    legend_below(figure, axes[1], 5)
    return figure


def draw_cost(c: Comparison):
    figure, axes = figure_of(3, (12, 4.2), sharey=True)
    for ax, x in zip(axes, ('tokens', 'flops', 'seconds'), strict=True):
        draw_curves(ax, c, x, 'val')
    axes[0].set_ylabel('validation loss, nats per token')
    legend_below(figure, axes[0], 6)
    return figure


def draw_difference(c: Comparison):
    """Where arms ended, seed by seed, and how the difference went on the way there."""
    compared = [a for a in c.others if a.difference]
    height = max(3.6, 1.4 + 0.34 * len(compared))
    figure, (left, right) = figure_of(2, (11, height))
    shown, ends = [0.0], []
    for row, arm in enumerate(compared):
        d = arm.difference
        left.plot(d.values, [row] * len(d.values), 'o', color=arm.colour, alpha=0.35, markersize=4)
        if d.low is not None:
            left.plot([d.low, d.high], [row, row], color=arm.colour, linewidth=2)
        left.plot(d.mean, row, 'D', color=arm.colour, markersize=6)
        curve = [p for p in c.points[arm.name] if p['difference'] is not None]
        xs = [p['iter'] for p in curve]
        right.plot(xs, [p['difference'] for p in curve], linewidth=1.4, **style(arm))
        if all(p['low'] is not None for p in curve):
            low, high = ([p[name] for p in curve] for name in ('low', 'high'))
            right.fill_between(xs, low, high, color=arm.colour, alpha=0.12, linewidth=0)
        values = [p[name] for p in late(curve) for name in ('difference', 'low', 'high')]
        shown += [v for v in values if v is not None]
        ends += [(p['difference'], arm) for p in curve[-1:]]
    fit_y(right, shown)
    # names at the ends of the lines, moved apart where they would overlap
    apart, lowest = (max(shown) - min(shown)) / (5 * height), -math.inf
    for value, arm in sorted(ends, key=lambda end: end[0]):
        lowest = max(value, lowest + apart)
        place = {'xycoords': ('axes fraction', 'data'), 'va': 'center', 'fontsize': 8}
        right.annotate(label_of(arm), (1.01, lowest), color=arm.colour, **place)
    left.locator_params(axis='x', nbins=6)  # more of such long numbers would run into one another
    left.set_yticks(range(len(compared)), [label_of(a) for a in compared])
    left.set_ylim(len(compared) - 0.5, -0.5)
    left.set_xlabel(
        f'validation loss minus that of {c.base.name}, last step (nats per token)\n'
        'diamond and bar: mean and 95 % interval; dots: seeds'
    )
    right.set_xlabel('steps')
    right.set_ylabel(f'minus {c.base.name}, with 95 % interval')
    left.axvline(0, color='black', linewidth=0.8)
    right.axhline(0, color='black', linewidth=0.8)
    for ax in (left, right):
        ax.grid(alpha=0.25, linewidth=0.5)
    return figure


def draw_speed(c: Comparison):
    """Bars are means over seeds, dots are seeds; MFU only where the device's peak is known."""
    arms = [a for a in c.arms if a.speed]
    panels = {'tokens_per_s': 'training tokens per second'}
    if any(a.mean('mfu') for a in arms):
        panels['mfu'] = 'MFU: share of the peak FLOP/s of the device'
    size = (5.5 * len(panels) + 1, max(2.4, 1 + 0.32 * len(arms)))
    figure, axes = figure_of(len(panels), size, sharey=True)
    for ax, (name, label) in zip(axes, panels.items(), strict=True):
        for row, arm in enumerate(arms):
            values = list(arm.by_seed(name).values())
            ax.barh(row, arm.mean(name) or 0, color=arm.colour, alpha=0.75, height=0.65)
            ax.plot(values, [row] * len(values), 'o', color='white', markeredgecolor='black', markersize=4)
        ax.set_yticks(range(len(arms)), [label_of(a) for a in arms])
        ax.set_xlabel(label)
        ax.grid(axis='x', alpha=0.25, linewidth=0.5)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def draw_pareto(c: Comparison):
    """What a loss costs: a token's KV cache, and seconds of training. A line joins the arms that no other
    beats in both."""
    panels = {
        'KV cache, bytes per token': lambda arm: arm.one.run['model']['cache_bytes_per_token'],
        'training seconds at the mean speed': lambda arm: arm.seconds,
    }
    arms = [a for a in c.arms if a.finished]
    figure, axes = figure_of(len(panels), (10, 4.6), sharey=True)
    for ax, (label, cost) in zip(axes, panels.items(), strict=True):
        known = [(cost(arm), arm.mean('val_loss'), arm) for arm in arms if cost(arm) is not None]
        for x, y, arm in known:
            spread_of = list(arm.by_seed('val_loss').values())
            error = statistics.stdev(spread_of) if len(spread_of) > 1 else 0
            ax.errorbar(x, y, error, fmt='o', color=arm.colour, capsize=3, label=label_of(arm))
        front = [p for p in known if not any(beats(other, p) for other in known)]
        front.sort(key=lambda p: p[:2])
        ax.plot([p[0] for p in front], [p[1] for p in front], color='#999999', linewidth=0.8, zorder=0)
        ax.set_xlabel(label)
        ax.grid(alpha=0.25, linewidth=0.5)
    axes[0].set_ylabel('validation loss, nats per token')
    figure.suptitle(
        'Bars: standard deviation over seeds. Line: arms that no other beats in both.', fontsize=8
    )
    legend_below(figure, axes[0], 5)
    return figure


def beats(one: tuple, other: tuple) -> bool:
    """Whether a (cost, loss, …) is nowhere worse than another and somewhere better."""
    return one[0] <= other[0] and one[1] <= other[1] and one[:2] != other[:2]


def draw(c: Comparison, folder: Path):
    """Write the .png files; one that has nothing to show is removed."""
    figures = {'loss': draw_loss(c), 'cost': draw_cost(c)}
    if sum(bool(a.finished) for a in c.arms) > 1:
        figures['pareto'] = draw_pareto(c)
    if any(a.difference for a in c.others):
        figures['difference'] = draw_difference(c)
    if any(a.speed for a in c.arms):
        figures['speed'] = draw_speed(c)
    for name in ('loss', 'cost', 'difference', 'speed', 'pareto'):
        path = folder / f'{name}.png'
        if name in figures:  # without the drawing program's version: the same results give the same bytes
            figures[name].savefig(path, dpi=110, metadata={'Software': None})
        else:
            path.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Page


def page(c: Comparison, title: str, command: str) -> str:
    """compare.html with the report in it: one file, no network."""
    header, rows = table(c)
    arms = []
    for arm, cells in zip(c.arms, rows, strict=True):
        unfinished = [
            {'seed': r.seed, 'state': r.state, 'evals': r.evals} for r in arm.runs if not r.finished
        ]
        arms.append(
            {
                'name': arm.name,
                'colour': None if arm is c.base else arm.colour,  # the page's text colour, light or dark
                'dash': arm.dash,
                'cells': cells,
                'points': c.points[arm.name],
                'unfinished': unfinished,
                'difference': arm.difference and vars(arm.difference) | {'p_holm': arm.p_holm},
                'tokens_per_s': arm.by_seed('tokens_per_s'),
                'mfu': arm.by_seed('mfu'),
            }
        )
    report = {
        'title': title,
        'baseline': c.base.name if c.base else None,
        'warnings': c.warnings,
        'guide': reading_guide(c),
        'notes': what_differs(c),
        'provenance': [*provenance(c), f'made by {command}'],
        'axes': X_AXES,
        'shown_from': SHOWN_FROM,
        'header': header,
        'costs': header.index(COSTS) if COSTS in header else len(header),
        'arms': arms,
    }
    data = json.dumps(report, allow_nan=False).replace(
        '<', '\\u003c'
    )  # nothing in it ends the script element
    before, after = (ROOT / 'compare.html').read_text(encoding='utf-8').split('__REPORT__')
    return before + data + after


# -----------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    k, _, paths = configure(Knobs, argv, __doc__, words='[NAME=]PATH …')
    if not paths:
        raise ConfigError('which runs? Give their folders, or one that holds them: compare.py results/4-cpu')
    if k.pack:
        print(f'kept: {", ".join(path.as_posix() for path in pack([*map(Path, paths)], Path(k.pack)))}')
        return 0
    c = Comparison(find_runs(paths), k.baseline or None, k.arms.split(',') if k.arms else None)
    command = 'python compare.py ' + shlex.join(argv)
    first = unpacked(root_of(paths[0])[1].resolve())
    name = k.name or first.name
    check_name('the name of the comparison', name)
    kept = first.is_relative_to(ROOT / 'results')
    folder = Path(k.out or ('charts' if kept else 'out/charts')) / name
    text = markdown(c, name, command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw(c, folder)
    except OSError as e:
        raise CompareError(f'{write_failed(folder, e)}; give another --out') from None
    write_text(folder / 'table.md', text)
    write_text(folder / 'index.html', page(c, name, command))
    if k.insert:
        insert(text, name, Path(k.insert))
    print(text)
    print(f'{folder.as_posix()}/: table.md, index.html and the charts')
    return 0


if __name__ == '__main__':
    run_program(main)
