"""The batches of training and the windows of evaluation: pure functions (files: test_data_reader.py)."""

import hashlib
import json
import os
import tracemalloc

import numpy as np
import pytest

from data.tokendata import Shards, batch_starts, eval_batch, eval_starts, get_batch, open_data
from data.tokenizer import Bytes

# ---- batches


def test_a_batch_is_a_function_of_its_arguments_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = get_batch(tokens, seed=1, step=2, micro=3, batch_size=4, block_size=16)
    np.random.seed(0)
    get_batch(tokens, 1, 7, 0, 4, 16)
    again = get_batch(tokens.copy(), 1, 2, 3, 4, 16)
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == np.int64
    assert np.array_equal(x[:, 1:], y[:, :-1]) and np.array_equal(y, x + 1)  # tokens in a row, one ahead
    assert np.array_equal(tokens, np.arange(1000))  # and no one's tokens are touched


def test_batches_are_the_same_for_ever():
    """A saved run resumes with them: another numpy or another version of this file must not change them."""
    assert batch_starts(10_000, 1337, 5, 2, 4, 64).tolist() == [5802, 4890, 334, 9024]


@pytest.mark.parametrize('name, value', [('seed', 2), ('step', 3), ('micro', 4)])
def test_seed_step_and_micro_batch_each_change_the_batch(name, value):
    arguments = {'n_tokens': 10**6, 'seed': 1, 'step': 2, 'micro': 3, 'batch_size': 8, 'block_size': 16}
    one, other = batch_starts(**arguments), batch_starts(**{**arguments, name: value})
    assert not set(one) & set(other)


@pytest.mark.parametrize('world', [1, 2, 4])
def test_any_number_of_ranks_share_the_same_total_batch(world):
    tokens, total = np.arange(5000, dtype=np.uint16), 8
    shares = [[j * world + rank for j in range(total // world)] for rank in range(world)]  # as in train.py
    rows = [get_batch(tokens, 0, 9, micro, 2, 16)[0] for share in shares for micro in share]
    alone = [get_batch(tokens, 0, 9, micro, 2, 16)[0] for micro in range(total)]
    assert sorted(np.concatenate(rows).tolist()) == sorted(np.concatenate(alone).tolist())


def test_batches_cover_the_split_evenly_and_never_leave_it():
    n, block = 40, 8
    starts = np.concatenate([batch_starts(n, 0, step, 0, 64, block) for step in range(100)])
    counts = np.bincount(starts, minlength=n - block)
    assert len(counts) == n - block  # the last window ends with the last token as its target
    expected = len(starts) / len(counts)
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 62.5  # chi-squared, 31 degrees of freedom: p = 0.0007


def test_the_shortest_split_has_one_window():
    x, y = get_batch(np.arange(9, dtype=np.uint16), 0, 0, 0, 2, 8)
    assert x.tolist() == [list(range(8))] * 2 and y.tolist() == [list(range(1, 9))] * 2


# ---- shards


def in_shards(tokens, *sizes):
    ends = np.cumsum(sizes)
    assert ends[-1] == len(tokens)
    return Shards([tokens[end - size : end] for size, end in zip(sizes, ends, strict=True)])


@pytest.mark.parametrize('sizes', [(100,), (40, 60), (1, 98, 1), (33, 33, 33, 1), (10,) * 10])
def test_shards_are_read_as_one_array(sizes):
    tokens = np.arange(100, dtype=np.uint16)
    shards = in_shards(tokens, *sizes)
    assert (len(shards), shards.dtype) == (100, np.uint16)
    for start in (None, *range(-3, 104, 7)):
        for stop in (None, *range(-105, 104, 9), 100, 101):
            part = shards[start:stop]
            assert part.dtype == np.uint16
            assert np.array_equal(part, tokens[start:stop]), (start, stop)
    assert [shards[i] for i in (0, 9, 10, 99, -1, -100)] == [0, 9, 10, 99, 99, 0]
    assert list(shards) == list(tokens)
    for i in (100, -101):
        with pytest.raises(IndexError):
            shards[i]
    with pytest.raises(ValueError, match='in steps of 2'):
        shards[::2]


@pytest.mark.parametrize('sizes', [(500, 500), (3, 990, 7), (5,) * 200])
def test_batches_do_not_depend_on_shards(sizes):
    """Shards shorter than a window too."""
    tokens = (np.arange(1000) * 7 % 501).astype(np.uint16)
    shards = in_shards(tokens, *sizes)
    for step in range(20):
        batches = zip(*(get_batch(t, 1, step, 0, 8, 16) for t in (tokens, shards)), strict=True)
        assert all(np.array_equal(one, other) for one, other in batches)
    starts, skip = eval_starts(1000, 16, 0)
    for index in range(8):
        pairs = zip(*(eval_batch(t, starts, skip, index, 8, 16) for t in (tokens, shards)), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)


def test_a_hundred_billion_tokens_take_the_memory_of_a_batch(tmp_path):
    """Starts are drawn, not shuffled: nothing is kept that grows with the data. The files are sparse."""
    size, count = 10**9, 100
    splits = {}
    for name, n in (('train', count), ('val', 2)):
        for i in range(n):
            with (tmp_path / f'{name}_{i:03d}.bin').open('wb') as file:
                file.truncate(2 * size)
        splits[name] = {'tokens': n * size, 'shards': [{'tokens': size, 'sha256': '0' * 64}] * n}
    meta = {'format': 1, 'vocab_size': 257, 'dtype': 'uint16', 'tokenizer': Bytes().spec, 'splits': splits}
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    starts = batch_starts(count * size, 1, 2, 3, 4, 64)
    assert starts.max() > 2**32
    for start in starts.tolist():
        shard, at = divmod(start, size)
        with (tmp_path / f'train_{shard:03d}.bin').open('r+b') as file:
            file.seek(2 * at)
            file.write(np.arange(1, 66, dtype=np.uint16).tobytes())
    data = open_data(tmp_path, 64, verify=False)
    tracemalloc.start()
    x, y = get_batch(data.splits['train'], 1, 2, 3, 4, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.tolist() == [list(range(1, 65))] * 4
    assert y.tolist() == [list(range(2, 66))] * 4
    assert peak < 200_000
    assert os.stat(tmp_path / 'train_000.bin').st_blocks * 512 < 10**6  # it was not filled


def test_a_run_on_shards_is_the_run_on_one_file(tmp_path, capsys):
    """Bit for bit; and eval.py reads them too."""
    import eval as evaluation
    import tiny

    one = tiny.write_tokens(tmp_path / 'one')
    meta = json.loads((one / 'meta.json').read_text(encoding='utf-8'))
    other = tmp_path / 'shards'
    other.mkdir()
    for name, split in meta['splits'].items():
        tokens, shards = np.fromfile(one / f'{name}.bin', '<u2'), []
        for i, part in enumerate(np.array_split(tokens, [10, 300, 310])):
            part.tofile(other / f'{name}_{i:03d}.bin')
            shards.append({'tokens': len(part), 'sha256': hashlib.sha256(part.tobytes()).hexdigest()})
        del split['sha256']
        split['shards'] = shards
    (other / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    losses = []
    for data in (one, other):
        assert tiny.start(tmp_path / f'run-{data.name}', data, max_iters=6) == 0
        capsys.readouterr()
        assert evaluation.main([f'--out_dir={tmp_path / f"run-{data.name}"}', '--device=cpu']) == 0
        losses.append(capsys.readouterr().out.split(': ')[1])
    assert tiny.lines(tmp_path / 'run-one') == tiny.lines(tmp_path / 'run-shards')
    assert losses[0] == losses[1]


# ---- evaluation


@pytest.mark.parametrize('n_tokens', [17, 18, 32, 33, 34, 100, 161])
@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_a_whole_evaluation_counts_every_target_once(n_tokens, batch_size):
    tokens, block = np.arange(n_tokens, dtype=np.uint16), 16
    starts, skip = eval_starts(n_tokens, block, n_windows=0)
    counted = []
    for index in range(-(-len(starts) // batch_size)):
        x, y = eval_batch(tokens, starts, skip, index, batch_size, block)
        assert x.shape == y.shape == (batch_size, block)
        assert np.array_equal(y[y != -1], x[y != -1] + 1)
        counted += y[y != -1].tolist()
    assert sorted(counted) == list(range(1, n_tokens))


def test_some_windows_are_spread_from_end_to_end_without_overlap():
    starts, skip = eval_starts(1000, 16, n_windows=10)
    assert starts[0] == 0 and starts[-1] == 1000 - 1 - 16 and not skip.any()
    assert np.diff(starts).min() >= 16 and np.ptp(np.diff(starts)) <= 1
    assert eval_starts(1000, 16, 1)[0].tolist() == [0]


def test_more_windows_than_there_are_is_the_whole_split():
    for n in (63, 64, 10_000):
        starts, skip = eval_starts(1000, 16, n)
        whole = eval_starts(1000, 16, 0)
        assert np.array_equal(starts, whole[0]) and np.array_equal(skip, whole[1])
