"""experiments.py --launcher=slurm: on a stand-in for Slurm wherever Python runs, and on a cluster of this
machine where Slurm is installed (tests/slurm_cluster.sh)."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import experiments
import tiny
from configurator import ConfigError
from runs import slurm
from runs.files import FileError
from test_experiments import STAND_IN, both_run, calls, losses, states, wait_until

ROOT = Path(__file__).resolve().parent.parent
# sbatch, squeue and scontrol in one: tasks are processes, and a folder has a file for each of them. A task
# that is older than the file `forgotten` is known no more; while there is a file `down`, nothing answers.
FAKE = """#!{python} -S
import os, re, subprocess, sys
from pathlib import Path
home, name, arguments = Path({home!r}), Path(sys.argv[0]).name, sys.argv[1:]
given = dict(a[2:].split('=', 1) for a in arguments if a.startswith('--') and '=' in a)
if (home / 'down').exists():
    (home / 'refused').touch()
    sys.exit('slurm_load_jobs error: Unable to contact slurm controller')
if name == 'sbatch':
    if given.get('partition') == 'none':
        sys.exit('sbatch: error: invalid partition specified: none')
    number = len(list(home.glob('*_0'))) + 1
    for i in range(int(re.match(r'0-(\\d+)', given['array'])[1]) + 1):
        own = {{'SLURM_ARRAY_TASK_ID': str(i), 'SLURM_ARRAY_JOB_ID': str(number), 'SLURM_CPUS_PER_TASK': '1'}}
        task = subprocess.Popen(
            ['bash', arguments[-1]], env=os.environ | own, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (home / f'{{number}}_{{i}}').write_text(f'{{task.pid}} {{given["comment"]}}')
    print(number)
elif name == 'squeue':
    for path in sorted(home.glob('*_*')):
        pid, comment = path.read_text().split(' ', 1)
        try:
            alive = Path(f'/proc/{{pid}}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError:  # it is gone, or goes while it is read
            alive = False
        if alive or not (home / 'forgotten').exists():
            state = 'PENDING|Priority' if (home / 'full').exists() else 'RUNNING|None'
            print(f'{{path.name}}|{{state if alive else "COMPLETED|None"}}|{{comment}}')
elif arguments == ['show', 'config']:
    print('MaxArraySize            = 3')
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """lab(*arguments): experiments.py with the stand-ins for train.py and for Slurm; returns its status."""
    home = tmp_path / 'slurm'
    (tmp_path / 'out').mkdir()
    home.mkdir()
    for name in ('sbatch', 'squeue', 'scontrol'):
        path = home / name
        path.write_text(FAKE.format(python=sys.executable, home=str(home)), encoding='utf-8')
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    (tmp_path / 'stand_in.py').write_text(STAND_IN, encoding='utf-8')
    (tmp_path / 'out/data.txt').write_text('f' * 64, encoding='utf-8')
    monkeypatch.setenv('PATH', f'{home}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setattr(experiments, 'PROGRAM', tmp_path / 'stand_in.py')
    monkeypatch.setattr(experiments, 'check_data', lambda plan: None)
    monkeypatch.setattr(experiments, 'same_models', lambda plan: [])
    monkeypatch.setattr(experiments.SlurmRunner, 'POLL', 0.3)
    monkeypatch.setattr(experiments.SlurmRunner, 'SETTLE', 0.5)

    def run(*arguments):
        common = ['4', '--arms=vanilla', '--scale=cpu', '--learning_rate=1e-3', '--max_iters=12', '--seeds=2']
        return experiments.main([*common, '--launcher=slurm', f'--out={tmp_path / "out"}', *arguments])

    yield run
    (tmp_path / 'out/hold').unlink(missing_ok=True)


@pytest.fixture
def driver(lab, tmp_path):
    """driver(*arguments): the same in a process of its own; its runs wait while there is a file `hold`."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import experiments
experiments.PROGRAM = Path({str(tmp_path / 'stand_in.py')!r})
experiments.check_data, experiments.same_models = lambda plan: None, lambda plan: []
experiments.SlurmRunner.POLL, experiments.SlurmRunner.SETTLE = 0.3, 0.5
experiments.run_program(experiments.main)
"""
    started = []

    def start(*arguments):
        (tmp_path / 'out/hold').touch()
        command = [sys.executable, '-c', code, '4', '--scale=cpu', '--arms=vanilla', '--learning_rate=1e-3']
        command += ['--seeds=2', f'--out={tmp_path / "out"}', '--max_iters=12', '--launcher=slurm']
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
        started.append(subprocess.Popen([*command, *arguments], text=True, encoding='utf-8', **pipes))
        return started[-1]

    yield start
    (tmp_path / 'out/hold').unlink(missing_ok=True)
    for process in started:
        process.terminate()
        process.communicate(timeout=120)


def test_every_arm_and_seed_is_a_task_and_results_land_where_they_always_do(lab, tmp_path, capsys):
    assert lab('--seeds=5') == 0
    assert losses(tmp_path, '4-cpu').keys() == {f'vanilla/{seed}' for seed in range(5)}
    assert sorted(calls(tmp_path)) == [f'4-cpu/vanilla/seed{seed}' for seed in range(5)], 'each ran once'
    told = capsys.readouterr().out
    assert '3 tasks submitted' in told and '2 tasks submitted' in told  # arrays have at most MaxArraySize
    assert 'vanilla seed4: validation loss 4.' in told and 'compared runs: 5 of 5 done' in told
    assert not list((tmp_path / 'out').rglob('*.pt'))
    assert lab('--seeds=5') == 0 and len(calls(tmp_path)) == 5


def test_a_run_that_fails_is_told_with_its_last_line(lab, tmp_path, capsys):
    (tmp_path / 'out/crash').touch()
    assert lab('--seeds=1') == 1
    told = capsys.readouterr().out
    assert 'vanilla seed0: its task ended (completed): error: the disk is full' in told
    assert lab('--seeds=1', '--status') == 0
    told = capsys.readouterr().out
    assert 'compared runs: 0 of 1 done, 1 failed' in told
    assert 'vanilla seed0 failed: error: the disk is full' in told
    (tmp_path / 'out/crash').unlink()
    assert lab('--seeds=1') == 0, 'the same command tries again'


def test_tasks_outlive_their_driver_and_the_next_one_finds_them(driver, lab, tmp_path, capsys):
    first = driver()
    wait_until(both_run(tmp_path))
    with pytest.raises(FileError, match='in use by another experiments'):
        lab()
    (tmp_path / 'slurm/full').touch()  # what has begun may be suspended, or be requeued
    assert lab('--status') == 0
    told = capsys.readouterr().out
    assert '2 queued' in told and 'why tasks are queued, as Slurm says it: 2 Priority' in told
    (tmp_path / 'slurm/full').unlink()
    first.send_signal(signal.SIGTERM)
    out, errors = first.communicate(timeout=120)
    assert first.returncode == 130 and 'tasks stay in the queue (scancel --name=4-cpu' in out, out + errors
    with pytest.raises(ConfigError, match='2 runs of this study are tasks of Slurm'):
        lab('--launcher=local')
    second = driver()
    told = [second.stdout.readline() for _ in range(2)]
    assert [line.split(' as ')[0] for line in told] == [
        f'vanilla seed{seed}: is in the queue' for seed in (0, 1)
    ]
    (tmp_path / 'out/hold').unlink()
    out, errors = second.communicate(timeout=120)
    assert second.returncode == 0, out + errors
    assert len(calls(tmp_path)) == 2 and set(states(tmp_path).values()) == {'finished'}


def test_tasks_that_are_killed_go_on_and_a_silent_controller_is_waited_for(driver, tmp_path):
    """Gone from the queue after some steps: submitted again. While Slurm does not answer, nothing is."""
    process = driver()
    wait_until(both_run(tmp_path))
    wait_until((tmp_path / 'slurm/1_1').exists)
    time.sleep(0.5)
    (tmp_path / 'slurm/down').touch()
    (tmp_path / 'slurm/forgotten').touch()
    for path in tmp_path.glob('slurm/1_*'):
        os.killpg(int(path.read_text().split()[0]), signal.SIGKILL)
    wait_until((tmp_path / 'slurm/refused').exists)  # asked while it does not answer
    time.sleep(4)
    assert len(list(tmp_path.glob('out/4-cpu/slurm/*.sh'))) == 1
    (tmp_path / 'out/hold').unlink()
    (tmp_path / 'slurm/down').unlink()
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and 'Unable to contact slurm controller; asking again' in out, out + errors
    assert 'vanilla seed0: its task is gone from the queue at 1 of 12: it goes on' in out
    assert sorted(calls(tmp_path)) == [f'4-cpu/vanilla/seed{seed}' for seed in (0, 0, 1, 1)]


def test_what_slurm_refuses_is_one_line(lab, tmp_path):
    with pytest.raises(slurm.SlurmError, match=r'sbatch failed: .*invalid partition specified: none'):
        lab('--partition=none')
    for name in ('sbatch', 'scontrol', 'squeue'):
        (tmp_path / 'slurm' / name).unlink()
    if not shutil.which('scontrol'):
        with pytest.raises(slurm.SlurmError, match='is not here: start this where Slurm is installed'):
            lab()
    with pytest.raises(ConfigError, match='--partition is for tasks of a cluster: give --launcher=slurm'):
        lab('--launcher=local', '--partition=gpu')


def test_options_of_sbatch():
    wanted = slurm.Resources('gpu', 'lab', '8:00:00', 2, 4, '64G', 300, '--qos=long "--exclude=a b"')
    assert wanted.options() == [
        *('--partition=gpu', '--account=lab', '--time=8:00:00', '--gpus-per-node=2', '--cpus-per-task=4'),
        *('--mem=64G', '--signal=B:USR1@300', '--qos=long', '--exclude=a b'),
    ]
    assert slurm.Resources(warning=0).options() == []
    command = slurm.train_command(ROOT / 'train.py', gpus=2)
    assert command[1:5] == ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


# -----------------------------------------------------------------------------
# A cluster of this machine


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    """Slurm with one node of two processors; the environment of programs that use it."""
    missing = [name for name in ('sbatch', 'slurmctld', 'slurmd', 'munged') if not shutil.which(name)]
    if missing:
        pytest.skip(f'needs {missing[0]}: apt-get install slurm-wlm munge')
    if os.getuid():
        pytest.skip('needs root, to start the daemons of Slurm')
    folder, script = tmp_path_factory.mktemp('cluster'), ROOT / 'tests/slurm_cluster.sh'
    started = subprocess.run(
        ['bash', script, 'start', folder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    yield os.environ | {'SLURM_CONF': str(folder / 'slurm.conf')}
    subprocess.run(['bash', script, 'stop', folder], check=True)


# train.py as it is, but the first time that a run comes to step 6 it waits: for a signal, or, the arm `mine`,
# for ever, as a step that takes too long would.
WAITING = """
import signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import tiny, train
from runs.ranks import run_rank
out = Path(next(a for a in sys.argv if a.startswith('--out_dir=')).partition('=')[2])

def wait():
    if not (out / 'waited').exists():
        (out / 'waited').touch()
        signal.pause()
        while 'mine' in out.parts:
            signal.pause()

tiny.at_step_after_saves(6, wait)
run_rank(train.main, sys.argv[1:])
"""


def test_tasks_that_come_to_their_limit_end_bit_identical(cluster, tmp_path):
    """Two side by side. One is warned, saves and goes back into the queue by itself; the other one is killed,
    and the driver submits it again."""
    program, mine = tmp_path / 'waiting.py', tmp_path / 'mine.py'
    program.write_text(WAITING.format(root=str(ROOT), tests=str(ROOT / 'tests')), encoding='utf-8')
    mine.write_text("attention = 'reflex(2-2)'\n", encoding='utf-8')
    data, out = tiny.write_tokens(tmp_path / 'data'), tmp_path / 'out'
    knobs = {name: value for name, value in tiny.TINY.items() if name not in ('attention', 'learning_rate')}
    extra = [f'--{name}={value}' for name, value in {**knobs, 'dataset': data}.items()]
    command = [str(mine), '--scale=minutes', '--learning_rate=1e-2', '--seeds=1', f'--out={out}', *extra]
    command += ['--keep_checkpoints=true']
    limits = ['--launcher=slurm', '--time_limit=2', '--warning=30', '--cpus=1', '--name=queue']
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import experiments
experiments.PROGRAM = Path({str(program)!r})
experiments.SlurmRunner.POLL, experiments.SlurmRunner.SETTLE = 0.5, 2
experiments.run_program(experiments.main)
"""
    log = tmp_path / 'driver.log'
    with log.open('w') as file:
        process = subprocess.Popen(
            [sys.executable, '-c', code, *command, *limits], env=cluster, stdout=file, stderr=file
        )
    side_by_side, until = 0, time.monotonic() + 500
    try:
        while process.poll() is None:
            assert time.monotonic() < until, log.read_text(encoding='utf-8')
            tasks = ask(cluster, 'squeue', '-h', '-r', '-o', '%i|%T|%r').splitlines()
            side_by_side = max(side_by_side, sum('|RUNNING|' in line for line in tasks))
            for line in tasks:
                if line.endswith('|BeginTime'):  # Slurm lets a requeued task wait for two minutes
                    ask(cluster, 'scontrol', 'update', f'JobId={line.split("|")[0]}', 'StartTime=now')
            time.sleep(1)
    finally:
        process.kill()
    told = log.read_text(encoding='utf-8')
    assert process.returncode == 0, told
    assert side_by_side == 2
    assert 'mine seed0: its task ended (timeout) at 6 of 12: it goes on' in told, told
    warned, killed = (
        (out / 'queue' / arm / 'seed0/log.txt').read_text(encoding='utf-8') for arm in ('vanilla', 'mine')
    )
    assert 'the limit on time is near, back to the queue' in warned
    assert 'stopped by SIGTERM at iteration 7' in warned and 'from iteration 7' in warned
    assert 'from iteration 5' in killed  # of its last save
    assert experiments.main([*command, '--name=straight', '--jobs=2']) == 0
    for arm in ('vanilla', 'mine'):
        tiny.assert_same_run(out / 'straight' / arm / 'seed0', out / 'queue' / arm / 'seed0')


def ask(environment, *command) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
