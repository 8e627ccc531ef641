"""Compare runs: curves, paired differences and their uncertainty, speed and cost, from the files runs leave.

    python compare.py results/4-cpu                      # a tree <experiment>/<arm>/seed<k>/
    python compare.py out/vanilla out/reflex_422         # any output folders of train.py
    python compare.py base=out/a new=out/b1 new=out/b2   # named: two seeds of the arm `new`
    python compare.py results/4-cpu --insert=README.md   # also put the table between its markers there

Writes charts/NAME/: loss.png, cost.png, difference.png, speed.png, table.md, and index.html, which opens from
disk and needs no network. Everything in them is computed from run.json and metrics.jsonl.

What is compared is the validation loss at the last step. For one seed all arms see the same batches and share
initial values, so arms are compared seed by seed: mean and 95 % interval of the difference (paired t), p with
Holm's correction over the arms. Unfinished and failed runs are named and never counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
from scipy import stats

from configurator import UserError, run_program
from runs.knobs import BEFORE
from runs.metrics import METRICS, RUN, read_jsonl

matplotlib.use('Agg')  # needs no display
import matplotlib.pyplot as plt

plt.rcParams['font.size'] = 9

ROOT = Path(__file__).resolve().parent

# Knobs that do not change what a run learns: they may differ within an arm
SESSION = set(
    'out_dir overwrite init_from seed eval_only log_interval sample_tokens sample_start checkpoint_interval '
    'checkpoint_minutes wandb_log wandb_project wandb_run_name wandb_group device compile threads backend '
    'dist_timeout'.split()
)
# Okabe and Ito's colours without yellow, which a white page swallows; the baseline is black
COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']
DASHES = ['', '6 3', '2 2', '8 3 2 3']
SHOWN_FROM = 0.3  # of the steps: the y axis fits what comes after, the steep start would flatten it


class CompareError(UserError):
    """Runs that cannot be compared: which, why, and the mend, in one line."""


# -----------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Run:
    folder: Path
    arm: str
    seed: int
    run: dict  # run.json
    evals: list  # lines of metrics.jsonl with a validation loss
    tokens_per_s: float | None  # median over its logged steps
    mfu: float | None
    state: str  # 'finished', or in words why it does not count

    @property
    def finished(self) -> bool:
        return self.state == 'finished'

    @property
    def config(self) -> dict:
        return self.run['config']

    @property
    def val_loss(self) -> float:
        """At the last step; no stopping where it happens to be lowest."""
        return self.evals[-1]['val/loss']

    @property
    def train_loss(self) -> float:
        return self.evals[-1]['train/loss']

    @property
    def peak_memory(self) -> int | None:
        return self.run.get('peak_memory_bytes')


def read_run(folder: Path, arm: str) -> Run:
    """The run in a folder; what is missing or broken there becomes its state, not an exception."""
    try:
        run = json.loads((folder / RUN).read_text(encoding='utf-8'))
        records = read_jsonl(folder / METRICS)
        config, status = run['config'], run['status']
        seed, last, total = config['seed'], max((r['iter'] for r in records), default=0), config['max_iters']
        # what a comparison cannot do without
        _ = [config[name] for name in ('eval_iters', 'batch_size', 'block_size')]
        per_step, _ = run['tokens_per_step'], run['model']['flops_per_token']
    except (OSError, ValueError, KeyError, TypeError) as e:
        number = re.fullmatch(r'seed(\d+)', folder.name)
        reason = f'its files cannot be read ({type(e).__name__}: {e})'
        return Run(folder, arm, int(number[1]) if number else -1, {}, [], None, None, reason)
    evals = [r for r in records if 'val/loss' in r]
    steps = [r for r in records if 'tokens_per_s' in r]
    # the first line of a process holds the compilation; a median does not see it
    speeds = [r['tokens_per_s'] for r in steps if r['iter'] > 1] or [r['tokens_per_s'] for r in steps]
    mfus = [r['mfu'] for r in steps if r['iter'] > 1 and r.get('mfu')]
    state = 'finished'
    if status != 'finished':
        error = run.get('error') or ''
        state = f'{status} at step {last} of {total}' + (f' ({error.split(";")[0]})' if error else '')
    elif not evals or evals[-1]['iter'] < total:
        state = f'ended without an evaluation at its last step, {total}'
    elif evals[-1]['val/loss'] is None:
        state = f'the validation loss is not a number at step {total}'
    evals = [r for r in evals if r['val/loss'] is not None and r['train/loss'] is not None]
    evals = [{**r, 'tokens': r['iter'] * per_step} for r in evals]
    return Run(
        folder,
        arm,
        seed,
        run,
        evals,
        statistics.median(speeds) if speeds else None,
        statistics.median(mfus) if mfus else None,
        state,
    )


def find_runs(arguments: list[str]) -> list[Run]:
    """The runs under `PATH` or `NAME=PATH` arguments, each with the name of its arm.

    An arm is named by NAME, else by the folder that holds seed<k> folders, else by the run's own folder; of
    those last ones, runs whose configs differ only in the seed are one arm.
    """
    found, loose, roots, named = [], [], {}, False
    for argument in arguments:
        name, equals, path = argument.partition('=')
        named = named or bool(equals)
        root = Path(path if equals else argument)
        folders = sorted({p.parent for what in (RUN, METRICS) for p in root.rglob(what)}, key=_natural)
        if not folders:
            raise CompareError(
                f'{root}: no {RUN} or {METRICS} there or below; give the folder of a run, or of many'
            )
        for folder in folders:
            full = folder.resolve()
            roots[folder] = root.resolve()
            if equals:
                found.append(read_run(folder, name))
            elif re.fullmatch(r'seed\d+', full.name):
                found.append(read_run(folder, full.parent.name))
            else:
                loose.append(read_run(folder, full.name))
    alike = {}
    for run in loose:
        key = json.dumps(what_is_learned(run.run['config']), sort_keys=True) if run.run else run.folder
        alike.setdefault(key, []).append(run)
    names = [_in_common(runs) for runs in alike.values()]
    for name, runs in zip(names, alike.values(), strict=True):
        found += [replace(r, arm=name if names.count(name) == 1 else runs[0].arm) for r in runs]
    # the same arm in two experiments: the experiment's name tells them apart
    if not named and len({(r.arm, r.seed) for r in found}) < len(found) and len(set(roots.values())) > 1:
        found = [replace(r, arm=f'{roots[r.folder].name}/{r.arm}') for r in found]
    seen = {}
    for run in found:
        if (run.arm, run.seed) in seen:
            raise CompareError(
                f'{seen[run.arm, run.seed]} and {run.folder} are both seed {run.seed} of {run.arm!r}: leave '
                'one out, or name them apart: NAME=PATH'
            )
        seen[run.arm, run.seed] = run.folder
    return found


def _in_common(runs: list[Run]) -> str:
    """What the folders of runs that differ only in the seed are called but for it: a-s1 and a-s2 are a."""
    names = {re.sub(rf'([-_.]+(seed|s)?|seed){r.seed}$', '', r.arm) if len(runs) > 1 else r.arm for r in runs}
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r'[-_.]+(seed|s)?$', '', ''.join(letters[0] for letters in same)) or runs[0].arm


def _natural(path: Path):
    """Sort key that puts seed10 after seed9."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r'(\d+)', str(path))
    ]


def what_is_learned(config: dict) -> dict:
    """The knobs that decide what a run learns, of where it started only whether from other weights."""
    learned = {name: value for name, value in {**BEFORE, **config}.items() if name not in SESSION}
    if config.get('optimizer') != 'muon':
        del learned['muon_qkv']
    if config.get('init_from') not in (None, 'scratch', 'resume', 'auto'):
        learned['init_from'] = config['init_from']
    return learned


def validation_set(run: Run):
    """What the validation loss is a mean over. The whole split is the same tokens whatever the block size."""
    config, data = run.config, run.run.get('data') or {}
    windows, size = config['eval_iters'] * config['batch_size'], config['block_size']
    targets = (data.get('tokens') or {}).get('val', math.inf) - 1
    whole = windows == 0 or windows * size >= targets
    return data.get('fingerprint'), 'every token' if whole else f'{windows} windows of {size} tokens'


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


class Arm:
    """The runs of one arm and what they come to."""

    def __init__(self, name: str, runs: list[Run]):
        self.name = name
        self.runs = sorted(runs, key=lambda r: r.seed)
        self.finished = [r for r in self.runs if r.finished]
        # a run that stands for the arm in what its runs agree in; None if no file of any can be read
        self.one = next((r for r in [*self.finished, *self.runs] if r.run), None)
        self.speed = self.mean('tokens_per_s')
        self.colour, self.dash = '#000000', ''
        self.difference: Difference | None = None  # of the validation loss to the baseline's
        self.p_holm: float | None = None
        self.speedup: Difference | None = None  # of log tokens per second to the baseline's

    def by_seed(self, name: str) -> dict[int, float]:
        """seed -> an attribute of the finished run, where it is known."""
        return {r.seed: getattr(r, name) for r in self.finished if getattr(r, name) is not None}

    def mean(self, name: str) -> float | None:
        values = list(self.by_seed(name).values())
        return statistics.fmean(values) if values else None

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
            for name in ('val', 'train'):
                values = [evals[it][f'{name}/loss'] for evals in runs.values()]
                point[name] = statistics.fmean(values)
                point[f'{name}_sd'] = statistics.stdev(values) if len(values) > 1 else 0.0
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
        arms = [Arm(n, [r for r in runs if r.arm == n]) for n in names]
        self.base = next((a for a in arms if a.name == baseline), None)
        self.others = sorted(
            (a for a in arms if a is not self.base), key=lambda a: a.mean('val_loss') or math.inf
        )
        self.arms = [self.base, *self.others] if self.base else self.others
        refuse_other_validation_sets(self.arms)
        for i, arm in enumerate(self.others):
            arm.colour, arm.dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        if self.base:
            self._hold_against_base()
        self.points = {a.name: a.points(None if a is self.base else self.base) for a in self.arms}
        self.warnings = list(cautions(self.arms, self.base))

    def _hold_against_base(self):
        logs = {a.name: {s: math.log(v) for s, v in a.by_seed('tokens_per_s').items()} for a in self.arms}
        for arm in self.others:
            arm.difference = paired(arm.by_seed('val_loss'), self.base.by_seed('val_loss'))
            arm.speedup = paired(logs[arm.name], logs[self.base.name])
        tested = [a for a in self.others if a.difference and a.difference.p is not None]
        for arm, p in zip(tested, holm([a.difference.p for a in tested]), strict=True):
            arm.p_holm = p


def refuse_other_validation_sets(arms: list[Arm]):
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
    'torch': NOTHING_ALIKE,
    'commit': 'comparable only if nothing in between changes what either computes',
}


def cautions(arms: list[Arm], base: Arm | None):
    """What is not equal and should be, and what is too little, line by line: shown above everything else."""
    for arm in arms:
        for run in (r for r in arm.runs if not r.finished):
            yield f'{arm.name}, seed {run.seed}: {run.state}; it does not count ({run.folder.as_posix()})'
        kinds = {json.dumps(what_is_learned(r.config), sort_keys=True): r for r in arm.runs if r.run}
        if len(kinds) > 1:
            a, b = list(kinds.values())[:2]
            knobs = ', '.join(f'{k} {v!r} and {w!r}' for k, v, w in unlike(a.config, b.config))
            yield f'{arm.name}: its runs differ in more than the seed (seeds {a.seed} and {b.seed}: {knobs})'
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
            pairs = {seed: (ours[seed][name], theirs[seed][name]) for seed in ours if seed in theirs}
            apart = {seed: pair for seed, pair in pairs.items() if pair[0] != pair[1]}
            if apart:
                seeds, (a, b) = ', '.join(map(str, apart)), next(iter(apart.values()))
                yield f'{arm.name} ran with {name} {a}, {base.name} with {b} (seeds {seeds}): {follows}'


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
    }


def unlike(a: dict, b: dict) -> list[tuple]:
    """(knob, value in a, value in b) for every knob of learning in which two configs differ."""
    a, b = what_is_learned(a), what_is_learned(b)
    return [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


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


def verdict(arm: Arm) -> str:
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


def table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, one row per arm, for Markdown and for the page."""
    to = c.base.name if c.base else 'the baseline'
    rows = []
    for arm in c.arms:
        n, of = len(arm.finished), len(arm.runs)
        row = {'arm': arm.name, 'seeds': str(n) if n == of else f'{n} of {of}'}
        row['val loss'] = spread(arm.by_seed('val_loss').values())
        row[f'difference to {to} [95 % CI]'] = with_interval(arm.difference, '+.4f')
        row['p (Holm)'] = probability(arm.p_holm)
        row['verdict'] = 'baseline' if arm is c.base else verdict(arm)
        row['train loss'] = f'{arm.mean("train_loss"):.4f}' if n else NOTHING
        config, run = (arm.one.config, arm.one.run) if arm.one else ({}, {})
        model, steps = run.get('model', {}), config.get('max_iters')
        row['learning rate'] = f'{config["learning_rate"]:g}' if config else NOTHING
        row['steps'] = str(steps) if steps else NOTHING
        row['parameters'] = f'{model["params"] / 1e6:.3f}M' if model else NOTHING
        row['FLOPs per token'] = f'{model["flops_per_token"] / 1e6:.2f}M' if model else NOTHING
        row['tokens/s'] = f'{arm.speed:,.0f}' if arm.speed else NOTHING
        row[f'speed / {to} [95 % CI]'] = with_interval(arm.speedup, '.3f', math.exp)
        row['training time'] = duration(steps * run['tokens_per_step'] / arm.speed) if arm.speed else NOTHING
        mfu, memory = arm.mean('mfu'), arm.mean('peak_memory')
        row['MFU'] = f'{mfu:.1%}' if mfu else NOTHING
        row['peak memory'] = f'{memory / 2**20:,.0f} MiB' if memory else NOTHING
        row['KV cache per token'] = f'{model["cache_bytes_per_token"]:,} B' if model else NOTHING
        fixed = model.get('state_bytes')  # of a recurrence, whatever the length
        row['state per sequence'] = f'{fixed:,} B' if fixed else NOTHING
        rows.append(row)
    shown = [name for name in rows[0] if any(row[name] != NOTHING for row in rows)]
    return shown, [[row[name] for name in shown] for row in rows]


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
        commit, changes = re.fullmatch(r'(\w{0,10})\w*(.*)', str(run.run.get('commit'))).groups()
        fingerprint, validated = validation_set(run)
        data = f'{run.config.get("dataset")}, fingerprint {str(fingerprint)[:12]}'
        known = surroundings(run) | {'commit': commit + changes, 'data': data, 'validated on': validated}
        for name, value in known.items():
            facts.setdefault(name, {})[str(value)] = None
    return [f'{name}: {"; ".join(values)}' for name, values in facts.items()]


def reading_guide(c: Comparison) -> str:
    text = 'Validation loss at the last step in nats per token, mean ± standard deviation over seeds.'
    if c.base:
        text += (
            f' Differences to {c.base.name} are paired by seed: mean and 95 % confidence interval (paired '
            "t), p with Holm's correction over all arms of this table; negative is better. Speed is the "
            'ratio of the median tokens per second, paired by seed, with its 95 % interval; training '
            'time is that of all steps at the mean speed.'
        )
    return text + ' FLOPs are of forward and backward pass; parameters are without position embeddings.'


def markdown(c: Comparison, title: str, command: str) -> str:
    header, rows = table(c)
    lines = [f'### {title}', '']
    for warning in c.warnings:
        lines += [f'> **Caution:** {warning}', '>']
    lines += [''] * bool(c.warnings)
    lines += ['| ' + ' | '.join(row) + ' |' for row in (header, ['---'] * len(header), *rows)]
    lines += ['', reading_guide(c), '']
    if c.others and c.base:
        lines += ['Knobs that differ from the baseline:', '', *(f'- {line}' for line in what_differs(c)), '']
    lines += ['Where the numbers come from:', '', *(f'- {line}' for line in provenance(c))]
    lines += [f'- made by `{command}`', '']
    return '\n'.join(lines)


def insert(text: str, name: str, path: Path):
    """Replace what stands between <!-- NAME --> and <!-- /NAME --> in a Markdown file."""
    document = path.read_text(encoding='utf-8')
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    if document.count(start) != 1 or document.count(end) != 1:
        raise CompareError(f'{path}: put a line {start} and a line {end} where the table belongs')
    before, rest = document.split(start)
    path.write_text(before + start + '\n' + text + end + rest.split(end)[1], encoding='utf-8')


# -----------------------------------------------------------------------------
# Pictures

X_AXES = {
    'iter': 'steps',
    'tokens': 'tokens trained on',
    'flops': 'training FLOPs',
    'seconds': 'training seconds at the mean speed',
}


def style(arm: Arm) -> dict:
    return {'color': arm.colour, 'linestyle': (0, tuple(map(float, arm.dash.split()))) if arm.dash else '-'}


def fit_y(ax, values: list[float]):
    if values:
        room = 0.06 * (max(values) - min(values) or 0.1)
        ax.set_ylim(min(values) - room, max(values) + room)


def late(curve: list[dict]) -> list[dict]:
    return [p for p in curve if p['iter'] >= SHOWN_FROM * curve[-1]['iter']]


def draw_curves(ax, c: Comparison, x: str, y: str):
    """Means over seeds with a band of one standard deviation; unfinished runs one by one, thin and dotted."""
    shown = []
    for arm in c.arms:
        curve = [p for p in c.points[arm.name] if p[x] is not None]
        if curve:
            xs, ys, sds = ([p[name] for p in curve] for name in (x, y, f'{y}_sd'))
            ax.plot(xs, ys, label=arm.name, linewidth=1.4, **style(arm))
            low, high = ([v + sign * sd for v, sd in zip(ys, sds, strict=True)] for sign in (-1, 1))
            ax.fill_between(xs, low, high, color=arm.colour, alpha=0.15, linewidth=0)
            shown += [p[y] for p in late(curve)]
        for run in arm.runs:
            if not run.finished and run.evals and x in ('iter', 'tokens'):
                xs, ys = ([e[name] for e in run.evals] for name in (x, f'{y}/loss'))
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
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout='constrained')
    for ax, y, name in zip(axes, ('train', 'val'), ('training', 'validation'), strict=True):
        draw_curves(ax, c, 'iter', y)
        ax.set_ylabel(f'{name} loss, nats per token')
    legend_below(figure, axes[1], 5)
    return figure


def draw_cost(c: Comparison):
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout='constrained', sharey=True)
    for ax, x in zip(axes, ('tokens', 'flops', 'seconds'), strict=True):
        draw_curves(ax, c, x, 'val')
    axes[0].set_ylabel('validation loss, nats per token')
    legend_below(figure, axes[0], 6)
    return figure


def draw_difference(c: Comparison):
    """Where arms ended, seed by seed, and how the difference went on the way there."""
    compared = [a for a in c.others if a.difference]
    height = max(3.6, 1.4 + 0.34 * len(compared))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout='constrained')
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
        ends.append((curve[-1]['difference'], arm))
    fit_y(right, shown)
    # names at the ends of the lines, moved apart where they would overlap
    apart, lowest = (max(shown) - min(shown)) / (5 * height), -math.inf
    for value, arm in sorted(ends, key=lambda end: end[0]):
        lowest = max(value, lowest + apart)
        place = {'xycoords': ('axes fraction', 'data'), 'va': 'center', 'fontsize': 8}
        right.annotate(arm.name, (1.01, lowest), color=arm.colour, **place)
    left.locator_params(axis='x', nbins=6)  # more of such long numbers would run into one another
    left.set_yticks(range(len(compared)), [a.name for a in compared])
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
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, layout='constrained', squeeze=False, sharey=True
    )
    for ax, (name, label) in zip(axes[0], panels.items(), strict=True):
        for row, arm in enumerate(arms):
            values = list(arm.by_seed(name).values())
            ax.barh(row, arm.mean(name) or 0, color=arm.colour, alpha=0.75, height=0.65)
            ax.plot(values, [row] * len(values), 'o', color='white', markeredgecolor='black', markersize=4)
        ax.set_yticks(range(len(arms)), [a.name for a in arms])
        ax.set_xlabel(label)
        ax.grid(axis='x', alpha=0.25, linewidth=0.5)
    axes[0][0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def draw(c: Comparison, folder: Path):
    """Write the .png files; one that has nothing to show is removed."""
    figures = {'loss': draw_loss(c), 'cost': draw_cost(c)}
    if any(a.difference for a in c.others):
        figures['difference'] = draw_difference(c)
    if any(a.speed for a in c.arms):
        figures['speed'] = draw_speed(c)
    for name in ('loss', 'cost', 'difference', 'speed'):
        path = folder / f'{name}.png'
        if name in figures:  # without the drawing program's version: the same results give the same bytes
            figures[name].savefig(path, dpi=110, metadata={'Software': None})
            plt.close(figures[name])
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
        'arms': arms,
    }
    data = json.dumps(report, allow_nan=False).replace(
        '<', '\\u003c'
    )  # nothing in it ends the script element
    before, after = (ROOT / 'compare.html').read_text(encoding='utf-8').split('__REPORT__')
    return before + data + after


# -----------------------------------------------------------------------------


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option('results', nargs='+', metavar='[NAME=]PATH', help='folders of runs, or of trees of runs')
    option('--baseline', help="the arm that others are compared with ('vanilla', else the first)")
    option('--arms', help='only these arms, separated by commas (and the baseline)')
    option('--name', help='of the comparison (the name of the first folder)')
    option('--out', type=Path, default=Path('charts'), help='the folder in which NAME/ is written (charts)')
    option('--insert', type=Path, metavar='FILE.md', help='also put the table between the markers there')
    args = parser.parse_args(argv)
    command = 'python compare.py ' + ' '.join(argv)
    try:
        c = Comparison(find_runs(args.results), args.baseline, args.arms.split(',') if args.arms else None)
        name = args.name or Path(args.results[0].rpartition('=')[2]).resolve().name
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        draw(c, folder)
        text = markdown(c, name, command)
        (folder / 'table.md').write_text(text, encoding='utf-8')
        (folder / 'index.html').write_text(page(c, name, command), encoding='utf-8')
        if args.insert:
            insert(text, name, args.insert)
    except CompareError as e:
        sys.exit(f'compare.py: {e}')
    print(text)
    print(f'{folder.as_posix()}/: table.md, index.html and the charts')


if __name__ == '__main__':
    run_program(main)
