"""compare.py: statistics against hand-computed numbers, what it reads and refuses, pictures, the page."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings

import pytest

import compare
from compare import CompareError, holm, paired
from configurator import ConfigError, UserError
from runs.files import FileError
from runs.records import RecordError, find_runs

CONFIG = {
    'out_dir': 'out/x',
    'seed': 0,
    'attention': 'vanilla',
    'max_iters': 100,
    'eval_iters': 2,
    'batch_size': 4,
    'block_size': 8,
    'learning_rate': 1e-3,
    'dataset': 'stdlib',
    'compile': False,
}
RUN = {
    'commit': '0123456789abcdef0123456789abcdef01234567',
    'versions': {'torch': '2.13.0'},
    'device': {'type': 'cpu', 'name': 'a processor', 'dtype': 'bfloat16'},
    'threads': 1,
    'model': {'params': 2_000_000, 'flops_per_token': 12_000_000, 'cache_bytes_per_token': 3072},
    'data': {'fingerprint': 'f' * 64, 'tokens': {'train': 10**6, 'val': 10**5}},
    'tokens_per_step': 32,
    'status': 'finished',
    'peak_memory_bytes': 2**28,
}


def make_run(folder, loss, seed=0, speed=1000.0, mfu=None, last=100, run=(), **config):
    """A run's two files, with an evaluation every 25 steps whose losses end at `loss`."""
    folder.mkdir(parents=True)
    info = {**RUN, **dict(run), 'config': {**CONFIG, 'seed': seed, **config}}
    lines = []
    for it in range(0, last + 1, 5):
        if it:
            tokens_per_s = 1.0 if it == 5 else speed  # the first line: compilation
            record = {'iter': it, 'loss': 5.0, 'lr': 1e-3, 'tokens_per_s': tokens_per_s, 'mfu': mfu}
            lines.append({**record, 'iter': 1 if it == 5 else it})
        if it % 25 == 0:
            lines.append({'iter': it, 'train/loss': loss - 0.1, 'val/loss': loss + (100 - it) / 50})
    (folder / 'metrics.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8'
    )
    (folder / 'run.json').write_text(json.dumps(info), encoding='utf-8')
    return folder


# base losses differ from seed to seed far more than the arms do: only pairing sees the difference
BASE = [4.10, 4.30, 4.20, 4.50, 4.00]
SHIFT = [-0.03, -0.01, -0.02, -0.04, 0.00]


@pytest.fixture
def tree(tmp_path):
    """results/exp: vanilla, better (five seeds each), and worse."""
    for seed, (base, shift) in enumerate(zip(BASE, SHIFT, strict=True)):
        make_run(tmp_path / f'exp/vanilla/seed{seed}', base, seed, mfu=0.4)
        make_run(
            tmp_path / f'exp/better/seed{seed}', base + shift, seed, 900.0 + seed, 0.35, attention='better'
        )
        worse = base + 0.1 + 0.001 * seed
        make_run(tmp_path / f'exp/worse/seed{seed}', worse, seed, 2000.0, 0.8, attention='worse')
    return tmp_path / 'exp'


def report(*arguments, **options):
    """The Markdown, and the report in the page, without the pictures."""
    c = compare.Comparison(find_runs([str(a) for a in arguments]), **options)
    data = compare.page(c, 'exp', 'command').split('id="report">')[1].split('</script>')[0]
    return compare.markdown(c, 'exp', 'command'), json.loads(data)


def run_main(tmp_path, *arguments):
    compare.main([*map(str, arguments), f'--out={tmp_path / "charts"}'])
    return tmp_path / 'charts'


def test_paired_t_by_hand():
    """Differences -.03 -.01 -.02 -.04 0: mean -.02, standard deviation .0158114, standard error .00707107, so
    t = -2.828427 with 4 degrees of freedom. For 4, the distribution is algebraic:
    p = 1 - 3/4 · t/√(1 + t²/4) · (1 - t²/(1 + t²/4)/12) = 1 - .75 · 2.828427/√3 · (1 - 8/36) = .0474207,
    and the 97.5 % point is 2.776445: the interval is -.02 ± .0196324."""
    base = dict(enumerate(BASE))
    d = paired({seed: base[seed] + SHIFT[seed] for seed in base}, base)
    assert d.mean == pytest.approx(-0.02)
    assert d.p == pytest.approx(1 - 0.75 * 8**0.5 / 3**0.5 * (1 - 8 / 36), abs=1e-9)
    assert d.p == pytest.approx(0.0474207, abs=1e-6)
    assert (d.low, d.high) == (pytest.approx(-0.0396324, abs=1e-6), pytest.approx(-0.0003676, abs=1e-6))


def test_pairs_are_the_seeds_that_both_have():
    d = paired({1: 4.0, 2: 5.0, 3: 6.0}, {2: 5.5, 3: 6.7, 9: 1.0})
    assert d.seeds == [2, 3] and d.values == pytest.approx([-0.5, -0.7])
    assert paired({1: 4.0}, {2: 4.0}) is None
    one = paired({1: 4.0}, {1: 4.5})
    assert (one.mean, one.low, one.high, one.p) == (-0.5, None, None, None)
    same = paired({1: 4.0, 2: 5.0}, {1: 4.0, 2: 5.0})
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1.0)


def test_holm_by_hand():
    """Sorted: .005·4 = .02, .01·3 = .03, .03·2 = .06, .04·1 = .04, raised to the one before: .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def read_tables(text):
    """{arm: {column: cell}} of both tables of a report."""
    rows, header = {}, []
    for line in text.splitlines():
        cells = line[2:-2].split(' | ')
        if line.startswith('| arm'):
            header = cells
        elif line.startswith('| ') and not line.startswith('| ---'):
            rows.setdefault(cells[0], {}).update(zip(header, cells, strict=True))
    return rows


def test_the_table_says_what_the_files_say(tree, tmp_path):
    text, page = report(tree)
    rows = read_tables(text)
    assert list(rows) == ['vanilla', 'better', 'worse'], 'the baseline, then by loss'
    better = rows['better']
    assert better['val loss'] == '4.2000 ± 0.1823' and rows['vanilla']['val loss'] == '4.2200 ± 0.1924'
    assert better['difference to vanilla [95 % CI]'] == '−0.0200 [−0.0396, −0.0004]'
    assert better['p (Holm)'] == '0.0474', 'the larger of two p, times one'
    assert better['verdict'] == 'better' and rows['worse']['verdict'] == 'worse'
    assert better['seeds'] == '5' and better['train loss'] == '4.1000' and better['steps'] == '100'
    assert better['tokens/s'] == '902', 'the line with the compilation is no outlier of a median'
    assert better['speed / vanilla [95 % CI]'].startswith('0.902 [0.900, 0.90')
    assert rows['worse']['speed / vanilla [95 % CI]'] == '2.000 [2.000, 2.000]'
    assert rows['worse']['training time'] == '1.6 s', '100 steps of 32 tokens at 2000 a second'
    assert better['MFU'] == '35.0%' and better['peak memory'] == '256 MiB'
    assert better['parameters'] == '2.000M' and better['KV cache per token'] == '3,072 B'
    assert "better: attention='better'" in text and 'Caution' not in text
    arms = {arm['name']: arm for arm in page['arms']}
    assert [p['iter'] for p in arms['better']['points']] == [0, 25, 50, 75, 100]
    last = arms['better']['points'][-1]
    assert last['tokens'] == 3200 and last['flops'] == 3200 * 12_000_000
    assert last['seconds'] == pytest.approx(3200 / 902) and last['val'] == pytest.approx(4.2)
    assert last['difference'] == pytest.approx(-0.02) and last['low'] == pytest.approx(-0.0396, abs=1e-4)
    assert arms['better']['difference']['values'] == pytest.approx(SHIFT)


def test_noise_is_not_called_a_difference(tmp_path):
    for seed, (base, noise) in enumerate(zip(BASE, [0.01, -0.012, 0.004, -0.006, 0.001], strict=True)):
        make_run(tmp_path / f'exp/vanilla/seed{seed}', base, seed)
        make_run(tmp_path / f'exp/noise/seed{seed}', base + noise, seed, attention='noise')
    text, _ = report(tmp_path / 'exp')
    assert 'no difference shown' in text


def test_what_did_not_finish_is_told_and_not_counted(tree, tmp_path):
    make_run(tree / 'better/seed5', 1.0, 5, last=50, run={'status': 'running'}, attention='better')
    make_run(tree / 'better/seed6', 1.0, 6, last=75, run={'status': 'failed'}, attention='better')
    make_run(tree / 'better/seed7', 1.0, 7, last=75, attention='better')
    (tree / 'better/seed8').mkdir()
    (tree / 'better/seed8/run.json').write_text('{"config": ', encoding='utf-8')
    make_run(tree / 'better/seed9', float('nan'), 9, attention='better')
    (tree / 'better/seed9/metrics.jsonl').write_text(
        (tree / 'better/seed9/metrics.jsonl').read_text(encoding='utf-8').replace('NaN', 'null'),
        encoding='utf-8',
    )
    make_run(tree / 'never/seed0', 1.0, 0, last=25, run={'status': 'stopped'}, attention='never')
    text, page = report(tree)
    for told in (
        'better, seed 5: running at step 50 of 100',
        'better, seed 6: failed at step 75 of 100',
        'better, seed 7: ended without an evaluation at its last step, 100',
        'better, seed 8: its files cannot be read',
        'better, seed 9: the validation loss is not a number at step 100',
        'never, seed 0: stopped at step 25 of 100',
    ):
        assert told in text and any(told in w for w in page['warnings']), told
    assert '| better | 5 of 10 | 4.2000 ± 0.1823 |' in text
    assert '| never | 0 of 1 | – |' in text
    never = next(arm for arm in page['arms'] if arm['name'] == 'never')
    assert never['points'] == [] and len(never['unfinished'][0]['evals']) == 2, 'its curve is still drawn'


def test_other_validation_sets_are_refused(tree, tmp_path):
    make_run(tree / 'longer/seed0', 3.0, 0, eval_iters=4, attention='longer')
    with pytest.raises(CompareError, match='16 windows of 8 tokens'):
        report(tree)
    shutil.rmtree(tree / 'longer')
    other = {'data': {'fingerprint': 'e' * 64, 'tokens': {'train': 10**6, 'val': 10**5}}}
    make_run(tree / 'elsewhere/seed0', 3.0, 0, run=other, attention='elsewhere')
    with pytest.raises(CompareError, match='validation sets differ'):
        report(tree)


def test_the_whole_validation_split_is_the_same_whatever_the_block_size(tmp_path):
    make_run(tmp_path / 'exp/short/seed0', 4.0, eval_iters=0)
    make_run(tmp_path / 'exp/long/seed0', 3.9, eval_iters=0, block_size=32, run={'tokens_per_step': 128})
    make_run(tmp_path / 'exp/ample/seed0', 3.9, eval_iters=10**6)
    text, _ = report(tmp_path / 'exp', baseline='short')
    assert 'long has tokens_per_step=128, short 32' in text and 'every token' in text


def test_unequal_steps_seeds_and_machines_are_marked(tree, tmp_path):
    make_run(tree / 'short/seed0', 4.4, 0, last=50, max_iters=50, attention='short')
    device = {**RUN['device'], 'name': 'a faster processor', 'ranks': 2}
    other = {'device': device, 'threads': 2, 'commit': 'fedcba98765432'}
    make_run(tree / 'moved/seed0', 4.1, 0, run=other, attention='moved', shard=True)
    make_run(tree / 'mixed/seed0', 4.1, 0, attention='mixed')
    make_run(tree / 'mixed/seed1', 4.1, 1, attention='mixed', dropout=0.1)
    text, _ = report(tree)
    assert 'short has max_iters=50, vanilla 100' in text
    assert 'short has finished seeds 0, vanilla 0, 1, 2, 3, 4' in text
    assert 'moved ran with device a faster processor, vanilla with a processor' in text
    assert 'moved ran with threads 2' in text
    assert 'moved ran with commit fedcba9876, vanilla with 0123456789 (seeds 0): comparable only if' in text
    assert 'moved ran with ranks 2' in text
    assert 'moved ran with shard True, vanilla with False (seeds 0): their speeds cannot' in text
    assert 'mixed: its runs differ in more than the seed (seeds 0 and 1: dropout 0.0 and 0.1)' in text
    assert 'not tested' in text, 'one seed is no test'
    assert 'too few for a headline: mixed (2), moved (1), short (1)' in text


def test_a_pair_on_two_machines_is_marked_and_a_pair_that_moved_together_is_not(tree, tmp_path):
    elsewhere = {'device': {'type': 'cpu', 'name': 'a newer processor', 'dtype': 'float32'}}
    for arm, loss, moved in (('together', 4.1, (3, 4)), ('apart', 4.2, (2, 4))):
        for seed in range(5):
            make_run(tree / f'{arm}/seed{seed}', loss + seed, seed, run=elsewhere if seed in moved else {})
    text, _ = report(tree, baseline='together', chosen=['apart'])
    assert 'apart ran with device a newer processor, together with a processor (seeds 2, 3): their sp' in text
    assert 'with dtype float32, together with bfloat16 (seeds 2, 3): their losses and speeds' in text


def test_any_output_folders_compare(tmp_path):
    a = make_run(tmp_path / 'out/plain-1', 4.0, 1, out_dir='out/plain-1')
    b = make_run(tmp_path / 'out/plain-2', 4.2, 2, out_dir='out/plain-2')
    c = make_run(tmp_path / 'out/mine', 3.9, 1, attention='mine')
    text, page = report(a, b, c)
    assert [arm['name'] for arm in page['arms']] == ['plain', 'mine'], (
        'runs that differ in the seed are one arm'
    )
    assert '| plain | 2 | 4.1000 ± 0.1414 |' in text
    _, page = report(f'base={a}', f'new={c}')
    assert page['baseline'] == 'base' and [arm['name'] for arm in page['arms']] == ['base', 'new']
    with pytest.raises(RecordError, match='both seed 1'):
        report(f'x={a}', f'x={c}')
    with pytest.raises(RecordError, match='nowhere'):
        report(tmp_path / 'nowhere')
    with pytest.raises(CompareError, match="no arm 'vanila': there are plain, mine"):
        report(a, b, c, baseline='vanila')


def test_folders_named_after_what_they_hold_are_not_taken_for_seeds(tmp_path):
    for name, attention in (('vanilla', 'vanilla'), ('reflex_422', 'reflex'), ('reflex_521', '5-2-1')):
        make_run(tmp_path / name, 4.0, 1337, attention=attention)
        make_run(tmp_path / f'{name}_b2', 4.1, 2, attention=attention)
    _, page = report(*sorted(tmp_path.iterdir()))
    assert sorted(arm['name'] for arm in page['arms']) == ['reflex_422', 'reflex_521', 'vanilla']
    a, b = make_run(tmp_path / 'a2', 4.0, 2, dropout=0.1), make_run(tmp_path / 'a22', 4.0, 22, dropout=0.1)
    assert {run.arm for run in find_runs([str(a), str(b)])} == {'a2'}
    # alike in what they have in common: each keeps a name of its own
    for seed, lr in ((1, 1e-3), (2, 1e-3), (3, 1e-2), (4, 1e-2)):
        make_run(tmp_path / f'run-s{seed}', 4.0, seed, learning_rate=lr)
    text, _ = report(*sorted(tmp_path.glob('run-*')))
    assert '| run-s1 | 2 |' in text and '| run-s3 | 2 |' in text


@pytest.mark.parametrize('missing', ['tokens_per_step', 'model', 'config'])
def test_a_record_without_what_is_needed_is_told_and_not_counted(tree, missing):
    path = tree / 'worse/seed3/run.json'
    run = json.loads(path.read_text(encoding='utf-8'))
    del run[missing]
    path.write_text(json.dumps(run), encoding='utf-8')
    text, _ = report(tree)
    assert f'worse, seed 3: its files cannot be read (run.json: {missing} is missing); it does not' in text


def test_arms_of_two_experiments_are_told_apart(tmp_path):
    for experiment, loss in (('one', 4.0), ('two', 4.1)):
        make_run(tmp_path / experiment / 'vanilla/seed0', loss)
    _, page = report(tmp_path / 'one', tmp_path / 'two')
    assert [arm['name'] for arm in page['arms']] == ['one/vanilla', 'two/vanilla']


def test_a_choice_of_arms_and_a_table_in_a_document(tree, tmp_path):
    document = tmp_path / 'README.md'
    document.write_text('before\n<!-- exp -->\nold\n<!-- /exp -->\nafter\n', encoding='utf-8')
    run_main(tmp_path, tree, '--arms=worse', f'--insert={document}')
    text = document.read_text(encoding='utf-8')
    assert text.startswith('before\n<!-- exp -->\n### exp') and text.endswith('<!-- /exp -->\nafter\n')
    assert '| worse |' in text and '| vanilla |' in text and '| better |' not in text and 'old' not in text
    with pytest.raises(CompareError, match='put a line <!-- other -->'):
        run_main(tmp_path, tree, '--name=other', f'--insert={document}')


def test_names_break_neither_tables_nor_pictures(tmp_path):
    names = ['$x^2$', 'a|b', 'two\nlines', '_under', '<b>', '{x}', '%s', '$']
    arguments = []
    for i, name in enumerate(names):
        for seed in (0, 1):
            folder = make_run(tmp_path / f'r{i}-{seed}', 4 + i / 10 + seed / 100, seed, attention=f'k{i}')
            arguments.append(f'{name}={folder}')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        folder = run_main(tmp_path, *arguments, '--name=odd') / 'odd'
    shown = ['\\$x^2\\$', 'a\\|b', 'two lines', '_under', '&lt;b>', '{x}', '%s', '\\$']
    text = (folder / 'table.md').read_text(encoding='utf-8')
    rows = [re.split(r'(?<!\\)\|', line) for line in text.splitlines() if line.startswith('|')]
    assert [row[1].strip() for row in rows[2:10]] == shown and len({len(row) for row in rows[:10]}) == 1
    arms = [compare.Compared(name, []) for name in names]
    assert [compare.label_of(arm) for arm in arms[2:4]] == ['two lines', ' _under']


@pytest.mark.parametrize(
    'line',
    [
        '5',
        'null',
        '{}',
        '{"iter": 30, "val/loss": "low"}',
        '{"iter": 1e999}',
        '{"iter": 100, "val/loss": 0.1}',
    ],
)
def test_one_bad_run_takes_no_other_down(tree, tmp_path, line):
    before = read_tables(report(tree)[0])
    with open(tree / 'worse/seed3/metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(line + '\n')
    folder = run_main(tmp_path, tree) / 'exp'
    after = read_tables((folder / 'table.md').read_text(encoding='utf-8'))
    assert after['better'] == before['better'] and after['vanilla'] == before['vanilla']
    assert after['worse']['seeds'] == '4 of 5'
    _, page = report(tree)
    assert sum('worse, seed 3: ' in warning for warning in page['warnings']) == 1


def test_numbers_that_are_not_known_are_left_out(tree, tmp_path):
    """No training loss, no speed, NaN, evaluations that no two runs share: a dash, and no failure."""

    def rewrite(path, change):
        rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        path.write_text(''.join(json.dumps(change(row)) + '\n' for row in rows), encoding='utf-8')

    for path in (tree / 'better').rglob('metrics.jsonl'):
        rewrite(path, lambda row: {k: v for k, v in row.items() if k != 'train/loss'})
    for path in (tree / 'worse').rglob('metrics.jsonl'):
        rewrite(path, lambda row: {**row, 'tokens_per_s': 0.0, 'loss': float('nan')})
    for seed in (0, 1):
        make_run(tree / f'sparse/seed{seed}', 4.4, seed, attention='sparse')
    rewrite(tree / 'sparse/seed0/metrics.jsonl', lambda row: {**row, 'iter': row['iter'] * 2})
    run = json.loads((tree / 'sparse/seed0/run.json').read_text(encoding='utf-8'))
    run['config']['max_iters'] = 200
    (tree / 'sparse/seed0/run.json').write_text(json.dumps(run), encoding='utf-8')
    rewrite(tree / 'sparse/seed0/metrics.jsonl', lambda row: {**row, 'iter': row['iter'] or 1})
    for path, keep in (('seed0', (200,)), ('seed1', (100,))):
        rows = (tree / f'sparse/{path}/metrics.jsonl').read_text(encoding='utf-8').splitlines()
        rows = [r for r in rows if 'val/loss' not in r or json.loads(r)['iter'] in keep]
        (tree / f'sparse/{path}/metrics.jsonl').write_text('\n'.join(rows) + '\n', encoding='utf-8')
    folder = run_main(tmp_path, tree) / 'exp'
    rows = read_tables((folder / 'table.md').read_text(encoding='utf-8'))
    assert rows['better']['train loss'] == '–' and rows['better']['val loss'] == '4.2000 ± 0.1823'
    assert rows['worse']['tokens/s'] == '–' and rows['worse']['training time'] == '–'
    assert rows['worse']["time to vanilla's loss"] == '–'
    assert (
        rows['sparse']['val loss'] == '4.4000 ± 0.0000' and rows['sparse']["tokens to vanilla's loss"] == '–'
    )
    text, page = report(tree)
    assert 'sparse: its runs have no evaluation in common, so no curve of it is drawn' in text
    assert next(arm for arm in page['arms'] if arm['name'] == 'sparse')['points'] == []


def test_evaluation_settings_that_changed_are_told(tree):
    path = tree / 'worse/seed3/metrics.jsonl'
    rows = path.read_text(encoding='utf-8').splitlines()
    at = next(i for i, row in enumerate(rows) if '"iter": 50, "train/loss"' in row)
    rows.insert(at + 1, '{"iter": 50, "event": "eval_changed", "eval_iters": [1, 2]}')
    path.write_text('\n'.join(rows) + '\n', encoding='utf-8')
    text, page = report(tree)
    assert 'worse, seed 3: its evaluation settings changed at step 50; its curve begins there' in text
    worse = next(arm for arm in page['arms'] if arm['name'] == 'worse')
    assert [p['iter'] for p in worse['points']] == [75, 100], 'those that all its runs have'


def test_bits_per_byte_by_hand(tree):
    """4.2 nats per token of 3.2 bytes: 4.2 / (ln 2 · 3.2) = 1.8935 bits per byte."""
    for path in tree.rglob('run.json'):
        run = json.loads(path.read_text(encoding='utf-8'))
        run['data']['bytes_per_token'] = {'train': 3.0, 'val': 3.2}
        path.write_text(json.dumps(run), encoding='utf-8')
    rows = read_tables(report(tree)[0])
    assert rows['better']['bits per byte'] == f'{4.2 / (math.log(2) * 3.2):.4f}' == '1.8935'
    assert 'bits per byte' not in read_tables(report('x=' + str(make_run(tree.parent / 'y', 4.0)))[0])['x']


def test_how_much_sooner_by_hand(tree):
    """better falls by 0.02 a step and ends 0.02 below vanilla: it is at vanilla's last loss one step before
    its end, at 99 % of the tokens; at 0.902 of the speed that takes 1.10 times vanilla's time."""
    rows = read_tables(report(tree)[0])
    assert rows['better']["tokens to vanilla's loss"] == '0.99'
    assert rows['better']["time to vanilla's loss"] == '1.10'
    assert (
        rows['worse']["tokens to vanilla's loss"] == rows['worse']["time to vanilla's loss"] == 'not reached'
    )
    assert rows['vanilla']["tokens to vanilla's loss"] == '–'


def test_how_sensitive_an_arm_is_to_its_rate(tree):
    for rate, loss in ((5e-4, 4.5), (1e-3, 4.2), (2e-3, 4.3)):
        for seed, more in ((1000, 0.0), (1001, 0.1)):
            place = tree.parent / f'exp-lr/better-lr{rate:g}/seed{seed}'
            make_run(place, loss + more, seed, last=50, max_iters=50, attention='better', learning_rate=rate)
    make_run(tree.parent / 'exp-lr/worse-lr0.001/seed1000', 4.0, attention='worse')
    make_run(tree.parent / 'exp-lr/worse-lr0.002/seed1000', 4.1, attention='other', learning_rate=2e-3)
    rows = read_tables(report(tree)[0])
    # losses of make_run are those at step 100: one more at step 50, for all alike
    assert rows['better']['at half, twice the rate'] == '+0.3000, +0.1000'
    assert rows['worse']['at half, twice the rate'] == '–, –', 'a sweep of another model is none of its'
    assert rows['vanilla']['at half, twice the rate'] == '–, –'


def test_two_arms_that_are_one_model_are_told(tmp_path):
    shape = {'n_layer': 6, 'n_head': 8}
    for arm, knobs in {
        'vanilla': {'attention': 'vanilla', 'head_split': '4-2-2'},  # which says nothing there
        'same': {'attention': 'vanilla', 'learning_rate': 2e-3},
        'cla': {'attention': 'cla'},
        'dropout': {'attention': 'vanilla', 'dropout': 0.1},
    }.items():
        make_run(tmp_path / f'exp/{arm}/seed0', 4.0, **shape, **knobs)
    larger = {'model': {**RUN['model'], 'params': RUN['model']['params'] + 6}}
    make_run(tmp_path / 'exp/value_residual/seed0', 4.0, run=larger, **shape, attention='value_residual')
    _, page = report(tmp_path / 'exp')
    told = [w for w in page['warnings'] if 'same model' in w]
    assert len(told) == 1 and told[0].startswith('same and vanilla are the same model')


def test_arms_have_colours_of_their_own(tmp_path):
    for i in range(13):
        make_run(tmp_path / f'exp/arm{i}/seed0', 4 + i / 10, attention=f'k{i}')
    _, page = report(tmp_path / 'exp')
    assert len({arm['colour'] for arm in page['arms']}) == 13


def test_what_no_other_arm_beats():
    assert compare.beats((1, 4.0), (2, 4.0)) and compare.beats((1, 4.0), (1, 4.1))
    assert not compare.beats((1, 4.0), (1, 4.0)) and not compare.beats((1, 4.1), (2, 4.0))


def test_where_it_writes(tmp_path, monkeypatch, capsys):
    """Own runs out of git's sight; what is kept in results/ beside the other kept charts."""
    shutil.copy(compare.ROOT / 'compare.html', tmp_path)
    monkeypatch.setattr(compare, 'ROOT', tmp_path)
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / 'results/kept/a/seed0', 4.0)
    make_run(tmp_path / 'out/experiments/mine/a/seed0', 4.0)
    assert compare.main(['results/kept']) == 0 and compare.main(['out/experiments/mine']) == 0
    assert (tmp_path / 'charts/kept/table.md').exists()
    assert (tmp_path / 'out/charts/mine/table.md').exists() and not (tmp_path / 'charts/mine').exists()
    for name in ('../x', '/x', 'a/b', '.x'):
        with pytest.raises(FileError, match='give the plain name of a folder'):
            compare.main(['results/kept', f'--name={name}'])
    with pytest.raises(ConfigError, match='which runs'):
        compare.main([])


def test_places_that_cannot_be_written_or_read_are_one_line(tree, tmp_path):
    (tmp_path / 'file').touch()
    for argument, words in (
        (f'--out={tmp_path}/file', r'file/exp could not be written: .*; give another --out'),
        (f'--insert={tmp_path}/gone.md', r'gone\.md cannot be read .*: give a Markdown file'),
        (f'--pack={tmp_path}/file/x', 'file cannot be made'),
    ):
        out = [] if argument.startswith('--out') else [f'--out={tmp_path}/charts']
        with pytest.raises(UserError, match=words) as error:
            compare.main([str(tree), argument, *out])
        assert '\n' not in str(error.value)


def test_mistakes_need_neither_torch_nor_matplotlib(tmp_path):
    code = """
import sys
sys.argv = ['compare.py', *sys.argv[1:]]
import compare
try:
    compare.run_program(compare.main)
finally:
    print('loaded:', *({'torch', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)), file=sys.stderr)
"""
    for argv, status in ((['--help'], 0), (['--nmae=x'], 2), (['nowhere'], 2), ([], 2)):
        command = [sys.executable, '-c', code, *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=compare.ROOT, check=False)
        assert done.returncode == status and done.stderr.splitlines()[-1] == 'loaded:', done.stderr
        assert len(done.stderr.splitlines()) == 1 + bool(status), 'one line'


def test_a_reader_that_goes_away_is_no_error(tree, tmp_path):
    command = [sys.executable, 'compare.py', tree, f'--out={tmp_path}', '--name=x']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    process = subprocess.Popen(command, cwd=compare.ROOT, text=True, **pipes)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ''
    process.stderr.close()


def test_pictures_are_drawn_and_the_same_results_give_the_same_bytes(tree, tmp_path):
    make_run(tree / 'better/seed5', 4.0, 5, last=50, run={'status': 'failed'}, attention='better')
    make_run(tree / 'never/seed0', 1.0, 0, last=25, run={'status': 'stopped'}, attention='never')
    folder = run_main(tmp_path, tree) / 'exp'
    first = {path.name: path.read_bytes() for path in folder.glob('*.png')}
    assert sorted(first) == ['cost.png', 'difference.png', 'loss.png', 'pareto.png', 'speed.png']
    assert all(len(image) > 10_000 for image in first.values())
    run_main(tmp_path, tree)
    assert first == {path.name: path.read_bytes() for path in folder.glob('*.png')}


def test_pictures_of_what_there_is(tmp_path):
    """One arm, no steps logged, one evaluation: no differences, no speeds, no failure."""
    make_run(tmp_path / 'alone/seed0', 4.0, last=0, max_iters=0)
    folder = run_main(tmp_path, tmp_path / 'alone') / 'alone'
    assert sorted(path.name for path in folder.iterdir()) == [
        'cost.png',
        'index.html',
        'loss.png',
        'table.md',
    ]


def test_names_cannot_break_out_of_the_page(tmp_path):
    make_run(tmp_path / 'exp/a/seed0', 4.0)
    evil = '</script><!--<script>alert(1)</script>'
    c = compare.Comparison(find_runs([f'a={tmp_path / "exp"}', f'{evil}={make_run(tmp_path / "b", 4.0)}']))
    assert compare.page(c, 'exp', '').count('<script') == 2 and '<!--' not in compare.page(c, 'exp', '')


def test_the_page_in_a_browser(browser, tree, tmp_path):
    make_run(tree / 'better/seed5', 4.0, 5, last=50, run={'status': 'failed'}, attention='better')
    c = compare.Comparison(find_runs([str(tree)]))
    path = tmp_path / 'index.html'
    path.write_text(compare.page(c, 'exp', 'command'), encoding='utf-8')
    page = browser.new_page(viewport={'width': 1300, 'height': 2000})
    problems, requests = [], []
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.on('console', lambda message: problems.append(message.text))
    page.on('request', lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.title() == 'exp'
    assert page.locator('#table tr').count() == 4
    assert '−0.0200 [−0.0396, −0.0004]' in page.locator('#table').inner_text()
    assert 'better, seed 5: failed at step 50 of 100' in page.locator('#warnings').inner_text()
    # everything is seen at once: the tables fit, the curves are shown from their start
    fits = '[...document.querySelectorAll(".scroll")].every(box => box.scrollWidth <= box.clientWidth)'
    assert page.evaluate(fits) and page.locator('.more').count() == 0
    assert page.locator('#costs tr').count() == 4 and '3,072 B' in page.locator('#costs').inner_text()
    ticks = [float(t) for t in page.locator('#curves text[text-anchor=end]').all_text_contents()]
    assert max(ticks) >= 6, 'the loss of 6.2 at step 0'
    page.locator('#end').check()
    ticks = [float(t) for t in page.locator('#curves text[text-anchor=end]').all_text_contents()]
    assert max(ticks) <= 5.5
    page.locator('#end').uncheck()
    # curves: one line and one band per arm, the failed run dotted
    curve = page.locator('#curves path.curve[data-arm=better]')
    assert page.locator('#curves path.curve').count() == 3
    assert page.locator('#curves path.unfinished').count() == 1
    # hover near the right end: values of the last evaluation, highest first
    box = page.locator('#curves svg').bounding_box()
    page.mouse.move(box['x'] + box['width'] - 16, box['y'] + 200)
    tip = page.locator('#curves .tip').inner_text()
    assert '4.2000' in tip and '± 0.1823' in tip and '5 seeds' in tip
    assert tip.index('worse') < tip.index('vanilla') < tip.index('better')
    # click: the arm leaves all charts and comes back
    button = page.get_by_role('button', name='better')
    button.click()
    assert curve.count() == 0 and button.get_attribute('aria-pressed') == 'false'
    assert page.locator('#difference [data-arm=better]').count() == 0
    assert page.locator('#speed [data-arm=better]').count() == 0
    button.click()
    assert curve.count() == 1
    # other axes, single seeds, zoom
    seen = {curve.get_attribute('d')}
    for axis in ('tokens', 'flops', 'seconds'):
        page.select_option('#x', axis)
        seen.add(curve.get_attribute('d'))
    assert len(seen) == 2, 'the arm that is last on an axis is last on the others, but seconds are its own'
    page.select_option('#y', 'difference')
    page.mouse.move(box['x'] + box['width'] / 2, box['y'] + 200)
    assert 'minus that of vanilla' in page.locator('#curves .tip').inner_text()
    page.select_option('#y', 'val')
    page.locator('#single').check()
    assert page.locator('#curves path.seed[data-arm=worse]').count() == 5
    page.locator('#single').uncheck()
    before = curve.get_attribute('d')
    page.mouse.move(box['x'] + 700, box['y'] + 100)
    page.mouse.down()
    page.mouse.move(box['x'] + 1000, box['y'] + 150, steps=3)
    page.mouse.up()
    assert curve.get_attribute('d') != before
    # the differences tell their seeds
    page.locator('#difference svg rect').first.hover()
    assert 'seed 3' in page.locator('#difference .tip').inner_text()
    page.set_viewport_size({'width': 500, 'height': 900})
    page.wait_for_selector('.more')
    assert page.locator('.more').first.inner_text() == 'the table goes on: scroll it to the right →'
    page.wait_for_function("document.querySelector('#curves svg').getBoundingClientRect().width <= 500")
    assert problems == [] and all(url.startswith('file:') for url in requests if not url.startswith('data:'))
    page.close()
