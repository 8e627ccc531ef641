"""Run an experiment: every arm and seed through train.py, as a person would, side by side and resumable.

    python experiments.py config/skip_v1.py --scale=minutes --jobs=2  # any config file against vanilla
    python experiments.py 4 --scale=cpu --jobs=2             # experiment 4 shrunk for a laptop, two at a time
    python experiments.py 4 --scale=short --jobs=2           # the same models for an eighth of the tokens
    python experiments.py 4 --scale=paper                    # its published size, for a GPU
    python experiments.py 4 peers --scale=cpu --jobs=2       # and the closest published ideas beside them
    python experiments.py leap --scale=cpu --jobs=2          # LEAP, additive attention, vanilla
    python experiments.py 4 config/plans/cla.py --scale=short  # a config file beside all arms of experiment 4
    python experiments.py search 4 peers plans --scale=short # the best arm of many, by successive halving
    python experiments.py 4 --scale=cpu --status             # what is done, runs, waits and failed
    python experiments.py 4 --scale=cpu --equal=seconds      # equal time, not steps, once speeds are known
    python experiments.py 4 --scale=paper --launcher=slurm --gpus=1 --time_limit=8:00:00  # tasks of a cluster

The protocol: first each arm gets the same small sweep of learning rates on seeds of its own (1000, 1001; an
edge that wins is pushed out), and takes the lowest point of the parabola through the best rate and its two
neighbours. Then all arms train on seeds 0, 1, … with the rate that each has won. One seed is one order of
batches and one draw of shared initial values for all arms.

A search lets all arms compete in short runs, the better half of them in longer ones, and so on (SEARCH,
below); the winner is compared with the baseline on seeds that the search has not seen.

out/experiments/<experiment>-<scale>/<arm>/seed<k>/ is the folder of a run, <experiment>-<scale>-lr/ beside it
has the sweep's. Stop at any time: the same command goes on where it was, and never repeats a finished run.
compare.py reads the folder, and its --pack keeps it as one file in results/; --go_on=results/4-cpu goes on
with such a study. Any knob of train.py can be added, except seed, out_dir and init_from: it goes to every
run.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from configurator import ConfigError, configure, divide, run_program
from runs import knobs as training
from runs import slurm
from runs.datasets import data_folder, prepare_own
from runs.files import FolderLock, check_name, lock_holder, make_folder, remove_shards, write_text
from runs.records import (
    METRICS,
    README,
    RUN,
    Arm,
    RecordError,
    Run,
    find_runs,
    read_jsonl,
    read_run,
    unlike,
    unpack,
    unpacked,
    what_is_learned,
)

ROOT = Path(__file__).resolve().parent
PROGRAM = ROOT / 'train.py'
LOG = (
    'log.txt'  # in the folder of a run: what train.py printed, and in lines that begin with MARK what we did
)
MARK = '--- experiments.py: '


# -----------------------------------------------------------------------------
# What is run: data


@dataclass(frozen=True)
class Scale:
    datasets: list  # the first that is there; the last is made on the spot
    arguments: list  # of every run
    sizes: dict  # published size -> arguments
    seeds: int = 5
    rates: tuple = (5e-4, 1e-3, 2e-3)  # of the sweep, to begin with
    sweep: float = 0.25  # steps of a run of the sweep, as a share of those of a whole run


SCALES = {
    # train.py's defaults are the published settings
    'paper': Scale(
        ['openwebtext'],
        [],
        {
            '512/256': ['config/sizes/size_512_256.py'],
            '512/1024': ['--n_embd=512'],
            '768/1024': [],
            '128/2048': ['config/sizes/size_leap.py'],
            # of about the parameters of vanilla 768/1024
            'hierarchy': ['--model=hierarchy', '--latents=16-4', '--widths=256-512-768', '--n_layer=4'],
        },
    ),
    # all sizes shrunk together: a quarter of the block, a sixth to a fifth of the width; 4.1M tokens per run.
    # With Muon: two seeds of AdamW differ by up to 0.26 nats at twice the tokens (results/4-cpu-adamw).
    'cpu': Scale(
        ['proposals_bpe4096', 'stdlib'],
        [
            *('config/sizes/size_cpu.py', '--device=cpu', '--eval_iters=32', '--compile=true'),
            *('--optimizer=muon', '--max_iters=1000', '--warmup_iters=50'),
        ],
        {
            '512/256': ['--n_embd=96', '--block_size=64'],
            '512/1024': ['--n_embd=96'],
            '768/1024': [],
            # the published size for a hundredth of the steps: nothing is seen twice, so no dropout
            '128/2048': [
                *('config/sizes/size_leap.py', '--max_iters=150', '--warmup_iters=15', '--dropout=0'),
                *('--eval_interval=50', '--eval_iters=8', '--compile=false'),
            ],
            'hierarchy': ['config/hierarchy/hierarchy_cpu.py'],
        },
        rates=(5e-3, 1e-2, 2e-2),
        sweep=0.5,
    ),
}
# A first answer in an hour or two: the models of cpu, but small batches, to make many steps of 0.5M tokens
SCALES['short'] = replace(
    SCALES['cpu'],
    arguments=[
        *(
            'config/sizes/size_cpu.py',
            '--device=cpu',
            '--compile=false',
            '--batch_size=4',
            '--optimizer=muon',
        ),
        *('--max_iters=500', '--warmup_iters=15', '--eval_interval=250', '--eval_iters=32'),
    ],
    # as many tokens per step as at the other sizes
    sizes={**SCALES['cpu'].sizes, '512/256': ['--n_embd=96', '--block_size=64', '--batch_size=16']},
)


# A first look in ten minutes of two cores, on a corpus that every machine has: two arms, two seeds
SCALES['minutes'] = replace(
    SCALES['short'],
    datasets=['stdlib'],
    arguments=[*SCALES['short'].arguments, '--max_iters=400', '--eval_interval=200'],
    seeds=2,
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
    return {name: [training.config_file(name)] for name in names}


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
        configs('value_residual', 'skip_v1', 'cla', 'lime', 'depth_attention', 'moda'),
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
    'controls': Experiment(
        'Is what values of layer 0 give a path for the identity of tokens?',
        configs(
            *('embedding_values', 'embedding_values_all', 'bank', 'x0_skip', 'svformer', 'skip_v1'),
            *('value_residual', 'cla', 'shared_above', 'fused_lite', 'grouped_4'),
        ),
        beside='4',
    ),
    'modern': Experiment(
        'What is left of each lead on a base of today?',
        configs('vanilla', 'reflex_422', 'skip_v1', 'embedding_values', 'value_residual', 'x0_skip'),
        arguments=['config/base_modern.py'],
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
SWEEP_SEED = 1000  # the first seed of sweeps and searches: none of the comparison's


@dataclass(frozen=True)
class Rung:
    """A round of a search. The baseline takes part in each, beside the arms that are tried."""

    arms: float  # the share of the arms of the round before that go on: the best ones
    seeds: int
    steps: float  # as a share of those of a whole run


# Successive halving, with about the same work in each round. The first one is the sweep of learning rates.
SEARCH = (Rung(1, seeds=1, steps=0.25), Rung(0.5, seeds=2, steps=0.5), Rung(0.5, seeds=2, steps=1))
# Knobs that change neither the runs nor their speed: not in the command that is kept with the results
OWN = ('minutes', 'keep_checkpoints', 'wandb_log', 'status', 'out', 'go_on')


@dataclass(frozen=True)
class Knobs:
    # what is run
    scale: str = ''  # paper (as published, for a GPU) | cpu (a night) | short (an evening) | minutes (ten)
    seeds: int = 0  # how many seeds the arms are compared on: 0, 1, …; 0 = as many as the scale says
    jobs: int | None = None  # runs side by side, here with one CPU thread each; default: 1, with slurm all
    arms: str = ''  # only these arms, separated by commas
    equal: str = 'steps'  # what all arms get: steps | flops | seconds (by the runs of equal steps)
    # where it runs
    launcher: str = 'local'  # local (here) | slurm (each arm and seed is a task of a cluster)
    partition: str = ''  # of slurm; '' and 0 here and below: what the cluster takes for itself
    account: str = ''  # that slurm charges
    time_limit: str = ''  # of a task, as of sbatch --time; a run that comes near it saves and is requeued
    gpus: int = 0  # of a task; several: torchrun starts a rank on each
    cpus: int = 0  # of a task, which has as many threads
    memory: str = ''  # of a task, as sbatch --mem takes it
    warning: int = 120  # seconds before the limit on time at which a run is asked to save
    sbatch: str = ''  # further options of sbatch, such as '--qos=long --constraint=a100'
    # learning rates
    learning_rate: float | None = None  # for all arms, instead of a sweep
    rates: str = ''  # the rates that the sweep begins with, separated by commas; '' = those of the scale
    sweep_seeds: int = 2  # seeds per rate of the sweep, from 1000 on
    sweep_iters: int = 0  # steps of a run of the sweep; 0 = half of max_iters, at paper scale a quarter
    pick: str = 'parabola'  # how the sweep chooses: parabola (its lowest point) | best (the best rate swept)
    # the rest
    minutes: float = 0.0  # stop in good order after so long; 0 = never
    keep_checkpoints: bool = False  # keep the checkpoints of finished runs too
    wandb_log: bool = False  # log to wandb: a group per arm
    name: str = ''  # the name of the study and its folder; '' = EXPERIMENT-SCALE, or that of go_on
    out: str = 'out/experiments'  # the folder in which NAME/ is made
    go_on: str = ''  # results/NAME: a kept study, whose runs count as done
    status: bool = False  # tell what is done, runs, waits and failed, and stop

    def __post_init__(self):
        choices = {'scale': SCALES, 'equal': ('steps', 'flops', 'seconds'), 'pick': ('parabola', 'best')}
        choices['launcher'] = ('local', 'slurm')
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                value = f'={getattr(self, name)}' if getattr(self, name) else ' is not given'
                raise ConfigError(f'--{name}{value}: give one of {", ".join(allowed)}')
        at_least = {'jobs': 1, 'sweep_seeds': 1} | dict.fromkeys(
            ('seeds', 'sweep_iters', 'minutes', 'gpus', 'cpus', 'warning'), 0
        )
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f'--{name}={getattr(self, name)}: at least {least}')
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ConfigError(
                f'--learning_rate={self.learning_rate:g}: a positive number, or leave it out for a sweep'
            )
        if self.name:
            check_name('--name', self.name)
        of_slurm = ('partition', 'account', 'time_limit', 'gpus', 'cpus', 'memory', 'sbatch')
        given = [name for name in of_slurm if getattr(self, name)]
        if given and self.launcher != 'slurm':
            raise ConfigError(f'--{given[0]} is for tasks of a cluster: give --launcher=slurm too')

    def resources(self) -> slurm.Resources:
        """What a task of the cluster asks for."""
        return slurm.Resources(
            partition=self.partition,
            account=self.account,
            time_limit=self.time_limit,
            gpus=self.gpus,
            cpus=self.cpus,
            memory=self.memory,
            warning=self.warning,
            more=self.sbatch,
        )


# -----------------------------------------------------------------------------
# One run


@cache
def resolve(arguments: tuple) -> training.Knobs:
    """The knobs that train.py makes of its arguments; ConfigError where it would refuse them."""
    files = [str(ROOT / a) if a.endswith('.py') and not a.startswith('--') else a for a in arguments]
    knobs = configure(training.Knobs, files).knobs
    training.check(knobs)
    return knobs


@dataclass(frozen=True)
class Job:
    """A run of train.py. Its state is what its files say: nothing is lost with the process that runs it."""

    arm: str
    arguments: tuple  # of train.py, all but where the run lives
    out: Path  # train.py's out_dir

    @property
    def knobs(self) -> training.Knobs:
        return resolve(self.arguments)

    def __str__(self):
        return f'{self.arm} {self.out.name}'

    def start_arguments(self) -> list[str]:
        """Of train.py, all of them: it starts, or goes on with what is there."""
        return [*self.arguments, f'--out_dir={_short(self.out)}', '--init_from=auto']

    def done(self) -> Run | None:
        """The run, if it has come to its end: finished, or ended by its own loss."""
        if not (self.out / RUN).exists():
            return None
        run = read_run(self.out, self.arm)
        return run if run.finished or str(run.run.get('error')).startswith('TrainingError') else None

    def step(self) -> int:
        """How far it is, by the files of the run itself; after a kill it goes on from its last checkpoint."""
        try:
            return read_jsonl(self.out / METRICS)[-1]['iter']
        except (OSError, ValueError, IndexError):
            return 0

    def state(self, busy: bool, task: slurm.Task | None = None) -> str:
        """'done', 'running', 'queued' (by Slurm), 'failed' (train.py ended with an error), 'stopped' on the
        way, or 'waiting'.

        busy: experiments.py is at work on the study, so what has begun may not have its lock yet; task: of
        Slurm, if it knows of one.
        """
        if self.done():
            return 'done'
        if task and task.alive:
            return 'queued' if task.waits else 'running'
        last = self.log()[-1:]
        if lock_holder(self.out) or (busy and last == [f'{MARK}start']):
            return 'running'
        return 'failed' if self.failed() else 'stopped' if last else 'waiting'

    def failed(self) -> bool:
        """Whether its last attempt ended with an error."""
        if (self.out / RUN).exists() and read_run(self.out, self.arm).state.startswith('failed'):
            return True
        return any(line.startswith(f'{MARK}ended') for line in self.log()[-1:])

    def log(self) -> list[str]:
        """The lines of its log."""
        try:
            lines = (self.out / LOG).read_text(encoding='utf-8', errors='replace').split('\n')
        except OSError:
            return []
        return [line.strip() for line in lines if line.strip()]

    def last_words(self) -> str:
        """The last line that train.py printed."""
        said = [line for line in self.log() if not line.startswith(MARK)]
        return said[-1] if said else 'it printed nothing'


class Runner:
    """Runs jobs, `at_once` at a time, and tells how it goes. `stopped` says why it was asked to end early."""

    def __init__(self, at_once: int, minutes: float, keep: bool):
        self.at_once, self.keep = at_once, keep
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes if minutes else float('inf')
        self.steps = 0  # made since then by runs that have ended
        self.stopped = ''
        self.ended_badly = []

    def run(self, jobs: list[Job], later: int = 0):
        """Bring the jobs to their end. later: steps that will be asked for after these, for the time left."""
        waiting = [job for job in jobs if not job.done()]
        running = {}  # job -> (its process, or None where an earlier start of this began it; its first step)
        told = -math.inf
        try:
            while (waiting or running) and not self.stopped:
                while waiting and len(running) < self.at_once:
                    job = waiting.pop(0)
                    running[job] = (self._start(job), job.step())
                for job, (process, first) in list(running.items()):
                    if process.poll() is None if process else lock_holder(job.out):
                        continue
                    del running[job]
                    if process and not job.done() and lock_holder(job.out):
                        running[job] = (self._wait_for(job), first)  # that one had just begun when we did
                        continue
                    self.steps += max(0, job.step() - first)
                    if process or job.done():
                        code = process.returncode if process else 0
                        if not self._end(job, f'ended with {code}: {job.last_words()}') and not self.stopped:
                            with open(job.out / LOG, 'a', encoding='utf-8') as log:
                                print(f'{MARK}ended with {code}', file=log)
                    else:
                        waiting.insert(0, job)  # it goes on from its checkpoint
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    self._tell(waiting, running, later)
                if time.monotonic() > self.deadline:
                    self.stopped = self.stopped or 'time is up'
                time.sleep(0.1)
        finally:
            self._save_and_stop(running)

    def _start(self, job: Job):
        """Its process; None where it still runs, since this program was killed and the run was not."""
        if lock_holder(job.out):
            return self._wait_for(job)
        make_folder(job.out)
        command = [sys.executable, str(PROGRAM), *job.start_arguments()]
        command += ['--threads=1'] if self.at_once > 1 else []
        environment = dict(os.environ)
        if self.at_once > 1:  # else each of them would start a thread on every core
            environment |= {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
        with open(job.out / LOG, 'a', encoding='utf-8') as log:
            print(f'{MARK}start', file=log, flush=True)
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _wait_for(self, job: Job):
        say(f'{job}: still runs ({lock_holder(job.out)}): waiting for it')

    def _end(self, job: Job, how: str) -> bool:
        """Tell that it has ended, and how if it did not finish; whether it did."""
        run = job.done()
        if run and run.finished:
            say(f'{job}: validation loss {run.val_loss:.4f}, {run.tokens_per_s or 0:,.0f} tokens/s')
            for path in [] if self.keep else job.out.glob('*.pt'):
                path.unlink()
            if not self.keep:
                remove_shards(job.out)
            return True
        if not self.stopped:
            say(f'{job}: {how}')
            self.ended_badly += [] if run else [job]  # a loss that is not a number is a result
        return False

    def _tell(self, waiting, running, later):
        steps = self.steps + sum(max(0, job.step() - first) for job, (_, first) in running.items())
        left = later + sum(job.knobs.max_iters - job.step() for job in [*waiting, *running])
        now = ', '.join(f'{job} at {job.step()} of {job.knobs.max_iters}' for job in running)
        if steps >= 20:  # before, most of the time went into starting
            minutes = round((time.monotonic() - self.started) / steps * left / 60)
            now += f'; about {minutes // 60} h {minutes % 60:02} min left'
        say(f'[{time.strftime("%H:%M")}] {now}; {len(waiting)} more to do')

    def _save_and_stop(self, running):
        """Have the runs save and end, also those that an earlier start began; after two minutes kill ours."""
        for job, (process, _) in running.items():
            if process:
                process.terminate()
            else:
                terminate_holder(job.out)
        until = time.monotonic() + 120
        for job, (process, _) in running.items():
            while time.monotonic() < until and (process.poll() is None if process else lock_holder(job.out)):
                time.sleep(0.1)
            if process and process.poll() is None:
                process.kill()
                process.wait()


class SlurmRunner(Runner):
    """Runs jobs as tasks of Slurm, which has them in its hands: whatever becomes of this program, they go on,
    and the next one finds them in the queue."""

    POLL = 10.0  # seconds between two questions to Slurm
    SETTLE = 60.0  # that the files of a task may take to show on this machine once it has ended

    def __init__(self, at_once: int, minutes: float, keep: bool, study: Path, wanted: slurm.Resources):
        """study: the folder that keeps the batch scripts; wanted: of every task."""
        super().__init__(at_once, minutes, keep)
        self.study, self.wanted = study, wanted
        self.array_size = slurm.most_tasks()

    def run(self, jobs: list[Job], later: int = 0):
        waiting = [job for job in jobs if not job.done()]
        running, missed, told = {}, {}, -math.inf  # job -> its first step; when its task was first not there
        while (waiting or running) and not self.stopped:
            queue = self._queue()
            if queue is not None:
                for job in [job for job in waiting if job.out in queue and queue[job.out].alive]:
                    say(f'{job}: is in the queue as {queue[job.out].id}: waiting for it')
                    waiting.remove(job)
                    running[job] = job.step()
                for job in list(running):
                    self._look(job, queue.get(job.out), running, missed, waiting)
                some = waiting[: self.array_size]
                if some:
                    self._submit(some, room=self.at_once and max(1, self.at_once - len(running)))
                    running |= {job: job.step() for job in some}
                    del waiting[: len(some)]
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    begun = {job: (None, first) for job, first in running.items() if job.step() > first}
                    self._tell([*waiting, *(job for job in running if job not in begun)], begun, later)
            until = time.monotonic() + self.POLL
            while (running or queue is None) and time.monotonic() < until and not self.stopped:
                time.sleep(min(0.1, self.POLL))
                if time.monotonic() > self.deadline:
                    self.stopped = self.stopped or 'time is up'

    def _queue(self) -> dict | None:
        """What Slurm knows of our tasks; None while it does not answer: then nothing is taken for gone."""
        try:
            return slurm.queued(self.study)
        except slurm.SlurmError as e:
            say(f'warning: {e}; asking again')
            return None

    def _submit(self, jobs, room: int):
        start = slurm.train_command(PROGRAM, self.wanted.gpus)
        runs = [slurm.Run(job.out, [*start, *job.start_arguments()]) for job in jobs]
        slurm.submit(runs, self.study, self.study.name, LOG, MARK, room, self.wanted)
        say(f'{len(jobs)} task{"s" * (len(jobs) > 1)} submitted to Slurm as {self.study.name}')

    def _look(self, job: Job, task: slurm.Task | None, running: dict, missed: dict, waiting: list):
        """What became of a job that was submitted; waiting gets it where it is to be submitted again."""
        if task and task.alive:
            missed.pop(job, None)
            return
        since = time.monotonic() - missed.setdefault(job, time.monotonic())
        if not (job.done() or job.failed()) and since < self.SETTLE:
            return
        del missed[job]
        made = max(0, job.step() - running.pop(job))
        self.steps += made
        how = f'its task ended ({task.state.lower()})' if task else 'its task is gone from the queue'
        cancelled = task and task.state == 'CANCELLED'
        if made and not (cancelled or job.done() or job.failed()):
            say(f'{job}: {how} at {job.step()} of {job.knobs.max_iters}: it goes on')
            waiting.append(job)
        else:
            self._end(job, f'{how}: {job.last_words()}')


def terminate_holder(folder: Path):
    """Ask the run that holds a folder to save and end, if it is on this machine."""
    holder = re.fullmatch(r'process (\d+) on (.*)', lock_holder(folder))
    if holder and holder[2] == platform.node():
        with contextlib.suppress(OSError):
            os.kill(int(holder[1]), signal.SIGTERM)


def say(text: str):
    """Print. A terminal or a pipe that has gone away does not stop the runs."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _short(path: Path) -> str:
    """Seen from the repository, where it is in it."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


# -----------------------------------------------------------------------------
# An experiment at a scale


def first_rates(text: str) -> tuple:
    """Those that --rates gives; ConfigError for anything but different positive numbers."""
    try:
        values = tuple(float(number) for number in text.split(','))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values) or len(set(values)) < len(values):
        raise ConfigError(f'--rates={text}: different positive numbers, separated by commas, as in 1e-3,2e-3')
    return values


def lowest(losses: dict[float, float], pick: str) -> float:
    """The rate that a sweep chooses from {rate: loss}.

    The best of them; or, where it has finite neighbours on both sides, the lowest point of the parabola
    through the three in the logarithm of the rate, in two digits.
    """
    rates = sorted(losses)
    best = rates.index(min(rates, key=losses.__getitem__))
    if pick == 'best' or best in (0, len(rates) - 1):
        return rates[best]
    x = [math.log(rate) for rate in rates[best - 1 : best + 2]]
    y = [losses[rate] for rate in rates[best - 1 : best + 2]]
    left, right = (x[1] - x[0]) * (y[1] - y[2]), (x[1] - x[2]) * (y[1] - y[0])
    if not all(map(math.isfinite, y)) or left == right:
        return rates[best]
    point = x[1] - 0.5 * ((x[1] - x[0]) * left - (x[1] - x[2]) * right) / (left - right)
    return float(f'{math.exp(point):.2g}')


class Plan:
    """All jobs of an experiment at a scale, and where their files are.

    words: experiments and config files, or 'search' and those whose arms are searched. extra: knobs of
    train.py that go to every run, as --key=value.
    """

    def __init__(self, k: Knobs, words: list[str], extra: list[str]):
        self.k, self.extra, self.scale = k, extra, SCALES[k.scale]
        if k.rates:
            self.scale = replace(self.scale, rates=first_rates(k.rates))
        self.search = words[:1] == ['search']
        words = words[1:] if self.search else words
        own = list(dict.fromkeys(Path(word) for word in words if word.endswith('.py')))
        names = list(dict.fromkeys(word for word in words if not word.endswith('.py')))
        for name in names:
            if name not in EXPERIMENTS:
                raise ConfigError(f'no experiment {name!r}: there are {", ".join(EXPERIMENTS)}')
        folders = {EXPERIMENTS[name].beside or name for name in names}
        if len(folders) > 1:
            raise ConfigError(f'{" and ".join(names)} have no baseline in common: run one, then the other')
        if not words:
            raise ConfigError(f'which experiment? There are {", ".join(EXPERIMENTS)}, or config files')
        # config files alone stand against the baseline of experiment 4, without its other arms
        base = EXPERIMENTS[next(iter(folders), '4')]
        self.question, self.baseline = base.question, next(iter(base.arms))
        if not folders:
            self.question = f'Is {" or ".join(path.stem for path in own)} better than {self.baseline}?'
            names, folders = ['own'], ['-'.join(path.stem for path in own)]
        arms = {'own': replace(base, arms={self.baseline: base.arms[self.baseline]}), **EXPERIMENTS}
        self.experiment_of = {arm: arms[name] for name in names for arm in arms[name].arms}
        for path in own:
            arguments = [_short(path.resolve())]
            known = self.experiment_of.get(path.stem)
            if known and known.arms[path.stem] != arguments:
                raise ConfigError(f'{path}: there is another arm {path.stem!r} already; rename the file')
            self.experiment_of[path.stem] = known or replace(base, arms={path.stem: arguments})
        kept = unpacked(Path(k.go_on)).name
        first = 'search' if self.search else next(iter(folders))
        self.name = k.name or kept or f'{first}-{k.scale}'
        check_name('the name of the study', self.name)
        self.tree = self.name if k.equal == 'steps' else f'{self.name}-{k.equal}'
        self.out = Path(k.out).resolve()
        self.seeds = range(k.seeds or self.scale.seeds)
        self.arms = k.arms.split(',') if k.arms else list(self.experiment_of)
        for arm in self.arms:
            if arm not in self.experiment_of:
                raise ConfigError(f'no arm {arm!r}: there are {", ".join(self.experiment_of)}')
            if self.arms.count(arm) > 1:
                raise ConfigError(f'--arms names {arm} {self.arms.count(arm)} times: name each arm once')
        if self.search:
            self.arms = list(dict.fromkeys([self.baseline, *self.arms]))
            if k.equal != 'steps' or len(self.arms) < 3:
                raise ConfigError('a search is for two arms or more beside the baseline, at equal steps')
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
        if self.k.wandb_log:
            group = f'{tree}/{name or arm}'
            run = f'{group}/seed{seed}'
            arguments += ['--wandb_log=true', f'--wandb_group={group}', f'--wandb_run_name={run}']
        return Job(name or arm, tuple(arguments), self.out / place)

    def steps(self, arm: str) -> int:
        return self.job('', arm, 0, 1e-3).knobs.max_iters

    def sweep(self, arm: str, rate: float) -> list[Job]:
        """The short runs of one learning rate."""
        share, seeds = self.scale.sweep, self.k.sweep_seeds
        if self.search:
            share, seeds = SEARCH[0].steps, SEARCH[0].seeds
        steps = self.k.sweep_iters or max(1, round(self.steps(arm) * share))
        seeds = range(SWEEP_SEED, SWEEP_SEED + seeds)
        return [self.job(f'{self.name}-lr', arm, s, rate, steps, f'{arm}-lr{rate:g}') for s in seeds]

    def rates(self, arm: str) -> dict[float, float | None]:
        """{rate: mean loss of its sweep, inf if one failed, None while they run}, lowest rate first.

        While the best rate is the lowest or the highest there is, the one beyond it is asked for too, up to
        eight times lower or higher than the first ones.
        """
        rates = sorted(self.scale.rates)
        least, most = rates[0] / 8, rates[-1] * 8
        while True:
            losses = {rate: mean_loss(self.sweep(arm, rate)) for rate in rates}
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
        if self.k.learning_rate is not None:
            return self.k.learning_rate
        losses = self.rates(arm)
        return None if None in losses.values() else lowest(losses, self.k.pick)

    def swept(self, arm: str) -> list[Job]:
        """The jobs of an arm's sweep, as far as it is known by now."""
        if self.k.learning_rate is not None:
            return []
        return [job for rate in self.rates(arm) for job in self.sweep(arm, rate)]

    def rounds(self) -> list[dict[str, float | None]]:
        """{arm: its loss, None while it runs} of every round of the search that has begun, by now."""
        found = []
        for number, rung in enumerate(SEARCH):
            arms = self.arms
            if found:
                tried = sorted((a for a in found[-1] if a != self.baseline), key=found[-1].__getitem__)
                arms = [self.baseline, *tried[: math.ceil(len(tried) * rung.arms)]]
            losses = {arm: mean_loss(self.round_jobs(number, arm)) for arm in arms}
            if number == 0 and self.k.learning_rate is None:  # of the best rate
                swept = {arm: list(self.rates(arm).values()) for arm in arms}
                losses = {arm: None if None in values else min(values) for arm, values in swept.items()}
            found.append(losses)
            if None in losses.values():
                break
        return found

    def round_jobs(self, number: int, arm: str) -> list[Job]:
        """The runs of an arm in a round of the search."""
        if number == 0 and self.k.learning_rate is None:
            return self.swept(arm)
        rung, tree = SEARCH[number], f'{self.name}-rung{number + 1}'
        steps, seeds = max(1, round(self.steps(arm) * rung.steps)), range(SWEEP_SEED, SWEEP_SEED + rung.seeds)
        return [self.job(tree, arm, seed, self.rate(arm), steps) for seed in seeds]

    def preliminary(self) -> list[Job]:
        """The jobs before those that are compared, as far as they are known by now: sweeps, or a search."""
        if self.search:
            rounds = enumerate(self.rounds())
            return [job for number, arms in rounds for arm in arms for job in self.round_jobs(number, arm)]
        return [job for arm in self.arms for job in self.swept(arm)]

    def compared(self) -> list[str]:
        """The arms that are compared; of a search the baseline and what wins, none while it is not known."""
        if not self.search:
            return self.arms
        rounds = self.rounds()
        if len(rounds) < len(SEARCH) or None in rounds[-1].values():
            return []
        tried = (arm for arm in rounds[-1] if arm != self.baseline)
        return [self.baseline, min(tried, key=rounds[-1].__getitem__)]

    def headline(self) -> list[Job]:
        """The runs that are compared, of the arms whose learning rate is known.

        Seed by seed, so that an early end leaves whole pairs; each seed begins with another arm, so that none
        always has the same neighbour on the machine.
        """
        arms, jobs = self.compared(), []
        rates = {arm: self.rate(arm) for arm in arms}
        steps = dict.fromkeys(arms) if self.k.equal == 'steps' else self.equal_steps()
        for seed in self.seeds:
            turn = seed % max(1, len(arms))
            for arm in arms[turn:] + arms[:turn]:
                if rates[arm] is not None and arm in steps:
                    jobs.append(self.job(self.tree, arm, seed, rates[arm], steps[arm]))
        return jobs

    def equal_steps(self) -> dict[str, int]:
        """Steps that cost an arm what the baseline's cost it, by FLOPs or speeds of the runs of equal steps.

        The baseline is left out: its runs are there already.
        """
        try:
            runs = find_runs([str(self.out / self.name)])
        except RecordError:
            runs = []
        arms = {name: Arm(name, [r for r in runs if r.arm == name]) for name in {r.arm for r in runs}}
        missing = [
            a for a in dict.fromkeys([self.baseline, *self.arms]) if a not in arms or not arms[a].speed
        ]
        if missing:
            raise ConfigError(
                f'--equal={self.k.equal} goes by the speeds of finished runs of equal steps; there are '
                f'none of {", ".join(missing)}: run those first'
            )

        def per_step(arm):
            """Steps of the baseline that one step of the arm costs."""
            own, base = (arms[name] for name in (arm, self.baseline))
            tokens = own.one.run['tokens_per_step'] / base.one.run['tokens_per_step']
            if self.k.equal == 'flops':
                flops = [a.one.run['model']['flops_per_token'] for a in (own, base)]
                return tokens * flops[0] / flops[1]
            own, base = own.by_seed('tokens_per_s'), base.by_seed('tokens_per_s')
            return tokens * statistics.geometric_mean([base[s] / own[s] for s in own.keys() & base.keys()])

        given = arms[self.baseline].one.config['max_iters']
        return {arm: round(given / per_step(arm)) for arm in self.arms if arm != self.baseline}

    def compare_command(self) -> str:
        folder = _short(self.out)
        if self.k.equal == 'steps':
            return f'python compare.py {folder}/{self.tree} --baseline={self.baseline}'
        both = f'{folder}/{self.name}/{self.baseline} {folder}/{self.tree}'
        return f'python compare.py {both} --name={self.tree}'


def mean_loss(jobs: list[Job]) -> float | None:
    """Of the jobs' last evaluations; inf if one of them diverged, None while one is not done."""
    runs = [job.done() for job in jobs]
    if None in runs:
        return None
    return statistics.fmean(run.val_loss if run.finished else math.inf for run in runs)


def refuse_other_settings(plan: Plan, fingerprint: str | None = None):
    """A finished run with other settings, or of other data, is no part of this experiment, nor taken for one:
    not in the sweep, whose losses choose the rates, nor among the headline runs, before a sweep is run for
    nothing. fingerprint: of the data; None if it is not known.
    """
    jobs, later = plan.headline(), []
    if plan.k.equal == 'steps':  # of the arms whose rate is not known yet
        arms = set(plan.compared()) - {job.arm for job in jobs}
        later = [plan.job(plan.tree, arm, seed, 1e-3) for arm in arms for seed in plan.seeds]
    for job in [*plan.preliminary(), *jobs, *later]:
        run = job.done()
        if not run:
            continue
        then = training.saved_knobs(run.config, str(job.out / RUN))
        told = [
            f'{name}={was!r} (now {now!r})'
            for name, now, was in unlike(asdict(job.knobs), asdict(then))
            if not (job in later and name == 'learning_rate')
        ]
        if told:
            raise ConfigError(
                f'{job.out} holds a run with other settings: {", ".join(told)}. Give them as they were, '
                'or another --name, or delete that folder'
            )
        if fingerprint and run.fingerprint and run.fingerprint != fingerprint:
            raise ConfigError(
                f'{job.out} holds a run on other data: its tokens have the fingerprint '
                f'{run.fingerprint[:12]}, those of {plan.dataset} have {fingerprint[:12]}. Give the data of '
                'that run, or another --name, or delete that folder'
            )


def check_data(plan: Plan) -> str:
    """The fingerprint of the data; DataError before the first run, rather than one from each."""
    from data.tokendata import open_data

    folder = data_folder(plan.dataset)
    prepare_own(folder)
    block_size = max(plan.job('', arm, 0, 1e-3).knobs.block_size for arm in plan.arms)
    vocab_size = plan.job('', plan.arms[0], 0, 1e-3).knobs.vocab_size
    return open_data(folder, block_size, vocab_size or None).fingerprint


def same_models(plan: Plan) -> list[str]:
    """A line for every arm that is the same model as another one and trained alike."""
    import torch

    from runs.models import build

    known, told = {}, []
    for arm in plan.arms:
        k = plan.job('', arm, 0, 1e-3).knobs
        with torch.device('meta'):  # built without memory
            model = build(k, training.model_config(k, vocab_size=64, vocab_used=64))
        knobs = {name: v for name, v in what_is_learned(asdict(k)).items() if name != 'attention'}
        first = known.setdefault((model.describe(), model.num_params(), str(knobs)), arm)
        told += [] if first == arm else [f'{arm} and {first} are the same model, trained alike']
    return told


def status(plan: Plan) -> str:
    """How many runs are in which state; a line per arm, with the loss of each seed or how far it is; and what
    the runs that failed said last."""
    tasks = slurm.queued(plan.out / plan.name)
    busy = bool(lock_holder(plan.out / plan.name)) and not tasks
    headline, arms = plan.headline(), plan.compared()
    states = {job: job.state(busy, tasks.get(job.out)) for job in [*plan.preliminary(), *headline]}
    groups = {'sweep': (plan.preliminary(), len(plan.preliminary()))}
    if plan.search:
        groups = {}
        for number, losses in enumerate(plan.rounds()):
            jobs = [job for arm in losses for job in plan.round_jobs(number, arm)]
            groups[f'round {number + 1} of {len(SEARCH)}, {len(losses)} arms'] = jobs, len(jobs)
    groups['compared runs'] = headline, len(arms) * len(plan.seeds)
    lines = [f'{plan.tree} on {plan.dataset}, in {_short(plan.out / plan.tree)}']
    for what, (jobs, of) in groups.items():
        found = [states[job] for job in jobs]
        told = [f'{found.count(s)} {s}' for s in ('running', 'queued', 'failed', 'stopped') if s in found]
        waiting = of - sum(state != 'waiting' for state in found)
        told += [f'{waiting} waiting'] if waiting else []
        if of:
            lines.append(f'{what}: ' + ', '.join([f'{found.count("done")} of {of} done', *told]))
    lines += ranking(plan)
    width = max(map(len, arms), default=0)
    if arms:
        lines += ['', f'{"":<{width}}  {"rate":<8}' + ''.join(f'{f"seed {s}":>10}' for s in plan.seeds)]
    places = {(job.arm, job.out.name): job for job in headline}
    for arm in arms:
        rate = plan.rate(arm)
        line = f'{arm:<{width}}  {rate if rate is not None else "sweep":<8}'
        for seed in plan.seeds:
            job = places.get((arm, f'seed{seed}'))
            run = job.done() if job else None
            if run:
                cell = f'{run.val_loss:.4f}' if run.finished else 'diverged'
            elif not job or states[job] == 'waiting':
                cell = '·'
            else:
                share = f'{job.step() / max(1, job.knobs.max_iters):.0%}'
                cell = {'running': f'at {share}', 'failed': 'failed'}.get(states[job], f'({share})')
            line += f'{cell:>10}'
        lines.append(line)
    if arms:
        there = 'stopped or queued there' if tasks else 'stopped there'
        lines.append(f'a number is a validation loss; at 40%: running; (40%): {there}; ·: waiting')
    reasons = [tasks[job.out].reason for job, state in states.items() if state == 'queued']
    if reasons:
        told = [f'{reasons.count(reason)} {reason}' for reason in dict.fromkeys(reasons)]
        lines.append(f'why tasks are queued, as Slurm says it: {", ".join(told)}')
    lines += [
        f'{job} failed: {job.last_words()} ({_short(job.out / LOG)})'
        for job, state in states.items()
        if state == 'failed'
    ]
    return '\n'.join(lines)


def ranking(plan: Plan) -> list[str]:
    """Of a search, a line per round that is over: its arms and their losses, the best one first."""
    if not plan.search:
        return []
    lines = []
    for number, losses in enumerate(plan.rounds(), 1):
        if None not in losses.values():
            order = sorted(losses, key=losses.__getitem__)
            lines.append(f'round {number}: ' + ', '.join(f'{arm} {losses[arm]:.4f}' for arm in order))
    return lines


def write_readme(plan: Plan, command: str):
    """In the folder of the results: the commands that made it, what each arm is, how its rate was chosen."""
    path = plan.out / plan.tree / README
    before = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    commands = [line for line in before if line.startswith('python experiments.py')]
    rows = {line.split(' | ')[0]: line for line in before if line.startswith('| `')}
    for arm in plan.arms:
        varied = ('--learning_rate', '--seed', '--wandb')
        knobs = [a for a in plan.job(plan.tree, arm, 0, 1e-3).arguments if not a.startswith(varied)]
        losses = {} if plan.k.learning_rate is not None else plan.rates(arm)
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
    lines += [f'- {line}' for line in ranking(plan)]
    make_folder(path.parent)
    write_text(path, '\n'.join(lines))


def run_all(plan: Plan, runner: Runner, fingerprint: str | None):
    """Sweeps or a search, in rounds as long as results ask for more; then the runs that are compared."""
    tried = set()
    while not runner.stopped:
        jobs = [job for job in plan.preliminary() if job not in tried and not job.done()]
        if not jobs:
            break
        tried.update(jobs)
        runner.run(jobs, later=len(plan.seeds) * sum(map(plan.steps, plan.compared())))
    if not runner.stopped:
        refuse_other_settings(plan, fingerprint)
        runner.run(plan.headline())


def main(argv: list[str]) -> int:
    argv = ['--wandb_log' if arg == '--wandb' else arg for arg in argv]  # as it was called before
    own, extra = divide(Knobs, training.Knobs, argv)
    told = '\n'.join(f'  {name}: {e.question}' for name, e in EXPERIMENTS.items())
    k, _, words = configure(Knobs, own, f'{__doc__}\nExperiments:\n{told}', words='EXPERIMENT …')
    for knob in ('seed', 'out_dir', 'init_from'):
        if any(a.startswith(f'--{knob}=') for a in extra):
            raise ConfigError(f'--{knob} is chosen run by run here: leave it out')
    default = asdict(Knobs(scale='paper')) | {'scale': ''}
    knobs = [f'--{n}={v}' for n, v in asdict(k).items() if v != default[n] and n not in OWN]
    command = f'python experiments.py {shlex.join([*words, *knobs, *extra])}'

    plan = Plan(k, words, extra)
    if k.status:
        if k.go_on:
            unpack(Path(k.go_on), plan.out / plan.name)
        refuse_other_settings(plan)
        print(status(plan))
        return 0
    with FolderLock(plan.out / plan.name, user='experiments.py', instead='--name'):
        if k.go_on:
            unpack(Path(k.go_on), plan.out / plan.name)
        fingerprint = check_data(plan)
        refuse_other_settings(plan, fingerprint)
        for line in same_models(plan):
            say(f'caution: {line}')
        runner = make_runner(k, plan.out / plan.name)
        with stopping(runner):
            run_all(plan, runner, fingerprint)
        write_readme(plan, command)
    say(status(plan))
    if runner.stopped and k.launcher == 'slurm':
        say(
            f'stopped ({runner.stopped}); tasks stay in the queue (scancel --name={plan.name} ends them); '
            'the same command goes on with them'
        )
    elif runner.stopped:
        say(f'stopped ({runner.stopped}); the same command goes on')
    elif runner.ended_badly:
        say(f'not done: {", ".join(map(str, runner.ended_badly))}; the same command tries again')
    else:
        say(f'done; now: {plan.compare_command()}')
    return 130 if runner.stopped.startswith('SIG') else 1 if runner.ended_badly else 0


def make_runner(k: Knobs, study: Path) -> Runner:
    """What brings the jobs of a study to their end: here, or as tasks of a cluster."""
    if k.launcher == 'slurm':
        return SlurmRunner(k.jobs or 0, k.minutes, k.keep_checkpoints, study, k.resources())
    alive = [task for task in slurm.queued(study).values() if task.alive]
    if alive:
        raise ConfigError(
            f'{len(alive)} runs of this study are tasks of Slurm ({alive[0].id}, …): give --launcher=slurm, '
            f'or end them with scancel --name={study.name}'
        )
    return Runner(k.jobs or 1, k.minutes, k.keep_checkpoints)


@contextlib.contextmanager
def stopping(runner: Runner):
    """Signals have the runner save and stop in here, whatever asks for it: a person, a queue, a terminal."""

    def on_signal(number, frame):
        runner.stopped = runner.stopped or signal.Signals(number).name

    before = {}
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGXCPU'):  # Windows has the first two
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == '__main__':
    run_program(main)
