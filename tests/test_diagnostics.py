"""Generated data sets of examples: what they ask, how they are read, trained on, evaluated and compared."""

import hashlib
import json

import numpy as np
import pytest
import torch

import compare
import eval as evaluation
import tiny
from configurator import ConfigError
from data.diagnostics import prepare as diagnostics
from data.tokendata import DataError, Examples, eval_batch, eval_windows, get_batch, open_data
from runs import datasets
from runs.models import load_model
from runs.records import find_runs
from test_compare import BASE, make_run, report

SMALL = {'block_size': 64, 'n_layer': 2, 'batch_size': 8, 'dropout': 0.0, 'max_iters': 4, 'eval_iters': 2}


def make(folder, task='mqar', *options):
    diagnostics.main([task, '--examples=50', '--val_examples=20', f'--out_dir={folder}', *options])
    return folder


@pytest.fixture(scope='module')
def mqar(tmp_path_factory):
    return make(tmp_path_factory.mktemp('diagnostics') / 'mqar')


# ---- what is asked for: every answer is found again in the text of its example, by other means


def answered(task, n=200):
    """(text before an asked token, the token, its group), as text, of n examples."""
    made = diagnostics.examples(task, seed=3, split=1, n=n)
    signs = np.array([*diagnostics.SIGNS, *diagnostics.LETTERS[: diagnostics.VOCABULARY[task]]])
    for row in made.rows:
        text = ''.join(signs[row])
        assert text[0] == '\n' and '\n' not in text[1:]
        for group, places in made.asked.items():
            for place in places:
                yield text[:place], text[place], group


def test_mqar_asks_for_the_value_of_a_key_that_was_told_once_before():
    asked = list(answered('mqar'))
    assert len(asked) == 200 * 16
    for before, answer, _ in asked:
        told = before[1:33]
        keys, values = told[::2], told[1::2]
        assert len(set(keys)) == 16 and not set(keys) & set(values)
        assert values[keys.index(before[-1])] == answer
    keys_asked = {before[-1] for before, _, _ in asked[:16]}
    assert len(keys_asked) == 16  # each of them once


def test_induction_asks_for_what_followed_near_or_far():
    distances = {'near': set(), 'far': set()}
    for before, answer, group in answered('induction'):
        text, symbol = before[1:49], before[-1]
        assert len(set(text)) == 48
        at = text.index(symbol)
        assert text[at + 1] == answer
        assert before[49:-1].count(symbol) == before[49:-1].count(answer) == 0  # nothing else tells
        distances[group].add(48 - at)
    assert (min(distances['near']), max(distances['near'])) == (3, 18)
    assert (min(distances['far']), max(distances['far'])) == (19, 48)


@pytest.mark.parametrize('task, n', [('copy', 20), ('selective_copy', 16)])
def test_copies_are_of_the_symbols_without_the_fillers(task, n):
    starts, scattered = set(), 0
    for before, answer, _ in answered(task):
        field, copied = before[1:].split('|')
        text = field.replace('.', '')
        assert len(text) == n and text.startswith(copied) and text[len(copied)] == answer
        starts.add(field.index(text[0]))
        scattered += text not in field
    assert len(starts) > 10  # the place tells nothing
    assert bool(scattered) == (task == 'selective_copy')


def test_depth_asks_through_the_class_of_a_name():
    groups = {'direct': 0, 'alias': 0}
    for before, answer, group in answered('depth'):
        dictionary = dict(zip(before[1:37:2], before[2:37:2], strict=True))
        names, values = before[37:49:2], before[38:49:2]
        assert len(dictionary) == 18 and len({dictionary[name] for name in names}) == len(set(values)) == 6
        asked, told_before = before[-1], before[49:-1:2]
        by_class = dict(zip((dictionary[name] for name in names), values, strict=True))
        assert by_class[dictionary[asked]] == answer
        assert (asked in names) == (group == 'direct')
        assert asked not in told_before  # else an earlier answer would tell
        groups[group] += 1
    assert groups == {'direct': 200 * 4, 'alias': 200 * 8}


@pytest.mark.parametrize('task', diagnostics.TASKS)
def test_no_answer_is_more_likely_than_another(task):
    made = diagnostics.examples(task, seed=3, split=1, n=1000)
    for places in made.asked.values():  # one of each: the answers of an example are not independent
        _, counts = np.unique(made.rows[:, places[0]], return_counts=True)
        n, expected = len(counts) - 1, 1000 / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < n + 4 * (2 * n) ** 0.5  # chi-squared


# ---- the same for ever


def test_a_data_set_is_the_same_for_ever():
    """Kept results name its fingerprint: neither another numpy nor this file may change it unnoticed."""
    content = [diagnostics.examples(task, 0, 0, 7).rows.astype('<u2').tobytes() for task in diagnostics.TASKS]
    wanted = ['436206930c2d', '1f4cc32494d6', '325eff977de0', '00c75fe162d5', 'baa018c760c6']
    assert [hashlib.sha256(part).hexdigest()[:12] for part in content] == wanted


def test_more_examples_begin_with_the_same_ones():
    few, many = (diagnostics.examples('mqar', 0, 0, n).rows for n in (10, diagnostics.CHUNK + 10))
    assert np.array_equal(many[:10], few) and len(many) == diagnostics.CHUNK + 10
    assert not np.array_equal(many[diagnostics.CHUNK :], few)
    for seed, split in ((1, 0), (0, 1)):
        assert not np.array_equal(diagnostics.examples('mqar', seed, split, 10).rows, few)


def test_every_task_makes_a_data_set_that_opens(tmp_path, capsys):
    for task in diagnostics.TASKS:
        folder = make(tmp_path / task, task)
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        size = meta['example']['tokens']
        data = open_data(folder, size - 1)
        assert {name: len(tokens) for name, tokens in data.splits.items()} == {
            'train': 50 * size,
            'val': 20 * size,
        }
        assert all(isinstance(tokens, Examples) for tokens in data.splits.values())
    assert 'asked for in each: 4 direct, 8 alias' in capsys.readouterr().out


# ---- how they are read


def test_a_window_is_an_example_and_only_what_is_asked_for_counts(mqar):
    tokens = open_data(mqar, 64).splits['train']
    rows = tokens[:].reshape(50, 65)
    x, y = get_batch(tokens, seed=1, step=2, micro=0, batch_size=40, block_size=64)
    found = [np.flatnonzero((rows[:, :-1] == row).all(1)) for row in x]
    assert all(len(at) == 1 for at in found) and len({int(at[0]) for at in found}) > 20
    whole = rows[[at[0] for at in found], 1:].astype(np.int64)
    counts = np.zeros(64, dtype=bool)
    counts[33::2] = True  # the second half: keys and values by turns
    assert np.array_equal(y[:, counts], whole[:, counts]) and (y[:, ~counts] == -1).all()


@pytest.mark.parametrize('n_windows', [0, 20, 99])
def test_a_whole_evaluation_takes_every_example_once(mqar, n_windows):
    tokens = open_data(mqar, 64).splits['val']
    starts, skip = eval_windows(tokens, 64, n_windows)
    assert starts.tolist() == [65 * i for i in range(20)] and not skip.any()
    x, y = eval_batch(tokens, starts, skip, 2, 8, 64)
    assert np.array_equal(x[:4], tokens[:].reshape(20, 65)[16:, :-1])
    assert (y[:4] != -1).sum() == 4 * 16 and (y[4:] == -1).all()


def test_some_examples_are_spread_from_end_to_end(mqar):
    tokens = open_data(mqar, 64).splits['val']
    assert eval_windows(tokens, 64, 3)[0].tolist() == [0, 65 * 9, 65 * 19]
    assert eval_windows(tokens, 64, 1)[0].tolist() == [0]


def test_shards_of_examples_are_read_as_one_file(mqar, tmp_path):
    meta = json.loads((mqar / 'meta.json').read_text(encoding='utf-8'))
    for name, split in meta['splits'].items():
        shards = []
        for i, part in enumerate(np.array_split(np.fromfile(mqar / f'{name}.bin', '<u2'), [100, 333])):
            part.tofile(tmp_path / f'{name}_{i:03d}.bin')
            shards.append({'tokens': len(part), 'sha256': hashlib.sha256(part.tobytes()).hexdigest()})
        del split['sha256']
        split['shards'] = shards
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    one, other = (get_batch(open_data(f, 64).splits['train'], 0, 0, 0, 8, 64) for f in (mqar, tmp_path))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def changed(mqar, tmp_path, **example):
    folder = tmp_path / 'changed'
    folder.mkdir()
    for name in ('train.bin', 'val.bin'):
        (folder / name).write_bytes((mqar / name).read_bytes())
    meta = json.loads((mqar / 'meta.json').read_text(encoding='utf-8'))
    meta['example'] |= example
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return folder


@pytest.mark.parametrize(
    'example, message',
    [
        ({'tokens': 64}, '3,250 tokens, not a whole number of examples of 64'),
        ({'asked': {'a': [65]}}, 'places from 1 to 64'),
        ({'asked': {'a': [0]}}, 'of at least 1'),
        ({'asked': {'a': [4, 5], 'b': [5]}}, 'each of them once'),
        ({'asked': {}}, 'places from 1 to 64'),
        ({'asked': {'a/b': [4]}}, 'not a word'),
        ({'more': 1}, 'more is not known'),
    ],
)
def test_a_description_of_examples_that_does_not_fit_is_refused(mqar, tmp_path, example, message):
    with pytest.raises(DataError, match=message):
        open_data(changed(mqar, tmp_path, **example))


def test_another_block_size_is_refused_with_the_right_one(mqar):
    with pytest.raises(DataError, match='block_size is 32: take block_size=64'):
        open_data(mqar, 32)


def test_what_is_asked_for_is_part_of_the_fingerprint(mqar, tmp_path):
    other = changed(mqar, tmp_path, asked={'value': [34]})
    assert open_data(other).fingerprint != open_data(mqar).fingerprint


def test_a_diagnostic_is_made_when_it_is_used_first(tmp_path, monkeypatch, capfd):
    folder = datasets.data_folder('diagnostics/nothing')
    assert folder == datasets.ROOT / 'data' / 'diagnostics' / 'nothing'
    with pytest.raises(DataError, match='could not be prepared'):
        datasets.prepare_own(folder)
    assert "invalid choice: 'nothing'" in capfd.readouterr().err
    commands = []

    def run(command, check):
        commands.append(command[1:])
        return type('Done', (), {'returncode': 0})

    monkeypatch.setattr(datasets.subprocess, 'run', run)
    datasets.prepare_own(folder.with_name('no_such_copy'))
    datasets.prepare_own(tmp_path / 'mqar')
    assert commands == [[str(folder.parent / 'prepare.py'), 'no_such_copy']]


# ---- training, evaluation, comparison


def test_training_logs_the_accuracy_on_what_is_asked_for(tmp_path, capsys):
    data = make(tmp_path / 'induction', 'induction')
    assert tiny.start(tmp_path / 'run', data, **SMALL) == 0
    last = tiny.lines(tmp_path / 'run')[-1]
    model, _ = load_model(tmp_path / 'run', 'last.pt')
    rows = torch.from_numpy(open_data(data).splits['val'][:].reshape(20, 65).astype(np.int64))
    rows = rows[[i * 19 // 15 for i in range(16)]]  # two batches of eight, spread evenly
    with torch.no_grad():
        guesses = model(rows[:, :-1])[0][..., :99].argmax(-1)
    right = guesses == rows[:, 1:]
    near, far = (right[:, first::4].double().mean().item() for first in (49, 51))
    assert last['val/accuracy/near'] == pytest.approx(near)
    assert last['val/accuracy/far'] == pytest.approx(far)
    assert last['val/accuracy'] == pytest.approx((near + far) / 2)
    assert f', accuracy {last["val/accuracy"]:.1%}' in capsys.readouterr().out


def test_a_model_that_knows_the_answers_has_an_accuracy_of_one(mqar):
    """And one that knows half of them of a half; padding ids are no answers."""
    from functools import partial
    from types import SimpleNamespace

    from runs.ranks import Ranks
    from runs.step import accuracies

    rows = open_data(mqar, 64).splits['val']
    answers = {
        tuple(row[:-1].tolist()): torch.from_numpy(row[1:].astype(np.int64))
        for row in rows[:].reshape(20, 65)
    }

    class Knows(torch.nn.Module):
        known = 1.0

        def forward(self, x):
            logits = torch.zeros(*x.shape, 192)
            for row, ids in zip(logits, x.tolist(), strict=True):
                if tuple(ids) in answers:  # not a row that fills up the last batch
                    row[torch.arange(64), answers[tuple(ids)]] = 1.0
                    row[int(64 * self.known) :] = 0.0
            logits[..., 131:] = 9.0
            return logits, None

    model, k = Knows(), SimpleNamespace(block_size=64, batch_size=8, eval_iters=0)
    real = SimpleNamespace(config=SimpleNamespace(vocab_used=131))
    step = SimpleNamespace(
        sharded=False,
        k=k,
        compiled=model,
        model=real,
        group=Ranks(),
        device='cpu',
        autocast=partial(torch.autocast, 'cpu'),
    )
    assert accuracies(step, rows) == {'val/accuracy': 1.0}
    assert model.training
    model.known = 0.75  # the first half of the second half, where the questions are
    assert accuracies(step, rows) == {'val/accuracy': 0.5}
    assert accuracies(step, rows.tokens) == {}


def test_accuracy_does_not_depend_on_the_ranks(mqar, tmp_path):
    knobs = {**tiny.TINY, **SMALL, 'dataset': mqar, 'eval_iters': 0, 'max_iters': 2}
    assert tiny.start(tmp_path / 'one', mqar, **{**SMALL, 'eval_iters': 0, 'max_iters': 2}) == 0
    assert tiny.run_ranks(2, tiny.flags(tmp_path / 'two', **knobs), tmp_path) == [0, 0]
    one, two = (
        [r['val/accuracy'] for r in tiny.lines(tmp_path / name) if 'val/accuracy' in r]
        for name in ('one', 'two')
    )
    assert one == two and len(one) == 2


def test_eval_takes_examples_whole(mqar, tmp_path, capsys):
    assert tiny.start(tmp_path / 'run', mqar, **{**SMALL, 'eval_iters': 0}) == 0
    capsys.readouterr()
    assert (
        evaluation.main(
            [
                f'--out_dir={tmp_path / "run"}',
                '--checkpoint=last.pt',
                '--dtype=float32',
                '--device=cpu',
                '--batch_size=7',
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    model, _ = load_model(tmp_path / 'run', 'last.pt')
    rows = torch.from_numpy(open_data(mqar).splits['val'][:].reshape(20, 65).astype(np.int64))
    with torch.no_grad():
        logits = model(rows[:, :-1])[0][:, 33::2, :131]  # those of padding have no probability
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 34::2].flatten()).item()
    assert '320 tokens' in out and float(out.split('loss ')[1].split()[0]) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ConfigError, match='leave out window and stride'):
        evaluation.main([f'--out_dir={tmp_path / "run"}', '--device=cpu', '--stride=8'])


def with_accuracy(folder, last, **groups):
    path = folder / 'metrics.jsonl'
    records = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    for record in records:
        if 'val/loss' in record:
            done = record['iter'] / 100
            record['val/accuracy'] = done * last
            record |= {f'val/accuracy/{name}': done * value for name, value in groups.items()}
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')


def test_compare_shows_accuracies_beside_the_loss(tmp_path):
    for seed, loss in enumerate(BASE[:3]):
        with_accuracy(make_run(tmp_path / f'exp/vanilla/seed{seed}', loss, seed), 0.5 + 0.1 * seed, far=0.25)
        new = make_run(tmp_path / f'exp/new/seed{seed}', loss, seed, attention='new')
        with_accuracy(new, 0.75 + 0.1 * seed, far=0.25 + 0.01 * seed)
    make_run(tmp_path / 'exp/silent/seed0', 4.0, 0, attention='silent')
    text, _ = report(tmp_path / 'exp')
    table = [
        [cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')
    ]
    header, rows = table[0], {row[0]: row for row in table[2:5]}
    cells = {name: dict(zip(header, row, strict=True)) for name, row in rows.items()}
    assert cells['vanilla']['accuracy'] == '0.6000 ± 0.1000' and cells['new']['accuracy'] == '0.8500 ± 0.1000'
    assert cells['new']['accuracy, difference to vanilla [95 % CI]'].startswith('+0.2500 [')
    assert cells['new']['accuracy: far, difference to vanilla [95 % CI]'] == '+0.0100 [−0.0148, +0.0348]'
    assert cells['silent']['accuracy'] == '–'
    assert 'higher is better' in text
    c = compare.Comparison(find_runs([str(tmp_path / 'exp')]))
    assert [round(p['accuracy'], 3) for p in c.points['vanilla']] == [0.0, 0.15, 0.3, 0.45, 0.6]
    assert len(compare.draw_loss(c).axes) == 3


def test_where_nothing_is_asked_for_a_table_has_no_accuracy(tmp_path):
    make_run(tmp_path / 'exp/vanilla/seed0', 4.0)
    text, _ = report(tmp_path / 'exp')
    assert 'ccuracy' not in text
    assert len(compare.draw_loss(compare.Comparison(find_runs([str(tmp_path / 'exp')]))).axes) == 2
