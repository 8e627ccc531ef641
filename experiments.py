"""Run an experiment: every arm and seed through train.py, as a person would, side by side and resumable.

    python experiments.py 4 --scale=cpu --seeds=5 --jobs=2   # experiment 4 shrunk for a laptop, two at a time
    python experiments.py 4 --scale=short --jobs=2           # the same models for an eighth of the tokens
    python experiments.py 4 --scale=paper                    # its published size, for a GPU
    python experiments.py 4 peers --scale=cpu --jobs=2       # and the closest published ideas beside them
    python experiments.py leap --scale=cpu --jobs=2          # LEAP, additive attention, vanilla
    python experiments.py 4 config/mine.py --scale=cpu       # and your own: an arm named mine
    python experiments.py 4 --scale=cpu --status             # what is done, and stop
    python experiments.py 4 --scale=cpu --equal=seconds      # equal time, not steps, once speeds are known

The protocol: first each arm gets the same small sweep of learning rates on seeds of its own (1000, …; a
quarter of the steps; an edge that wins is pushed out). Then all arms train on seeds 0, 1, … with the rate
that each has won. One seed is one order of batches and one draw of shared initial values for all arms.

results/<experiment>-<scale>/<arm>/seed<k>/ gets each run's run.json and metrics.jsonl (small: commit them),
results/<experiment>-<scale>-lr/ those of the sweep; checkpoints stay in out/ until their run is finished.
What the README tells of is kept there already: --name=NAME makes a folder of your own, results/NAME.
Stop at any time: the same command goes on where it was, and never repeats a finished run. Any --knob=value of
train.py can be added, but for seed, out_dir and init_from; it goes to every run.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from compare import Arm, CompareError, Run, find_runs, read_run, unlike
from configurator import ConfigError, configure, run_program
from data.tokendata import open_data
from runs.checkpoint import FolderLock
from runs.datasets import data_folder, prepare_stdlib
from runs.knobs import Knobs, check, saved_knobs
from runs.metrics import METRICS, RUN, read_jsonl

ROOT = Path(__file__).resolve().parent
PROGRAM = ROOT / 'train.py'


# -----------------------------------------------------------------------------
# What is run: data


@dataclass(frozen=True)
class Scale:
    datasets: list  # the first that is there; the last is made on the spot
    arguments: list  # of every run
    sizes: dict  # published size -> arguments
    seeds: int = 5
    rates: tuple = (5e-4, 1e-3, 2e-3)  # of the sweep, to begin with


SCALES = {
    # train.py's defaults are the published settings
    'paper': Scale(
        ['openwebtext'],
        [],
        {
            '512/256': ['config/size_512_256.py'],
            '512/1024': ['--n_embd=512'],
            '768/1024': [],
            '128/2048': ['config/size_leap.py'],
            # of about the parameters of vanilla 768/1024
            'hierarchy': ['--model=hierarchy', '--latents=16-4', '--widths=256-512-768', '--n_layer=4'],
        },
    ),
    # all sizes shrunk together: a quarter of the block, a sixth to a fifth of the width; 4.1M tokens per run.
    # With Muon: two seeds of AdamW differ by up to 0.26 nats at twice the tokens (results/4-cpu-adamw).
    'cpu': Scale(
        ['proposals_bpe4096', 'stdlib'],
        [
            *('config/size_cpu.py', '--device=cpu', '--eval_iters=32', '--compile=true'),
            *('--optimizer=muon', '--max_iters=1000', '--warmup_iters=50'),
        ],
        {
            '512/256': ['--n_embd=96', '--block_size=64'],
            '512/1024': ['--n_embd=96'],
            '768/1024': [],
            # the published size for a hundredth of the steps: nothing is seen twice, so no dropout
            '128/2048': [
                *('config/size_leap.py', '--max_iters=150', '--warmup_iters=15', '--dropout=0'),
                *('--eval_interval=50', '--eval_iters=8', '--compile=false'),
            ],
            'hierarchy': ['config/hierarchy_cpu.py'],
        },
        rates=(5e-3, 1e-2, 2e-2),
    ),
}
# A first answer in an hour or two: the models of cpu, but small batches, to make many steps of 0.5M tokens
SCALES['short'] = replace(
    SCALES['cpu'],
    arguments=[
        *('config/size_cpu.py', '--device=cpu', '--compile=false', '--batch_size=4', '--optimizer=muon'),
        *('--max_iters=500', '--warmup_iters=15', '--eval_interval=250', '--eval_iters=32'),
    ],
    # as many tokens per step as at the other sizes
    sizes={**SCALES['cpu'].sizes, '512/256': ['--n_embd=96', '--block_size=64', '--batch_size=16']},
)


@dataclass(frozen=True)
class Experiment:
    question: str
    arms: dict  # name -> arguments of train.py; the first is the baseline
    size: str = '768/1024'  # n_embd/block_size, as published; a key of Scale.sizes
    sizes: dict = field(default_factory=dict)  # arm -> size, where they differ
    arguments: list = field(default_factory=list)
    beside: str = ''  # the experiment whose results these arms stand beside, in its folder


# each one a change of the hierarchy, whose shape is that of its size
HIERARCHY_OPTIONS = [
    *('hierarchy_transformer', 'hierarchy_attention', 'hierarchy_channels4', 'hierarchy_channels8'),
    *('hierarchy_dense', 'hierarchy_latent_loss', 'hierarchy_interpolate', 'hierarchy_reflex'),
]


def configs(*names: str) -> dict:
    return {name: [f'config/{name}.py'] for name in names}


EXPERIMENTS = {
    '1': Experiment(
        'Does reflex attention help a small model with a short context?',
        configs('vanilla', 'reflex_422', 'reflex_332'),
        '512/256',
    ),
    '2': Experiment(
        'What does a longer context give reflex attention, and what do biases?',
        {
            'short': ['config/reflex_422.py'],
            'long': ['config/reflex_422.py'],
            'long_bias': ['config/reflex_422.py', '--bias=true'],
        },
        '512/1024',
        {'short': '512/256'},
        ['--eval_iters=0'],  # all tokens: the same ones whatever the block size
    ),
    '3': Experiment(
        'What does a wider model give reflex attention?',
        {'narrow': ['config/reflex_422.py'], 'wide': ['config/reflex_422.py']},
        sizes={'narrow': '512/1024'},
    ),
    '4': Experiment(
        'Is reflex attention better than vanilla, and which split is best?',
        configs('vanilla', 'reflex_422', 'reflex_521', 'reflex_all'),
    ),
    '5': Experiment(
        'Does dropout help reflex attention in one pass over the data?',
        {'dropout_0': ['config/reflex_all.py'], 'dropout_0.1': ['config/reflex_all.py', '--dropout=0.1']},
    ),
    'peers': Experiment(
        'How does reflex attention stand against the closest published ideas?',
        configs('value_residual', 'skip_v1', 'cla', 'lime'),
        beside='4',
    ),
    'plans': Experiment(
        'Which plan is best: other lags, keys and values apart, layer 0, learned shares?',
        configs(
            *('reflex_4211', 'reflex_all_oldest', 'reflex_values', 'reflex_keys', 'reflex_all_values'),
            *('first_62', 'first_422', 'first_values_422', 'skip_v1_26', 'skip_v1_residual', 'learned_split'),
        ),
        beside='4',
    ),
    'leap': Experiment(
        'Does LEAP with windows beat vanilla, and vanilla LEAP without windows?',
        configs('vanilla', 'leap', 'leap_global', 'additive', 'additive_global'),
        '128/2048',
    ),
    'hierarchy': Experiment(
        'What does the hierarchical transformer give for its time, and which of its options earn their cost?',
        {**configs('vanilla'), 'hierarchy': [], **configs(*HIERARCHY_OPTIONS)},
        sizes=dict.fromkeys(['hierarchy', *HIERARCHY_OPTIONS], 'hierarchy'),
    ),
}
SWEEP_SEED = 1000  # the sweep's first seed: none of the comparison's
# Arguments that change neither the runs nor their speed: not in the command that is kept with the results
OWN = {'experiments', 'minutes', 'keep_checkpoints', 'wandb', 'status', 'results', 'work'}


# -----------------------------------------------------------------------------
# One run


@cache
def resolve(arguments: tuple) -> Knobs:
    """What train.py makes of its arguments; ConfigError where it would refuse them."""
    knobs = configure(Knobs, [str(ROOT / a) if a.endswith('.py') else a for a in arguments]).knobs
    check(knobs)
    return knobs


@dataclass(frozen=True)
class Job:
    """A run of train.py. Its state is what its files say: nothing is lost with the process that runs it."""

    arm: str
    arguments: tuple  # of train.py, all but where the run lives
    results: Path  # gets the small files
    out: Path  # train.py's out_dir

    @property
    def knobs(self) -> Knobs:
        return resolve(self.arguments)

    def __str__(self):
        return f'{self.arm} {self.results.name}'

    def done(self) -> Run | None:
        """The run, if it has come to its end: finished, or ended by its own loss."""
        if not (self.results / RUN).exists():
            return None
        run = read_run(self.results, self.arm)
        return run if run.finished or str(run.run.get('error')).startswith('TrainingError') else None

    def step(self) -> int:
        """How far it is, by the files of the run itself; after a kill it goes on from its last checkpoint."""
        if self.done():
            return self.knobs.max_iters
        try:
            return read_jsonl(self.out / METRICS)[-1]['iter']
        except (OSError, ValueError, IndexError):
            return 0

    def collect(self):
        """Copy the small files to the results, each whole or not at all."""
        for name in (RUN, METRICS):
            if (self.out / name).exists():
                self.results.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.out / name, self.results / f'{name}.tmp')
                os.replace(self.results / f'{name}.tmp', self.results / name)


class Runner:
    """Runs jobs, `at_once` at a time, and tells how it goes. `stopped` says why it was asked to end early."""

    def __init__(self, at_once: int, minutes: float, keep: bool, extra: list[str]):
        self.at_once, self.keep, self.extra = at_once, keep, extra
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes if minutes else float('inf')
        self.steps = 0  # made since then by runs that have ended
        self.stopped = ''
        self.ended_badly = []

    def run(self, jobs: list[Job], later: int = 0):
        """Bring the jobs to their end. later: steps that will be asked for after these, for the time left."""
        waiting = [job for job in jobs if not job.done()]
        running = {}  # job -> (process, its step when it was started)
        told = -math.inf
        try:
            while (waiting or running) and not self.stopped:
                while waiting and len(running) < self.at_once:
                    job = waiting.pop(0)
                    running[job] = (self._start(job), job.step())
                for job, (process, first) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        self.steps += max(0, job.step() - first)
                        self._end(job, process.returncode)
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    self._tell(waiting, running, later)
                if time.monotonic() > self.deadline:
                    self.stopped = self.stopped or 'time is up'
                time.sleep(0.1)
        finally:
            self._save_and_stop(running)

    def _start(self, job: Job):
        job.out.mkdir(parents=True, exist_ok=True)
        out = job.out.relative_to(ROOT) if job.out.is_relative_to(ROOT) else job.out
        command = [sys.executable, str(PROGRAM), *job.arguments, *self.extra]
        command += [f'--out_dir={out.as_posix()}', '--init_from=auto']
        environment = dict(os.environ)
        if self.at_once > 1:  # else each of them would start a thread on every core
            environment |= {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
        with open(job.out / 'log.txt', 'a', encoding='utf-8') as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _end(self, job: Job, code: int):
        job.collect()
        run = job.done()
        if run and run.finished:
            print(
                f'{job}: validation loss {run.val_loss:.4f}, {run.tokens_per_s or 0:,.0f} tokens/s',
                flush=True,
            )
            for path in [] if self.keep else job.out.glob('*.pt'):
                path.unlink()
        elif not self.stopped:
            log = (job.out / 'log.txt').read_text(encoding='utf-8', errors='replace').strip()
            print(f'{job}: ended with {code}: {log.splitlines()[-1] if log else "no word"}', flush=True)
            self.ended_badly += [] if run else [job]  # a loss that is not a number is a result

    def _tell(self, waiting, running, later):
        steps = self.steps + sum(max(0, job.step() - first) for job, (_, first) in running.items())
        left = later + sum(job.knobs.max_iters - job.step() for job in [*waiting, *running])
        now = ', '.join(f'{job} at {job.step()} of {job.knobs.max_iters}' for job in running)
        if steps:
            minutes = round((time.monotonic() - self.started) / steps * left / 60)
            now += f'; about {minutes // 60} h {minutes % 60:02} min left'
        print(f'[{time.strftime("%H:%M")}] {now}; {len(waiting)} more to do', flush=True)

    def _save_and_stop(self, running):
        for process, _ in running.values():
            process.terminate()
        for job, (process, _) in running.items():
            try:
                process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            job.collect()


# -----------------------------------------------------------------------------
# An experiment at a scale


def first_rates(text: str) -> tuple:
    """Those that --rates gives, separated by commas; ConfigError for anything but positive numbers."""
    try:
        values = tuple(float(number) for number in text.split(','))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise ConfigError(f'--rates={text}: positive numbers, separated by commas, as in 1e-3,2e-3')
    return values


class Plan:
    """All jobs of an experiment at a scale, and where their files are.

    args: the parsed command line. extra: knobs of train.py that go to every run.
    """

    def __init__(self, args, extra: list[str]):
        self.args, self.extra = args, extra
        self.scale = SCALES[args.scale]
        if args.rates:
            self.scale = replace(self.scale, rates=first_rates(args.rates))
        own = [Path(name) for name in args.experiments if name.endswith('.py')]
        names = [name for name in args.experiments if not name.endswith('.py')]
        for name in names:
            if name not in EXPERIMENTS:
                raise ConfigError(f'no experiment {name!r}: there are {", ".join(EXPERIMENTS)}')
        folders = {EXPERIMENTS[name].beside or name for name in names}
        if len(folders) > 1:
            raise ConfigError(f'{" and ".join(names)} have no baseline in common: run one, then the other')
        if not folders:
            raise ConfigError(
                f'{own[0]} is compared in which experiment? Name it too: experiments.py 4 {own[0]}'
            )
        (folder,) = folders
        base = EXPERIMENTS[folder]
        self.question, self.baseline = base.question, next(iter(base.arms))
        self.experiment_of = {arm: EXPERIMENTS[name] for name in names for arm in EXPERIMENTS[name].arms}
        for path in own:
            full = path.resolve()
            config = full.relative_to(ROOT) if full.is_relative_to(ROOT) else full
            self.experiment_of[path.stem] = replace(base, arms={path.stem: [config.as_posix()]})
        self.name = args.name or f'{folder}-{args.scale}'
        self.tree = self.name if args.equal == 'steps' else f'{self.name}-{args.equal}'
        self.seeds = range(args.seeds or self.scale.seeds)
        self.arms = args.arms.split(',') if args.arms else list(self.experiment_of)
        for arm in self.arms:
            if arm not in self.experiment_of:
                raise ConfigError(f'no arm {arm!r}: there are {", ".join(self.experiment_of)}')
        given = [a.partition('=')[2] for a in extra if a.startswith('--dataset=')]
        there = [d for d in self.scale.datasets if (data_folder(d) / 'meta.json').exists()]
        self.dataset = given[-1] if given else there[0] if there else self.scale.datasets[-1]

    def job(
        self, tree: str, arm: str, seed: int, rate: float, steps: int | None = None, name: str = ''
    ) -> Job:
        e = self.experiment_of[arm]
        size = self.scale.sizes[e.sizes.get(arm, e.size)]
        arguments = [*e.arms[arm], *self.scale.arguments, *size, *e.arguments, f'--dataset={self.dataset}']
        # of a knob that is given twice, the last one counts
        arguments += [*self.extra, f'--learning_rate={rate:g}', f'--seed={seed}']
        arguments += [f'--max_iters={steps}'] if steps is not None else []
        place = Path(tree) / (name or arm) / f'seed{seed}'
        if self.args.wandb:
            group, run = f'{tree}/{name or arm}', f'{tree}/{name or arm}/seed{seed}'
            arguments += ['--wandb_log=true', f'--wandb_group={group}', f'--wandb_run_name={run}']
        return Job(name or arm, tuple(arguments), self.args.results / place, self.args.work / place)

    def steps(self, arm: str) -> int:
        return self.job('', arm, 0, 1e-3).knobs.max_iters

    def sweep(self, arm: str, rate: float) -> list[Job]:
        """The short runs of one learning rate."""
        steps = self.args.sweep_iters or max(1, self.steps(arm) // 4)
        seeds = range(SWEEP_SEED, SWEEP_SEED + self.args.sweep_seeds)
        return [self.job(f'{self.name}-lr', arm, s, rate, steps, f'{arm}-lr{rate:g}') for s in seeds]

    def rates(self, arm: str) -> dict[float, float | None]:
        """{rate: mean loss of its sweep, inf if one failed, None while they run}, lowest rate first.

        While the best rate is the lowest or the highest there is, the one beyond it is asked for too, up to
        eight times lower or higher than the first ones.
        """
        rates = sorted(self.scale.rates)
        least, most = rates[0] / 8, rates[-1] * 8
        while True:
            losses = {}
            for rate in rates:
                runs = [job.done() for job in self.sweep(arm, rate)]
                values = [run.val_loss if run.finished else math.inf for run in runs if run]
                losses[rate] = statistics.fmean(values) if len(values) == len(runs) else None
            if None in losses.values():
                return losses
            best = min(rates, key=losses.__getitem__)
            if best == rates[0] and best > least:
                rates.insert(0, best / 2)
            elif best == rates[-1] and best < most:
                rates.append(best * 2)
            else:
                return losses

    def rate(self, arm: str) -> float | None:
        """The learning rate of an arm; None while its sweep is not done."""
        if self.args.learning_rate:
            return self.args.learning_rate
        losses = self.rates(arm)
        return None if None in losses.values() else min(losses, key=losses.__getitem__)

    def headline(self) -> list[Job]:
        """The runs that are compared, of the arms whose learning rate is known.

        Seed by seed, so that an early end leaves whole pairs; each seed begins with another arm, so that none
        always has the same neighbour on the machine.
        """
        rates = {arm: self.rate(arm) for arm in self.arms}
        steps = dict.fromkeys(self.arms) if self.args.equal == 'steps' else self.equal_steps()
        jobs = []
        for seed in self.seeds:
            turn = seed % len(self.arms)
            for arm in self.arms[turn:] + self.arms[:turn]:
                if rates[arm] is not None and arm in steps:
                    jobs.append(self.job(self.tree, arm, seed, rates[arm], steps[arm]))
        return jobs

    def equal_steps(self) -> dict[str, int]:
        """Steps that cost an arm what the baseline's cost it, by FLOPs or speeds of the runs of equal steps.

        The baseline is left out: its runs are there already.
        """
        try:
            runs = find_runs([str(self.args.results / self.name)])
        except CompareError:
            runs = []
        arms = {name: Arm(name, [r for r in runs if r.arm == name]) for name in {r.arm for r in runs}}
        missing = [
            a for a in dict.fromkeys([self.baseline, *self.arms]) if a not in arms or not arms[a].speed
        ]
        if missing:
            raise ConfigError(
                f'--equal={self.args.equal} goes by the speeds of finished runs of equal steps; there are '
                f'none of {", ".join(missing)}: run those first'
            )

        def per_step(arm):
            """Steps of the baseline that one step of the arm costs."""
            own, base = (arms[name] for name in (arm, self.baseline))
            tokens = own.one.run['tokens_per_step'] / base.one.run['tokens_per_step']
            if self.args.equal == 'flops':
                flops = [a.one.run['model']['flops_per_token'] for a in (own, base)]
                return tokens * flops[0] / flops[1]
            own, base = own.by_seed('tokens_per_s'), base.by_seed('tokens_per_s')
            return tokens * statistics.geometric_mean([base[s] / own[s] for s in own.keys() & base.keys()])

        given = arms[self.baseline].one.config['max_iters']
        return {arm: round(given / per_step(arm)) for arm in self.arms if arm != self.baseline}

    def compare_command(self) -> str:
        if self.args.equal == 'steps':
            return f'python compare.py results/{self.tree} --baseline={self.baseline}'
        return f'python compare.py results/{self.name}/{self.baseline} results/{self.tree} --name={self.tree}'


def refuse_other_settings(plan: Plan):
    """A finished run with other settings is no part of this experiment, nor taken for one: not in the
    sweep, whose losses choose the rates, nor among the headline runs, before a sweep is run for nothing.
    """
    jobs, sweep, later = plan.headline(), [], []
    if not plan.args.learning_rate:
        sweep = [job for arm in plan.arms for rate in plan.rates(arm) for job in plan.sweep(arm, rate)]
    if plan.args.equal == 'steps':  # of the arms whose rate is not known yet
        arms = set(plan.arms) - {job.arm for job in jobs}
        later = [plan.job(plan.tree, arm, seed, 1e-3) for arm in arms for seed in plan.seeds]
    for job in [*sweep, *jobs, *later]:
        run = job.done()
        then = saved_knobs(run.config, str(job.results / RUN)) if run else job.knobs
        knobs = unlike(asdict(job.knobs), asdict(then))
        told = [
            f'{name}={was!r} (now {now!r})'
            for name, now, was in knobs
            if not (job in later and name == 'learning_rate')
        ]
        if told:
            raise ConfigError(
                f'{job.results} holds a run with other settings: {", ".join(told)}. Give them as they were, '
                'or another --name, or delete that folder'
            )


def check_data(plan: Plan):
    """DataError before the first run, rather than one from each."""
    folder = data_folder(plan.dataset)
    prepare_stdlib(folder)
    block_size = max(plan.job('', arm, 0, 1e-3).knobs.block_size for arm in plan.arms)
    open_data(folder, block_size, plan.job('', plan.arms[0], 0, 1e-3).knobs.vocab_size or None)


def status(plan: Plan, jobs: list[Job]) -> str:
    """A line per arm: its learning rate, then for each seed its loss or how far it is."""
    width = max(len(arm) for arm in plan.arms)
    lines = [
        f'{plan.tree} on {plan.dataset}',
        f'{"":<{width}}  {"rate":<8}' + ''.join(f'{f"seed {s}":>9}' for s in plan.seeds),
    ]
    places = {(job.arm, job.results.name): job for job in jobs}
    for arm in plan.arms:
        rate = plan.rate(arm)
        line = f'{arm:<{width}}  {rate if rate is not None else "sweep":<8}'
        for seed in plan.seeds:
            job = places.get((arm, f'seed{seed}'))
            run = job.done() if job else None
            if run:
                line += f'{run.val_loss:>9.4f}' if run.finished else f'{"failed":>9}'
            else:
                line += f'{job.step() / job.knobs.max_iters:>9.0%}' if job and job.step() else f'{"·":>9}'
        lines.append(line)
    return '\n'.join(lines)


def write_readme(plan: Plan, command: str):
    """In the folder of the results: the commands that made it, what each arm is, how its rate was chosen."""
    path = plan.args.results / plan.tree / 'README.md'
    before = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    commands = [line for line in before if line.startswith('python experiments.py')]
    rows = {line.split(' | ')[0]: line for line in before if line.startswith('| `')}
    for arm in plan.arms:
        varied = ('--learning_rate', '--seed', '--wandb')
        knobs = [a for a in plan.job(plan.tree, arm, 0, 1e-3).arguments if not a.startswith(varied)]
        losses = {} if plan.args.learning_rate else plan.rates(arm)
        told = [f'{rate:g}: {"–" if loss is None else f"{loss:.4f}"}' for rate, loss in losses.items()]
        cells = [
            f'`{arm}`',
            f'`{" ".join(knobs)}`',
            f'{plan.rate(arm) or "–"}',
            ', '.join(told) or 'not swept',
        ]
        row, known = f'| {" | ".join(cells)} |', rows.get(f'| {cells[0]}', '')
        # a rate that was given does not undo the sweep that an earlier command chose it by
        same = known.split(' | ')[:3] == row.split(' | ')[:3]
        rows[f'| {cells[0]}'] = known if same and not losses else row
    lines = [f'# {plan.tree}', '', plan.question, '', '```']
    lines += [*dict.fromkeys([*commands, command]), plan.compare_command(), '```', '']
    lines += ['| arm | arguments of train.py | learning rate | sweep: validation loss by rate |']
    lines += ['| --- | --- | --- | --- |', *rows.values(), '']
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines), encoding='utf-8')


def run_all(plan: Plan, runner: Runner):
    """The sweeps, in rounds as long as a best rate lies on an edge; then the runs that are compared."""
    tried = set()
    while not (runner.stopped or plan.args.learning_rate):
        pairs = [(arm, rate) for arm in plan.arms for rate, loss in plan.rates(arm).items() if loss is None]
        sweep = [job for arm, rate in pairs for job in plan.sweep(arm, rate) if job not in tried]
        if not sweep:
            break
        tried.update(sweep)
        runner.run(sweep, later=len(plan.seeds) * sum(map(plan.steps, plan.arms)))
    if not runner.stopped:
        refuse_other_settings(plan)
        runner.run(plan.headline())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    option = parser.add_argument
    told = '; '.join(f'{name}: {e.question}' for name, e in EXPERIMENTS.items())
    option('experiments', nargs='+', metavar='EXPERIMENT', help=f'{told}; a config file: an arm of your own')
    option(
        '--scale',
        choices=SCALES,
        required=True,
        help='paper: as published; cpu: on a laptop; short: in an evening',
    )
    option('--seeds', type=int, default=0, help='how many: 0, 1, … (5)')
    option('--jobs', type=int, default=1, help='runs side by side; if several, with one CPU thread each (1)')
    option('--arms', help='only these, separated by commas')
    option(
        '--equal', choices=('steps', 'flops', 'seconds'), default='steps', help='what all arms get (steps)'
    )
    option('--learning_rate', type=float, help='for all arms, instead of a sweep')
    option('--rates', help='learning rates that the sweep begins with, separated by commas (by scale)')
    option('--sweep_seeds', type=int, default=1, help='seeds per rate of the sweep, from 1000 on (1)')
    option('--sweep_iters', type=int, default=0, help='steps of a run of the sweep (a quarter of max_iters)')
    option('--minutes', type=float, default=0, help='stop in good order after so long (never)')
    option('--keep_checkpoints', action='store_true', help='keep those of finished runs, in out/')
    option('--wandb', action='store_true', help='log to wandb: a group per arm')
    option('--name', help='of the folder in results/ (<experiment>-<scale>)')
    option('--status', action='store_true', help='tell what is done, and stop')
    option('--results', type=Path, default=ROOT / 'results', help='folder for the results (results)')
    option('--work', type=Path, default=ROOT / 'out/experiments', help='for checkpoints (out/experiments)')
    args, extra = parser.parse_known_args(argv)
    if args.jobs < 1:
        raise ConfigError(f'--jobs={args.jobs}: at least 1')
    for knob in ('--seed', '--out_dir', '--init_from'):
        if any(a.partition('=')[0] == knob for a in extra):
            raise ConfigError(f'{knob} is chosen run by run here: leave it out')
    unlike_default = {k: v for k, v in vars(args).items() if k not in OWN and v != parser.get_default(k)}
    command = ['python experiments.py', *args.experiments, *(f'--{k}={v}' for k, v in unlike_default.items())]
    args.results, args.work = args.results.resolve(), args.work.resolve()

    plan = Plan(args, extra)
    refuse_other_settings(plan)
    if args.status:
        print(status(plan, plan.headline()))
        return 0
    check_data(plan)
    runner = Runner(args.jobs, args.minutes, args.keep_checkpoints, ['--threads=1'] if args.jobs > 1 else [])

    def on_signal(number, frame):
        runner.stopped = signal.Signals(number).name

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with FolderLock(args.work / plan.tree):
            run_all(plan, runner)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    write_readme(plan, ' '.join([*command, *extra]))
    print(status(plan, plan.headline()))
    if runner.stopped:
        print(f'stopped ({runner.stopped}); the same command goes on')
    elif runner.ended_badly:
        print(f'not done: {", ".join(map(str, runner.ended_badly))}; logs are in {args.work / plan.tree}*')
    else:
        print(f'done; now: {plan.compare_command()}')
    return 130 if runner.stopped.startswith('SIG') else 1 if runner.ended_badly else 0


if __name__ == '__main__':
    run_program(main)
