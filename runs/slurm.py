"""Runs as tasks of Slurm: an array of them is submitted with sbatch, and squeue tells what became of each.

Slurm is asked, and nothing else remembers: the comment of every task is the path of the batch script that it
runs, and the script says in which folder each task works. A program that was killed just after it submitted
tasks finds them again.
"""

from __future__ import annotations

import getpass
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from runs.files import make_folder, write_text

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = 'slurm'  # in the folder of a study: its batch scripts, and what Slurm says of its tasks
# The states of a task that will not run (again); in any other, it may still write into its folder
ENDED = (
    *('BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY'),
    *('PREEMPTED', 'REVOKED', 'TIMEOUT'),
)
# Every index of the array works in a folder of its own. Slurm sends USR1 some time before the limit on time;
# the run gets a TERM, which torchrun passes on too, and saves; then the task goes back into the queue. What
# ends without being asked says how, as the local launcher does. A run that the TERM kills (143) had not yet
# begun: back in the queue it never would.
SCRIPT = """#!/bin/bash
case "$SLURM_ARRAY_TASK_ID" in
{cases}
esac
cd {root}
mkdir -p "$folder"
exec >>"$folder"/{log} 2>&1
echo {mark}start
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}" MKL_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
asked='' child=''
ask() {{ asked="$1"; if [ -n "$child" ]; then kill -TERM "$child"; fi; }}
trap 'ask limit' USR1
trap 'ask end' TERM
"${{command[@]}}" &
child=$!
if [ -n "$asked" ]; then kill -TERM "$child"; fi
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a trap ends a wait early
if [ "$asked" = limit ] && [ "$code" = 143 ]; then
    echo {mark}ended with 143: the limit on time was near before the run had begun
elif [ "$asked" = limit ]; then
    echo {mark}the limit on time is near, back to the queue
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
elif [ "${{code:=0}}" != 0 ] && [ -z "$asked" ]; then
    echo {mark}ended with "$code"
fi
exit "${{code:-0}}"
"""


class SlurmError(UserError):
    """One line: what Slurm did not do, and what it said."""


class Run(NamedTuple):
    """What one task is to do: a command, in a folder that is made for it, which gets the output."""

    folder: Path
    command: list[str]


class Task(NamedTuple):
    """A task of Slurm: its id ('12_3'), its state ('RUNNING', …), and why it waits, as Slurm says it."""

    id: str
    state: str
    reason: str

    @property
    def alive(self) -> bool:
        return self.state not in ENDED

    @property
    def waits(self) -> bool:
        return self.state not in ('RUNNING', 'COMPLETING') and self.alive


@dataclass(frozen=True)
class Resources:
    """What every task asks for; '' and 0 leave it to the cluster."""

    partition: str = ''
    account: str = ''
    time_limit: str = ''  # as sbatch --time takes it
    gpus: int = 0
    cpus: int = 0
    memory: str = ''  # as sbatch --mem takes it
    warning: int = 120  # seconds before the limit on time at which a run is asked to save
    more: str = ''  # further options of sbatch

    def options(self) -> list[str]:
        """Those of sbatch."""
        given = {
            'partition': self.partition,
            'account': self.account,
            'time': self.time_limit,
            'gpus-per-node': self.gpus,
            'cpus-per-task': self.cpus,
            'mem': self.memory,
        }
        named = [f'--{name}={value}' for name, value in given.items() if value]
        if self.warning:
            named.append(f'--signal=B:USR1@{self.warning}')
        return [*named, *shlex.split(self.more)]


def train_command(program: Path, gpus: int) -> list[str]:
    """How a program is started in a task: with several GPUs a rank on each of them."""
    if gpus <= 1:
        return [sys.executable, str(program)]
    ranks = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={gpus}']
    return [sys.executable, *ranks, str(program)]


def submit(runs: list[Run], folder: Path, name: str, log: str, mark: str, at_once: int, wanted: Resources):
    """Submit an array with a task for each run; at most `most_tasks()` of them.

    folder: of a study, which keeps the script; name: of the array, as squeue shows it; log: the file of a
    run's folder that gets the output; mark: how the lines begin that the script adds to it; at_once: how many
    may run side by side, 0: as many as there is room for. SlurmError where Slurm refuses it.
    """
    scripts = folder / SCRIPTS
    make_folder(scripts)
    numbers = [int(path.stem) for path in scripts.glob('*.sh') if path.stem.isdigit()]
    path = scripts / f'{max(numbers, default=0) + 1:03d}.sh'
    cases = [
        f'{i}) folder={shlex.quote(str(run.folder))} command=({shlex.join(run.command)}) ;;'
        for i, run in enumerate(runs)
    ]
    quoted = {'root': shlex.quote(str(ROOT)), 'log': shlex.quote(log), 'mark': shlex.quote(mark)}
    write_text(path, SCRIPT.format(cases='\n'.join(cases), **quoted))
    array = f'--array=0-{len(runs) - 1}' + (f'%{at_once}' if at_once else '')
    kept = ['--requeue', '--open-mode=append', f'--output={scripts}/%A.out', f'--comment={path}']
    one = ['--nodes=1', '--ntasks=1', f'--job-name={name}']
    _ask('sbatch', '--parsable', array, *one, *kept, *wanted.options(), str(path))


def queued(folder: Path) -> dict[Path, Task]:
    """{the folder of a run: its task}, of the tasks of a study that Slurm knows of; those that have ended are
    among them for some minutes. A run that was submitted several times has its live task, or its last.

    folder: of the study. Empty where nothing was ever submitted. SlurmError where Slurm does not answer.
    """
    scripts = folder / SCRIPTS
    if not scripts.is_dir():
        return {}
    told = _ask(
        'squeue', '--noheader', '--array', '--states=all', f'--user={getpass.getuser()}', '-o', FORMAT
    )
    found, folders = {}, {}
    for line in told.splitlines():
        number, state, reason, comment = line.split('|', 3)
        path = Path(comment)
        index = re.fullmatch(r'(\d+)_(\d+)', number)
        if path.parent != scripts or not index:
            continue
        if path not in folders:
            folders[path] = _folders(path)
        run, task = folders[path].get(int(index[2])), Task(number, state, reason)
        if run is None:
            continue
        known = found.get(run)
        newer = known and int(index[1]) > int(known.id.split('_')[0])
        if task.alive or known is None or (newer and not known.alive):
            found[run] = task
    return found


FORMAT = '%i|%T|%r|%k'  # of squeue: number, state, reason, comment


def _folders(script: Path) -> dict[int, Path]:
    """{index in the array: the folder of the run}, as a batch script says."""
    try:
        lines = script.read_text(encoding='utf-8').splitlines()
    except OSError:
        return {}
    cases = [re.fullmatch(r'(\d+)\) folder=(.*) command=\((.*)\) ;;', line) for line in lines]
    return {int(case[1]): Path(shlex.split(case[2])[0]) for case in cases if case}


def most_tasks() -> int:
    """How many tasks an array of this cluster may have."""
    found = re.search(r'^MaxArraySize\s*=\s*(\d+)', _ask('scontrol', 'show', 'config'), re.MULTILINE)
    return int(found[1]) if found else 1001


def _ask(*command: str) -> str:
    """What a command of Slurm prints. Raises SlurmError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError:
        raise SlurmError(
            f'{command[0]} is not here: start this where Slurm is installed, or without --launcher=slurm'
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f'{command[0]} gives no answer within 120 s: is the cluster up?') from None
    if done.returncode:
        said = ' '.join((done.stderr or done.stdout).split()) or f'status {done.returncode}'
        raise SlurmError(f'{command[0]} failed: {said}')
    return done.stdout
