"""experiments.py: its arms are real, its protocol is kept, nothing runs twice. A stand-in trains."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
import experiments
from configurator import ConfigError, configure
from runs import metrics
from runs.files import FileError, lock_holder
from runs.knobs import model_config
from runs.models import MODELS
from runs.records import RecordError, find_runs, pack, unlike, what_is_learned

RATES = '--rates=1e-3,2e-3,4e-3'  # the stand-in is best at one of them, or at the one beyond
# Takes train.py's place: the same arguments and files, a loss that is a formula, no torch.
STAND_IN = """
import ast, fcntl, json, math, os, platform, signal, sys, time
from pathlib import Path
config = {'muon_qkv': 'apart'}
for argument in sys.argv[1:]:
    if argument.endswith('.py'):
        exec(Path(argument).read_text(encoding='utf-8'), {}, config)
for argument in sys.argv[1:]:
    if argument.startswith('--'):
        name, _, text = argument[2:].partition('=')
        try:
            config[name] = ast.literal_eval(text.title() if text in ('true', 'false') else text)
        except (ValueError, SyntaxError):
            config[name] = text
out = Path(config['out_dir'])
while (out.parents[2] / 'early').exists():  # as long as torch is imported
    time.sleep(0.02)
lock = open(out / '.lock', 'a+')
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
lock.truncate(0)
lock.write(f'process {os.getpid()} on {platform.node()}')
lock.flush()
with open(out.parents[2] / 'calls.txt', 'a', encoding='utf-8') as f:
    f.write('/'.join(out.parts[-3:]) + chr(10))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
metrics, last = out / 'metrics.jsonl', out / 'last.pt'
start = int(last.read_text()) if last.exists() else 0
kind = config['attention']
best = 8e-3 if kind == 'reflex_all' else 2e-3
rate, n, run = config['learning_rate'], config['max_iters'], dict(status='running', error=None)
diverged = config['seed'] == 7
model = {'params': 10, 'flops_per_token': 50 if kind == 'cla' else 100, 'cache_bytes_per_token': 1}
data = {'fingerprint': (out.parents[2] / 'data.txt').read_text(encoding='utf-8')}
run |= {'config': config, 'model': model, 'data': data, 'tokens_per_step': 10}
for it in range(start, n + 1):
    while it > 1 and (out.parents[2] / 'hold').exists() and not asked:
        time.sleep(0.02)
    if asked:
        run['status'] = 'stopped'
        break
    if diverged and it == n // 2:
        run.update(status='failed', error='TrainingError: iteration 5: loss nan; first not finite: x')
        break
    if it == 1:
        (out / 'run.json').write_text(json.dumps(run), encoding='utf-8')
    if it == 3 and (out.parents[2] / 'crash').exists():
        sys.exit('error: the disk is full')
    time.sleep(config.get('dist_timeout', 600) / 1e6)
    with open(metrics, 'a', encoding='utf-8') as f:
        speed = 2e3 if kind == 'cla' else 1e3
        f.write(json.dumps({'iter': it, 'loss': 1.0, 'tokens_per_s': speed, 'mfu': None}) + chr(10))
        if it == n:
            loss = 4 + config['seed'] / 100 + abs(math.log(rate / best)) / 10
            loss += {'cla': -0.3, 'lime': -0.2, 'reflex(5-2-1)': 0.1}.get(kind, 0)
            if kind == 'lime' and n > 6:
                loss -= 0.4  # which a search sees in its last round only
            f.write(json.dumps({'iter': it, 'train/loss': loss, 'val/loss': loss}) + chr(10))
            run['status'] = 'finished'
    last.write_text(str(it + 1))
(out / 'run.json').write_text(json.dumps(run), encoding='utf-8')
sys.exit(3 if run['status'] == 'failed' else 0)
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """lab(*arguments): experiments.py on a folder of its own, with the stand-in; returns its exit code."""
    program = tmp_path / 'stand_in.py'
    program.write_text(STAND_IN, encoding='utf-8')
    monkeypatch.setattr(experiments, 'PROGRAM', program)
    monkeypatch.setattr(experiments, 'check_data', lambda plan: (tmp_path / 'out/data.txt').read_text())
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/data.txt').write_text('f' * 64, encoding='utf-8')

    def run(*arguments):
        scale = [] if any(a.startswith('--scale') for a in arguments) else ['--scale=cpu', '--max_iters=12']
        return experiments.main([*arguments, *scale, f'--out={tmp_path / "out"}'])

    return run


def calls(tmp_path):
    path = tmp_path / 'out/calls.txt'
    return path.read_text(encoding='utf-8').split() if path.exists() else []


def losses(tmp_path, tree):
    """{arm/seed: final loss} of what is in the results."""
    runs = find_runs([str(tmp_path / 'out' / tree)])
    return {f'{r.arm}/{r.seed}': r.val_loss for r in runs if r.finished}


def plan_of(*argv, extra=()):
    """The plan of a command line, without running anything."""
    k, _, words = configure(experiments.Knobs, list(argv), words='EXPERIMENT …')
    return experiments.Plan(k, words, list(extra))


@pytest.mark.parametrize('scale', experiments.SCALES)
@pytest.mark.parametrize('name', experiments.EXPERIMENTS)
def test_every_arm_is_a_model_and_differs_from_the_others(name, scale, tmp_path):
    plan = plan_of(name, f'--scale={scale}', f'--out={tmp_path}')
    knobs = [plan.job('t', arm, 0, 1e-3).knobs for arm in plan.arms]
    learned = [json.dumps(what_is_learned(asdict(k)), sort_keys=True) for k in knobs]
    assert len(set(learned)) == len(plan.arms)
    for k in knobs:
        with torch.device('meta'):
            MODELS[k.model](model_config(k, 64, 64))
        assert k.eval_iters == 0 or (k.eval_iters, k.batch_size, k.block_size) == tuple(
            getattr(knobs[0], n) for n in ('eval_iters', 'batch_size', 'block_size')
        ), 'one validation set'


def test_the_published_sizes():
    plan = plan_of('4', '--scale=paper')
    k = plan.job('t', 'reflex_422', 3, 1e-3).knobs
    assert (k.n_layer, k.n_head, k.n_embd, k.block_size, k.batch_size) == (6, 8, 768, 1024, 32)
    assert (k.max_iters, k.warmup_iters, k.learning_rate, k.min_lr, k.beta2) == (5000, 400, 1e-3, 1e-5, 0.98)
    assert (k.attention, k.seed, k.bias, k.dropout, k.gradient_accumulation_steps) == (
        'reflex(4-2-2)',
        3,
        False,
        0,
        1,
    )
    plan = plan_of('2', '--scale=paper')
    sizes = {arm: plan.job('t', arm, 0, 1e-3).knobs for arm in plan.arms}
    assert {a: (k.n_embd, k.block_size, k.bias) for a, k in sizes.items()} == {
        'short': (512, 256, False),
        'long': (512, 1024, False),
        'long_bias': (512, 1024, True),
    }


def test_the_published_size_of_leap():
    for scale, steps, dropout, warmup in (('paper', 15000, 0.1, 0), ('cpu', 150, 0, 15)):
        plan = plan_of('leap', f'--scale={scale}', '--learning_rate=5e-4')
        assert plan.baseline == 'vanilla' and 'leap' in plan.arms and 'leap_global' in plan.arms
        k = plan.job('t', 'leap', 0, plan.rate('leap')).knobs
        assert (k.n_layer, k.n_head, k.n_embd, k.block_size, k.batch_size) == (6, 4, 128, 2048, 2)
        assert (k.max_iters, k.dropout, k.warmup_iters, k.learning_rate) == (steps, dropout, warmup, 5e-4)
        assert (k.lr_schedule, k.min_lr, k.beta2, k.weight_decay) == ('linear', 0, 0.999, 0.01)


@pytest.mark.parametrize('text', ['1e-3,', 'a', '0,1e-3', '-1', 'nan', 'inf', '1e-3,2e-3,1e-3'])
def test_rates_are_positive_numbers(lab, text):
    with pytest.raises(ConfigError, match=f'--rates={text}: different positive numbers'):
        lab('4', f'--rates={text}')


def test_a_sweep_per_arm_on_its_own_seeds_then_paired_runs(lab, tmp_path, capsys):
    assert lab('4', '--arms=vanilla,reflex_all', '--seeds=2', '--jobs=3', RATES) == 0
    swept = losses(tmp_path, '4-cpu-lr')
    # the best rate of reflex_all is 8e-3, beyond the first three: the edge is pushed out until it is none
    assert set(swept) == {
        *(f'vanilla-lr{r}/{seed}' for r in ('0.001', '0.002', '0.004') for seed in (1000, 1001)),
        *(f'reflex_all-lr0.00{r}/{seed}' for r in (1, 2, 4, 8) for seed in (1000, 1001)),
        *(f'reflex_all-lr0.016/{seed}' for seed in (1000, 1001)),
    }
    runs = {(r.arm, r.seed): r for r in find_runs([str(tmp_path / 'out/4-cpu')])}
    assert set(runs) == {(arm, seed) for arm in ('vanilla', 'reflex_all') for seed in (0, 1)}
    assert runs['vanilla', 0].config['learning_rate'] == 2e-3
    assert runs['reflex_all', 1].config['learning_rate'] == 8e-3
    assert runs['vanilla', 1].config['max_iters'] == 12
    sweep = find_runs([str(tmp_path / 'out/4-cpu-lr')])
    assert {r.config['max_iters'] for r in sweep} == {6} and {r.seed for r in sweep} == {1000, 1001}
    # no checkpoint is left behind
    names = {p.name for p in (tmp_path / 'out/4-cpu').rglob('*') if p.is_file()}
    assert names == {'run.json', 'metrics.jsonl', 'log.txt', '.lock', 'README.md'}
    readme = (tmp_path / 'out/4-cpu/README.md').read_text(encoding='utf-8')
    assert '| `reflex_all` |' in readme and '0.008: 14.0050' in readme
    command = (
        'python experiments.py 4 --scale=cpu --seeds=2 --jobs=3 --arms=vanilla,reflex_all '
        f'{RATES} --max_iters=12'
    )
    assert f'\n{command}\n' in readme
    told = capsys.readouterr().out
    assert 'vanilla seed1: validation loss 4.0100' in told and f'compare.py {tmp_path}/out/4-cpu' in told
    # the same command again: nothing is run
    before = len(calls(tmp_path))
    assert lab('4', '--arms=vanilla,reflex_all', '--seeds=2', '--jobs=3', RATES) == 0
    assert len(calls(tmp_path)) == before == len(set(calls(tmp_path)))
    # more seeds and more arms add to it
    assert lab('4', 'peers', '--arms=vanilla,cla', '--seeds=3', '--jobs=3', RATES) == 0
    assert len(calls(tmp_path)) == before + 1 + 6 + 3
    readme = (tmp_path / 'out/4-cpu/README.md').read_text(encoding='utf-8')
    assert (
        readme.count('python experiments.py') == 2 and '| `reflex_all` |' in readme and '| `cla` |' in readme
    )
    # nor is a sweep forgotten where the rate that it chose is given
    row = next(line for line in readme.splitlines() if line.startswith('| `vanilla` |'))
    assert '0.002: 14.0050' in row
    assert lab('4', '--arms=vanilla', '--seeds=4', '--learning_rate=2e-3') == 0
    readme = (tmp_path / 'out/4-cpu/README.md').read_text(encoding='utf-8')
    assert row in readme.splitlines() and readme.count('python experiments.py') == 3


def test_equal_seconds_and_flops_go_by_the_runs_of_equal_steps(lab, tmp_path):
    """cla, as the stand-in has it, is twice as fast and half as costly."""
    common = ('4', 'peers', '--arms=vanilla,cla', '--learning_rate=2e-3', '--seeds=2')
    with pytest.raises(ConfigError, match='none of vanilla, cla'):
        lab(*common, '--equal=seconds')
    assert lab(*common, '--jobs=4') == 0
    for equal in ('seconds', 'flops'):
        assert lab(*common, '--jobs=4', f'--equal={equal}') == 0
        runs = find_runs([str(tmp_path / f'out/4-cpu-{equal}')])
        assert {(r.arm, r.config['max_iters']) for r in runs} == {('cla', 24)}


@pytest.mark.parametrize('equal', ['seconds', 'flops'])
def test_an_arm_with_larger_steps_gets_fewer_of_them(lab, tmp_path, equal):
    common = ('4', 'peers', '--arms=vanilla,cla', '--learning_rate=2e-3', '--seeds=2')
    assert lab(*common, '--jobs=4') == 0
    for path in tmp_path.glob('out/4-cpu/cla/*/run.json'):
        run = json.loads(path.read_text(encoding='utf-8'))
        run['tokens_per_step'] *= 4
        path.write_text(json.dumps(run), encoding='utf-8')
    plan = plan_of(*common, '--scale=cpu', f'--equal={equal}', f'--out={tmp_path / "out"}')
    assert plan.equal_steps() == {'cla': 6}


def test_a_run_that_diverges_is_a_result_and_one_that_crashes_is_not(lab, tmp_path, capsys):
    common = ('4', '--arms=vanilla', '--learning_rate=2e-3', '--seeds=8', '--jobs=4')
    assert lab(*common) == 0
    assert 'vanilla seed7: ended with 3' in capsys.readouterr().out
    (run,) = (r for r in find_runs([str(tmp_path / 'out/4-cpu')]) if r.seed == 7)
    assert run.state == 'failed at step 5 of 12 (TrainingError: iteration 5: loss nan)'
    before = len(calls(tmp_path))
    assert lab(*common) == 0 and len(calls(tmp_path)) == before, 'it would diverge again'
    (tmp_path / 'out/crash').touch()
    common = ('4', '--arms=reflex_422', '--learning_rate=2e-3', '--seeds=1')
    assert lab(*common) == 1
    assert 'reflex_422 seed0: ended with 1: error: the disk is full' in capsys.readouterr().out
    (tmp_path / 'out/crash').unlink()
    assert lab(*common) == 0 and 'reflex_422/0' in losses(tmp_path, '4-cpu')


def test_the_clock_stops_it_and_the_same_command_goes_on(lab, tmp_path, capsys):
    slow = (
        '4',
        '--arms=vanilla',
        '--learning_rate=2e-3',
        '--seeds=1',
        '--dist_timeout=100000',
    )  # 0.1 s a step
    assert lab(*slow, '--minutes=0.01') == 0
    assert 'stopped (time is up); the same command goes on' in capsys.readouterr().out
    (run,) = find_runs([str(tmp_path / 'out/4-cpu')])
    assert run.state.startswith('stopped at step ') and not run.finished, 'shown as what it is'
    assert lab(*slow) == 0 and losses(tmp_path, '4-cpu') == {'vanilla/0': 4.0}
    iters = [json.loads(line)['iter'] for line in (tmp_path / 'out/4-cpu/vanilla/seed0/metrics.jsonl').open()]
    assert iters == [*range(13), 12], 'it went on where it was'


@pytest.fixture
def driver(lab, tmp_path):
    """driver(*arguments): the same in a process of its own; its runs wait while there is a file `hold`."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(experiments.ROOT)!r})
import experiments
experiments.PROGRAM = Path({str(tmp_path / 'stand_in.py')!r})
experiments.check_data = lambda plan: None
experiments.run_program(experiments.main)
"""
    started = []

    def start(*arguments):
        (tmp_path / 'out/hold').touch()
        command = [sys.executable, '-c', code, '4', '--scale=cpu', '--arms=vanilla', '--learning_rate=1e-3']
        command += ['--seeds=2', '--jobs=2', f'--out={tmp_path / "out"}', '--max_iters=12', *arguments]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, encoding='utf-8', **pipes))
        return started[-1]

    yield start
    (tmp_path / 'out/hold').unlink(missing_ok=True)  # else what a killed driver leaves waits for ever
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'it did not happen'
        time.sleep(0.05)


def both_run(tmp_path):
    """A condition: both runs have made a step and hold their folders."""
    folders = [tmp_path / f'out/4-cpu/vanilla/seed{seed}' for seed in (0, 1)]
    return lambda: all((f / 'last.pt').exists() and lock_holder(f) for f in folders)


def states(tmp_path):
    return {r.seed: r.state for r in find_runs([str(tmp_path / 'out/4-cpu')])}


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP', 'SIGUSR1'])
def test_a_signal_stops_it_in_good_order(driver, tmp_path, name):
    process = driver()
    wait_until(both_run(tmp_path))
    if name == 'SIGHUP':
        process.stdout.close()  # the terminal has gone away, too
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 130
    if name != 'SIGHUP':
        assert f'stopped ({name}); the same command goes on' in process.stdout.read()
    assert all(state.startswith('stopped at step') for state in states(tmp_path).values())
    assert not any(lock_holder(tmp_path / f'out/4-cpu/vanilla/seed{seed}') for seed in (0, 1)), 'no orphan'


def test_a_signal_that_is_to_be_ignored_is(driver, tmp_path):
    """As nohup asks for it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = driver()
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(both_run(tmp_path))
    process.send_signal(signal.SIGHUP)
    (tmp_path / 'out/hold').unlink()
    assert process.wait(60) == 0 and set(states(tmp_path).values()) == {'finished'}


def test_runs_whose_driver_was_killed_are_waited_for(driver, tmp_path):
    first = driver()
    wait_until(both_run(tmp_path))
    first.kill()
    first.wait()
    assert both_run(tmp_path)(), 'they go on'
    second = driver()
    told = [second.stdout.readline() for _ in range(2)]
    assert [line.split(' (')[0] for line in told] == [f'vanilla seed{seed}: still runs' for seed in (0, 1)]
    (tmp_path / 'out/hold').unlink()
    out, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert 'vanilla seed0: validation loss 4.' in out
    assert set(states(tmp_path).values()) == {'finished'}
    assert len(calls(tmp_path)) == 2, 'neither was started twice'
    assert not list((tmp_path / 'out').rglob('*.pt'))


def test_runs_that_had_just_begun_when_their_driver_was_killed_are_waited_for(driver, tmp_path):
    """They hold their folders a little later: then a second start of each is one too many, and gives way."""
    early, logs = tmp_path / 'out/early', lambda: list((tmp_path / 'out').rglob('log.txt'))
    early.touch()
    first = driver()
    wait_until(lambda: len(logs()) == 2)
    first.kill()
    first.wait()
    second = driver()
    wait_until(lambda: sum(log.read_text().count('start') for log in logs()) == 4)
    early.unlink()
    wait_until(lambda: sum(log.read_text().count('BlockingIOError: ') for log in logs()) == 2)
    (tmp_path / 'out/hold').unlink()
    out, errors = second.communicate(timeout=60)
    assert second.returncode == 0, out + errors
    assert set(states(tmp_path).values()) == {'finished'} and len(calls(tmp_path)) == 2


def test_runs_whose_driver_was_killed_are_stopped_with_the_next_one(driver, tmp_path):
    first = driver()
    wait_until(both_run(tmp_path))
    first.kill()
    first.wait()
    second = driver()
    assert 'still runs' in second.stdout.readline()
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 130
    assert all(state.startswith('stopped at step') for state in states(tmp_path).values())


def test_a_run_that_ends_undone_while_it_is_waited_for_goes_on(driver, tmp_path):
    first = driver()
    wait_until(both_run(tmp_path))
    first.kill()
    first.wait()
    second = driver()
    assert all('still runs' in second.stdout.readline() for _ in range(2))
    number = int(lock_holder(tmp_path / 'out/4-cpu/vanilla/seed1').split()[1])
    os.kill(number, signal.SIGKILL)
    (tmp_path / 'out/hold').unlink()
    assert second.wait(60) == 0 and set(states(tmp_path).values()) == {'finished'}
    assert sorted(calls(tmp_path)) == [
        '4-cpu/vanilla/seed0',
        '4-cpu/vanilla/seed1',
        '4-cpu/vanilla/seed1',
    ]


def test_a_second_driver_of_a_study_is_refused(driver, lab, tmp_path):
    driver()
    wait_until(both_run(tmp_path))
    other = ('4', '--arms=vanilla', '--learning_rate=1e-3', '--seeds=1', '--scale=cpu')
    with pytest.raises(FileError, match=r'out/4-cpu is in use by another experiments.py \(process \d+ on'):
        lab(*other)
    # not even where it would write elsewhere, but share the sweep
    with pytest.raises(FileError, match='wait for it, stop it, or give another --name'):
        lab('4', '--arms=vanilla', '--scale=cpu')


def test_status_tells_what_waits_runs_stopped_and_failed(driver, lab, tmp_path, capsys):
    common = ('4', '--arms=vanilla', '--learning_rate=2e-3', '--seeds=4')
    assert lab(*common[:-1], '--seeds=1') == 0
    slow = driver('--learning_rate=2e-3')  # seed 1, as seed 0 is done
    wait_until((tmp_path / 'out/4-cpu/vanilla/seed1/last.pt').exists)
    capsys.readouterr()
    assert lab(*common, '--status') == 0
    told = capsys.readouterr().out
    assert 'compared runs: 1 of 4 done, 1 running, 2 waiting' in told
    row = next(line.split() for line in told.splitlines() if line.startswith('vanilla'))
    assert row[:4] == ['vanilla', '0.002', '4.0000', 'at'] and row[-2:] == ['·', '·']
    slow.send_signal(signal.SIGTERM)
    slow.wait(60)
    (tmp_path / 'out/hold').unlink()
    (tmp_path / 'out/crash').touch()
    assert lab(*common[:-1], '--seeds=3') == 1
    assert lab(*common, '--status') == 0
    told = capsys.readouterr().out
    path = 'out/4-cpu/vanilla/seed2/log.txt'
    assert f'vanilla seed2 failed: error: the disk is full ({tmp_path}/{path})' in told
    assert calls(tmp_path).count('4-cpu/vanilla/seed0') == 1


def test_other_settings_are_refused(lab, tmp_path):
    common = ('4', '--arms=vanilla', '--learning_rate=2e-3', '--seeds=1')
    assert lab(*common) == 0
    with pytest.raises(ConfigError, match=r'weight_decay=0.1 \(now 0.2\)'):
        lab(*common, '--weight_decay=0.2')
    with pytest.raises(ConfigError, match=r'weight_decay=0.1 \(now 0.2\)'):
        lab(*common, '--weight_decay=0.2', '--status')
    assert lab(*common, '--weight_decay=0.2', '--name=other') == 0
    assert losses(tmp_path, 'other') == {'vanilla/0': 4.0}
    # before a sweep is run for nothing
    before = calls(tmp_path)
    with pytest.raises(ConfigError, match=r'4-cpu/vanilla/seed0 .* weight_decay=0.1 \(now 0.2\)'):
        lab('4', '--arms=vanilla', '--seeds=1', '--weight_decay=0.2')
    assert calls(tmp_path) == before


def test_a_finished_sweep_of_other_settings_chooses_no_rate(lab, tmp_path):
    common = ('4', '--arms=vanilla', '--seeds=1', RATES)
    assert lab(*common) == 0
    shutil.rmtree(tmp_path / 'out/4-cpu')
    for other in ('--optimizer=adamw', '--sweep_iters=5'):
        with pytest.raises(ConfigError, match=r'4-cpu-lr/vanilla-lr0\.001/seed1000 holds a run with other'):
            lab(*common, other)


def test_an_arm_of_ones_own(lab, tmp_path):
    mine = tmp_path / 'mine.py'
    mine.write_text("attention = 'vanilla'\nqk_norm = True\n", encoding='utf-8')
    assert lab('4', str(mine), '--arms=vanilla,mine', '--learning_rate=2e-3', '--seeds=1') == 0
    runs = {r.arm: r for r in find_runs([str(tmp_path / 'out/4-cpu')])}
    assert set(runs) == {'vanilla', 'mine'}
    assert unlike(runs['mine'].config, runs['vanilla'].config) == [('qk_norm', True, False)]


def test_two_arms_that_are_one_model_are_told(lab, tmp_path, capsys):
    same = tmp_path / 'same.py'
    same.write_text("attention = 'layer0(4-4)'\nn_layer = 2\n", encoding='utf-8')  # lag 1 is layer 0 there
    other = tmp_path / 'other.py'
    other.write_text("attention = 'reflex(4-4)'\nn_layer = 2\n", encoding='utf-8')
    lab('4', str(same), str(other), '--arms=vanilla,other,same', '--learning_rate=2e-3', '--seeds=1')
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith('caution')]
    assert told == ['caution: same and other are the same model, trained alike']


def test_status_and_mistakes(lab, tmp_path, capsys):
    assert lab('4', '--status', '--seeds=2') == 0
    told = capsys.readouterr().out
    assert 'vanilla' in told and 'sweep' in told and 'seed 1' in told and calls(tmp_path) == []
    for argv, words in (
        (('4', '--arms=vanila'), "no arm 'vanila': there are vanilla, reflex_422"),
        (('1', '4'), '1 and 4 have no baseline in common'),
        (('6',), "no experiment '6': there are 1, 2, 3"),
        (('4', '--learning_rat=1'), 'learning_rate'),
        (('4', '--jobs=0'), '--jobs=0: at least 1'),
        (('4', '--sweep_seeds=0'), '--sweep_seeds=0: at least 1'),
        (('4', '--sweep_iters=-1'), '--sweep_iters=-1: at least 0'),
        (('4', '--seeds=-1'), '--seeds=-1: at least 0'),
        (('4', '--minutes=-1'), '--minutes=-1.0: at least 0'),
        (('4', '--learning_rate=0'), '--learning_rate=0: a positive number'),
        (('4', '--learning_rate=-1e-3'), '--learning_rate=-0.001: a positive number'),
        (('4', '--arms=vanilla,reflex_all,vanilla'), '--arms names vanilla 2 times'),
        (('4', '--equal=hours'), '--equal=hours: give one of steps, flops, seconds'),
        (('4', '--scale=huge'), '--scale=huge: give one of paper, cpu, short'),
        (('4', '--seed=7'), '--seed is chosen run by run'),
        (('4', '--init_from=gpt2'), '--init_from is chosen run by run'),
        ((), 'which experiment'),
    ):
        with pytest.raises(ConfigError, match=words):
            lab(*argv)
    for name in ('../x', '/x', '.', '..', 'a/b', '-x', 'a\\b'):
        with pytest.raises(FileError, match='give the plain name of a folder'):
            lab('4', f'--name={name}')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'stand_in.py']
    other = tmp_path / 'cla.py'
    other.write_text("attention = 'vanilla'\n", encoding='utf-8')
    with pytest.raises(ConfigError, match="another arm 'cla' already; rename the file"):
        lab('4', 'peers', str(other))


def test_a_config_file_alone_stands_against_vanilla(lab, tmp_path):
    plan = plan_of('config/skip_v1.py', 'config/plans/cla.py', '--scale=short')
    assert (plan.arms, plan.baseline) == (['vanilla', 'skip_v1', 'cla'], 'vanilla')
    assert plan.name == 'skip_v1-cla-short' and plan.question == 'Is skip_v1 or cla better than vanilla?'
    assert plan_of('4', 'peers', 'config/plans/cla.py', '--scale=cpu').arms.count('cla') == 1


COMMANDS = re.findall(r'^    python experiments.py (.*?) +#', experiments.__doc__, re.MULTILINE)


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_of_the_documentation_has_a_folder_of_its_own(command, tmp_path, monkeypatch, capsys):
    """On a fresh clone, which has kept results and no data: nothing is in the way of what it would run."""
    monkeypatch.chdir(experiments.ROOT)
    argv = [a for a in command.split() if a != '--status']
    if '--equal' in command:  # first those of equal steps
        with pytest.raises(ConfigError, match='there are none of vanilla'):
            experiments.main([*argv, '--status', f'--out={tmp_path}'])
        return
    assert experiments.main([*argv, '--status', f'--out={tmp_path}']) == 0
    told = capsys.readouterr().out
    first = r'round 1 of 3, \d+ arms' if argv[0] == 'search' else 'compared runs'
    assert re.search(rf'{first}: 0 of (\d+) done, \1 waiting', told)
    # by default it is out of git's sight, and no kept study is where it writes
    plan = plan_of(*argv)
    assert plan.out == experiments.ROOT / 'out/experiments'
    assert '/out/' in (experiments.ROOT / '.gitignore').read_text(encoding='utf-8').splitlines()


def test_the_program_and_its_mistakes_need_no_torch():
    code = """
import sys
sys.argv = ['experiments.py', *sys.argv[1:]]
import experiments
try:
    experiments.run_program(experiments.main)
finally:
    print('loaded:', *({'torch', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)), file=sys.stderr)
"""
    for argv in (['--help'], ['4', '--scale=cpu', '--jobs=0'], ['4'], ['7', '--scale=cpu']):
        done = subprocess.run(
            [sys.executable, '-c', code, *argv],
            capture_output=True,
            text=True,
            cwd=experiments.ROOT,
            check=False,
        )
        assert done.stderr.splitlines()[-1] == 'loaded:', done.stderr
        assert done.returncode == (0 if argv == ['--help'] else 2)
        assert len(done.stderr.splitlines()) == (1 if argv == ['--help'] else 2), 'one line'


def test_the_lowest_point_of_a_sweep():
    """Losses 4 + (ln rate - ln r)² are a parabola with its lowest point at r, whatever the three rates."""

    def swept(r, *rates):
        return {rate: 4 + math.log(rate / r) ** 2 for rate in rates}

    assert experiments.lowest(swept(0.0123, 0.005, 0.01, 0.02), 'parabola') == 0.012  # in two digits
    assert experiments.lowest(swept(0.0155, 0.005, 0.01, 0.02, 0.04), 'parabola') == 0.016
    assert experiments.lowest(swept(0.011, 0.001, 0.01, 0.02), 'parabola') == 0.011
    assert experiments.lowest(swept(0.0123, 0.005, 0.01, 0.02), 'best') == 0.01
    assert experiments.lowest(swept(0.03, 0.005, 0.01, 0.02), 'parabola') == 0.02, 'an edge is no parabola'
    assert experiments.lowest({1e-3: 5.0, 2e-3: 4.0, 4e-3: math.inf}, 'parabola') == 2e-3
    assert experiments.lowest({1e-3: 4.0, 2e-3: 4.0, 4e-3: 4.0}, 'parabola') == 1e-3
    assert experiments.lowest({1e-3: 4.1, 2e-3: 4.0, 4e-3: 4.0}, 'parabola') == 2.8e-3, 'halfway'


def test_a_rate_between_those_that_were_swept(lab, tmp_path):
    """The stand-in's loss is |ln(rate / 2e-3)| / 10: at 1.25e-3, 2.5e-3, 5e-3 it is .0470, .0223, .0916."""
    assert lab('4', '--arms=vanilla', '--seeds=1', '--rates=1.25e-3,2.5e-3,5e-3') == 0
    (run,) = find_runs([str(tmp_path / 'out/4-cpu')])
    y = [abs(math.log(rate / 2e-3)) / 10 for rate in (1.25e-3, 2.5e-3, 5e-3)]
    # on equal distances h the lowest point is h/2 · (y0 - y2) / (y0 - 2 y1 + y2) from the middle one
    wanted = 2.5e-3 * math.exp(math.log(2) / 2 * (y[0] - y[2]) / (y[0] - 2 * y[1] + y[2]))
    assert run.config['learning_rate'] == float(f'{wanted:.2g}') == 2.1e-3
    with pytest.raises(ConfigError, match=r'learning_rate=0.0021 \(now 0.0025\)'):
        lab('4', '--arms=vanilla', '--seeds=1', '--rates=1.25e-3,2.5e-3,5e-3', '--pick=best')


def test_runs_on_other_data_are_refused_before_anything_is_trained(lab, tmp_path):
    common = ('4', '--arms=vanilla', '--seeds=1', RATES)
    assert lab(*common) == 0
    (tmp_path / 'out/data.txt').write_text('e' * 64, encoding='utf-8')
    before = calls(tmp_path)
    words = (
        r'4-cpu-lr/vanilla-lr0\.001/seed1000 holds a run on other data: its tokens have the fingerprint ffff'
    )
    with pytest.raises(ConfigError, match=words):
        lab(*common)
    with pytest.raises(ConfigError, match=words):  # a sweep does not choose the rate of runs on other data
        lab('4', '--arms=vanilla', '--seeds=2', RATES)
    assert calls(tmp_path) == before
    assert lab(*common, '--name=other') == 0


def test_a_search_halves_its_arms_and_confirms_the_winner(lab, tmp_path, capsys):
    """Five arms beside vanilla: all of them for 3 steps at each rate, the best three for 6 on two seeds, the
    best two for 12; then the winner and vanilla on seeds 0 and 1. lime is second until runs are long."""
    arms = '--arms=cla,lime,reflex_521,reflex_422,value_residual'
    command = ('search', '4', 'peers', arms, '--seeds=2', '--jobs=3', '--rates=1e-3,2e-3,4e-3')
    assert lab(*command) == 0
    everything = ['cla', 'lime', 'reflex_422', 'reflex_521', 'value_residual', 'vanilla']
    assert {(name.split('/')[0]) for name in losses(tmp_path, 'search-cpu-lr')} == {
        f'{arm}-lr{rate}' for arm in everything for rate in ('0.001', '0.002', '0.004')
    }
    assert {r.config['max_iters'] for r in find_runs([str(tmp_path / 'out/search-cpu-lr')])} == {3}
    second, third = (find_runs([str(tmp_path / f'out/search-cpu-rung{n}')]) for n in (2, 3))
    best = ['cla', 'lime', 'reflex_422', 'vanilla']
    assert {(r.arm, r.seed) for r in second} == {(arm, seed) for arm in best for seed in (1000, 1001)}
    assert {(r.arm, r.seed) for r in third} == {
        (a, s) for a in ('cla', 'lime', 'vanilla') for s in (1000, 1001)
    }
    assert {r.config['max_iters'] for r in second} == {6} and {r.config['max_iters'] for r in third} == {12}
    assert set(losses(tmp_path, 'search-cpu')) == {'vanilla/0', 'vanilla/1', 'lime/0', 'lime/1'}
    told = capsys.readouterr().out
    assert 'round 3: lime 13.4050, cla 13.7050, vanilla 14.0050' in told
    assert 'round 3 of 3, 3 arms: 6 of 6 done' in told and 'compared runs: 4 of 4 done' in told
    readme = (tmp_path / 'out/search-cpu/README.md').read_text(encoding='utf-8')
    assert '- round 2: cla 13.7050, lime 13.8050' in readme and '| `reflex_521` |' in readme
    assert '\npython experiments.py search 4 peers --scale=cpu' in readme
    # again: nothing is run; and every run of it is kept
    before = len(calls(tmp_path))
    assert lab(*command) == 0 and len(calls(tmp_path)) == before == 18 + 8 + 6 + 4
    pack([tmp_path / 'out/search-cpu'], tmp_path / 'kept/s')
    names = {path.name for path in (tmp_path / 'kept').iterdir()}
    assert names == {'s.jsonl', 's-lr.jsonl', 's-rung2.jsonl', 's-rung3.jsonl', 's.md'}


def test_a_search_goes_on_where_it_was(lab, tmp_path, capsys):
    command = (
        'search',
        '4',
        'peers',
        '--arms=cla,reflex_422',
        '--seeds=1',
        '--learning_rate=2e-3',
        '--jobs=2',
    )
    (tmp_path / 'out/crash').touch()
    assert lab(*command) == 1  # all runs of the first round, of 3 steps, crash
    assert 'not done: ' in capsys.readouterr().out and len(calls(tmp_path)) == 3
    (tmp_path / 'out/crash').unlink()
    assert lab(*command, '--status') == 0
    told = capsys.readouterr().out
    assert 'round 1 of 3, 3 arms: 0 of 3 done, 3 failed' in told and 'compared' not in told
    assert lab(*command) == 0
    assert set(losses(tmp_path, 'search-cpu')) == {'vanilla/0', 'cla/0'}
    assert len(calls(tmp_path)) == 3 + 3 + 4 + 4 + 2
    for argv in (('search', '4', '--arms=vanilla,reflex_422'), ('search', '4', '--equal=flops')):
        with pytest.raises(ConfigError, match='a search is for two arms or more beside the baseline'):
            lab(*argv)
    with pytest.raises(ConfigError, match='which experiment'):
        lab('search')


def test_going_on_with_a_kept_study(lab, tmp_path, monkeypatch, capsys):
    """Unpacked, its runs count as done; packed again, the file has the old lines and the new ones."""
    common = ('4', '--arms=vanilla', RATES)
    assert lab(*common, '--seeds=2') == 0
    made, study = tmp_path / 'out/4-cpu', tmp_path / 'kept/old'
    assert compare.main([str(made), f'--pack={study}']) == 0
    assert {path.name for path in study.parent.iterdir()} == {'old.jsonl', 'old-lr.jsonl', 'old.md'}
    assert f'python compare.py {study} --baseline=vanilla' in study.with_name('old.md').read_text()
    lines = study.with_name('old.jsonl').read_text(encoding='utf-8').splitlines()
    assert len(lines) == 2
    shutil.rmtree(made)
    shutil.rmtree(tmp_path / 'out/4-cpu-lr')
    before = len(calls(tmp_path))
    assert lab(*common, '--seeds=3', f'--go_on={study}') == 0
    assert calls(tmp_path)[before:] == ['old/vanilla/seed2'], 'neither a sweep nor a finished run again'
    readme = (tmp_path / 'out/old/README.md').read_text(encoding='utf-8')
    assert '--seeds=2' in readme and '--seeds=3' in readme and '--go_on' not in readme
    capsys.readouterr()
    assert compare.main([str(tmp_path / 'out/old'), f'--pack={study}.jsonl']) == 0
    after = study.with_name('old.jsonl').read_text(encoding='utf-8').splitlines()
    assert after[:2] == lines and len(after) == 3
    with pytest.raises(RecordError, match='nowhere'):
        lab(*common, f'--go_on={tmp_path / "nowhere"}')


def test_the_same_comparison_in_wandb(tmp_path, monkeypatch):
    """Offline, and read back: an arm is a group, a run is named after its folder, steps are iterations."""
    pytest.importorskip('wandb')
    plan = plan_of('4', '--scale=cpu', '--wandb_log', '--name=mine')
    assert (
        experiments.main(['4', '--scale=cpu', '--wandb', '--name=mine', '--status', f'--out={tmp_path}']) == 0
    )
    k = plan.job(plan.tree, 'reflex_422', 3, 1e-3).knobs
    assert (k.wandb_log, k.wandb_group, k.wandb_run_name) == (
        True,
        'mine/reflex_422',
        'mine/reflex_422/seed3',
    )
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    log = metrics.Wandb(True, 'project', k.wandb_run_name, k.wandb_group, tmp_path, {'seed': 3})
    log.log({'iter': 0, 'val/loss': 5.0})
    log.log({'iter': 250, 'val/loss': 4.5})
    log.summary({'best_val_loss': 4.5})
    log.finish()
    (path,) = (tmp_path / 'wandb').rglob('*.wandb')
    command = [Path(sys.executable).with_name('wandb'), 'leet', 'inspect', '--json', path]
    told = subprocess.run(command, check=True, capture_output=True, text=True, encoding='utf-8', timeout=60)
    records = [json.loads(line) for line in told.stdout.splitlines()]
    (run,) = (r['run'] for r in records if r['type'] == 'run')
    assert (run['run_group'], run['display_name']) == ('mine/reflex_422', 'mine/reflex_422/seed3')
    assert run['config']['update']['seed'] == 3
    assert any(r['metric'].get('step_metric') == 'iter' for r in records if r['type'] == 'metric')
    rows = [r['history']['item'] for r in records if r['type'] == 'history']
    assert [(row['iter'], row['val/loss']) for row in rows] == [(0, 5.0), (250, 4.5)]
    summary = {k: v for r in records if r['type'] == 'summary' for k, v in r['summary']['update'].items()}
    assert summary['best_val_loss'] == 4.5


def test_a_real_run(tmp_path):
    """Through train.py itself: the knobs that are asked for are those that the run says it had."""
    data = tmp_path / 'data'
    data.mkdir()
    for split, n in (('train', 4000), ('val', 600)):
        np.random.default_rng(0).integers(64, size=n).astype('<u2').tofile(data / f'{split}.bin')
    command = ['4', '--scale=cpu', '--arms=reflex_422', '--learning_rate=2e-3', '--seeds=1', '--max_iters=3']
    command += [f'--dataset={data}', '--vocab_size=64', '--n_embd=32', '--block_size=16', '--eval_iters=1']
    command += [f'--out={tmp_path / "out"}', '--compile=false']
    assert experiments.main(command) == 0
    (run,) = find_runs([str(tmp_path / 'out/4-cpu')])
    assert run.finished and run.config['attention'] == 'reflex(4-2-2)' and 3 < run.val_loss < 5
    assert [e['iter'] for e in run.evals] == [0, 3]
    assert experiments.main(command) == 0, 'finished, with the settings that were asked for'
    text = compare.markdown(compare.Comparison([run]), 'x', 'y')
    assert '| reflex_422 | 1 |' in text


def test_results_do_not_change_the_commit_of_the_runs_after_them(tmp_path):
    def git(*args):
        who = ('-c', 'user.name=a', '-c', 'user.email=a@b.c')
        subprocess.run(['git', '-C', tmp_path, *who, *args], check=True, capture_output=True)

    assert metrics.commit(tmp_path / 'nowhere') == 'unknown'
    for name in ('model.py', 'results/4-cpu/README.md'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('one', encoding='utf-8')
    git('init')
    git('add', '.')
    git('commit', '-m', 'one')
    (tmp_path / 'results/4-cpu/README.md').write_text('two', encoding='utf-8')
    assert len(metrics.commit(tmp_path)) == 40
    (tmp_path / 'model.py').write_text('two', encoding='utf-8')
    assert metrics.commit(tmp_path).endswith('+changes')
