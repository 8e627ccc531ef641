"""experiments.py: its arms are real, its protocol is kept, nothing runs twice. A stand-in trains."""

import json
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
from configurator import ConfigError
from runs import metrics
from runs.knobs import model_config
from runs.models import MODELS

RATES = '--rates=1e-3,2e-3,4e-3'  # the stand-in is best at one of them, or at the one beyond
# Takes train.py's place: the same arguments and files, a loss that is a formula, no torch.
STAND_IN = """
import ast, json, math, signal, sys, time
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
with open(out.parents[2] / 'calls.txt', 'a', encoding='utf-8') as f:
    f.write('/'.join(out.parts[-3:]) + chr(10))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
metrics, last = out / 'metrics.jsonl', out / 'last.pt'
start = int(last.read_text()) if last.exists() else 0
kind = config['attention'] + config['head_split'] if 'head_split' in config else config['attention']
best = 8e-3 if kind == 'reflex_all' else 2e-3
rate, n, run = config['learning_rate'], config['max_iters'], dict(status='running', error=None)
diverged = config['seed'] == 7
for it in range(start, n + 1):
    if asked:
        run['status'] = 'stopped'
        break
    if diverged and it == n // 2:
        run.update(status='failed', error='TrainingError: iteration 5: loss nan; first not finite: x')
        break
    if it == 3 and (out.parents[2] / 'crash').exists():
        sys.exit('error: the disk is full')
    time.sleep(config.get('dist_timeout', 600) / 1e6)
    with open(metrics, 'a', encoding='utf-8') as f:
        speed = 2e3 if kind == 'cla' else 1e3
        f.write(json.dumps({'iter': it, 'loss': 1.0, 'tokens_per_s': speed, 'mfu': None}) + chr(10))
        if it == n:
            loss = 4 + config['seed'] / 100 + abs(math.log(rate / best)) / 10
            f.write(json.dumps({'iter': it, 'train/loss': loss, 'val/loss': loss}) + chr(10))
            run['status'] = 'finished'
    last.write_text(str(it + 1))
model = {'params': 10, 'flops_per_token': 50 if kind == 'cla' else 100, 'cache_bytes_per_token': 1}
run |= {'config': config, 'model': model, 'data': {}, 'tokens_per_step': 10}
(out / 'run.json').write_text(json.dumps(run), encoding='utf-8')
sys.exit(3 if run['status'] == 'failed' else 0)
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """lab(*arguments): experiments.py on a folder of its own, with the stand-in; returns its exit code."""
    program = tmp_path / 'stand_in.py'
    program.write_text(STAND_IN, encoding='utf-8')
    monkeypatch.setattr(experiments, 'PROGRAM', program)
    monkeypatch.setattr(experiments, 'check_data', lambda plan: None)

    def run(*arguments):
        folders = [f'--results={tmp_path / "results"}', f'--work={tmp_path / "work"}']
        return experiments.main([*arguments, '--scale=cpu', '--max_iters=12', *folders])

    return run


def calls(tmp_path):
    path = tmp_path / 'work/calls.txt'
    return path.read_text(encoding='utf-8').split() if path.exists() else []


def losses(tmp_path, tree):
    """{arm/seed: final loss} of what is in the results."""
    runs = compare.find_runs([str(tmp_path / 'results' / tree)])
    return {f'{r.arm}/{r.seed}': r.val_loss for r in runs if r.finished}


@pytest.mark.parametrize('scale', experiments.SCALES)
@pytest.mark.parametrize('name', experiments.EXPERIMENTS)
def test_every_arm_is_a_model_and_differs_from_the_others(name, scale, tmp_path):
    args = ['--results', str(tmp_path), '--work', str(tmp_path)]
    parsed = parse(name, f'--scale={scale}', *args)
    plan = experiments.Plan(parsed, [])
    knobs = [plan.job('t', arm, 0, 1e-3).knobs for arm in plan.arms]
    learned = [json.dumps(compare.what_is_learned(asdict(k)), sort_keys=True) for k in knobs]
    assert len(set(learned)) == len(plan.arms)
    for k in knobs:
        with torch.device('meta'):
            MODELS[k.model](model_config(k, 64, 64))
        assert k.eval_iters == 0 or (k.eval_iters, k.batch_size, k.block_size) == tuple(
            getattr(knobs[0], n) for n in ('eval_iters', 'batch_size', 'block_size')
        ), 'one validation set'


def parse(*argv):
    """The parsed command line, without running anything."""
    seen = []

    class Stop(Exception):
        pass

    def plan(args, extra):
        seen.append(args)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, 'Plan', plan)
        with pytest.raises(Stop):
            experiments.main(list(argv))
    return seen[0]


def test_the_published_sizes():
    plan = experiments.Plan(parse('4', '--scale=paper'), [])
    k = plan.job('t', 'reflex_422', 3, 1e-3).knobs
    assert (k.n_layer, k.n_head, k.n_embd, k.block_size, k.batch_size) == (6, 8, 768, 1024, 32)
    assert (k.max_iters, k.warmup_iters, k.learning_rate, k.min_lr, k.beta2) == (5000, 400, 1e-3, 1e-5, 0.98)
    assert (k.head_split, k.seed, k.bias, k.dropout, k.gradient_accumulation_steps) == (
        '4-2-2',
        3,
        False,
        0,
        1,
    )
    plan = experiments.Plan(parse('2', '--scale=paper'), [])
    sizes = {arm: plan.job('t', arm, 0, 1e-3).knobs for arm in plan.arms}
    assert {a: (k.n_embd, k.block_size, k.bias) for a, k in sizes.items()} == {
        'short': (512, 256, False),
        'long': (512, 1024, False),
        'long_bias': (512, 1024, True),
    }


def test_the_published_size_of_leap():
    for scale, steps, dropout, warmup in (('paper', 15000, 0.1, 0), ('cpu', 150, 0, 15)):
        plan = experiments.Plan(parse('leap', f'--scale={scale}', '--learning_rate=5e-4'), [])
        assert plan.baseline == 'vanilla' and 'leap' in plan.arms and 'leap_global' in plan.arms
        k = plan.job('t', 'leap', 0, plan.rate('leap')).knobs
        assert (k.n_layer, k.n_head, k.n_embd, k.block_size, k.batch_size) == (6, 4, 128, 2048, 2)
        assert (k.max_iters, k.dropout, k.warmup_iters, k.learning_rate) == (steps, dropout, warmup, 5e-4)
        assert (k.lr_schedule, k.min_lr, k.beta2, k.weight_decay) == ('linear', 0, 0.999, 0.01)


@pytest.mark.parametrize('text', ['1e-3,', 'a', '0,1e-3', '-1', 'nan', 'inf'])
def test_rates_are_positive_numbers(lab, text):
    with pytest.raises(ConfigError, match=f'--rates={text}: positive numbers'):
        lab('4', f'--rates={text}')


def test_a_sweep_per_arm_on_its_own_seeds_then_paired_runs(lab, tmp_path, capsys):
    assert lab('4', '--arms=vanilla,reflex_all', '--seeds=2', '--jobs=3', RATES) == 0
    swept = losses(tmp_path, '4-cpu-lr')
    # the best rate of reflex_all is 8e-3, beyond the first three: the edge is pushed out until it is none
    assert set(swept) == {
        *(f'vanilla-lr{rate}/1000' for rate in ('0.001', '0.002', '0.004')),
        *(f'reflex_all-lr{rate}/1000' for rate in ('0.001', '0.002', '0.004', '0.008', '0.016')),
    }
    runs = {(r.arm, r.seed): r for r in compare.find_runs([str(tmp_path / 'results/4-cpu')])}
    assert set(runs) == {(arm, seed) for arm in ('vanilla', 'reflex_all') for seed in (0, 1)}
    assert runs['vanilla', 0].config['learning_rate'] == 2e-3
    assert runs['reflex_all', 1].config['learning_rate'] == 8e-3
    assert runs['vanilla', 1].config['max_iters'] == 12
    sweep = compare.find_runs([str(tmp_path / 'results/4-cpu-lr')])
    assert {r.config['max_iters'] for r in sweep} == {3} and {r.seed for r in sweep} == {1000}
    # small files only, no checkpoint left behind
    names = {p.name for p in (tmp_path / 'results').rglob('*') if p.is_file()}
    assert names == {'run.json', 'metrics.jsonl', 'README.md'} and not list((tmp_path / 'work').rglob('*.pt'))
    readme = (tmp_path / 'results/4-cpu/README.md').read_text(encoding='utf-8')
    assert '| `reflex_all` |' in readme and '0.008: 14.0000' in readme
    command = (
        'python experiments.py 4 --scale=cpu --seeds=2 --jobs=3 --arms=vanilla,reflex_all '
        f'{RATES} --max_iters=12'
    )
    assert f'\n{command}\n' in readme
    assert str(tmp_path) not in readme
    told = capsys.readouterr().out
    assert 'vanilla seed1: validation loss 4.0100' in told and 'compare.py results/4-cpu' in told
    # the same command again: nothing is run
    before = len(calls(tmp_path))
    assert lab('4', '--arms=vanilla,reflex_all', '--seeds=2', '--jobs=3', RATES) == 0
    assert len(calls(tmp_path)) == before == len(set(calls(tmp_path)))
    # more seeds and more arms add to it
    assert lab('4', 'peers', '--arms=vanilla,cla', '--seeds=3', '--jobs=3', RATES) == 0
    assert len(calls(tmp_path)) == before + 1 + 3 + 3
    readme = (tmp_path / 'results/4-cpu/README.md').read_text(encoding='utf-8')
    assert (
        readme.count('python experiments.py') == 2 and '| `reflex_all` |' in readme and '| `cla` |' in readme
    )
    # nor is a sweep forgotten where the rate that it chose is given
    row = next(line for line in readme.splitlines() if line.startswith('| `vanilla` |'))
    assert '0.002: 14.0000' in row
    assert lab('4', '--arms=vanilla', '--seeds=4', '--learning_rate=2e-3') == 0
    readme = (tmp_path / 'results/4-cpu/README.md').read_text(encoding='utf-8')
    assert row in readme.splitlines() and readme.count('python experiments.py') == 3


def test_equal_seconds_and_flops_go_by_the_runs_of_equal_steps(lab, tmp_path):
    """cla, as the stand-in has it, is twice as fast and half as costly."""
    common = ('4', 'peers', '--arms=vanilla,cla', '--learning_rate=2e-3', '--seeds=2')
    with pytest.raises(ConfigError, match='none of vanilla, cla'):
        lab(*common, '--equal=seconds')
    assert lab(*common, '--jobs=4') == 0
    for equal in ('seconds', 'flops'):
        assert lab(*common, '--jobs=4', f'--equal={equal}') == 0
        runs = compare.find_runs([str(tmp_path / f'results/4-cpu-{equal}')])
        assert {(r.arm, r.config['max_iters']) for r in runs} == {('cla', 24)}


@pytest.mark.parametrize('equal', ['seconds', 'flops'])
def test_an_arm_with_larger_steps_gets_fewer_of_them(lab, tmp_path, equal):
    common = ('4', 'peers', '--arms=vanilla,cla', '--learning_rate=2e-3', '--seeds=2')
    assert lab(*common, '--jobs=4') == 0
    for path in tmp_path.glob('results/4-cpu/cla/*/run.json'):
        run = json.loads(path.read_text(encoding='utf-8'))
        run['tokens_per_step'] *= 4
        path.write_text(json.dumps(run), encoding='utf-8')
    plan = experiments.Plan(
        parse(*common, '--scale=cpu', f'--equal={equal}', f'--results={tmp_path / "results"}'), []
    )
    assert plan.equal_steps() == {'cla': 6}


def test_a_run_that_diverges_is_a_result_and_one_that_crashes_is_not(lab, tmp_path, capsys):
    common = ('4', '--arms=vanilla', '--learning_rate=2e-3', '--seeds=8', '--jobs=4')
    assert lab(*common) == 0
    assert 'vanilla seed7: ended with 3' in capsys.readouterr().out
    (run,) = (r for r in compare.find_runs([str(tmp_path / 'results/4-cpu')]) if r.seed == 7)
    assert run.state == 'failed at step 5 of 12 (TrainingError: iteration 5: loss nan)'
    before = len(calls(tmp_path))
    assert lab(*common) == 0 and len(calls(tmp_path)) == before, 'it would diverge again'
    (tmp_path / 'work/crash').touch()
    common = ('4', '--arms=reflex_422', '--learning_rate=2e-3', '--seeds=1')
    assert lab(*common) == 1
    assert 'reflex_422 seed0: ended with 1: error: the disk is full' in capsys.readouterr().out
    (tmp_path / 'work/crash').unlink()
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
    (run,) = compare.find_runs([str(tmp_path / 'results/4-cpu')])
    assert run.state.startswith('stopped at step ') and not run.finished, 'shown as what it is'
    assert lab(*slow) == 0 and losses(tmp_path, '4-cpu') == {'vanilla/0': 4.0}
    iters = [
        json.loads(line)['iter'] for line in (tmp_path / 'work/4-cpu/vanilla/seed0/metrics.jsonl').open()
    ]
    assert iters == [*range(13), 12], 'it went on where it was'


def test_a_signal_stops_it_in_good_order(tmp_path):
    (tmp_path / 'stand_in.py').write_text(STAND_IN, encoding='utf-8')
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(experiments.ROOT)!r})
import experiments
experiments.PROGRAM = Path({str(tmp_path / 'stand_in.py')!r})
experiments.check_data = lambda plan: None
sys.exit(experiments.main(sys.argv[1:]))
"""
    command = [
        sys.executable,
        '-c',
        code,
        '4',
        '--scale=cpu',
        '--arms=vanilla',
        '--learning_rate=1e-3',
        '--seeds=2',
    ]
    command += [
        '--jobs=2',
        f'--results={tmp_path / "results"}',
        f'--work={tmp_path / "work"}',
        '--dist_timeout=100000',
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding='utf-8')
    deadline = time.monotonic() + 60
    while len(list((tmp_path / 'work').rglob('last.pt'))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and 'stopped (SIGTERM); the same command goes on' in out
    runs = compare.find_runs([str(tmp_path / 'results/4-cpu')])
    assert len(runs) == 2 and all(r.state.startswith('stopped at step') for r in runs)


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
    shutil.rmtree(tmp_path / 'results/4-cpu')
    for other in ('--optimizer=adamw', '--sweep_iters=5'):
        with pytest.raises(ConfigError, match=r'4-cpu-lr/vanilla-lr0\.001/seed1000 holds a run with other'):
            lab(*common, other)


def test_an_arm_of_ones_own(lab, tmp_path):
    mine = tmp_path / 'mine.py'
    mine.write_text("attention = 'vanilla'\nqk_norm = True\n", encoding='utf-8')
    assert lab('4', str(mine), '--arms=vanilla,mine', '--learning_rate=2e-3', '--seeds=1') == 0
    runs = {r.arm: r for r in compare.find_runs([str(tmp_path / 'results/4-cpu')])}
    assert set(runs) == {'vanilla', 'mine'}
    assert compare.unlike(runs['mine'].config, runs['vanilla'].config) == [('qk_norm', True, None)]


def test_status_and_mistakes(lab, tmp_path, capsys):
    assert lab('4', '--status', '--seeds=2') == 0
    told = capsys.readouterr().out
    assert 'vanilla' in told and 'sweep' in told and 'seed 1' in told and calls(tmp_path) == []
    for argv, words in (
        (('4', '--arms=vanila'), "no arm 'vanila': there are vanilla, reflex_422"),
        (('1', '4'), '1 and 4 have no baseline in common'),
        (('6',), "no experiment '6': there are 1, 2, 3"),
        (('config/cla.py',), 'in which experiment'),
        (('4', '--learning_rat=1'), 'learning_rate'),
        (('4', '--jobs=0'), '--jobs=0: at least 1'),
        (('4', '--seed=7'), '--seed is chosen run by run'),
        (('4', '--init_from=gpt2'), '--init_from is chosen run by run'),
    ):
        with pytest.raises(ConfigError, match=words):
            lab(*argv)


def test_the_same_comparison_in_wandb(tmp_path, monkeypatch):
    """Offline, and read back: an arm is a group, a run is named after its folder, steps are iterations."""
    pytest.importorskip('wandb')
    plan = experiments.Plan(parse('4', '--scale=cpu', '--wandb', '--name=mine'), [])
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
    command += [f'--results={tmp_path / "results"}', f'--work={tmp_path / "work"}', '--compile=false']
    assert experiments.main(command) == 0
    (run,) = compare.find_runs([str(tmp_path / 'results/4-cpu')])
    assert run.finished and run.config['head_split'] == '4-2-2' and 3 < run.val_loss < 5
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
