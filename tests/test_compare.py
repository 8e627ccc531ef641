"""compare.py: statistics against hand-computed numbers, what it reads and refuses, pictures, the page."""

import json
import shutil

import pytest

import compare
from compare import CompareError, holm, paired
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


def test_the_table_says_what_the_files_say(tree, tmp_path):
    text, page = report(tree)
    header, *rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows[1:]}
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
    make_run(tree / 'moved/seed0', 4.1, 0, run=other, attention='moved')
    make_run(tree / 'mixed/seed0', 4.1, 0, attention='mixed')
    make_run(tree / 'mixed/seed1', 4.1, 1, attention='mixed', dropout=0.1)
    text, _ = report(tree)
    assert 'short has max_iters=50, vanilla 100' in text
    assert 'short has finished seeds 0, vanilla 0, 1, 2, 3, 4' in text
    assert 'moved ran with device a faster processor, vanilla with a processor' in text
    assert 'moved ran with threads 2' in text
    assert 'moved ran with commit fedcba9876, vanilla with 0123456789 (seeds 0): comparable only if' in text
    assert 'moved ran with ranks 2' in text
    assert 'mixed: its runs differ in more than the seed (seeds 0 and 1: dropout None and 0.1)' in text
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


def test_pictures_are_drawn_and_the_same_results_give_the_same_bytes(tree, tmp_path):
    make_run(tree / 'better/seed5', 4.0, 5, last=50, run={'status': 'failed'}, attention='better')
    make_run(tree / 'never/seed0', 1.0, 0, last=25, run={'status': 'stopped'}, attention='never')
    folder = run_main(tmp_path, tree) / 'exp'
    first = {path.name: path.read_bytes() for path in folder.glob('*.png')}
    assert sorted(first) == ['cost.png', 'difference.png', 'loss.png', 'speed.png']
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


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip('needs a Chromium: none of ' + ', '.join(names) + ' is here')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


def test_the_page_in_a_browser(browser, tree, tmp_path):
    make_run(tree / 'better/seed5', 4.0, 5, last=50, run={'status': 'failed'}, attention='better')
    c = compare.Comparison(find_runs([str(tree)]))
    path = tmp_path / 'index.html'
    path.write_text(compare.page(c, 'exp', 'command'), encoding='utf-8')
    page = browser.new_page(viewport={'width': 1200, 'height': 2000})
    problems, requests = [], []
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.on('console', lambda message: problems.append(message.text))
    page.on('request', lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.title() == 'exp'
    assert page.locator('#table tr').count() == 4
    assert '−0.0200 [−0.0396, −0.0004]' in page.locator('#table').inner_text()
    assert 'better, seed 5: failed at step 50 of 100' in page.locator('#warnings').inner_text()
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
    page.wait_for_function("document.querySelector('#curves svg').getBoundingClientRect().width <= 500")
    assert problems == [] and all(url.startswith('file:') for url in requests if not url.startswith('data:'))
    page.close()
